"""Retrieval on NVIDIA GPUs: a Pallas kernel that Triton compiles; interpreted (slowly) on any other platform.

There is one program a token. It goes through the token's places a few at a time, loads those experts, whose rows of
D values lie side by side in memory, and keeps x and the sum in registers. Widths that are no power of two are
masked; addresses of tables beyond 4 GiB are computed in 64 bits. See `fused` for what it computes.
"""

import functools

import jax
import jax.numpy as jnp

from moe_jax import compat
from moe_jax.ops.retrieval import fused

# Values of one row of all experts that a program holds at once, and of them in one warp of 32 threads.
TILE, WARP = 4096, 1024
MOST_WARPS = 16


def run(x, ids, pairs, table, *, outputs, inner, project, combine):
    """See `fused`."""
    pl, triton = compat.pallas(), compat.pallas("triton")
    (tokens, retrieved), (experts, _, width) = ids.shape, table.shape
    block = pl.next_power_of_2(width)
    places = max(1, min(TILE // block, 32, pl.next_power_of_2(retrieved)))
    given = [*([x] if project else []), ids, *pairs]

    def kernel(*refs):
        refs, table_ref, outs = list(refs[: len(given)]), refs[len(given)], refs[len(given) + 1 :]
        x_ref, ids_ref, pair_refs = (refs.pop(0) if project else None), refs[0], refs[1:]
        token, columns = pl.program_id(0), jnp.arange(block)
        inside = columns < width
        if project:
            vector = triton.load(x_ref.at[token, columns], mask=inside, other=0).astype(jnp.float32)

        def step(i, total):
            place = i * places + jnp.arange(places)
            there = place < retrieved
            pick = lambda ref, other: triton.load(ref.at[token, place], mask=there, other=other)
            which = pick(ids_ref, experts)
            here = which < experts
            which, mask = jnp.where(here, which, 0)[:, None], here[:, None] & inside[None, :]

            rows = {
                m: triton.load(table_ref.at[which, m, columns[None, :]], mask=mask, other=0).astype(jnp.float32)
                for m in (*project, *combine)
            }
            dots = tuple(jnp.sum(rows[m] * vector[None, :], axis=1) for m in project)
            values, weights = inner(dots, tuple(pick(ref, 0) for ref in pair_refs))
            for ref, value in zip(outs[len(outs) - outputs :], values, strict=True):
                triton.store(ref.at[token, place], value, mask=there)
            for m, weight in zip(combine, weights, strict=True):
                total += weight[:, None] * rows[m]
            return total

        start = jnp.zeros((places, block) if combine else (), jnp.float32)
        total = jax.lax.fori_loop(0, pl.cdiv(retrieved, places), step, start)
        if combine:
            triton.store(outs[0].at[token, columns], jnp.sum(total, axis=0), mask=inside)

    shapes = [jax.ShapeDtypeStruct((tokens, width), jnp.float32)] * bool(combine)
    shapes += [jax.ShapeDtypeStruct((tokens, retrieved), jnp.float32)] * outputs
    results = pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid=(tokens,),
        name="retrieval",
        compiler_params=triton.CompilerParams(num_warps=min(MOST_WARPS, max(1, places * block // WARP))),
        interpret=compat.target_platform() not in ("gpu", "cuda", "rocm"),
    )(*given, table)
    return (results[0], tuple(results[1:])) if combine else (None, tuple(results))


forward = functools.partial(fused.forward, run)
backward = functools.partial(fused.backward, run)
