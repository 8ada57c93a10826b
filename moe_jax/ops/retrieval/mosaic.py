"""Retrieval on TPUs: a Pallas kernel that Mosaic compiles; interpreted (slowly) on any other platform.

A program takes a few tokens, whose ids lie in scalar memory. While it works on the experts of one token, those of
the next are on their way from HBM to VMEM, a copy of [M, D] values for each, all at once; an expert is always
fetched whole. D is a multiple of 128. See `fused` for what it computes; products are in float32, or in bfloat16 with
sums in float32 where x and the table are.

Of M = 3 rows the compiler makes a copy of the table, in rows of four, once a call of the program: outside of kernels XLA keeps
[N, 3, D] with N inside (libtpu 0.0.42), and copies it for `blocks` too.
"""

import functools
import math

import jax
import jax.numpy as jnp

from moe_jax import compat
from moe_jax.ops.retrieval import fused

TOKENS = 16  # of a program: the rows of a tile of 16-bit values
BUFFER_BYTES = 2**21  # of the experts of one token; there are two such buffers, in the 16 MiB of VMEM of the smallest chips
LANES = 128


def run(x, ids, pairs, table, *, outputs, inner, project, combine):
    """See `fused`.

    Raises:
      ValueError: D is no multiple of 128.
    """
    pl, tpu = compat.pallas(), compat.pallas("tpu")
    (tokens, retrieved), (experts, rows, width) = ids.shape, table.shape
    if width % LANES:
        raise ValueError(f"retrieval backend mosaic: width {width} is no multiple of {LANES}; use the backend blocks")
    expert_bytes = -(-rows // 2) * 2 * width * table.dtype.itemsize
    parts = -(-retrieved // max(8, BUFFER_BYTES // expert_bytes))
    places = -(-retrieved // parts)  # of a part of a token's experts, which are in VMEM at once
    padded, many = -(-tokens // TOKENS) * TOKENS, TOKENS * parts
    # Where both are narrow, products are too; x travels wide, as a single row of it is half a word.
    native = jnp.bfloat16 if table.dtype == jnp.bfloat16 and (x is None or x.dtype == jnp.bfloat16) else jnp.float32

    def split(array, fill=0):
        """[T, R] -> [T parts, places]."""
        wide = ((0, padded - tokens), (0, parts * places - retrieved))
        return jnp.pad(array, wide, constant_values=fill).reshape(padded * parts, places)

    def kernel(ids_ref, *refs):
        x_ref, pair_refs = (refs[0] if project else None), refs[bool(project) : bool(project) + len(pairs)]
        table_ref, *outs, buffer, semaphores = refs[bool(project) + len(pairs) :]

        def fetch(part, slot, start):
            def fetch_expert(place, _):
                expert = ids_ref[part, place]
                copy = tpu.make_async_copy(
                    table_ref.at[jnp.minimum(expert, experts - 1)], buffer.at[slot, place], semaphores.at[slot]
                )
                pl.when(expert < experts)(copy.start if start else copy.wait)
                if start:

                    @pl.when(expert >= experts)
                    def _():
                        buffer[slot, place] = jnp.zeros((rows, width), buffer.dtype)

                return 0

            jax.lax.fori_loop(0, places, fetch_expert, 0)

        fetch(0, 0, start=True)

        def step(part, _):
            slot, token = part % 2, part // parts
            pl.when(part + 1 < many)(lambda: fetch(part + 1, 1 - slot, start=True))
            fetch(part, slot, start=False)
            row = lambda m: buffer[slot, :, m, :].astype(native)
            dots = tuple(_dot(x_ref[pl.ds(token, 1)].astype(native), row(m), 1) for m in project)
            values, weights = inner(dots, tuple(ref[pl.ds(part, 1)] for ref in pair_refs))
            for ref, value in zip(outs[len(outs) - outputs :], values, strict=True):
                ref[pl.ds(part, 1)] = value
            if combine:
                y = sum(_dot(weight.astype(native), row(m), 0) for m, weight in zip(combine, weights, strict=True))
                if parts > 1:
                    y += jnp.where(part % parts == 0, 0, outs[0][pl.ds(token, 1)])
                outs[0][pl.ds(token, 1)] = y
            return 0

        jax.lax.fori_loop(0, many, step, 0)

    of_token = pl.BlockSpec((TOKENS, width), lambda i: (i, 0))
    of_pair = pl.BlockSpec((many, places), lambda i: (i, 0))
    given = [jnp.pad(x, ((0, padded - tokens), (0, 0))).astype(jnp.float32)] if project else []
    shapes = [jax.ShapeDtypeStruct((padded, width), jnp.float32)] * bool(combine)
    shapes += [jax.ShapeDtypeStruct((padded * parts, places), jnp.float32)] * outputs
    inputs = [split(ids, experts), *given, *map(split, pairs)]
    moved = sum(math.prod(a.shape) * a.dtype.itemsize for a in (*inputs, *shapes))
    results = pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid=(padded // TOKENS,),
        name="retrieval",
        in_specs=[
            pl.BlockSpec((many, places), lambda i: (i, 0), memory_space=tpu.SMEM),
            *[of_token] * len(given),
            *[of_pair] * len(pairs),
            pl.BlockSpec(memory_space=pl.ANY),
        ],
        out_specs=[of_token] * bool(combine) + [of_pair] * outputs,
        scratch_shapes=[tpu.VMEM((2, places, rows, width), table.dtype), tpu.SemaphoreType.DMA((2,))],
        cost_estimate=pl.CostEstimate(
            flops=2 * ids.size * width * (len(project) + len(combine)),
            transcendentals=ids.size * len(project),
            bytes_accessed=moved + ids.size * rows * width * table.dtype.itemsize,
        ),
        interpret=compat.target_platform() != "tpu",
    )(*inputs, table)
    y, results = (results[0][:tokens], results[1:]) if combine else (None, results)
    return y, tuple(a.reshape(padded, -1)[:tokens, :retrieved] for a in results)


def _dot(a, rows, axis):
    """[1, C] or [1, D] with [C, D]: the sum over `axis` of the rows, in float32."""
    precision = jax.lax.Precision.HIGHEST if rows.dtype == jnp.float32 else None
    numbers = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(a, rows, numbers, precision=precision, preferred_element_type=jnp.float32)


forward = functools.partial(fused.forward, run)
backward = functools.partial(fused.backward, run)
