"""BASE layers: in training every expert gets equally many tokens, at the highest total affinity (arXiv:2103.16716)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax import compat
from moe_jax.config.routers import BaseConfig
from moe_jax.ops.balanced_assignment import balanced_assignment
from moe_jax.routing.contract import Router, best, score_by_kernel
from moe_jax.routing.statistics import choice_statistics
from moe_jax.types import RouterInputs, TokenChoice

KERNEL_INIT = nn.initializers.orthogonal(0.1)


class Base(nn.Module):
    """The router `base`: parameter `kernel` [D, E], the experts' embeddings.

    In training the tokens of a microbatch are balanced together, or each of `groups` equal parts of it by itself. A
    device holds the affinities of whole parts. With one part every device gets all 4 T E bytes of affinities, once. With
    as many parts as the batch has shards no affinity is sent; the parts run their rounds in step, and all-reduce one
    flag after each. In evaluation each token takes its best expert. The gate is the sigmoid of the affinity; the router
    learns by it alone.
    """

    experts: int
    options: BaseConfig = BaseConfig()
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, inputs: RouterInputs) -> tuple[TokenChoice, dict, dict]:
        """x [T, D] -> (TokenChoice with K = 1, no losses, stats).

        Raises:
          ValueError: `groups` does not divide T.
        """
        logits, routed, finite = score_by_kernel(self, x, inputs, self.experts, init=KERNEL_INIT)
        own = lambda: self._balanced(jax.lax.stop_gradient(logits), routed)[:, None] if inputs.train else best(logits, 1)
        # A branch: no auction is held over experts that are given.
        ids = own() if inputs.given is None else jax.lax.cond(inputs.given.use, lambda: inputs.given.expert_ids, own)
        ids = jnp.where(routed[:, None], ids, self.experts)
        gates = jax.nn.sigmoid(jnp.take_along_axis(logits, jnp.minimum(ids, self.experts - 1), axis=-1))
        stats = choice_statistics(ids, jax.nn.softmax(logits, axis=-1), routed, finite, self.experts)
        return TokenChoice(ids, jnp.where(routed[:, None], gates, 0)), {}, stats

    def _balanced(self, logits, routed):
        tokens, groups = logits.shape[0], self.options.groups
        if tokens % groups:
            raise ValueError(f"base.groups={groups} does not divide the {tokens} tokens of a microbatch")
        logits, routed = logits.reshape(groups, -1, self.experts), routed.reshape(groups, -1)
        # Every device gets its part's affinities before the first round. Otherwise each round would send them.
        logits = compat.constrain(logits, compat.BATCH_AXES, (), ())
        routed = compat.constrain(routed, compat.BATCH_AXES, ())
        return jax.vmap(lambda *part: balanced_assignment(*part).expert_ids)(logits, routed).reshape(-1)


ROUTER = Router(build=lambda sizes, options: Base(sizes.experts, options, parent=None))
