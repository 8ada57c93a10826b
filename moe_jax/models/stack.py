"""Repeating groups of blocks, with their parameters stacked over the groups, and named blocks between them.

A loop over the groups is compiled once (`scan`) or unrolled; both run the same function on slices of the same arrays, so
parameters and results do not depend on the choice.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax import compat
from moe_jax.config import ModelConfig
from moe_jax.config.blocks import RETRIEVING, block_kinds, parse_inserts, parse_pattern
from moe_jax.layers.attention import init_cache
from moe_jax.layers.block import Block, BlockInputs
from moe_jax.types import Aux

COLLECTIONS = ("params", "router_state", "row_sinks")


class StackOutput(NamedTuple):
    """x [B, S, D]; aux: {"groups": {"block_i": Aux stacked over groups}, name: Aux} of the routed blocks; cache: the same
    places with a KVCache each, or None."""

    x: jax.Array
    aux: dict[str, Any]
    cache: dict[str, Any] | None


class Stack(nn.Module):
    """All blocks of a model. Collections `params` and `router_state` hold `groups` {block_i: arrays [G, ...]} and the inserts;
    with `peer.share_pool` `params` also `pool` {experts: [N, M, D]}, in place of the pools of the blocks.
    """

    config: ModelConfig
    vocab_size: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, inputs: BlockInputs, cache: dict[str, Any] | None = None) -> StackOutput:
        """Runs x [B, S, D] through every block, in order."""
        kinds, inserts = parse_pattern(self.config), parse_inserts(self.config)
        groups, pool = self.config.layers // len(kinds), {}
        if self._shares_pool():
            kind = next(kind for kind in block_kinds(self.config) if kind in RETRIEVING)
            pool = self._variables("pool", lambda key: self._init_pool(key, kind, x, inputs))["params"]
        stacked = self._variables("groups", lambda key: self._init_groups(key, kinds, groups, x, inputs))
        auxes, caches, parts, done = {}, {}, [], 0
        # Inserts stand between groups; numbers after the last block keep their noise apart from the groups'.
        for number, (name, kind, before) in sorted(enumerate(inserts), key=lambda insert: insert[1][2]):
            x, part = self._run_groups(x, inputs, stacked, pool, cache, kinds, done, before // len(kinds))
            parts.append(part)
            done = before // len(kinds)
            width = self.config.insert_width
            variables = self._variables(name, lambda key, kind=kind: self._init_block(key, kind, x, inputs, width))
            layer = self.config.layers + number
            variables = _with_pool(variables, pool, kind)
            x, aux, new = self._block(kind, width)(variables, x, inputs, layer, cache and cache[name])
            caches[name] = new
            if aux is not None:
                auxes[name] = aux
        x, part = self._run_groups(x, inputs, stacked, pool, cache, kinds, done, groups)
        parts = [p for p in (*parts, part) if p is not None]
        auxes["groups"], caches["groups"] = jax.tree.map(lambda *a: jnp.concatenate(a), *parts) if parts else ({}, None)
        return StackOutput(x, auxes, caches if cache is not None else None)

    def _variables(self, name, init):
        if self.is_initializing():
            for collection, tree in init(self.make_rng("params")).items():
                self.put_variable(collection, name, tree)
        return {c: nn.unbox(self.get_variable(c, name)) for c in COLLECTIONS if self.has_variable(c, name)}

    def _shares_pool(self):
        return self.config.peer.share_pool and any(kind in RETRIEVING for kind in block_kinds(self.config))

    def _init_pool(self, key, kind, x, inputs):
        block = Block(self.config, kind, self.vocab_size, parent=None).init(key, x, inputs)
        return {"params": {"experts": block["params"]["peer"]["experts"]}}

    def _init_block(self, key, kind, x, inputs, width=0):
        block = Block(self.config, kind, self.vocab_size, width, parent=None).init(key, x, inputs)
        if kind in RETRIEVING and self._shares_pool():
            del block["params"]["peer"]["experts"]
        return block

    def _init_groups(self, key, kinds, groups, x, inputs):
        def one(g):
            group_key = jax.random.fold_in(key, g)
            blocks = [self._init_block(jax.random.fold_in(group_key, i), kind, x, inputs) for i, kind in enumerate(kinds)]
            return {c: {f"block_{i}": b[c] for i, b in enumerate(blocks) if c in b} for c in COLLECTIONS}

        def boxed(leaf):
            return isinstance(leaf, nn.meta.AxisMetadata)

        stacked = jax.vmap(one)(jnp.arange(groups))
        stacked = {c: tree for c, tree in stacked.items() if tree}
        return jax.tree.map(lambda b: b.add_axis(0, {nn.PARTITION_NAME: "layers"}) if boxed(b) else b, stacked, is_leaf=boxed)

    def _block(self, kind, width=0):
        def run(variables, x, inputs, layer, cache):
            block = Block(self.config, kind, self.vocab_size, width, parent=None)
            return block.apply(variables, x, inputs, layer, cache)

        return with_barriers(run, recompute=self.config.remat)

    def _run_groups(self, x, inputs, stacked, pool, cache, kinds, first, last):
        """Groups first..last-1; returns x and their (aux, cache), stacked, or None where there are none."""
        if first == last:
            return x, None
        variables, caches = jax.tree.map(lambda a: a[first:last], (stacked, cache and cache["groups"]))

        def group(x, inputs_of_group):
            variables, caches, g = inputs_of_group
            # Else the split of a weight's width spreads to the activations, and every block moves them around.
            x = compat.constrain(x, compat.BATCH_AXES, (), ())
            # XLA may keep bfloat16 values in float32 across what it fuses. The barriers end that where scan ends it.
            x, auxes, new = jax.lax.optimization_barrier(x), {}, {}
            for i, kind in enumerate(kinds):
                name = f"block_{i}"
                mine = {c: tree[name] for c, tree in variables.items() if name in tree}
                mine = _with_pool(mine, pool, kind)
                layer = g * len(kinds) + i
                x, aux, new[name] = self._block(kind)(mine, x, inputs, layer, caches and caches[name])
                if aux is not None:
                    auxes[name] = aux
            return x, (auxes, new)

        xs = (variables, caches, jnp.arange(first, last))
        x, outputs = jax.lax.scan(group, x, xs, unroll=1 if self.config.scan else last - first)
        return jax.lax.optimization_barrier(x), outputs


def _with_pool(variables, pool, kind):
    """The variables of a block, with the pool that all share in the place of its own."""
    if not pool or kind not in RETRIEVING:
        return variables
    params = variables["params"]
    return variables | {"params": params | {"peer": params["peer"] | pool}}


def with_barriers(run, recompute: bool):
    """`run(variables, x, inputs, layer, cache)` with a barrier between its residuals and its backward pass.

    With `recompute` the residuals are computed again in the backward pass instead of stored. `jax.checkpoint` would do
    that too, but XLA then fuses the recomputed values into their consumers and rounds differently; behind the barrier
    both ways give the same bits.
    """

    def wrapped(variables, x, inputs, layer, cache):
        if cache is not None:
            return run(variables, x, inputs, layer, cache)
        arrays = {name: a for name, a in inputs._asdict().items() if name not in ("train", "record")}

        def linearize(variables, x, arrays, layer):
            return jax.vjp(lambda v, x: run(v, x, inputs._replace(**arrays), layer, None), variables, x)

        @jax.custom_vjp
        def block(*args):
            return linearize(*args)[0]

        def forward(*args):
            y, vjp = linearize(*args)
            return y, (args if recompute else vjp)

        def backward(residuals, d_y):
            if recompute:
                args, d_y = jax.lax.optimization_barrier((residuals, d_y))
                residuals = linearize(*args)[1]
            vjp, d_y = jax.lax.optimization_barrier((residuals, d_y))
            return *vjp(d_y), None, None

        block.defvjp(forward, backward)
        return block(variables, x, arrays, layer)

    return wrapped


def init_stack_cache(config: ModelConfig, batch: int, length: int) -> dict[str, Any]:
    """An empty cache for `length` tokens in each of `batch` rows."""
    kinds = parse_pattern(config)
    width = config.head_width or config.width // config.heads
    one = init_cache(batch, length, config.kv_heads or config.heads, width, jnp.dtype(config.dtype))
    groups = config.layers // len(kinds)
    stacked = jax.tree.map(lambda a: jnp.broadcast_to(a, (groups, *a.shape)), one)
    cache = {"groups": {f"block_{i}": stacked for i in range(len(kinds))}}
    return cache | {name: one for name, _, _ in parse_inserts(config)}


def mean_losses(aux: dict[str, Any]) -> dict[str, jax.Array]:
    """Each router loss as its mean over the layers that have it: {name: float32 scalar}."""
    layers = [a.losses for a in jax.tree.leaves(aux, is_leaf=lambda a: isinstance(a, Aux))]
    names = sorted({name for losses in layers for name in losses})
    values = {name: [losses[name].reshape(-1) for losses in layers if name in losses] for name in names}
    return {name: jnp.mean(jnp.concatenate(value)) for name, value in values.items()}


def stats_tree(aux: dict[str, Any]) -> dict[str, Any]:
    """The statistics of every routed layer, at the places of `aux`."""
    return jax.tree.map(lambda a: a.stats, aux, is_leaf=lambda a: isinstance(a, Aux))


def row_ids_tree(aux: dict[str, Any]) -> dict[str, Any]:
    """The row ids of every pool with a sink, at the places of the pools in `params`: {"groups": {"block_i": {"peer": ...}}, ...}."""
    ids = {name: row_ids_tree(a) if isinstance(a, dict) else {"peer": a.row_ids} for name, a in aux.items()}
    return {name: tree for name, tree in ids.items() if tree and tree != {"peer": {}}}


def by_layer(tree: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """{"groups": {"block_i": leaves [G, ...]}, name: leaves} -> {"layer_07": leaves, name: leaves}, in order of depth."""
    kinds = parse_pattern(config)
    layers = {}
    for block, stacked in tree.get("groups", {}).items():
        for g in range(config.layers // len(kinds)):
            number = g * len(kinds) + int(block.removeprefix("block_"))
            layers[number] = jax.tree.map(lambda a: a[g], stacked)
    inserts = {name: tree[name] for name, _, _ in parse_inserts(config) if name in tree}
    return {f"layer_{number:02d}": layers[number] for number in sorted(layers)} | inserts
