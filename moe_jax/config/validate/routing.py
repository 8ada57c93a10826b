"""Routers."""

from moe_jax.config.leaf import ConfigError
from moe_jax.config.moe import MoEConfig
from moe_jax.config.run import Config


def check_router(config: Config, moe: MoEConfig, path: str) -> None:
    """That a routed layer's options, at the dotted path `path`, fit together."""
    traits, router = moe.options.traits, f"{path}router={moe.router}"
    if moe.top_k > moe.experts + moe.virtual_experts:
        limit = f"at most {path}experts={moe.experts}"
        if moe.virtual_experts:
            limit += f" and {moe.virtual_experts} zero, copy and constant experts"
        raise ConfigError(path + "top_k", moe.top_k, limit, "lower top_k or raise experts")
    if traits.top_k and moe.top_k not in traits.top_k:
        known = " or ".join(map(str, traits.top_k))
        raise ConfigError(path + "top_k", moe.top_k, f"{router} knows {known} only", f"use {known}")
    for name in ("zero_experts", "copy_experts", "constant_experts"):
        if getattr(moe, name) and not traits.virtual:
            limit = f"{router} chooses among real experts only"
            raise ConfigError(path + name, getattr(moe, name), limit, "use 0, or another router")
    if not traits.causal and not moe.allow_noncausal:
        limit = "looks at later tokens, in evaluation of a causal model too"
        fix = f"use another router, or {path}allow_noncausal=true to accept figures that this makes too good"
        raise ConfigError(path + "router", moe.router, limit, fix)
    defaults = {"exchange": "auto", "backend": "auto", "capacity_priority": "token"}
    for name, default in defaults.items() if not traits.exchange else ():
        if getattr(moe, name) != default:
            limit = f"without effect on {router}" + (traits.except_in or ", whose slots the compiler moves")
            raise ConfigError(path + name, getattr(moe, name), limit, f"use {default}")
    if not traits.causal and config.sample.prompt:
        limit = f"{router} looks at later tokens, which there are none of while text is generated"
        raise ConfigError("sample.prompt", config.sample.prompt, limit, "empty it")
    if not traits.capacity:
        if moe.execution == "capacity":
            limit = f"{router} is balanced without a limit"
            raise ConfigError(path + "execution", moe.execution, limit, "use dropless")
        if moe.eval_capacity:
            limit = f"{router} has no use for it{traits.except_in}"
            raise ConfigError(path + "eval_capacity", moe.eval_capacity, limit, "use 0")
    if moe.shared_gate and not moe.shared_experts:
        raise ConfigError(path + "shared_gate", True, f"{path}shared_experts=0", "raise it, or switch the gate off")
    tokens = config.data.batch_size // config.train.microbatches * config.data.sequence_length
    moe.options.check(moe, path, tokens)
