"""Multi-head attention: grouped queries, rotary positions, documents packed in a row, a cache for decoding.

`dot_product_attention` is the one place that decides which kernel runs, and says so in the log.
"""

import functools
import logging
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax import compat
from moe_jax.compat import BATCH_AXES
from moe_jax.layers.norms import RMSNorm
from moe_jax.layers.rotary import Rotary, apply_rotary

BACKENDS = ("auto", "xla", "cudnn", "splash")
# With the batch axes, those over which the splash kernel is mapped: the partitioner cannot look into it.
HEAD_AXES = ("tensor",)

_logger = logging.getLogger(__name__)


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far, in M slots a row. Rows may hold different numbers of tokens.

    Attributes:
      k: [B, M, G, W], after rotation.
      v: [B, M, G, W].
      segment_ids: int32 [B, M], 0 where the slot is empty.
      length: int32 [B], slots in use, the first ones. More than M: tokens did not fit and are missing.
    """

    k: jax.Array
    v: jax.Array
    segment_ids: jax.Array
    length: jax.Array


def init_cache(batch: int, length: int, kv_heads: int, head_width: int, dtype: Any = jnp.float32) -> KVCache:
    """An empty cache of one layer.

    Args:
      batch: rows B.
      length: slots M: the longest prompt plus the new tokens.
      kv_heads: key and value heads G.
      head_width: width W of a head.
      dtype: dtype of keys and values.

    Returns:
      A `KVCache`; every leaf starts with B, so that rows can be gathered (beam search).
    """
    kv = jnp.zeros((batch, length, kv_heads, head_width), dtype)
    return KVCache(kv, kv, jnp.zeros((batch, length), jnp.int32), jnp.zeros((batch,), jnp.int32))


def update_cache(cache: KVCache, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> tuple[KVCache, jax.Array]:
    """Appends the real tokens of each row; padding takes no slot, wherever it stands.

    Args:
      cache: the cache, M slots.
      k: [B, S, G, W].
      v: [B, S, G, W].
      segment_ids: int [B, S], 0 for padding.

    Returns:
      The new cache, and int32 [B, S], the slot of every token: M or more for padding and for tokens that did
      not fit.
    """
    slots = cache.k.shape[1]
    real = segment_ids > 0
    slot = cache.length[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
    slot = jnp.where(real, slot, slots)
    # Mapped over rows: the batch stays a batch dimension of the scatter, so the partitioner keeps it sharded.
    write = jax.vmap(lambda old, index, new: old.at[index].set(new.astype(old.dtype), mode="drop"))
    new = KVCache(
        write(cache.k, slot, k),
        write(cache.v, slot, v),
        write(cache.segment_ids, slot, segment_ids),
        cache.length + jnp.sum(real, axis=1, dtype=jnp.int32),
    )
    return new, slot


def segment_mask(query_segments: jax.Array, key_segments: jax.Array) -> jax.Array:
    """Who may look at whom: tokens of the same segment. Padding (0) looks at padding, so no row is empty.

    Args:
      query_segments: int [B, S].
      key_segments: int [B, M].

    Returns:
      bool [B, 1, S, M].
    """
    return (query_segments[:, :, None] == key_segments[:, None, :])[:, None]


def _cudnn_obstacle(platform: str, query: tuple, key: tuple, dtype, masked: bool, capability: str) -> str:
    """Why cuDNN's flash attention cannot run, or an empty string. The limits are those of jax.nn's checks."""
    # ROCm's devices, which JAX also calls "gpu", have capabilities such as "gfx90a".
    if platform not in ("gpu", "cuda") or not capability[:1].isdigit():
        return f"it needs an NVIDIA GPU, and the platform is {platform}"
    if float(capability) < 8:
        return f"it needs compute capability 8.0, and the GPU has {capability}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it needs bfloat16 or float16, and dtype={jnp.dtype(dtype).name}"
    limit = 256 if float(capability) >= 9 else 128
    if query[3] % 8 or query[3] > limit:
        return f"it needs a head width that is a multiple of 8 and at most {limit}, and head_width={query[3]}"
    if masked and (query[1] % 2 or key[1] % 2):
        return f"it needs even lengths with a mask, and there are {query[1]} queries and {key[1]} keys"
    return ""


def _splash_obstacle(platform: str, query: tuple, key: tuple, dtype, masked: bool, shards: int) -> str:
    """Why splash attention cannot run, or an empty string. `masked`: by more than segments and causality."""
    if platform != "tpu":
        return f"it needs a TPU, and the platform is {platform}"
    if masked or query[1] != key[1]:
        return "it takes segment ids but no mask, and as many keys as queries"
    if query[1] % 128:
        return f"it needs a length that is a multiple of 128, and S={query[1]}"
    if jnp.dtype(dtype).itemsize > 4:
        return f"it needs float32 or bfloat16, and dtype={jnp.dtype(dtype).name}"
    if query[0] % shards:
        return f"it needs a batch that is a multiple of the {shards} batch shards, and B={query[0]}"
    return ""


def choose_backend(
    backend: str,
    platform: str,
    query_shape: tuple[int, int, int, int],
    key_shape: tuple[int, int, int, int],
    dtype: Any,
    *,
    masked: bool = False,
    segmented: bool = False,
    capability: str = "",
    batch_shards: int = 1,
) -> tuple[str, str]:
    """The kernel for a call, and why.

    Args:
      backend: one of `BACKENDS`.
      platform: from `compat.target_platform`.
      query_shape: (B, S, H, W).
      key_shape: (B, M, G, W).
      dtype: of queries, keys and values.
      masked: whether a mask is given.
      segmented: whether segment ids are given.
      capability: compute capability of an NVIDIA GPU, such as "9.0".
      batch_shards: devices over which the batch is split.

    Returns:
      ("xla" | "cudnn" | "splash", reason).

    Raises:
      ValueError: `backend` is unknown, or names a kernel that cannot run this call.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention={backend!r} is unknown; use one of {', '.join(BACKENDS)}")
    if backend == "xla":
        return "xla", "requested"
    wanted = {"gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}.get(platform, "xla") if backend == "auto" else backend
    obstacle = ""
    if wanted == "cudnn":
        obstacle = _cudnn_obstacle(platform, query_shape, key_shape, dtype, masked or segmented, capability)
    elif wanted == "splash":
        obstacle = _splash_obstacle(platform, query_shape, key_shape, dtype, masked, batch_shards)
    if not obstacle:
        return wanted, "requested" if backend == wanted else f"the platform is {platform}"
    if backend == wanted:
        raise ValueError(f"attention={backend!r} cannot run here: {obstacle}; use attention='auto'")
    return "xla", f"{wanted} cannot run: {obstacle}"


@functools.cache
def _log_choice(choice: str, reason: str) -> None:
    """Says once per process and (choice, reason) which kernel runs."""
    _logger.info("attention kernel: %s (%s)", choice, reason)


def _compute_capability(platform: str) -> str:
    if platform not in ("gpu", "cuda") or jax.default_backend() != "gpu":
        return ""
    return str(getattr(jax.local_devices()[0], "compute_capability", ""))


def dot_product_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = True,
    segment_ids: jax.Array | None = None,
    mask: jax.Array | None = None,
    backend: str = "auto",
) -> jax.Array:
    """softmax(q k / sqrt(W)) v, with the softmax in float32.

    Query head h reads key and value head h // (H / G) (grouped queries, arXiv:2305.13245). A query that may
    look at nothing gets a finite value without a meaning.

    Args:
      q: [B, S, H, W].
      k: [B, M, G, W]; G divides H.
      v: [B, M, G, W].
      causal: position i looks at positions up to i, counted in the row.
      segment_ids: int [B, S], for M = S: tokens look only at their own segment. 0 is padding, which looks at
        padding.
      mask: bool, broadcastable to [B, H, S, M]: where a query may look; in addition to the others.
      backend: "xla" computes all S x M scores; "cudnn" is flash attention of NVIDIA GPUs (segments and masks
        become a bias [B, 1, S, M], so the memory is quadratic with them); "splash" is flash attention of
        TPUs; "auto" takes the platform's own where it can, else "xla", and logs why.

    Returns:
      [B, S, H, W] in the dtype of `q`.

    Raises:
      ValueError: `backend` is unknown, or names a kernel that cannot run this call.
    """
    platform, mesh = compat.target_platform(), compat.current_mesh()
    shards = 1 if compat.inside_shard_map(mesh) else compat.axis_size(mesh, *BATCH_AXES)
    kind, reason = choose_backend(
        backend,
        platform,
        q.shape,
        k.shape,
        q.dtype,
        masked=mask is not None,
        segmented=segment_ids is not None,
        capability=_compute_capability(platform),
        batch_shards=shards,
    )
    _log_choice(kind, reason)
    if kind == "splash":
        return splash_attention(q, k, v, causal=causal, segment_ids=segment_ids)
    if segment_ids is not None:
        same = segment_mask(segment_ids, segment_ids)
        mask = same if mask is None else mask & same
    # The library's own masked form is "xla" too: on 2 cores (B=16, S=256, W=32, value and gradient) an einsum
    # written out takes 0.98 of its time at H=G=4 and 1.13 at H=8, G=2.
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation=kind)


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = True,
    segment_ids: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`dot_product_attention` by JAX's TPU kernel, mapped over the batch and head axes of a mesh.

    Args:
      q: [B, S, H, W], S a multiple of 128.
      k: [B, S, G, W].
      v: [B, S, G, W].
      causal: as in `dot_product_attention`.
      segment_ids: as in `dot_product_attention`.
      interpret: emulates the kernel on any platform, slowly.

    Returns:
      [B, S, H, W] in the dtype of `q`.
    """
    if segment_ids is None:
        segment_ids = jnp.ones(q.shape[:2], jnp.int32)
    local = functools.partial(_local_splash, causal=causal, interpret=interpret)
    mesh = compat.current_mesh()
    if mesh is None or compat.inside_shard_map(mesh):
        return local(q, k, v, segment_ids)
    batch = tuple(name for name in BATCH_AXES if name in mesh.shape)
    heads = tuple(name for name in HEAD_AXES if name in mesh.shape)
    shards = compat.axis_size(mesh, *heads)
    if q.shape[2] % shards:
        heads, shards = (), 1  # every shard computes all heads
    if k.shape[2] % shards:
        # Fewer key heads than shards: a copy per query head, so that each shard has those of its queries.
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    rows = compat.PartitionSpec(batch or None, None, heads or None, None)
    # Without the replication check, which pallas_call does not pass; no output here is replicated.
    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, rows, rows, compat.PartitionSpec(batch or None)),
        out_specs=rows,
        check_vma=False,
    )
    return mapped(q, k, v, segment_ids)


def _local_splash(q, k, v, segment_ids, *, causal: bool, interpret: bool) -> jax.Array:
    # Imported here: only TPUs need it, and it pulls in Pallas.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads, width = q.shape[1:]
    block = next(size for size in (512, 256, 128) if length % size == 0)  # 512 as in MaxText; the default 128 is slow
    head_mask = masks.CausalMask((length, length)) if causal else masks.FullMask((length, length))
    kernel = kernels.make_splash_mha(
        mask=masks.MultiHeadMask([head_mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        interpret=interpret,
    )

    def row(q, k, v, segments):
        return kernel(q, k, v, segment_ids=kernels.SegmentIds(segments, segments))

    # The kernel wants heads first, and does not scale.
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * jnp.asarray(width**-0.5, q.dtype), k, v))
    return jnp.swapaxes(jax.vmap(row)(q, k, v, segment_ids), 1, 2).astype(q.dtype)


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
      backend: one of `BACKENDS`. Initialisation and calls with a cache always take "xla": a cache of rows
        with different lengths needs a general mask.
      dtype: compute dtype; the result has it.
      param_dtype: dtype of the parameters.
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
        earlier = jnp.arange(cache.k.shape[1]) <= slot[:, None, :, None]  # [B, 1, S, M]
        mask = earlier & segment_mask(segment_ids, cache.segment_ids)
        k, v = cache.k.astype(self.dtype), cache.v.astype(self.dtype)
        return dot_product_attention(q, k, v, causal=False, mask=mask, backend="xla"), cache

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
            weight = self._parameter("w_o", _fan_in((0, 1), 2), (*q.shape[2:], width), ("heads", "head", "embed"))
            y = y.reshape(-1, weight.shape[0] * weight.shape[1]) @ weight.reshape(-1, width)
            y = y.reshape(x.shape)
            if self.output_bias:
                y = y + self._parameter("b_o", nn.initializers.zeros_init(), (width,), ("embed",))
        return y, cache
