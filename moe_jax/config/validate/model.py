"""Blocks, attention and feed-forward layers."""

import importlib.util
import re

from moe_jax.config.blocks import BUILT_IN, RETRIEVING, distinct_layers, options_path, parse_inserts, parse_pattern
from moe_jax.config.leaf import ConfigError
from moe_jax.config.model import ModelConfig
from moe_jax.config.moe import MoEConfig
from moe_jax.config.run import Config
from moe_jax.config.validate.common import check_exchange_buffer, must_divide
from moe_jax.config.validate.retrieval import check_retrieval
from moe_jax.config.validate.routing import check_router

_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def check_blocks(model: ModelConfig) -> None:
    names = [ffn.name for ffn in model.ffns]
    for i, ffn in enumerate(model.ffns):
        path = f"model.ffns[{i}]."
        if not _NAME.fullmatch(ffn.name):
            raise ConfigError(path + "name", ffn.name, "not a name", "use letters, digits and '_'")
        if ffn.name in BUILT_IN or names.index(ffn.name) != i:
            raise ConfigError(path + "name", ffn.name, "the name of another feed-forward layer", "use another")
        if ffn.width and ffn.kind != "dense":
            limit = f"without effect on {path}kind={ffn.kind}"
            fix = f"use 0, and {path}moe.expert_width" if ffn.kind == "routed" else "use 0"
            raise ConfigError(path + "width", ffn.width, limit, fix)
    group = len(parse_pattern(model))
    if model.layers % group:
        limit = f"not a multiple of the {group} layers in model.pattern={model.pattern}"
        raise ConfigError("model.layers", model.layers, limit, f"use {model.layers // group * group or group}")
    parse_inserts(model)


def check_attention(config: Config) -> None:
    model, tensor = config.model, config.mesh.tensor
    kv_heads = model.kv_heads or model.heads
    must_divide("model.kv_heads", kv_heads, "model.heads", model.heads)
    if not model.head_width:
        must_divide("model.heads", model.heads, "model.width", model.width)
    must_divide("mesh.tensor", tensor, "model.heads", model.heads)
    must_divide("mesh.tensor", tensor, "model.kv_heads", kv_heads)
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


def check_feed_forward(config: Config) -> None:
    model, mesh = config.model, config.mesh
    must_divide("mesh.fsdp", mesh.fsdp, "model.width", model.width)
    must_divide("mesh.tensor", mesh.tensor, "model.ffn_width", model.ffn_width)
    if model.insert_width:
        if all(insert.ffn.name != "dense" for insert in parse_inserts(model)):
            limit = f"there is no insert of the layer dense in model.inserts={model.inserts!r}"
            raise ConfigError("model.insert_width", model.insert_width, limit, "use 0, or add one")
        must_divide("mesh.tensor", mesh.tensor, "model.insert_width", model.insert_width)
    for ffn in distinct_layers(model):
        path = options_path(model, ffn)
        if ffn.kind == "dense" and ffn.name not in BUILT_IN:
            must_divide("mesh.tensor", mesh.tensor, path + "width", ffn.width)
        elif ffn.kind == "routed":
            check_router(config, ffn.moe, path + "moe.")
            _check_experts(config, ffn.moe, path + "moe.")
        elif ffn.kind in RETRIEVING:
            check_retrieval(config, ffn, path + "peer.")
    if model.peer.share_pool and {"peer", "pkm"} <= {ffn.name for ffn in distinct_layers(model)}:
        limit = "neurons of peer blocks and values of pkm blocks have other shapes"
        raise ConfigError("model.peer.share_pool", True, limit, "use blocks of one of the two kinds")


def _check_experts(config: Config, moe: MoEConfig, path: str) -> None:
    mesh = config.mesh
    if moe.eval_capacity and moe.capacity_priority != "token":
        limit = f"not causal, in evaluation with {path}eval_capacity={moe.eval_capacity}"
        fix = f"use token, or {path}eval_capacity=0"
        raise ConfigError(path + "capacity_priority", moe.capacity_priority, limit, fix)
    if moe.renormalise_kept and moe.execution != "capacity" and not moe.eval_capacity:
        limit = f"nothing is dropped with {path}execution=dropless and {path}eval_capacity=0"
        raise ConfigError(path + "renormalise_kept", True, limit, f"use false, or {path}execution=capacity")
    check_exchange_buffer(path + "exchange_buffer", moe.exchange_buffer)
    if moe.backend == "tokamax" and importlib.util.find_spec("tokamax") is None:
        raise ConfigError(path + "backend", "tokamax", "a package that is missing", "pip install tokamax")
    must_divide("mesh.expert", mesh.expert, path + "experts", moe.experts)
    if moe.expert_width:
        must_divide("mesh.tensor", mesh.tensor, path + "expert_width", moe.expert_width)
