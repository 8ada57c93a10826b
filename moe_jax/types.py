"""What the rooms hand to each other, and the letters of the dimensions.

B batch, S sequence, T tokens (B*S), D model width, F expert width, E experts, K experts per token, C slots
per expert, H heads, N size of a PEER pool, L layers, V vocabulary. A suffix `_local` marks one shard's share.
The same letters stand in einsum strings, docstrings and error messages.
"""

from typing import NamedTuple

import jax


class TokenChoice(NamedTuple):
    """The nonzeros of the sparse matrix tokens x experts, K in each row.

    expert_ids: int32 [T, K]. Ids below E are experts; E is "no expert": it costs nothing and adds nothing.
    gates: [T, K], what each chosen expert's output is multiplied by; at least float32.
    """

    expert_ids: jax.Array
    gates: jax.Array


class RouterInputs(NamedTuple):
    """What a router may look at beside the hidden states.

    token_ids, positions, segment_ids: int32 [T]. valid: bool [T]; invalid (padding) tokens route nowhere and
    enter no statistic, loss or capacity. key: typed PRNG key of this layer and step, or None without noise.
    step: int32 scalar. train: static; capacity and noise differ in evaluation.
    """

    token_ids: jax.Array | None = None
    positions: jax.Array | None = None
    segment_ids: jax.Array | None = None
    valid: jax.Array | None = None
    key: jax.Array | None = None
    step: jax.Array | None = None
    train: bool = False


class Aux(NamedTuple):
    """What a layer returns beside its output.

    losses: float32 scalars, unweighted, by name.
    stats: sums over the valid tokens of this call, so that they may be added over microbatches: `counts` [E]
    of assignments, `dropped` assignments, `entropy_sum` in nats, `tokens`, `nonfinite` tokens; where experts are on
    several shards also `exchange_fallback`, `exchange_overflow` and `exchange_bytes`.
    """

    losses: dict[str, jax.Array]
    stats: dict[str, jax.Array]
