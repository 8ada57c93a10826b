"""What may stand in a config: types, ranges and combinations, checked before anything is traced.

Rules that need the devices' kind (attention kernels), the data on disk or a checkpoint are checked where
those are opened; they raise `ConfigError` too.
"""

import importlib.util
import math
import os
import re
from typing import Any

from moe_jax.config import Config, ConfigError, DataConfig, ModelConfig, MoEConfig, SourceConfig, leaves
from moe_jax.config_blocks import (
    RETRIEVING,
    block_kinds,
    expert_shards,
    has_retrieval_blocks,
    has_routed_blocks,
    parse_inserts,
    parse_pattern,
)
from moe_jax.config_types import check_limits, validate_types

_SOURCE_NAME = re.compile(r"[\w.-]+", re.ASCII)
_STEP_RANGE = re.compile(r"(\d+):(\d+)", re.ASCII)


def validate(config: Any, device_count: int | None = None) -> None:
    """Checks every leaf's type and value, and every combination of fields.

    An int in a float field becomes a float, and a list of sources or groups a tuple; nothing else is changed.

    Args:
      config: a `moe_jax.config.Config`.
      device_count: how many devices the mesh is laid over; None: `mesh.cpu_devices` where that is set, else
        not known yet, and only what holds for any number is checked.

    Raises:
      ConfigError: one line with the field, its value, the limit and the fix.
    """
    validate_types(config)
    for path, owner, leaf in leaves(config):
        check_limits(path, getattr(owner, leaf.name), leaf.metadata)
    _check_data(config.data)
    _check_blocks(config.model)
    _check_attention(config)
    _check_feed_forward(config)
    _check_mesh(config, device_count or _emulated_devices(config) or None)
    _check_optimizer(config)
    _check_run(config)


def _emulated_devices(config: Config) -> int:
    """Devices that the config asks to emulate, over all processes that the environment announces."""
    processes = os.environ.get("NUM_PROCESSES", "1")
    return config.mesh.cpu_devices * (int(processes) if processes.isdigit() else 1)


def _must_divide(field: str, value: int, total_field: str, total: int) -> None:
    if total % value:
        limit = f"does not divide {total_field}={total}"
        raise ConfigError(field, value, limit, f"change one so that {total_field} is a multiple of {field}")


def _check_data(data: DataConfig) -> None:
    if not data.sources:
        raise ConfigError("data.sources", data.sources, "there is no source", "add a SourceConfig")
    names = [source.name for source in data.sources]
    for i, source in enumerate(data.sources):
        if names.index(source.name) != i:
            limit = f"the name of data.sources[{names.index(source.name)}] too"
            raise ConfigError(f"data.sources[{i}].name", source.name, limit, "rename one")
        _check_source(f"data.sources[{i}].", source, data.held_out_percent)
    if not any(source.weight for source in data.sources):
        raise ConfigError("data.sources[0].weight", 0.0, "all weights are 0", "give one source a weight above 0")


def _check_source(path: str, source: SourceConfig, held_out_percent: float) -> None:
    if not _SOURCE_NAME.fullmatch(source.name):
        raise ConfigError(path + "name", source.name, "not a label", "use letters, digits, '_', '-' and '.'")
    for name in ("files", "validation_files", "test_files"):
        globs = getattr(source, name)
        if globs and not all(glob.strip() for glob in globs.split(",")):
            raise ConfigError(path + name, globs, "an empty glob between commas", "remove the extra comma")
    held_out = source.validation_files, source.test_files
    if source.tfds and source.files:
        raise ConfigError(path + "files", source.files, f"excludes {path}tfds={source.tfds}", "empty one of them")
    if not source.tfds and not source.files and (source.weight or not any(held_out)):
        limit = f"the source {source.name} has no text, and neither has {path}tfds"
        raise ConfigError(path + "files", source.files, limit, "set one of them")
    if source.files and source.weight and not all(held_out) and not held_out_percent:
        empty = "test_files" if source.validation_files else "validation_files"
        limit = f"holds nothing out for {path}{empty}, which is empty"
        raise ConfigError("data.held_out_percent", held_out_percent, limit, "raise it or name the files")
    if source.installed_packages and source.tfds != "python_stdlib":
        limit = f"only for python_stdlib, not {path}tfds={source.tfds!r}"
        raise ConfigError(path + "installed_packages", True, limit, "switch it off")
    if not source.text_feature.strip():
        raise ConfigError(path + "text_feature", source.text_feature, "no name", "name the text, such as 'text'")


def _check_blocks(model: ModelConfig) -> None:
    group = len(parse_pattern(model))
    if model.layers % group:
        limit = f"not a multiple of the {group} kinds in model.pattern={model.pattern}"
        raise ConfigError("model.layers", model.layers, limit, f"use {model.layers // group * group or group}")
    parse_inserts(model)


def _check_attention(config: Config) -> None:
    model, tensor = config.model, config.mesh.tensor
    kv_heads = model.kv_heads or model.heads
    _must_divide("model.kv_heads", kv_heads, "model.heads", model.heads)
    if not model.head_width:
        _must_divide("model.heads", model.heads, "model.width", model.width)
    _must_divide("mesh.tensor", tensor, "model.heads", model.heads)
    _must_divide("mesh.tensor", tensor, "model.kv_heads", kv_heads)
    if model.positions == "rope":
        head_width = model.head_width or model.width // model.heads
        if head_width % 2:
            limit = "model.positions=rope needs an even head width"
            if not model.head_width:
                limit += f", not model.width={model.width} / model.heads={model.heads} = {head_width}"
            raise ConfigError("model.head_width", model.head_width, limit, "set an even model.head_width")
    elif model.rope_scaling != "none":
        limit = f"model.positions={model.positions} has no frequencies to stretch"
        raise ConfigError("model.rope_scaling", model.rope_scaling, limit, "use none, or model.positions=rope")
    if model.rope_scaling == "llama3":
        low, high = model.rope_low_frequency, model.rope_high_frequency
        if not 0 < low < high:
            limit = f"not between 0 and model.rope_high_frequency={high}"
            raise ConfigError("model.rope_low_frequency", low, limit, "lower it, or raise the other")
    if model.positions == "learned":
        limit = f"rows are fewer than data.sequence_length={config.data.sequence_length}"
        if model.max_positions < config.data.sequence_length:
            raise ConfigError("model.max_positions", model.max_positions, limit, "raise it, or shorten the rows")
        if config.sample.prompt and config.sample.tokens >= model.max_positions:
            limit = f"with the prompt, more than model.max_positions={model.max_positions}"
            raise ConfigError("sample.tokens", config.sample.tokens, limit, "lower it, or raise the other")
    if model.row_gradients and model.tied_embeddings:
        limit = "model.tied_embeddings=true makes the gradient of the table dense"
        raise ConfigError("model.row_gradients", True, limit, "set model.tied_embeddings=false")


def _check_feed_forward(config: Config) -> None:
    model, moe, mesh = config.model, config.model.moe, config.mesh
    _must_divide("mesh.fsdp", mesh.fsdp, "model.width", model.width)
    _must_divide("mesh.tensor", mesh.tensor, "model.ffn_width", model.ffn_width)
    if model.insert_width:
        if all(kind != "dense" for _, kind, _ in parse_inserts(model)):
            limit = f"there is no insert of kind dense in model.inserts={model.inserts!r}"
            raise ConfigError("model.insert_width", model.insert_width, limit, "use 0, or add one")
        _must_divide("mesh.tensor", mesh.tensor, "model.insert_width", model.insert_width)
    if has_retrieval_blocks(model):
        _check_retrieval(config)
    if has_routed_blocks(model):
        _check_router(config)
        if moe.eval_capacity and moe.capacity_priority != "token":
            limit = f"not causal, in evaluation with model.moe.eval_capacity={moe.eval_capacity}"
            fix = "use token, or model.moe.eval_capacity=0"
            raise ConfigError("model.moe.capacity_priority", moe.capacity_priority, limit, fix)
        if 0 < moe.exchange_buffer < 1:
            limit = "less than an even load needs, so that every call would take gather"
            fix = "use 1 or more, or 0 for a buffer that holds everything"
            raise ConfigError("model.moe.exchange_buffer", moe.exchange_buffer, limit, fix)
        if moe.backend == "tokamax" and importlib.util.find_spec("tokamax") is None:
            raise ConfigError("model.moe.backend", "tokamax", "a package that is missing", "pip install tokamax")
        _must_divide("mesh.expert", mesh.expert, "model.moe.experts", moe.experts)
        if moe.expert_width:
            _must_divide("mesh.tensor", mesh.tensor, "model.moe.expert_width", moe.expert_width)


def _check_retrieval(config: Config) -> None:
    peer, mesh, path = config.model.peer, config.mesh, "model.peer."
    side = math.isqrt(peer.experts)
    if side * side != peer.experts:
        near = f"use {side**2} or {(side + 1) ** 2}"
        raise ConfigError(path + "experts", peer.experts, "not a square, which two sets of keys need", near)
    if peer.top_k > side:
        limit = f"more than the {side} keys of a half, the root of {path}experts={peer.experts}"
        raise ConfigError(path + "top_k", peer.top_k, limit, f"use {side} or less, or more experts")
    if peer.key_width % 2:
        limit = "odd, but each half of a query meets keys of its own"
        raise ConfigError(path + "key_width", peer.key_width, limit, f"use {peer.key_width + 1}")
    field = "model.width" if peer.split == "width" else path + "experts"
    total = config.model.width if peer.split == "width" else peer.experts
    _must_divide("mesh.expert", mesh.expert, field, total)
    width = config.model.width // (mesh.expert if peer.split == "width" else 1)
    if peer.backend == "mosaic" and width % 128:
        limit = f"{width} values of an expert's row on a device, and its copies are multiples of 128"
        raise ConfigError(path + "backend", peer.backend, limit, f"use {path}backend=auto, or another model.width")
    if peer.shared_width:
        _must_divide("mesh.tensor", mesh.tensor, path + "shared_width", peer.shared_width)
    if peer.top_k == 1:
        limit = "the softmax over one score is 1, so that the router gets no gradient"
        raise ConfigError(path + "top_k", 1, limit, "use 2 or more")
    kinds = [kind for kind in block_kinds(config.model) if kind in RETRIEVING]
    layers = len(kinds)
    if layers * peer.experts >= 2**31:
        limit = f"with {layers} such blocks {layers * peer.experts} ids, which do not fit into int32"
        raise ConfigError(path + "experts", peer.experts, limit, "use fewer experts or blocks")
    pairs = config.data.batch_size * config.data.sequence_length * peer.heads * peer.top_k * layers
    if pairs >= 2**31:
        limit = f"{pairs} pairs of a token and an expert in a step, which int32 cannot count"
        raise ConfigError(path + "heads", peer.heads, limit, "use fewer heads, a smaller top_k or a smaller batch")
    if peer.row_gradients and config.optimizer.ema_decay:
        limit = f"an average of all of the pool, with {path}row_gradients=true"
        raise ConfigError("optimizer.ema_decay", config.optimizer.ema_decay, limit, f"use 0, or {path}row_gradients=false")
    if peer.share_pool and len(set(kinds)) > 1:
        limit = "neurons of peer blocks and values of pkm blocks have other shapes"
        raise ConfigError(path + "share_pool", True, limit, "use blocks of one of the two kinds")


def _check_router(config: Config) -> None:
    moe, traits = config.model.moe, config.model.moe.options.traits
    router = f"model.moe.router={moe.router}"
    if moe.top_k > moe.experts + moe.virtual_experts:
        limit = f"at most model.moe.experts={moe.experts}"
        if moe.virtual_experts:
            limit += f" and {moe.virtual_experts} zero, copy and constant experts"
        raise ConfigError("model.moe.top_k", moe.top_k, limit, "lower top_k or raise experts")
    if traits.top_k and moe.top_k not in traits.top_k:
        known = " or ".join(map(str, traits.top_k))
        raise ConfigError("model.moe.top_k", moe.top_k, f"{router} knows {known} only", f"use {known}")
    for name in ("zero_experts", "copy_experts", "constant_experts"):
        if getattr(moe, name) and not traits.virtual:
            limit = f"{router} chooses among real experts only"
            raise ConfigError(f"model.moe.{name}", getattr(moe, name), limit, "use 0, or another router")
    if not traits.causal and not moe.allow_noncausal:
        limit = "looks at later tokens, in evaluation of a causal model too"
        fix = "use another router, or model.moe.allow_noncausal=true to accept figures that this makes too good"
        raise ConfigError("model.moe.router", moe.router, limit, fix)
    later = ""
    if moe.router == "expert_choice" and moe.routers.expert_choice.evaluation == "tokens":
        later = " in training; evaluation by tokens is dropless with the default exchange"
    defaults = {"exchange": "auto", "backend": "auto", "capacity_priority": "token"}
    for name, default in defaults.items() if not traits.exchange else ():
        if getattr(moe, name) != default:
            limit = f"without effect on {router}" + (later or ", whose slots the compiler moves")
            raise ConfigError(f"model.moe.{name}", getattr(moe, name), limit, f"use {default}")
    if not traits.causal and config.sample.prompt:
        limit = f"{router} looks at later tokens, which there are none of while text is generated"
        raise ConfigError("sample.prompt", config.sample.prompt, limit, "empty it")
    if not traits.capacity:
        if moe.execution == "capacity":
            limit = f"{router} is balanced without a limit"
            raise ConfigError("model.moe.execution", moe.execution, limit, "use dropless")
        if moe.eval_capacity:
            limit = f"{router} has no use for it{later}"
            raise ConfigError("model.moe.eval_capacity", moe.eval_capacity, limit, "use 0")
    if moe.shared_gate and not moe.shared_experts:
        raise ConfigError("model.moe.shared_gate", True, "model.moe.shared_experts=0", "raise it, or switch the gate off")
    if moe.router == "top_k":
        _check_top_k(moe)
    if moe.router == "remoe":
        low, high = moe.top_k, moe.experts
        if moe.routers.remoe.max_k and not low <= moe.routers.remoe.max_k <= high:
            limit = f"not from model.moe.top_k={low} to model.moe.experts={high}"
            raise ConfigError("model.moe.routers.remoe.max_k", moe.routers.remoe.max_k, limit, "use 0 for all")
    if moe.router == "base":
        tokens = config.data.batch_size // config.train.microbatches * config.data.sequence_length
        if tokens % moe.routers.base.groups:
            limit = f"does not divide the {tokens} tokens of a microbatch"
            raise ConfigError("model.moe.routers.base.groups", moe.routers.base.groups, limit, "use a divisor")


def _check_top_k(moe: MoEConfig) -> None:
    path, o = "model.moe.routers.top_k.", moe.routers.top_k
    columns = moe.experts + moe.virtual_experts
    if moe.top_k == 1 and (o.renormalise == "always" or o.order == "top_k_first"):
        name, value = ("renormalise", o.renormalise) if o.renormalise == "always" else ("order", o.order)
        limit = "with model.moe.top_k=1 every gate is 1 and the router gets no gradient"
        raise ConfigError(path + name, value, limit, "use auto" if name == "renormalise" else "use score_first")
    if o.order == "top_k_first" and o.score != "softmax":
        limit = f"the softmax over the chosen, not {path}score={o.score}"
        raise ConfigError(path + "order", o.order, limit, "use score_first")
    if columns % o.groups:
        raise ConfigError(path + "groups", o.groups, f"does not divide the {columns} experts", "use a divisor")
    if o.kept_groups > o.groups:
        raise ConfigError(path + "kept_groups", o.kept_groups, f"more than {path}groups={o.groups}", "lower it")
    if moe.top_k > columns // o.groups * o.kept_groups:
        limit = f"fewer than model.moe.top_k={moe.top_k} experts in {o.kept_groups} of {o.groups} groups"
        raise ConfigError(path + "kept_groups", o.kept_groups, limit, "raise it")
    if o.zero_sum_bias and not o.bias_rate:
        raise ConfigError(path + "zero_sum_bias", True, f"{path}bias_rate=0", "raise it, or switch this off")


def _check_mesh(config: Config, device_count: int | None) -> None:
    mesh, train = config.mesh, config.train
    if mesh.data == 0:
        raise ConfigError("mesh.data", 0, "no copy of the model", "use -1 for what the other axes leave, or 1 or more")
    others = mesh.fsdp * mesh.expert * mesh.tensor
    axes = f"fsdp={mesh.fsdp} * expert={mesh.expert} * tensor={mesh.tensor}"
    data = mesh.data
    if device_count is not None:
        if data == -1:
            if device_count % others:
                limit = f"{axes} = {others} does not divide the {device_count} devices"
                raise ConfigError("mesh.data", -1, limit, "change an axis so that the product does")
            data = device_count // others
        elif data * others != device_count:
            limit = f"data={data} * {axes} = {data * others}, but there are {device_count} devices"
            raise ConfigError("mesh.data", data, limit, "change an axis, or use mesh.data=-1")
    shards = max(data, 1) * mesh.fsdp * mesh.expert
    parts = train.microbatches * shards
    if config.data.batch_size % parts:
        limit = f"not a multiple of train.microbatches={train.microbatches} * {shards} shards = {parts}"
        near = max(config.data.batch_size // parts, 1) * parts
        raise ConfigError("data.batch_size", config.data.batch_size, limit, f"use {near}, or change the other two")


def _check_optimizer(config: Config) -> None:
    optimizer = config.optimizer
    if optimizer.warmup_steps > config.train.steps:
        limit = f"more than train.steps={config.train.steps}"
        raise ConfigError("optimizer.warmup_steps", optimizer.warmup_steps, limit, "lower it, or train longer")
    for i, group in enumerate(optimizer.groups):
        path = f"optimizer.groups[{i}]."
        if not group.path:
            raise ConfigError(path + "path", "", "matches every parameter", "write '.' if all are meant")
        try:
            re.compile(group.path)
        except re.error as error:
            limit = f"not a regular expression ({error})"
            raise ConfigError(path + "path", group.path, limit, "escape special characters with \\") from None
        if -1 < group.weight_decay < 0:
            raise ConfigError(path + "weight_decay", group.weight_decay, "negative", "use 0 or more, or -1")


def _check_run(config: Config) -> None:
    train, init = config.train, config.init
    if train.profile_steps:
        match = _STEP_RANGE.fullmatch(train.profile_steps)
        first, end = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= first < end <= train.steps + 1:
            limit = f"not a range 'first:end' with 1 <= first < end <= train.steps + 1 = {train.steps + 1}"
            raise ConfigError("train.profile_steps", train.profile_steps, limit, "write one such as 10:13")
    if init.upcycle_from:
        _check_upcycle(config)
    if init.include and not init.checkpoint:
        raise ConfigError("init.include", init.include, "init.checkpoint is empty", "name a checkpoint, or empty it")
    if init.include and not all(prefix.strip() for prefix in init.include.split(",")):
        raise ConfigError("init.include", init.include, "an empty prefix between commas", "remove the extra comma")


def _check_upcycle(config: Config) -> None:
    init, moe = config.init, config.model.moe
    for name in ("checkpoint", "include"):
        if value := getattr(init, name):
            limit = f"excludes init.upcycle_from={init.upcycle_from}"
            raise ConfigError(f"init.{name}", value, limit, "empty one of them")
    if not has_routed_blocks(config.model):
        limit = f"there are no experts in model.pattern={config.model.pattern}"
        raise ConfigError("init.upcycle_from", init.upcycle_from, limit, "add routed blocks, or use init.checkpoint")
    if has_retrieval_blocks(config.model):
        limit = "retrieved experts have no counterpart in a dense layer"
        raise ConfigError("init.upcycle_from", init.upcycle_from, limit, "use dense and routed blocks alone")
    width, kinds = config.model.insert_width, [kind for _, kind, _ in parse_inserts(config.model)]
    if "routed" in kinds and width not in (0, config.model.ffn_width):
        limit = f"experts of an upcycled insert have model.ffn_width={config.model.ffn_width}"
        raise ConfigError("model.insert_width", width, limit, "use 0")
    shards = expert_shards(config.model)
    for name in ("experts", "top_k"):
        value = getattr(moe, name)
        if value % shards:
            limit = f"not a multiple of model.ffn_width / model.moe.expert_width = {shards}, the shards of a dense layer"
            fix = f"use {-(-value // shards) * shards}, or another expert_width"
            raise ConfigError(f"model.moe.{name}", value, limit, fix)
