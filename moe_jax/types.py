"""What the rooms hand to each other, and the letters of the dimensions.

B batch, S sequence, T tokens (B*S), D model width, F expert width, E experts, K experts per token, C slots
per expert, H heads, N size of a PEER pool, L layers, V vocabulary. A suffix `_local` marks one shard's share.
The same letters stand in einsum strings, docstrings and error messages.
"""

from typing import NamedTuple

import jax


class TokenChoice(NamedTuple):
    """The nonzeros of the sparse matrix tokens x experts, K in each row.

    expert_ids: int32 [T, K]. Ids below E are experts; E is "no expert": it costs nothing and adds nothing; E+1+j is
    virtual expert j of V, which has no matrices.
    gates: [T, K], what each chosen expert's output is multiplied by; at least float32.
    """

    expert_ids: jax.Array
    gates: jax.Array


class ExpertChoice(NamedTuple):
    """The nonzeros of the sparse matrix tokens x experts, at most C in each column.

    token_ids: int32 [E, C]; T is "no token". gates: [E, C], at least float32.
    """

    token_ids: jax.Array
    gates: jax.Array


class SlotMix(NamedTuple):
    """Mixtures of tokens instead of tokens: slot (e, c) of a sequence is the sum of its tokens times `dispatch`, and a token
    is the sum of its sequence's slots times `combine`.

    dispatch, combine: [T, E, C], at least float32.
    """

    dispatch: jax.Array
    combine: jax.Array


Assignment = TokenChoice | ExpertChoice | SlotMix


class Given(NamedTuple):
    """Experts that tokens are given, instead of those that a router would choose.

    expert_ids: int32 [T, K], below E. use: bool scalar, whether they are taken.
    """

    expert_ids: jax.Array
    use: jax.Array


class RouterInputs(NamedTuple):
    """What a router may look at beside the hidden states.

    token_ids, positions, segment_ids: int32 [T]. valid: bool [T]; invalid (padding) tokens route nowhere and
    enter no statistic, loss or capacity. sequences: int32 [T], the number, below T, of each token's row; None: all are of
    one. key: typed PRNG key of this layer and step, or None without noise.  train: static; capacity and
    noise differ in evaluation. record: static, True or None; if True the layer's statistics hold the sparse
    matrix itself. earlier_ids: int32 [T, P], the ids of the P tokens before each one, the nearest first, -1 before the start of
    its document; where a router of the model reads them. given: experts that another router chose, for routers that
    can give any expert a gate: base, switch, top_k.
    """

    token_ids: jax.Array | None = None
    positions: jax.Array | None = None
    segment_ids: jax.Array | None = None
    valid: jax.Array | None = None
    sequences: jax.Array | None = None
    key: jax.Array | None = None
    train: bool = False
    record: bool | None = None
    earlier_ids: jax.Array | None = None
    given: Given | None = None


class Aux(NamedTuple):
    """What a layer returns beside its output.

    losses: float32 scalars, unweighted, by name.
    stats: sums over the valid tokens of this call, so that they may be added over microbatches: `counts` [E]
    of assignments, `dropped` assignments, `entropy_sum` in nats, `tokens`, `nonfinite` tokens; where experts are on
    several shards also `exchange_fallback`, `exchange_overflow` and `exchange_bytes`. Of layers that retrieve see
    `ProductKeys`.
    row_ids: int32 [T, R], N for "no row", for each pool [N, M, D] whose gradient is wanted by rows, by the parameter's
    name.
    rows: float32 [B], by name, of each row of the layer's input: `experts`, how many ran for a token on average, as the router
      chose, in layers whose tokens choose.
    """

    losses: dict[str, jax.Array]
    stats: dict[str, jax.Array]
    row_ids: dict[str, jax.Array] = {}
    rows: dict[str, jax.Array] = {}
