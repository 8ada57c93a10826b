"""Decoder-only language model."""

from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from moe_jax.config import ModelConfig
from moe_jax.config.blocks import RETRIEVING, most_earlier_tokens, parse_pattern
from moe_jax.layers.block import BlockInputs
from moe_jax.layers.earlier_tokens import earlier_tokens
from moe_jax.layers.embeddings import LearnedPositions, TokenEmbedding, row_ids
from moe_jax.layers.norms import make_norm
from moe_jax.models.places import pool_path, stacked_places
from moe_jax.models.stack import Stack, mean_losses, row_ids_tree, rows_by_layer, stats_tree
from moe_jax.ops.retrieval import row_sink, rows_of_expert


class Output(NamedTuple):
    """What a model returns.

    x: [B, S, D], normalised; logits are x table^T. table: [V, D], the output projection. losses: the routers' unweighted
      losses by feed-forward layer (see `stack.mean_losses`). stats: routing statistics of every block with a router (see
      `by_layer`). cache: for the next call, or None. row_ids: for every table in the collection `row_sinks`, at the same place,
      the table's rows that the sink's gradient belongs to: int32 [T], of a pool [T, R] (stacked over groups). rows: {name of a
      block: `Aux.rows`}.
    """

    x: jax.Array
    table: jax.Array
    losses: dict[str, jax.Array]
    stats: dict[str, Any]
    cache: dict[str, Any] | None
    row_ids: dict[str, Any]
    rows: dict[str, dict[str, jax.Array]] = {}


class Decoder(nn.Module):
    """Token embedding, a stack of blocks, a final norm, an output table."""

    config: ModelConfig
    vocab_size: int

    @nn.compact
    def __call__(
        self,
        token_ids: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        *,
        cache: dict[str, Any] | None = None,
        key: jax.Array | None = None,
        train: bool = False,
        record: bool | None = None,
    ) -> Output:
        """Runs token_ids, positions and segment_ids, int32 [B, S]; segment 0 is padding, 1 and up are documents.

        With `record` the statistics of each routed layer hold its sparse matrix, `matrix` [T, E+V].
        With a `cache` (from `init_stack_cache` or the last call) the tokens follow those in it.
        """
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        embed = TokenEmbedding(self.vocab_size, c.width, c.init_std, c.row_gradients, dtype, name="embed")
        x = embed(token_ids)
        if c.positions == "learned":
            x = x + LearnedPositions(c.max_positions, c.width, c.position_offset, c.init_std, dtype, name="positions")(
                positions
            )
        inputs = BlockInputs(token_ids, positions, segment_ids, key, train, record)
        if count := most_earlier_tokens(c):
            earlier, window = earlier_tokens(token_ids, segment_ids, count, cache and cache["earlier"])
            inputs = inputs._replace(earlier_ids=earlier)
        x, aux, cache = Stack(c, self.vocab_size, name="stack")(x, inputs, cache)
        if count and cache is not None:
            cache = cache | {"earlier": window}
        x = make_norm(c.norm, c.norm_epsilon, dtype, name="norm_final")(x)
        table = embed.embedding if c.tied_embeddings else self._output_table()
        ids = {"embed": {"embedding": row_ids(token_ids)}} if c.row_gradients else {}
        ids |= flax.traverse_util.unflatten_dict(row_ids_tree(aux, c), sep="/")
        return Output(x, table, mean_losses(aux, c), stats_tree(aux), cache, ids, rows_by_layer(aux, c))

    def _output_table(self):
        init = nn.with_logical_partitioning(nn.initializers.variance_scaling(1.0, "fan_out", "normal"), ("vocab", "embed"))
        return self.param("output", init, (self.vocab_size, self.config.width), jnp.float32)


def row_sinks(config: ModelConfig, tokens: int) -> dict[str, Any]:
    """Zeros for the collection `row_sinks` of a call over T = `tokens` tokens: for every row-wise table a leaf.

    Where a leaf is given, the table at its place in `params` gets no gradient; the sink's gradient, with
    `Output.row_ids`, is the table's gradient by rows: [T, D] of the token embedding, a `RowSink` of a pool.
    """
    sinks: dict[str, Any] = {}
    if config.row_gradients:
        sinks["embed/embedding"] = jnp.zeros((tokens, config.width), jnp.float32)
    groups = config.layers // len(parse_pattern(config))
    for place in stacked_places(config, *RETRIEVING):
        peer = place.ffn.peer
        if not peer.row_gradients:
            continue
        rows = rows_of_expert(peer.activation if place.ffn.kind == "peer" else None)
        sink = row_sink(tokens, peer.heads * peer.top_k, rows, config.width)
        if place.group is not None:
            sink = jax.tree.map(lambda a: jnp.zeros((groups, *a.shape), a.dtype), sink)
        sinks[place.own_experts] = sink
    return flax.traverse_util.unflatten_dict(sinks, sep="/")


def sink_tables(config: ModelConfig) -> dict[str, str]:
    """For the path of every leaf of `row_sinks` that of its table in `params`: the same, or the pool that blocks share."""
    tables = {path: path for path in flax.traverse_util.flatten_dict(row_sinks(config, 1), sep="/")}
    shared = {place.own_experts: pool_path(place) for place in stacked_places(config, *RETRIEVING)}
    return {path: shared.get(path, path) for path in tables}
