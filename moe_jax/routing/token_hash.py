"""Retrieval fixed by the token id: a control for layers whose queries search keys, as Hash layers are for routed ones."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.config import PeerConfig
from moe_jax.ops.hash_table import distinct_hash_table
from moe_jax.ops.precision import accumulator
from moe_jax.routing.contract import Router, Sizes, needed_token_ids, token_choice, usable_tokens
from moe_jax.routing.statistics import retrieval_statistics, sums
from moe_jax.types import RouterInputs, TokenChoice


class TokenHash(nn.Module):
    """Each token id has H*K different experts of N, drawn once; their gates are gate_scale / K.

    No parameters; state `table` int32 [V, H*K], the same for every layer.

    Attributes:
      experts: N.
      heads, top_k: H and K, of which the product counts, as of `ProductKeys` with its H*K experts and gates near 1/K.
      vocab_size: V.
      gate_scale: multiplies the gates.
      seed: of the table.
    """

    experts: int
    heads: int
    top_k: int
    vocab_size: int
    gate_scale: float = 1.0
    seed: int = 0

    @property
    def gate_square(self) -> float:
        """The sum of the squares of a token's gates."""
        return self.heads / self.top_k * self.gate_scale**2

    @nn.compact
    def __call__(self, x: jax.Array, inputs: RouterInputs) -> tuple[TokenChoice, dict, dict]:
        """x [T, D] -> (TokenChoice [T, H*K] of N experts, no losses, stats as of `ProductKeys` without a norm).

        Raises:
          ValueError: `inputs.token_ids` is missing.
        """
        token_ids = needed_token_ids(inputs, "the selector token_hash")
        draws = self.heads * self.top_k
        draw = lambda: jnp.asarray(distinct_hash_table(self.vocab_size, self.experts, draws, self.seed))
        table = self.variable("router_state", "table", draw).value
        valid, routed = usable_tokens(x, inputs)
        shares = jnp.full((x.shape[0], self.heads, self.top_k), 1 / self.top_k, accumulator(x.dtype))
        # A barrier: where XLA sees that all are equal it sums in another order in a loop over blocks than unrolled.
        shares = jax.lax.optimization_barrier(shares)
        gates = (self.gate_scale * shares).reshape(-1, draws)
        choice = token_choice(table[token_ids], gates, routed, self.experts)
        stats = retrieval_statistics(choice, shares, routed, routed | ~valid, self.experts, inputs.train)
        return choice, {}, sums(stats)


def _build(sizes: Sizes, peer: PeerConfig) -> TokenHash:
    return TokenHash(sizes.experts, peer.heads, sizes.top_k, sizes.vocab_size, peer.gate_scale, parent=None)


ROUTER = Router(build=_build)
