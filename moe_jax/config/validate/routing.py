"""Routers."""

from moe_jax.config.leaf import ConfigError
from moe_jax.config.routers import MoEConfig
from moe_jax.config.run import Config


def check_router(config: Config) -> None:
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
