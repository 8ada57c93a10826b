"""Hash layers: the expert is a table's entry for the token id, without parameters (arXiv:2106.04426)."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config.routers import HashConfig
from moe_jax.ops.hash_table import balanced_hash_table, random_hash_table
from moe_jax.ops.precision import accumulator
from moe_jax.routing.contract import Router, Sizes, needed_token_ids, usable_tokens
from moe_jax.routing.statistics import choice_statistics
from moe_jax.types import RouterInputs, TokenChoice


class Hash(nn.Module):
    """The router `hash`: no parameters; state `table` int32 [vocab_size], random until `start` balances it."""

    experts: int
    vocab_size: int
    options: HashConfig = HashConfig()

    @nn.compact
    def __call__(self, x: jax.Array, inputs: RouterInputs) -> tuple[TokenChoice, dict, dict]:
        """x [T, D] -> (TokenChoice with K = 1 and gates of 1, no losses, stats).

        Raises:
          ValueError: `inputs.token_ids` is missing.
        """
        token_ids = needed_token_ids(inputs, "the router hash")
        table = self.variable(
            "router_state", "table", lambda: jnp.asarray(random_hash_table(self.vocab_size, self.experts, self.options.seed))
        ).value
        valid, routed = usable_tokens(x, inputs)
        ids = jnp.where(routed, table[token_ids], self.experts)[:, None]
        gates = routed[:, None].astype(accumulator(x.dtype))
        certain = jax.nn.one_hot(ids[:, 0], self.experts, dtype=gates.dtype)
        stats = choice_statistics(ids, certain, routed, routed | ~valid, self.experts)
        return TokenChoice(ids, gates), {}, stats


def start(state: dict, token_shares: Callable[[], np.ndarray], sizes: Sizes, options: HashConfig) -> dict:
    """The state with a table balanced over the training text, if the options ask for one."""
    if options.table == "random":
        return state
    counts = np.rint(np.asarray(token_shares()) * 2**40)  # whole, and 0 for ids that never occur
    return {"table": balanced_hash_table(counts, sizes.experts, options.seed)}


ROUTER = Router(
    build=lambda sizes, options: Hash(sizes.experts, sizes.vocab_size, options, parent=None), start=start, by_token=True
)
