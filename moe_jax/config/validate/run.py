"""Mesh, optimizer, start and loop of a run."""

import re

from moe_jax.config.blocks import RETRIEVING, block_layers, distinct_layers, expert_shards, options_path, parse_inserts
from moe_jax.config.leaf import ConfigError
from moe_jax.config.model import FFNConfig, ModelConfig
from moe_jax.config.run import Config
from moe_jax.config.train import kept_steps

_STEP_RANGE = re.compile(r"(\d+):(\d+)", re.ASCII)


def check_curriculum(config: Config) -> None:
    layers = [ffn for ffn in distinct_layers(config.model, "routed") if ffn.moe.options.varies(ffn.moe)]
    if config.data.curriculum != "none" and not layers:
        limit = "no router of the model decides how many experts a token takes, so that all rows are alike"
        raise ConfigError("data.curriculum", config.data.curriculum, limit, "use none, or a router such as adaptive")


def check_mesh(config: Config, device_count: int | None) -> None:
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


def check_optimizer(config: Config) -> None:
    optimizer = config.optimizer
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


def check_run(config: Config) -> None:
    train, init = config.train, config.init
    if train.profile_steps:
        match = _STEP_RANGE.fullmatch(train.profile_steps)
        first, end = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= first < end <= train.steps + 1:
            limit = f"not a range 'first:end' with 1 <= first < end <= train.steps + 1 = {train.steps + 1}"
            raise ConfigError("train.profile_steps", train.profile_steps, limit, "write one such as 10:13")
    kept_steps(train)
    if init.upcycle_from:
        _check_upcycle(config)
    if init.branch_from:
        _check_branch(config)
    elif init.branch_step:
        raise ConfigError("init.branch_step", init.branch_step, "init.branch_from is empty", "name a run, or use 0")
    if init.include and not init.checkpoint:
        raise ConfigError("init.include", init.include, "init.checkpoint is empty", "name a checkpoint, or empty it")
    if init.include and not all(prefix.strip() for prefix in init.include.split(",")):
        raise ConfigError("init.include", init.include, "an empty prefix between commas", "remove the extra comma")


def _check_branch(config: Config) -> None:
    init, steps = config.init, config.train.steps
    for name in ("checkpoint", "upcycle_from", "include"):
        if value := getattr(init, name):
            raise ConfigError(f"init.{name}", value, f"excludes init.branch_from={init.branch_from}", "empty one of them")
    if init.branch_step >= steps:
        limit = f"no step is left of train.steps={steps}, which counts from the first step of the other run"
        raise ConfigError("init.branch_step", init.branch_step, limit, "raise train.steps, or name an earlier step")


def _check_upcycle(config: Config) -> None:
    init, model = config.init, config.model
    for name in ("checkpoint", "include"):
        if value := getattr(init, name):
            limit = f"excludes init.upcycle_from={init.upcycle_from}"
            raise ConfigError(f"init.{name}", value, limit, "empty one of them")
    if not block_layers(model, "routed"):
        limit = f"there are no experts in model.pattern={model.pattern}"
        raise ConfigError("init.upcycle_from", init.upcycle_from, limit, "add routed blocks, or use init.checkpoint")
    if block_layers(model, *RETRIEVING):
        limit = "retrieved experts have no counterpart in a dense layer"
        raise ConfigError("init.upcycle_from", init.upcycle_from, limit, "use dense and routed blocks alone")
    width, kinds = model.insert_width, [insert.ffn.kind for insert in parse_inserts(model)]
    if "routed" in kinds and width not in (0, model.ffn_width):
        limit = f"experts of an upcycled insert have model.ffn_width={model.ffn_width}"
        raise ConfigError("model.insert_width", width, limit, "use 0")
    for ffn in distinct_layers(model):
        path = options_path(model, ffn)
        if not (ffn.attention and ffn.norm):
            name = "attention" if not ffn.attention else "norm"
            limit = f"init.upcycle_from={init.upcycle_from}, whose blocks have it"
            raise ConfigError(path + name, False, limit, "leave the layer out, or use init.checkpoint")
        if ffn.kind == "routed":
            _check_shards(model, ffn, path + "moe.")


def _check_shards(model: ModelConfig, ffn: FFNConfig, path: str) -> None:
    shards = expert_shards(model, ffn)
    for name in ("experts", "top_k"):
        value = getattr(ffn.moe, name)
        if value % shards:
            limit = f"not a multiple of model.ffn_width / {path}expert_width = {shards}, the shards of a dense layer"
            fix = f"use {-(-value // shards) * shards}, or another expert_width"
            raise ConfigError(path + name, value, limit, fix)
