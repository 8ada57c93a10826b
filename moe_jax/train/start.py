"""How a run begins: a table of the ways to begin a new one, and going on from a run's own newest checkpoint.

`WAYS` is the table: another way, such as from converted or imported weights, is one more row. Most initialise a state from the
seed and fill parts of it; a branch goes on with another run's.
"""

import dataclasses
import math
import platform
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.config import (
    Config,
    ConfigError,
    OptimizerConfig,
    differences,
    from_dict,
    one_line,
    role,
    shorten_list,
    to_dict,
)
from moe_jax.config.blocks import RETRIEVING, options_path
from moe_jax.config.leaf import ON_RESUME
from moe_jax.data import TextData, Tokenizer, check_same_text
from moe_jax.models.places import places
from moe_jax.routing import ROUTERS
from moe_jax.train.branch import check_branch
from moe_jax.train.checkpoint import Checkpoints, leaves_by_path, load_meta
from moe_jax.train.curriculum import open_curriculum, placed_curriculum
from moe_jax.train.fill import fill_from
from moe_jax.train.frozen import frozen_paths
from moe_jax.train.optimizer import group_settings
from moe_jax.train.router_state import start_router_state
from moe_jax.train.state import State, abstract_state, init_state, learned_params, place_state
from moe_jax.train.upcycle import check_dense_run, upcycle


class Way(NamedTuple):
    """A way to begin a new run.

    field: the field of `config.init` that asks for this way when it is not empty; "": for a config that asks for none.
    check(config): refuses what cannot work, before the text is read.
    tokenizer(config): the one that the parameters taken over were trained with; None: the data's own is used.
    state(config, model, data, mesh): (the state before the run's first step, on `mesh`, lines that report where it comes from).
    """

    field: str
    check: Callable[[Config], Any]
    tokenizer: Callable[[Config], Tokenizer | None]
    state: Callable[[Config, nn.Module, TextData, Any], tuple[State, list[str]]]


def way_of(config: Config) -> Way:
    """The row of `WAYS` that the config asks for."""
    return next(way for way in WAYS if not way.field or getattr(config.init, way.field))


def inherited_tokenizer(config: Config) -> Tokenizer | None:
    """The tokenizer that a new run's first parameters were trained with; None: they are new, and the data's own is right.

    Raises:
      ConfigError: there is no such run, or the config asks for another tokenizer than that whose vocabulary it takes.
    """
    return way_of(config).tokenizer(config)


def begin(config: Config, model: nn.Module, data: TextData, mesh) -> tuple[State, list[str]]:
    """The state of a new run before its first step, on `mesh`, and lines that report where it comes from.

    Raises:
      ConfigError: what `config.init` names does not fit the model, or a branch the text.
      DamagedCheckpointError: it has no checkpoint that can be read.
    """
    return way_of(config).state(config, model, data, mesh)


# With new parameters.


def _new_state(config: Config, model: nn.Module, data: TextData, mesh) -> tuple[State, list[str]]:
    state = place_state(model, config, mesh)
    state["router_state"] = start_router_state(
        state["router_state"], data.token_shares, config.model, data.tokenizer.vocab_size
    )
    return state, []


def _filled(config: Config, state: State, **parts: Any) -> State:
    """A new state with parts taken over, whose average begins with the parameters."""
    state = state | parts
    if "ema" in state:
        state["ema"] = jax.jit(lambda params: jax.tree.map(jnp.copy, params))(learned_params(config, state["params"]))
    return state


# From a checkpoint, by prefixes.


def _check_checkpoint(config: Config) -> None:
    _other_run(config)
    _checkpoint_tokenizer(config)


def _other_run(config: Config) -> dict[str, Any]:
    """`meta` of the run that `config.init` names."""
    field = way_of(config).field
    return load_meta(getattr(config.init, field), field=f"init.{field}")


def _included(config: Config) -> tuple[str, ...]:
    return tuple(prefix.strip().strip("/") for prefix in config.init.include.split(",") if prefix)


def _checkpoint_tokenizer(config: Config) -> Tokenizer | None:
    by_token = ("embed", "output")  # parameters with a row per token
    if (prefixes := _included(config)) and not any(prefix.split("/")[0] in by_token for prefix in prefixes):
        return None
    return _same_tokenizer(config, "set it to that, or list in init.include what to take without embed and output")


def _same_tokenizer(config: Config, fix: str) -> Tokenizer:
    """The tokenizer of the run that `config.init` names; refuses a config that asks for another."""
    meta, field = _other_run(config), way_of(config).field
    theirs = from_dict(meta["config"]).data
    for name in ("tokenizer", "vocab_size") if config.data.tokenizer == "bpe" else ("tokenizer",):
        ours, its = getattr(config.data, name), getattr(theirs, name)
        if ours != its:
            raise ConfigError(f"data.{name}", ours, f"init.{field}={getattr(config.init, field)} has {its}", fix)
    return Tokenizer.from_json(meta["tokenizer"])


def _from_checkpoint(config: Config, model: nn.Module, data: TextData, mesh) -> tuple[State, list[str]]:
    state, lines = _new_state(config, model, data, mesh)
    part = {name: state[name] for name in ("params", "router_state")}
    if reason := _other_routers(config):
        lines.append(f"the routers' state starts fresh: {reason}")
        del part["router_state"]
    filled, report = fill_from(config.init.checkpoint, part, _included(config))
    return _filled(config, state, **filled), [*lines, str(report)]


def _other_routers(config: Config) -> str:
    """Why the routers' state of `init.checkpoint` is not for this model: ids in a table mean other tokens or experts."""
    model = from_dict(_other_run(config)["config"]).model
    theirs = {place.name: place.ffn.moe for place in places(model, "routed")}
    new_tokens = _checkpoint_tokenizer(config) is None
    for place in places(config.model, "routed"):
        ours, path = place.ffn.moe, options_path(config.model, place.ffn)
        if new_tokens and ROUTERS[ours.router].by_token:
            return "its tokens are those of another tokenizer"
        for name in ("router", "experts", "virtual_experts") if place.name in theirs else ():
            if (old := getattr(theirs[place.name], name)) != getattr(ours, name):
                return f"{path}moe.{name} is {getattr(ours, name)}, and {old} in init.checkpoint"
        if place.name in theirs and (old := theirs[place.name].options.state_kind(theirs[place.name])):
            if (kind := ours.options.state_kind(ours)) != old:
                return f"{path}moe.routers.{ours.router} has {kind}, and {old} in init.checkpoint"
    pools = {place.name: place.ffn.peer for place in places(model, *RETRIEVING)}
    for place in places(config.model, *RETRIEVING):
        ours, old, path = place.ffn.peer, pools.get(place.name), options_path(config.model, place.ffn)
        if old and not (ours.searches or old.searches) and ours.experts != old.experts:
            return f"{path}peer.experts is {ours.experts}, and {old.experts} in init.checkpoint"
    return ""


# Upcycled from a dense run.


def _upcycled(config: Config, model: nn.Module, data: TextData, mesh) -> tuple[State, list[str]]:
    state, _ = _new_state(config, model, data, mesh)
    params, report = upcycle(config, state["params"], model.vocab_size, mesh)
    warnings = [f"warning: at step 0 the model is not the dense one: {warning}" for warning in report.warnings]
    return _filled(config, state, params=params), [str(report), *warnings]


def _check_upcycled(config: Config) -> None:
    check_dense_run(config)
    _same_tokenizer(config, "set it to that")


# As a branch of another run, see `train.branch`.


def _branch_meta(config: Config) -> dict[str, Any]:
    """`meta` of the checkpoint that a branch goes on from."""
    return load_meta(config.init.branch_from, config.init.branch_step or None, field="init.branch_from")


def _check_branch(config: Config) -> None:
    meta = _branch_meta(config)
    check_branch(from_dict(meta["config"]), config, meta["step"])


def _branched(config: Config, model: nn.Module, data: TextData, mesh) -> tuple[State, list[str]]:
    meta = _branch_meta(config)
    lines = [f"warning: {warning}" for warning in check_same_text(meta, data)]
    with Checkpoints(config.init.branch_from, read_only=True, field="init.branch_from") as checkpoints:
        beside = placed_curriculum(open_curriculum(config, data), mesh)
        restored = checkpoints.restore(abstract_state(model, config, mesh) | beside, meta["step"])
    return restored.state, [*lines, f"branched from {config.init.branch_from} step {restored.step}"]


FRESH = Way("", lambda config: None, lambda config: None, _new_state)
WAYS = (
    Way("checkpoint", _check_checkpoint, _checkpoint_tokenizer, _from_checkpoint),
    Way("upcycle_from", _check_upcycled, lambda config: _same_tokenizer(config, "set it to that"), _upcycled),
    Way("branch_from", _check_branch, lambda config: Tokenizer.from_json(_branch_meta(config)["tokenizer"]), _branched),
    FRESH,
)


# From the run's own newest checkpoint.


def run_meta(config: Config, data: TextData, step: int) -> dict[str, Any]:
    """The `meta` of a checkpoint: what resuming, evaluation and generation need to know of a run beside its arrays."""
    return {
        "config": to_dict(config),
        "tokenizer": data.tokenizer.to_json(),
        "data_fingerprint": data.fingerprint,
        "text": data.identity,
        "step": step,
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }


def check_resume(saved: Config, new: Config, parameters: Iterable[str]) -> list[str]:
    """Compares a run's saved config with the one it is resumed with.

    Parameter groups may change only to freeze parameters.

    Args:
      saved, new: the configs.
      parameters: paths of the model's parameters, which groups name.

    Returns:
      Warnings: one if the schedule stretches, one if the numbers will differ in rounding.

    Raises:
      ConfigError: naming the first fields that may not differ.
    """
    changed = differences(saved, new)
    _check_groups_freeze(saved.optimizer, new.optimizer, parameters)
    free = lambda field: role(field) in ON_RESUME or field.startswith("optimizer.groups")
    refused = {f: values for f, values in changed.items() if not free(f)}
    if refused:
        changes = [f"{f} {one_line(old, 40)} -> {one_line(now, 40)}" for f, (old, now) in refused.items()]
        field, (_, value) = next(iter(refused.items()))
        limit = f"may not change on resume; differing: {shorten_list(changes)}"
        raise ConfigError(field, value, limit, "set these fields back, or start in another --workdir")
    warnings = []
    if "train.steps" in changed:
        old, now = changed["train.steps"]
        warnings.append(f"config.train.steps {old} -> {now}: the schedule stretches to the new length")
    rounding = [f"config.{f}" for f in changed if role(f) == "rounding"]
    if rounding:
        warnings.append(f"{', '.join(rounding)} changed: equal to the uninterrupted run except for rounding")
    return warnings


def _check_groups_freeze(saved: OptimizerConfig, new: OptimizerConfig, parameters: Iterable[str]) -> None:
    """Refuses groups that change the scale or decay of a parameter which they do not freeze.

    To unfreeze is refused too: the moments that a parameter had are gone, and Adam would take fresh ones for old.
    """
    changes = []
    for path in parameters:
        before, after = group_settings(saved, path), group_settings(new, path)
        if before != after and after[0]:
            names = ("learning_rate_scale", "weight_decay")
            changes += [f"{name} of {path} {a:g} -> {b:g}" for name, a, b in zip(names, before, after) if a != b]
    if changes:
        limit = f"may change on resume only to freeze; differing: {shorten_list(changes, 2)}"
        raise ConfigError("optimizer.groups", None, limit, "set the groups back, or start in another --workdir")


def resume(
    config: Config, model: nn.Module, mesh, checkpoints: Checkpoints, beside: State | None = None
) -> tuple[State, list[str]]:
    """The state of the newest checkpoint that can be read, on `mesh`, and lines that report it.

    The moments and averages of parameters that are frozen now are dropped. beside: what the checkpoint holds beside
    `abstract_state`, arrays or ShapeDtypeStructs.
    """
    target = abstract_state(model, config, mesh) | (beside or {})
    frozen = frozen_paths(config.optimizer, leaves_by_path(target["params"]))
    of_frozen = _leaves_of_frozen(config, model) if frozen else frozenset()
    restored = checkpoints.restore(target, ignore=lambda path: path in of_frozen)
    lines = [f"resumed at step {restored.step}"]
    if restored.ignored:
        dropped = [path for path in frozen if any(f"/{path}/" in f"{leaf}/" for leaf in restored.ignored)]
        arrays = leaves_by_path(target["params"])
        lines.append(
            f"optimizer.groups freezes {sum(arrays[path].size for path in dropped):,} parameters in {len(dropped)} arrays: "
            f"{sum(math.prod(shape) for shape in restored.ignored.values()):,} numbers of their moments and averages "
            "are dropped"
        )
    return restored.state, lines


def _leaves_of_frozen(config: Config, model: nn.Module) -> frozenset[str]:
    """Paths of what the state would hold beside `abstract_state` if nothing were frozen."""
    thawed = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, groups=()))
    key = jax.random.key(0)
    everything, held = (leaves_by_path(jax.eval_shape(lambda c=c: init_state(model, c, key))) for c in (thawed, config))
    return frozenset(everything) - frozenset(held)
