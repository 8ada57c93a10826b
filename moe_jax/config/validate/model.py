"""Blocks, attention and feed-forward layers."""

import importlib.util

from moe_jax.config.blocks import has_retrieval_blocks, has_routed_blocks, parse_inserts, parse_pattern
from moe_jax.config.leaf import ConfigError
from moe_jax.config.model import ModelConfig
from moe_jax.config.run import Config
from moe_jax.config.validate.common import must_divide
from moe_jax.config.validate.retrieval import check_retrieval
from moe_jax.config.validate.routing import check_router


def check_blocks(model: ModelConfig) -> None:
    group = len(parse_pattern(model))
    if model.layers % group:
        limit = f"not a multiple of the {group} kinds in model.pattern={model.pattern}"
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
    model, moe, mesh = config.model, config.model.moe, config.mesh
    must_divide("mesh.fsdp", mesh.fsdp, "model.width", model.width)
    must_divide("mesh.tensor", mesh.tensor, "model.ffn_width", model.ffn_width)
    if model.insert_width:
        if all(kind != "dense" for _, kind, _ in parse_inserts(model)):
            limit = f"there is no insert of kind dense in model.inserts={model.inserts!r}"
            raise ConfigError("model.insert_width", model.insert_width, limit, "use 0, or add one")
        must_divide("mesh.tensor", mesh.tensor, "model.insert_width", model.insert_width)
    if has_retrieval_blocks(model):
        check_retrieval(config)
    if has_routed_blocks(model):
        check_router(config)
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
        must_divide("mesh.expert", mesh.expert, "model.moe.experts", moe.experts)
        if moe.expert_width:
            must_divide("mesh.tensor", mesh.tensor, "model.moe.expert_width", moe.expert_width)
