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
from moe_jax.config.blocks import RETRIEVING, distinct_layers, most_earlier_tokens, parse_inserts, parse_pattern
from moe_jax.layers.block import Block, BlockInputs
from moe_jax.layers.earlier_tokens import init_window
from moe_jax.layers.kv_cache import init_cache
from moe_jax.models.places import MODULES, by_layer, shared_pool, stacked_places
from moe_jax.types import Aux

COLLECTIONS = ("params", "router_state", "row_sinks")


class StackOutput(NamedTuple):
    """x [B, S, D]; aux: {"groups": {"block_i": Aux stacked over groups}, name: Aux} of the blocks with a router; cache: the
    same places with a KVCache each (None without attention), or None. In a cache "groups" may be a tuple of groups."""

    x: jax.Array
    aux: dict[str, Any]
    cache: dict[str, Any] | None


class Stack(nn.Module):
    """All blocks of a model.

    The collections `params` and `router_state` hold `groups` {block_i: arrays [G, ...]} and the inserts. With `peer.share_pool`
    blocks have no pool of their own: `params` holds `pool` {experts: [N, M, D]}, or `pool_NAME` for the layer NAME of
    `model.ffns`. With an unstacked cache (`init_stack_cache`) the variables may have the form of `models.unstack`.
    """

    config: ModelConfig
    vocab_size: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, inputs: BlockInputs, cache: dict[str, Any] | None = None) -> StackOutput:
        """Runs x [B, S, D] through every block, in order."""
        pattern, inserts = parse_pattern(self.config), parse_inserts(self.config)
        groups, pools = self.config.layers // len(pattern), {}
        for ffn in distinct_layers(self.config):
            if (name := shared_pool(ffn)) and name not in pools:
                pools[name] = self._variables(name, lambda key, ffn=ffn: self._init_pool(key, ffn, x, inputs))["params"]
        stacked = self._variables("groups", lambda key: self._init_groups(key, pattern, groups, x, inputs))
        auxes, caches, parts, done = {}, {}, [], 0
        # Inserts stand between groups; numbers after the last block keep their noise apart from the groups'.
        for number, insert in sorted(enumerate(inserts), key=lambda one: one[1].before):
            name, ffn, before = insert
            x, part = self._run_groups(x, inputs, stacked, pools, cache, pattern, done, before // len(pattern))
            parts.append(part)
            done = before // len(pattern)
            variables = self._variables(name, lambda key, ffn=ffn: self._init_block(key, ffn, x, inputs))
            layer = self.config.layers + number
            variables = _with_pool(variables, pools, ffn)
            x, aux, new = self._block(ffn)(variables, x, inputs, layer, cache and cache[name])
            caches[name] = new
            if aux is not None:
                auxes[name] = aux
        x, part = self._run_groups(x, inputs, stacked, pools, cache, pattern, done, groups)
        parts = [p for p in (*parts, part) if p is not None]
        auxes["groups"], caches["groups"] = _join(parts)
        return StackOutput(x, auxes, caches if cache is not None else None)

    def _variables(self, name, init):
        if self.is_initializing():
            for collection, tree in init(self.make_rng("params")).items():
                self.put_variable(collection, name, tree)
        return {c: nn.unbox(self.get_variable(c, name)) for c in COLLECTIONS if self.has_variable(c, name)}

    def _init_pool(self, key, ffn, x, inputs):
        block = Block(self.config, ffn, self.vocab_size, parent=None).init(key, x, inputs)
        return {"params": {"experts": block["params"][MODULES[ffn.kind]]["experts"]}}

    def _init_block(self, key, ffn, x, inputs):
        block = Block(self.config, ffn, self.vocab_size, parent=None).init(key, x, inputs)
        if shared_pool(ffn):
            del block["params"][MODULES[ffn.kind]]["experts"]
        return block

    def _init_groups(self, key, pattern, groups, x, inputs):
        def init_group(g):
            group_key = jax.random.fold_in(key, g)
            blocks = [self._init_block(jax.random.fold_in(group_key, i), ffn, x, inputs) for i, ffn in enumerate(pattern)]
            return {c: {f"block_{i}": b[c] for i, b in enumerate(blocks) if c in b} for c in COLLECTIONS}

        def boxed(leaf):
            return isinstance(leaf, nn.meta.AxisMetadata)

        stacked = jax.vmap(init_group)(jnp.arange(groups))
        stacked = {c: tree for c, tree in stacked.items() if tree}
        return jax.tree.map(lambda b: b.add_axis(0, {nn.PARTITION_NAME: "layers"}) if boxed(b) else b, stacked, is_leaf=boxed)

    def _block(self, ffn):
        def run(variables, x, inputs, layer, cache):
            return Block(self.config, ffn, self.vocab_size, parent=None).apply(variables, x, inputs, layer, cache)

        return with_barriers(run, recompute=self.config.remat)

    def _run_groups(self, x, inputs, stacked, pools, cache, pattern, first, last):
        """Groups first..last-1; returns x and their (aux, cache), stacked, or None where there are none."""
        if first == last:
            return x, None
        caches = cache and cache["groups"]

        def group(x, inputs_of_group):
            variables, caches, g = inputs_of_group
            # Else the split of a weight's width spreads to the activations, and every block moves them around.
            x = compat.constrain(x, compat.BATCH_AXES, (), ())
            # XLA may keep bfloat16 values in float32 across what it fuses. The barriers end that where scan ends it.
            x, auxes, new = jax.lax.optimization_barrier(x), {}, {}
            for i, ffn in enumerate(pattern):
                name = f"block_{i}"
                block_variables = {c: tree[name] for c, tree in variables.items() if name in tree}
                block_variables = _with_pool(block_variables, pools, ffn)
                layer = g * len(pattern) + i
                x, aux, new[name] = self._block(ffn)(block_variables, x, inputs, layer, caches and caches[name])
                if aux is not None:
                    auxes[name] = aux
            return x, (auxes, new)

        if isinstance(caches, tuple):
            auxes, new = [], []
            for g in range(first, last):
                x, (aux, updated) = group(x, (_of_group(stacked, g), caches[g], g))
                auxes.append(aux)
                new.append(updated)
            return jax.lax.optimization_barrier(x), (jax.tree.map(lambda *a: jnp.stack(a), *auxes), tuple(new))
        xs = (*jax.tree.map(lambda a: a[first:last], (stacked, caches)), jnp.arange(first, last))
        x, outputs = jax.lax.scan(group, x, xs, unroll=1 if self.config.scan else last - first)
        return jax.lax.optimization_barrier(x), outputs


def _join(parts):
    """(aux, caches) of all groups from those of consecutive ones."""
    if not parts:
        return {}, None
    auxes, caches = zip(*parts)
    aux = jax.tree.map(lambda *a: jnp.concatenate(a), *auxes)
    if isinstance(caches[0], tuple):
        return aux, sum(caches, ())
    return aux, jax.tree.map(lambda *a: jnp.concatenate(a), *caches)


def _of_group(stacked, g):
    """{collection: group g's variables} of variables stacked over the groups, or of a tuple of groups."""
    return {c: tree[g] if isinstance(tree, tuple) else jax.tree.map(lambda a: a[g], tree) for c, tree in stacked.items()}


def _with_pool(variables, pools, ffn):
    """The variables of a block, with the pool that its layer shares in the place of its own."""
    if not (name := shared_pool(ffn)):
        return variables
    params, module = variables["params"], MODULES[ffn.kind]
    return variables | {"params": params | {module: params[module] | pools[name]}}


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
        if learned := [name for name, a in arrays.items() if a is not None and jnp.issubdtype(a.dtype, jnp.inexact)]:
            raise ValueError(f"block inputs {learned}: floats would get no gradient; pass what is differentiated as x")

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


def init_stack_cache(config: ModelConfig, batch: int, length: int, unstacked: bool = False) -> dict[str, Any]:
    """An empty cache for `length` tokens in each of `batch` rows; None for blocks without attention. `earlier` has the last
    token ids, where a router of the model reads them.

    `unstacked`: "groups" is a tuple of groups, and a call with this cache runs them one after the other, without a loop. What a
    loop over tokens then writes is the new tokens' slots; a loop over groups would copy all of a stacked cache.
    """
    pattern = parse_pattern(config)
    width = config.head_width or config.width // config.heads
    block_cache = init_cache(batch, length, config.kv_heads or config.heads, width, jnp.dtype(config.dtype))
    groups = config.layers // len(pattern)
    stacked = block_cache if unstacked else jax.tree.map(lambda a: jnp.broadcast_to(a, (groups, *a.shape)), block_cache)
    of_groups = {f"block_{i}": stacked if ffn.attention else None for i, ffn in enumerate(pattern)}
    cache = {"groups": (of_groups,) * groups if unstacked else of_groups}
    if count := most_earlier_tokens(config):
        cache["earlier"] = init_window(batch, count)
    return cache | {insert.name: block_cache if insert.ffn.attention else None for insert in parse_inserts(config)}


def mean_losses(aux: dict[str, Any], config: ModelConfig) -> dict[str, dict[str, jax.Array]]:
    """Each router loss by the feed-forward layer that has it, {layer's name: {loss: float32 scalar}}: the sum over its blocks,
    divided by the number of all blocks with a loss of that name. Summed over the layers that is the mean over blocks."""
    found: dict[str, dict[str, list[jax.Array]]] = {}
    count: dict[str, int] = {}
    for place in sorted(stacked_places(config), key=lambda place: place.path):
        block = place.find(aux)
        for name, value in block.losses.items() if block else ():
            found.setdefault(place.ffn.name, {}).setdefault(name, []).append(value.reshape(-1))
            count[name] = count.get(name, 0) + value.size
    return {
        ffn: {name: jnp.sum(jnp.concatenate(values)) / count[name] for name, values in sorted(losses.items())}
        for ffn, losses in found.items()
    }


def stats_tree(aux: dict[str, Any]) -> dict[str, Any]:
    """The statistics of every block with a router, at the places of `aux`."""
    return jax.tree.map(lambda a: a.stats, aux, is_leaf=lambda a: isinstance(a, Aux))


def rows_by_layer(aux: dict[str, Any], config: ModelConfig) -> dict[str, dict[str, jax.Array]]:
    """`Aux.rows` of every block that has some, by the name of the block in order of depth."""
    rows = jax.tree.map(lambda a: a.rows, aux, is_leaf=lambda a: isinstance(a, Aux))
    return {name: of_block for name, of_block in by_layer(rows, config).items() if of_block}


def row_ids_tree(aux: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The row ids of every pool with a sink, {path in `params`: {"experts": int32}}, such as "stack/groups/block_0/peer"."""
    placed = ((place, place.find(aux)) for place in stacked_places(config, *RETRIEVING))
    return {f"{place.prefix}/{place.module}": block.row_ids for place, block in placed if block and block.row_ids}
