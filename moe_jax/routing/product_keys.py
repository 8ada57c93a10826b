"""Product-key retrieval: each head's K best of N experts by two sets of sqrt(N) keys (PEER, arXiv:2407.04153, 2.1)."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config.validate.common import check_product_keys
from moe_jax.ops.norms import batch_norm, layer_norm, moments
from moe_jax.ops.product_keys import product_search
from moe_jax.routing.contract import score_by_kernel, token_choice
from moe_jax.routing.statistics import sums, token_statistics
from moe_jax.types import RouterInputs, TokenChoice

NORMS = ("batchnorm", "layernorm", "none")


class ProductKeys(nn.Module):
    """H heads choose K of N experts each for a token; the gates of a head sum to 1.

    Parameters: `kernel` [D, H*key_width], the query network; `keys` [2, n, key_width/2], n = sqrt(N), or with keys of each
    head [H, 2, n, key_width/2]; of the norm `scale` and `bias` [H*key_width]. State of "batchnorm": `mean` and `variance`
    [H*key_width], used in evaluation.

    Attributes:
      experts: N, a square.
      heads: H.
      top_k: K of each head.
      key_width: width of a query; even.
      share_keys: all heads search the same keys, as in the paper's text; False: each head its own, as in public code.
      query_norm: "batchnorm" over the real tokens of the call, all devices together (the paper's); "layernorm" over each
        head's query; "none".
    """

    experts: int
    heads: int = 8
    top_k: int = 16
    key_width: int = 256
    share_keys: bool = True
    query_norm: str = "batchnorm"
    norm_epsilon: float = 1e-5
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, inputs: RouterInputs) -> tuple[TokenChoice, dict, dict]:
        """x [T, D] -> (TokenChoice [T, H*K] of N experts, no losses, stats). Maths in float32 at least.

        stats: tokens, entropy_sum (nats, a mean over heads), nonfinite; in training with "batchnorm" query_sum and
        query_square_sum [H*key_width], of the distances to the running mean; in evaluation mass [N], the sum of the
        gates of each expert.

        Raises:
          ValueError: N is no square, key_width is odd, K is above sqrt(N), or the norm is unknown.
        """
        n, half = math.isqrt(self.experts), self.key_width // 2
        check_product_keys("ProductKeys ", self.experts, self.top_k, self.key_width)
        if self.query_norm not in NORMS:
            raise ValueError(f"query_norm={self.query_norm!r}: one of {', '.join(NORMS)}")
        width = self.heads * self.key_width
        scored = score_by_kernel(self, x, inputs, width)
        queries, stats = self._norm(scored.logits, scored.routed, inputs.train)
        queries = queries.reshape(-1, self.heads, 2, half)
        # So that a half's score has the variance 1/3 where queries have 1 (Lample et al., arXiv:1907.05242).
        init = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -1, 1) / math.sqrt(half)
        own = () if self.share_keys else (self.heads,)
        keys = self.param(
            "keys", nn.with_logical_partitioning(init, (None,) * (len(own) + 3)), (*own, 2, n, half), self.param_dtype
        ).astype(queries.dtype)
        scores, ids = product_search(queries, keys, self.top_k)
        gates = jax.nn.softmax(scores, axis=-1)
        routed, flat = scored.routed, (x.shape[0], self.heads * self.top_k)
        entropy = token_statistics(gates.reshape(-1, self.top_k), jnp.repeat(routed, self.heads), scored.finite)
        stats |= entropy | {"tokens": jnp.sum(routed), "entropy_sum": entropy["entropy_sum"] / self.heads}
        choice = token_choice(ids.reshape(flat), gates.reshape(flat), routed, self.experts)
        if not inputs.train:
            stats["mass"] = jnp.zeros(self.experts, gates.dtype).at[choice.expert_ids].add(choice.gates, mode="drop")
        return choice, {}, sums(stats)

    def _norm(self, queries, routed, train):
        """(normalised queries [T, H*key_width], what the running statistics learn from)."""
        if self.query_norm == "none":
            return queries, {}
        width = queries.shape[-1]

        def parameter(name, init):
            init = nn.with_logical_partitioning(init, ("norm",))
            return self.param(name, init, (width,), self.param_dtype)

        scale, bias = parameter("scale", nn.initializers.ones_init()), parameter("bias", nn.initializers.zeros_init())
        if self.query_norm == "layernorm":
            by_head = lambda a: a.reshape(-1, self.heads, self.key_width)
            return layer_norm(by_head(queries), by_head(scale), by_head(bias), self.norm_epsilon).reshape(-1, width), {}
        mean = self.variable("router_state", "mean", jnp.zeros, (width,), jnp.float32)
        variance = self.variable("router_state", "variance", jnp.ones, (width,), jnp.float32)
        if not train:
            return batch_norm(queries, mean.value, variance.value, scale, bias, self.norm_epsilon), {}
        # Barriers: fused with what stands around them, sums over tokens round differently in a loop over blocks and unrolled.
        queries = jax.lax.optimization_barrier(queries)
        of_batch = jax.lax.optimization_barrier(moments(queries, routed))
        # Sums of distances to the running mean: plain sums would lose all digits of the variance where the mean is large.
        moved = jnp.where(routed[:, None], queries - mean.value.astype(queries.dtype), 0)
        stats = {"query_sum": jnp.sum(moved, axis=0), "query_square_sum": jnp.sum(jnp.square(moved), axis=0)}
        return batch_norm(queries, *of_batch, scale, bias, self.norm_epsilon), stats


def update(state: dict[str, jax.Array], stats: dict[str, jax.Array], momentum: float = 0.1) -> dict[str, jax.Array]:
    """The running statistics after one optimizer step, from the statistics summed over it.

    The variance is that of the whole step with Bessel's correction, as in torch's BatchNorm1d.

    Args:
      state: `mean` and `variance` of a `ProductKeys`; empty: there is none.
      stats: as it returned them in training.
      momentum: weight of the step.
    """
    if not state:
        return state
    tokens = stats["tokens"][..., None]
    moved = stats["query_sum"] / jnp.maximum(tokens, 1)
    mean = state["mean"] + moved
    variance = jnp.maximum(stats["query_square_sum"] - tokens * moved * moved, 0) / jnp.maximum(tokens - 1, 1)
    mix = lambda old, new: jnp.where(tokens > 0, (1 - momentum) * old + momentum * new, old)
    return {"mean": mix(state["mean"], mean), "variance": mix(state["variance"], variance)}


def usage(mass: np.ndarray) -> dict[str, float]:
    """How evenly experts are used (PEER, section 3.3), from the gates that each of N got over a whole data set.

    Args:
      mass: [N].

    Returns:
      `usage`, the share of experts with any, and `unevenness`, the divergence of the shares from the uniform distribution in
      nats: 0 if all have the same, log N if one has all. NaN where there is no mass.
    """
    mass = np.asarray(mass, np.float64)
    total = mass.sum()
    if not total > 0:
        return {"usage": 0.0, "unevenness": math.nan}
    share = mass[mass > 0] / total
    return {"usage": len(share) / len(mass), "unevenness": float(math.log(len(mass)) + np.sum(share * np.log(share)))}
