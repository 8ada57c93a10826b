"""Multi-head attention: grouped queries, rotary positions, documents packed in a row, a cache for decoding."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.layers.attention_kernels import cached_attention, dot_product_attention, segment_mask
from moe_jax.layers.initializers import scaled
from moe_jax.layers.kv_cache import KVCache, update_cache
from moe_jax.layers.norms import RMSNorm
from moe_jax.layers.rotary import Rotary, apply_rotary


def _fan_in(in_axis: int | tuple[int, ...], out_axis: int | tuple[int, ...]):
    return nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=in_axis, out_axis=out_axis)


class Attention(nn.Module):
    """Self-attention with its projections.

    Parameters: `w_q` [D, H, W], `w_k` and `w_v` [D, G, W], `w_o` [H, W, D]; with `qkv_bias` `b_q` [H, W],
    `b_k` and `b_v` [G, W]; with `output_bias` `b_o` [D]; with `qk_norm` `q_norm/scale`, `k_norm/scale` [W].

    Attributes:
      heads: query heads H.
      kv_heads: key and value heads G; 0: H.
      head_width: width W of a head; 0: D / H.
      rotary: rotary positions; None: no positions in this layer.
      qk_norm: RMSNorm over each head's query and key, before the rotation (arXiv:2302.05442, Qwen3).
      norm_epsilon: of `qk_norm`.
      qkv_bias: biases of the query, key and value projections.
      output_bias: bias of the output projection.
      causal: whether a token sees only those before it.
      backend: one of `BACKENDS`. Initialisation always takes "xla", and calls with a cache `cached_attention`: a cache of
        rows with different lengths needs a general mask.
      dtype: compute dtype; the result has it.
      param_dtype: dtype of the parameters.
      output_init: factor on the standard deviation with which `w_o` starts.
    """

    heads: int
    kv_heads: int = 0
    head_width: int = 0
    rotary: Rotary | None = None
    qk_norm: bool = False
    norm_epsilon: float = 1e-6
    qkv_bias: bool = False
    output_bias: bool = False
    causal: bool = True
    backend: str = "auto"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    output_init: float = 1.0

    def _parameter(self, name: str, init, shape: tuple[int, ...], axes: tuple[str, ...]) -> jax.Array:
        return self.param(name, nn.with_logical_partitioning(init, axes), shape, self.param_dtype).astype(self.dtype)

    def _heads(self, x: jax.Array, name: str, heads: int, axis: str) -> jax.Array:
        """Projects x [B, S, D] to [B, S, heads, W], normalised where the options say so."""
        width = self.head_width or x.shape[-1] // self.heads
        weight = self._parameter(f"w_{name}", _fan_in(0, (1, 2)), (x.shape[-1], heads, width), ("embed", axis, "head"))
        # With one axis of tokens XLA's products and their gradients take less time on a CPU.
        y = x.reshape(-1, x.shape[-1]) @ weight.reshape(x.shape[-1], heads * width)
        y = y.reshape(*x.shape[:2], heads, width)
        if self.qkv_bias:
            y = y + self._parameter(f"b_{name}", nn.initializers.zeros_init(), (heads, width), (axis, "head"))
        if self.qk_norm and name != "v":
            y = RMSNorm(self.norm_epsilon, self.dtype, self.param_dtype, axis_name="head", name=f"{name}_norm")(y)
        return y

    def _attend(self, q, k, v, segment_ids, cache: KVCache | None) -> tuple[jax.Array, KVCache | None]:
        if cache is None:
            backend = "xla" if self.is_initializing() else self.backend
            return dot_product_attention(q, k, v, causal=self.causal, segment_ids=segment_ids, backend=backend), None
        if segment_ids is None:
            segment_ids = jnp.ones(q.shape[:2], jnp.int32)
        cache, slot = update_cache(cache, k, v, segment_ids)
        earlier = jnp.arange(cache.segment_ids.shape[1]) <= slot[:, None, :, None]  # [B, 1, S, M]
        mask = earlier & segment_mask(segment_ids, cache.segment_ids)
        return cached_attention(q, cache.k.astype(self.dtype), cache.v.astype(self.dtype), mask), cache

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Applies the layer.

        Args:
          x: [B, S, D] of any float dtype.
          positions: int [B, S], for the rotation: counted in a document; with a cache, on from the prompt.
          segment_ids: int [B, S], the document of each token, 0 for padding; None: one document, no padding.
          cache: what the earlier tokens left, from `init_cache` or the last call; None: x is all there is.
            The x of a row follow its cached tokens; padding among them takes no slot.

        Returns:
          y [B, S, D] of `dtype`, and the cache with these tokens (None without one).

        Raises:
          ValueError: the heads do not divide D or each other, a cache without `causal`, `backend` cannot run.
        """
        kv_heads = self.kv_heads or self.heads
        if self.heads % kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={kv_heads}")
        if not self.head_width and x.shape[-1] % self.heads:
            raise ValueError(f"width={x.shape[-1]} must be a multiple of heads={self.heads}; or set head_width")
        if cache is not None and not self.causal:
            raise ValueError("a cache needs causal=True: later tokens would have changed the cached ones")
        width, x = x.shape[-1], x.astype(self.dtype)
        with jax.named_scope("attention"):
            q = self._heads(x, "q", self.heads, "heads")
            k = self._heads(x, "k", kv_heads, "kv_heads")
            v = self._heads(x, "v", kv_heads, "kv_heads")
            if self.rotary is not None:
                frequencies = self.rotary.frequencies(q.shape[-1])
                q, k = (apply_rotary(y, positions, frequencies) for y in (q, k))
            y, cache = self._attend(q, k, v, segment_ids, cache)
            init = scaled(_fan_in((0, 1), 2), self.output_init)
            weight = self._parameter("w_o", init, (*q.shape[2:], width), ("heads", "head", "embed"))
            y = y.reshape(-1, weight.shape[0] * weight.shape[1]) @ weight.reshape(-1, width)
            y = y.reshape(x.shape)
            if self.output_bias:
                y = y + self._parameter("b_o", nn.initializers.zeros_init(), (width,), ("embed",))
        return y, cache
