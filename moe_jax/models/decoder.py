"""Decoder-only language model."""

from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from moe_jax.config import ModelConfig
from moe_jax.config.blocks import RETRIEVING, parse_inserts, parse_pattern
from moe_jax.layers.block import BlockInputs
from moe_jax.layers.embeddings import LearnedPositions, TokenEmbedding, row_ids
from moe_jax.layers.norms import make_norm
from moe_jax.models.stack import Stack, mean_losses, row_ids_tree, stats_tree
from moe_jax.ops.retrieval import row_sink, rows_of_expert


class Output(NamedTuple):
    """What a model returns.

    x: [B, S, D], normalised; logits are x table^T. table: [V, D], the output projection. losses: the routers' unweighted
    losses, each a mean over routed layers. stats: routing statistics of every routed layer (see `stack.by_layer`). cache: for
    the next call, or None. row_ids: for every table in the collection `row_sinks`, at the same place, int32 [T], of a pool
    [T, R] (stacked over groups): the table's rows that the sink's gradient belongs to.
    """

    x: jax.Array
    table: jax.Array
    losses: dict[str, jax.Array]
    stats: dict[str, Any]
    cache: dict[str, Any] | None
    row_ids: dict[str, Any]


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
        step: jax.Array | None = None,
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
        inputs = BlockInputs(token_ids, positions, segment_ids, key, step, train, record)
        x, aux, cache = Stack(c, self.vocab_size, name="stack")(x, inputs, cache)
        x = make_norm(c.norm, c.norm_epsilon, dtype, name="norm_final")(x)
        table = embed.embedding if c.tied_embeddings else self._output_table()
        ids = {"embed": {"embedding": row_ids(token_ids)}} if c.row_gradients else {}
        if pools := row_ids_tree(aux):
            ids["stack"] = pools
        return Output(x, table, mean_losses(aux), stats_tree(aux), cache, ids)

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
        sinks["embed"] = {"embedding": jnp.zeros((tokens, config.width), jnp.float32)}
    if not config.peer.row_gradients:
        return sinks

    def pool(kind, groups=None):
        rows = rows_of_expert(config.peer.activation if kind == "peer" else None)
        sink = row_sink(tokens, config.peer.heads * config.peer.top_k, rows, config.width)
        if groups is not None:
            sink = jax.tree.map(lambda a: jnp.zeros((groups, *a.shape), a.dtype), sink)
        return {"peer": {"experts": sink}}

    kinds = parse_pattern(config)
    groups = config.layers // len(kinds)
    blocks = {f"block_{i}": pool(kind, groups) for i, kind in enumerate(kinds) if kind in RETRIEVING}
    stack = {name: pool(kind) for name, kind, _ in parse_inserts(config) if kind in RETRIEVING}
    if blocks:
        stack["groups"] = blocks
    return sinks | ({"stack": stack} if stack else {})


def sink_tables(config: ModelConfig) -> dict[str, str]:
    """For the path of every leaf of `row_sinks` that of its table in `params`: the same, or the pool that blocks share."""
    paths = flax.traverse_util.flatten_dict(row_sinks(config, 1), sep="/")
    shared = config.peer.share_pool
    return {path: "stack/pool/experts" if shared and path.endswith("peer/experts") else path for path in paths}
