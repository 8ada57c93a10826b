"""Sparse upcycling: a routed model that starts from the parameters of a dense run (arXiv:2212.05055).

Blocks are matched by depth, inserts by name. Every expert of a routed block is the feed-forward layer of the dense block at its
depth; routers are fresh; the rest is copied. With an `expert_width` of ffn_width / G an expert is one of G shards of that layer
(arXiv:2410.07524): expert copy * G + s holds the hidden units of shard s, and the router's columns of one copy start equal, a
"virtual group". Equal scores go to the lower index, so the K best are then K / G whole copies, and every shard is in them.

A copy's G gates are equal. Where all K sum to a number c, those of its copies sum to c / G, which is what the whole
layer would be multiplied by: w_out times G / c and b_out by 1 / c give the dense layer. The router's options know c
(`RouterOptions.gate_sum`). Without drops and virtual experts the step-0 function is then that of the dense run up to
rounding. Elsewhere it is not, c counts as 1, and `departures` says why.

Shared experts start with an output of 0, which changes nothing and learns.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp

from moe_jax.config import Config, ConfigError, FFNConfig, ModelConfig, MoEConfig, from_dict
from moe_jax.config.blocks import RETRIEVING, block_layers, distinct_layers, expert_shards, options_path, parse_inserts
from moe_jax.models import MODELS
from moe_jax.models.places import Place, places
from moe_jax.train.checkpoint import load_meta, load_params
from moe_jax.train.state import abstract_placed_variables

Flat = dict[str, Any]  # 'a/b/c' -> leaf


class Origin(NamedTuple):
    """Where a leaf of the routed model comes from.

    how: "copied", "experts" or "fresh". sources: (path in the dense tree, group there or None), one for each group of the leaf.
    stacked: whether the leaf has an axis of groups. ffn: the feed-forward layer of its block.
    """

    how: str
    sources: tuple[tuple[str, int | None], ...] = ()
    stacked: bool = False
    ffn: FFNConfig | None = None


@dataclasses.dataclass(frozen=True)
class UpcycleReport:
    """What `upcycle` did: parameters by origin, G, and why the step-0 function is not the dense run's, if it is not."""

    workdir: str
    step: int
    copied: int
    experts: int
    fresh: int
    shards: int
    averaged: bool
    warnings: tuple[str, ...]

    def __str__(self):
        kind = f"experts of 1/{self.shards} of a dense layer" if self.shards > 1 else "experts"
        text = (
            f"upcycled from {self.workdir} step {self.step}: {self.copied:,} parameters copied, {self.experts:,} replicated "
            f"into {kind}, {self.fresh:,} fresh (routers and what has no dense counterpart); the optimizer starts fresh"
        )
        if self.averaged:
            text += "; the parameters' average in it is not used"
        return text if self.warnings else text + "; at step 0 the model computes what the dense one does"


def check_dense_run(config: Config) -> Config:
    """The config of the run `init.upcycle_from`.

    Raises:
      ConfigError: it has no checkpoint, has routed blocks, or its parameters do not fit the model of `config`.
    """
    workdir, new = config.init.upcycle_from, config.model
    old = from_dict(load_meta(workdir, field="init.upcycle_from")["config"])
    if block_layers(old.model, "routed", *RETRIEVING):
        limit = f"its model.pattern={old.model.pattern} and inserts={old.model.inserts!r} have blocks with experts"
        raise ConfigError("init.upcycle_from", workdir, limit, "name a dense run, or use init.checkpoint")
    for ffn in distinct_layers(new, "routed"):
        for name in ("expert_sublayers", "expert_norm"):
            if (value := getattr(ffn.moe, name)) != (plain := getattr(MoEConfig, name)):
                limit = "an expert must be a feed-forward layer of the dense run, or a part of one"
                raise ConfigError(f"{options_path(new, ffn)}moe.{name}", value, limit, f"use {plain}")
    ours, theirs = _fitting(new), _fitting(old.model)
    changes = {name: value for name, value in ours.items() if theirs.get(name, value) != value}
    if changes:
        listed = ", ".join(f"model.{name}={theirs[name]}" for name in changes)
        name = next(iter(changes))
        limit = f"the dense run {workdir} has {listed}"
        raise ConfigError(f"model.{name}", changes[name], limit, "make them equal, or name another init.upcycle_from")
    return old


def _fitting(model: ModelConfig) -> dict[str, Any]:
    """Field -> value, defaults resolved, of all that must be equal."""
    kv_heads, head_width = model.kv_heads or model.heads, model.head_width or model.width // model.heads
    names = "layers width ffn_width heads norm positions activation qkv_bias output_bias ffn_bias qk_norm tied_embeddings"
    fields = {name: getattr(model, name) for name in names.split()}
    if model.positions == "learned":
        fields |= {"max_positions": model.max_positions, "position_offset": model.position_offset}
    inserts = sorted(parse_inserts(model), key=lambda insert: insert.before)
    at = ",".join(f"{insert.name}@{insert.before}" for insert in inserts)
    widths = {"kv_heads": kv_heads, "head_width": head_width, "insert_width": model.insert_width or model.ffn_width}
    return fields | widths | {"inserts": at}


def departures(old: ModelConfig, new: ModelConfig) -> tuple[str, ...]:
    """Why the step-0 function is not the dense one, each with its field; empty: it is, up to rounding."""
    reasons = []
    for ffn in distinct_layers(new, "routed"):
        moe, path = ffn.moe, options_path(new, ffn) + "moe."
        reasons.append(path + "router=" + reason if (reason := moe.options.gate_sum(moe, expert_shards(new, ffn))[1]) else "")
        if moe.virtual_experts:
            reasons.append("zero, copy and constant experts take a share of the gates")
        if moe.execution == "capacity":
            reasons.append(f"{path}execution=capacity: training drops assignments")
        if moe.eval_capacity:
            reasons.append(f"{path}eval_capacity={moe.eval_capacity}: evaluation drops assignments")
    names = ["norm_epsilon"] + ["rope_theta", "rope_scaling"] * (new.positions == "rope")
    if new.rope_scaling != "none":
        names += ["rope_factor", "rope_low_frequency", "rope_high_frequency", "rope_original_length"]
    for name in names:
        if getattr(old, name) != getattr(new, name):
            reasons.append(f"model.{name}={getattr(new, name)}, in the dense run {getattr(old, name)}")
    return tuple(dict.fromkeys(reason for reason in reasons if reason))


def origins(routed: Flat, dense: Flat, old: ModelConfig, new: ModelConfig) -> dict[str, Origin]:
    """Path -> origin of every leaf of the routed model's parameters.

    Args:
      routed, dense: leaves with a shape, of the two models' parameters.
      old, new: their configs, which `check_dense_run` found to fit.

    Raises:
      ValueError: a leaf of the dense tree goes nowhere.
    """
    there = {place.name: place for place in places(old)}
    found: dict[str, Origin] = {path: Origin("copied", ((path, None),)) for path in routed if not path.startswith("stack/")}
    blocks: dict[str, list[Place]] = {}
    for place in places(new):
        blocks.setdefault(place.prefix, []).append(place)
    for prefix, mine in blocks.items():
        for path in (path for path in routed if path.startswith(f"{prefix}/")):
            rest, how = path.removeprefix(f"{prefix}/"), "copied"
            if rest.startswith("moe/experts/"):
                how, rest = "experts", rest.replace("moe/experts", "ffn")
            elif rest.startswith("moe/"):
                found[path] = Origin("fresh", ffn=mine[0].ffn)
                continue
            sources = tuple((f"{there[place.name].prefix}/{rest}", there[place.name].group) for place in mine)
            found[path] = Origin(how, sources, stacked=mine[0].group is not None, ffn=mine[0].ffn)
    used = {source for origin in found.values() for source in origin.sources}
    there = {
        (path, group)
        for path, leaf in dense.items()
        for group in (range(leaf.shape[0]) if path.startswith("stack/groups/") else (None,))
    }
    if used != there:
        raise ValueError(f"the dense and the routed model differ in {sorted(map(str, used ^ there))[:4]}")
    return found


def to_experts(name: str, weight: jax.Array, experts: int, shards: int, gates: float = 1.0) -> jax.Array:
    """A leaf of a dense feed-forward layer -> the same of E experts; expert e has shard e mod G of the hidden units.

    Args:
      name: w_in or w_gate [D, F], w_out [F, D], b_in or b_gate [F], b_out [D].
      weight: the leaf.
      experts: E, a multiple of G.
      shards: G.
      gates: what a token's gates sum to; the output is divided by it.
    """
    if name == "b_out":
        parts = jnp.broadcast_to(weight / gates, (shards, *weight.shape))
    elif name == "w_out":
        parts = weight.reshape(shards, -1, weight.shape[1]) * (shards / gates)
    else:
        parts = jnp.moveaxis(weight.reshape(*weight.shape[:-1], shards, -1), -2, 0)
    copies = jnp.broadcast_to(parts, (experts // shards, *parts.shape))
    return copies.reshape(experts, *parts.shape[1:])


def virtual_groups(kernel: jax.Array, experts: int, shards: int, axis: int) -> jax.Array:
    """A router's kernel whose columns of one copy, e // G, are its first expert's; E columns along `axis`, then others."""
    columns = jnp.arange(kernel.shape[axis])
    return jnp.take(kernel, jnp.where(columns < experts, columns // shards * shards, columns), axis=axis)


def upcycle_params(dense: Flat, fresh: Flat, plan: dict[str, Origin], model: ModelConfig) -> Flat:
    """The routed model's parameters.

    Args:
      dense: the dense run's.
      fresh: initialised leaves of the routed model, at least those whose origin is "fresh".
      plan: of `origins`.
      model: the routed model's config.
    """

    def make(path: str, origin: Origin) -> jax.Array:
        name = path.rpartition("/")[2]
        if origin.ffn is not None and origin.ffn.kind == "routed":
            moe, shards = origin.ffn.moe, expert_shards(model, origin.ffn)
            experts, gates = moe.experts, moe.options.gate_sum(moe, shards)[0]
        if origin.how == "fresh":
            if path.endswith(("moe/router/kernel", "moe/router/backbone/kernel")):
                return virtual_groups(fresh[path], experts, shards, axis=2 if path.startswith("stack/groups/") else 1)
            silent = path.endswith(("moe/shared/w_out", "moe/shared/b_out"))
            return jnp.zeros_like(fresh[path]) if silent else fresh[path]
        parts = [dense[source] if group is None else dense[source][group] for source, group in origin.sources]
        if origin.how == "experts":
            parts = [to_experts(name, part, experts, shards, gates) for part in parts]
        return jnp.stack(parts) if origin.stacked else parts[0]

    return {path: make(path, origin) for path, origin in plan.items()}


def upcycle(config: Config, params: Any, vocab_size: int, mesh) -> tuple[Any, UpcycleReport]:
    """The parameters to start with, from the newest checkpoint of `config.init.upcycle_from`.

    Args:
      config: the routed run's.
      params: its initialised parameters, on the mesh; the result has their shardings.
      vocab_size: of the dense run's tokenizer.
      mesh: the current one.

    Raises:
      ConfigError: as `check_dense_run`.
      DamagedCheckpointError: no checkpoint can be read.
    """
    old, new = check_dense_run(config), config.model
    # The dense run's own may name kernels that this machine lacks.
    builder = MODELS[new.name](
        dataclasses.replace(new, pattern=old.model.pattern, inserts=old.model.inserts, ffns=old.model.ffns), vocab_size
    )
    target = {"params": abstract_placed_variables(builder, mesh)["params"]}
    restored = load_params(config.init.upcycle_from, target, field="init.upcycle_from")
    dense = flax.traverse_util.flatten_dict(restored.state["params"], sep="/")
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    plan = origins(flat, dense, old.model, new)
    fresh = {path: flat[path] for path, origin in plan.items() if origin.how == "fresh"}
    shardings = {path: leaf.sharding for path, leaf in flat.items()}
    made = jax.jit(lambda dense, fresh: upcycle_params(dense, fresh, plan, new), out_shardings=shardings)(dense, fresh)
    counts = {
        how: sum(math.prod(flat[path].shape) for path, origin in plan.items() if origin.how == how)
        for how in ("copied", "experts", "fresh")
    }
    report = UpcycleReport(
        config.init.upcycle_from,
        restored.step,
        **counts,
        shards=max(expert_shards(new, ffn) for ffn in distinct_layers(new, "routed")),
        averaged=old.optimizer.ema_decay > 0,
        warnings=departures(old.model, new),
    )
    return flax.traverse_util.unflatten_dict(made, sep="/"), report
