"""Attention of queries, keys and values by the kernel that fits; `dot_product_attention` chooses it and logs why."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import compat
from moe_jax.compat import BATCH_AXES
from moe_jax.ops.precision import batched_product

BACKENDS = ("auto", "xla", "cudnn", "splash")
# With the batch axes, those over which the splash kernel is mapped: the partitioner cannot look into it.
HEAD_AXES = ("tensor",)

_logger = logging.getLogger(__name__)


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


def cached_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """`dot_product_attention` over a cache, whose heads come before its slots, in plain products.

    On 2 cores, for 64 rows of 144 slots of 4 heads of 64, `jax.nn.dot_product_attention` takes three times as long: it wants
    the slots before the heads, and then every token moves all of the cache.

    Args:
      q: [B, S, H, W].
      k, v: [B, G, M, W]; G divides H.
      mask: bool [B, 1, S, M], where a query may look. One that may look at nothing gets a finite value without a meaning.

    Returns:
      [B, S, H, W] in the dtype of `q`.
    """
    (batch, length, heads, width), (kv_heads, slots) = q.shape, k.shape[1:3]
    groups = q.reshape(batch, length, kv_heads, heads // kv_heads, width)
    rows = groups.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, width)
    scores = batched_product("BGQW,BGMW->BGQM", rows, k).reshape(batch, heads, length, slots) * width**-0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min), axis=-1).astype(v.dtype)
    y = batched_product("BGQM,BGMW->BGQW", weights.reshape(*rows.shape[:3], slots), v)
    y = y.reshape(batch, kv_heads, heads // kv_heads, length, width).transpose(0, 3, 1, 2, 4)
    return y.reshape(q.shape).astype(q.dtype)


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
