"""Product-key retrieval: each head's K best of N experts by two sets of sqrt(N) keys (PEER, arXiv:2407.04153, 2.1)."""

import math
import statistics
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import PeerConfig
from moe_jax.config.arguments import check_arguments
from moe_jax.config.validate.common import check_product_keys
from moe_jax.ops.norms import batch_norm, layer_norm, moments
from moe_jax.ops.product_keys import product_search
from moe_jax.routing.contract import Router, Sizes, score_by_kernel, token_choice
from moe_jax.routing.statistics import retrieval_statistics, sums
from moe_jax.types import RouterInputs, TokenChoice

NORMS = ("batchnorm", "layernorm", "none")
# Gates of a head from the scores [..., K] of its experts.
GATES = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid, "raw": lambda scores: scores}
FIELDS = {name: (PeerConfig, name) for name in ("score", "gate_scale", "query_rank")}


class ProductKeys(nn.Module):
    """H heads choose K of N experts each for a token; by default the gates of a head sum to 1.

    Parameters: `kernel` [D, H*key_width], the query network; `keys` [2, n, key_width/2], n = sqrt(N), or with keys of each
    head [H, 2, n, key_width/2]; of the norm `scale` and `bias` [H*key_width]. State of "batchnorm": `mean` and `variance`
    [H*key_width], used in evaluation. With `query_rank` r there is one query: r stands for H*key_width, and for key_width.

    Attributes:
      experts: N, a square.
      heads: H.
      top_k: K of each head.
      key_width: width of a query; even.
      share_keys: all heads search the same keys, as in the paper's text; False: each head its own, as in public code.
      query_norm: "batchnorm" over the real tokens of the call, all devices together (the paper's); "layernorm" over each
        head's query; "none".
      query_rank: width r of one query that all heads share, even; needs keys of each head. 0: each head has its own.
      score: the gates of a head from the scores of its K experts: "softmax" over them, "sigmoid" of each, or "raw", the scores
        themselves, of either sign.
      gate_scale: multiplies the gates.
    """

    experts: int
    heads: int = 8
    top_k: int = 16
    key_width: int = 256
    share_keys: bool = True
    query_norm: str = "batchnorm"
    norm_epsilon: float = 1e-5
    param_dtype: Any = jnp.float32
    query_rank: int = 0
    score: str = "softmax"
    gate_scale: float = 1.0

    @property
    def gate_square(self) -> float:
        """About the sum of the squares of a token's gates at the start, where queries have variance 1.

        A softmax is near 1/K. The scores of other gates are those of `first_scores`.
        """
        scores = first_scores(math.isqrt(self.experts), self.top_k)
        squares = {"softmax": 1 / self.top_k, "sigmoid": np.sum((1 + np.exp(-scores)) ** -2), "raw": np.sum(scores**2)}
        return float(self.heads * squares[self.score] * self.gate_scale**2)

    @nn.compact
    def __call__(self, x: jax.Array, inputs: RouterInputs) -> tuple[TokenChoice, dict, dict]:
        """x [T, D] -> (TokenChoice [T, H*K] of N experts, no losses, stats). Maths in float32 at least.

        stats: tokens, entropy_sum (nats, a mean over heads), nonfinite; in training with "batchnorm" query_sum and
        query_square_sum [H*key_width], of the distances to the running mean; in evaluation mass [N], the sum of the
        absolute gates of each expert. The entropy is that of the absolute gates of a head, divided by their sum.

        Raises:
          ValueError: N is no square, key_width or query_rank is odd, K is above sqrt(N), one query meets shared keys, or the
            norm or the score is unknown.
        """
        check_arguments("ProductKeys", vars(self), FIELDS)
        check_product_keys("ProductKeys ", self.experts, self.top_k, self.key_width, self.share_keys, self.query_rank)
        if self.query_norm not in NORMS:
            raise ValueError(f"query_norm={self.query_norm!r}: one of {', '.join(NORMS)}")
        n, half = math.isqrt(self.experts), self._query_width // 2
        scored = score_by_kernel(self, x, inputs, self._queries * self._query_width)
        queries, stats = self._norm(scored.logits, scored.routed, inputs.train)
        queries = jnp.broadcast_to(queries.reshape(-1, self._queries, 2, half), (x.shape[0], self.heads, 2, half))
        # So that a half's score has the variance 1/3 where queries have 1 (Lample et al., arXiv:1907.05242).
        init = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -1, 1) / math.sqrt(half)
        own = () if self.share_keys else (self.heads,)
        keys = self.param(
            "keys", nn.with_logical_partitioning(init, (None,) * (len(own) + 3)), (*own, 2, n, half), self.param_dtype
        ).astype(queries.dtype)
        scores, ids = product_search(queries, keys, self.top_k)
        gates = GATES[self.score](scores)
        routed, flat = scored.routed, (x.shape[0], self.heads * self.top_k)
        shares = gates if self.score == "softmax" else _shares(gates)
        gates = gates if self.gate_scale == 1 else gates * self.gate_scale
        choice = token_choice(ids.reshape(flat), gates.reshape(flat), routed, self.experts)
        stats |= retrieval_statistics(choice, shares, routed, scored.finite, self.experts, inputs.train)
        return choice, {}, sums(stats)

    @property
    def _queries(self):
        """How many queries a token has."""
        return 1 if self.query_rank else self.heads

    @property
    def _query_width(self):
        return self.query_rank or self.key_width

    def _norm(self, queries, routed, train):
        """(normalised queries [T, H*key_width], or [T, r] of one; what the running statistics learn from)."""
        if self.query_norm == "none":
            return queries, {}
        width = queries.shape[-1]

        def parameter(name, init):
            init = nn.with_logical_partitioning(init, ("norm",))
            return self.param(name, init, (width,), self.param_dtype)

        scale, bias = parameter("scale", nn.initializers.ones_init()), parameter("bias", nn.initializers.zeros_init())
        if self.query_norm == "layernorm":
            by_head = lambda a: a.reshape(-1, self._queries, self._query_width)
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


def _shares(gates: jax.Array) -> jax.Array:
    sizes = jnp.abs(gates)
    return sizes / jnp.maximum(jnp.sum(sizes, axis=-1, keepdims=True), jnp.finfo(sizes.dtype).tiny)


def first_scores(n: int, top_k: int) -> np.ndarray:
    """About the K best scores of a head at the start, best first, where queries have variance 1.

    The scores of a half are then near normal with variance 1/3, and the best i-th of n such is expected near the quantile
    1 - (i - 3/8) / (n + 1/4) (Blom 1958). A head's are the K largest sums of two.
    """
    normal = statistics.NormalDist(0, math.sqrt(1 / 3))
    best = np.array([normal.inv_cdf(1 - (i + 0.625) / (n + 0.25)) for i in range(top_k)])
    return np.sort(np.add.outer(best, best), axis=None)[::-1][:top_k]


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
      mass: [N], sums of absolute gates.

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


def _build(sizes: Sizes, peer: PeerConfig) -> ProductKeys:
    return ProductKeys(
        sizes.experts,
        peer.heads,
        sizes.top_k,
        peer.key_width,
        peer.share_keys,
        peer.query_norm,
        query_rank=peer.query_rank,
        score=peer.score,
        gate_scale=peer.gate_scale,
        parent=None,
    )


ROUTER = Router(build=_build, update=lambda state, step, sizes, peer: update(state, step.stats))
