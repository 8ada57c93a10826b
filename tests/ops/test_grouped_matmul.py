import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import compat
from moe_jax.ops.grouped_matmul import BACKENDS as ALL_BACKENDS
from moe_jax.ops.grouped_matmul import blocks, grouped_matmul, resolve_backend, tokamax

BACKENDS = [name for name in ALL_BACKENDS if name != "tokamax" or tokamax.is_installed()]
# Kernels, interpreted here or replaced by XLA: no float64, and no types inside a shard_map.
PLAIN = [name for name in BACKENDS if name not in ("megablox", "tokamax")]

D, F = 16, 12
# Rows, group sizes. Blocks are of 32 rows at least.
CASES = {
    "even": (70, (17, 17, 17, 17)),
    "empty": (70, (0, 40, 0, 30)),
    "all to one": (70, (0, 0, 70, 0)),
    "none": (70, (0, 0, 0, 0)),
    "tail": (70, (5, 1, 33, 2)),
    "no multiples": (70, (31, 33, 1, 5)),
    "less than a block": (7, (2, 0, 1, 3)),
    "blocks of 64": (300, (150, 131)),
}


def error(a, b):
    """max|a-b| / max|b|; where b is all 0, max|a|."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.abs(a - b).max() / (np.abs(b).max() or 1)


def make(case, dtype=np.float32):
    """(lhs, rhs, group sizes, cotangent) of `dtype`, all representable in it."""
    rows, sizes = CASES[case]
    rng = np.random.default_rng(0)
    shapes = (rows, D), (len(sizes), D, F), (rows, F)
    lhs, rhs, d_out = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return lhs, rhs, jnp.asarray(sizes, jnp.int32), d_out


def reference(lhs, rhs, sizes, d_out):
    """Value and gradients in NumPy float64."""
    lhs, rhs, d_out = (np.asarray(a, np.float64) for a in (lhs, rhs, d_out))
    out, d_lhs, d_rhs = np.zeros(d_out.shape), np.zeros(lhs.shape), np.zeros(rhs.shape)
    start = 0
    for e, size in enumerate(np.asarray(sizes)):
        mine = slice(start, start + size)
        out[mine], d_lhs[mine] = lhs[mine] @ rhs[e], d_out[mine] @ rhs[e].T
        d_rhs[e] = lhs[mine].T @ d_out[mine]
        start += size
    return out, d_lhs, d_rhs


@functools.partial(jax.jit, static_argnames=("backend", "preferred"))
def value_and_gradients(lhs, rhs, sizes, d_out, backend, preferred=None):
    def product(lhs, rhs):
        return grouped_matmul(lhs, rhs, sizes, preferred_element_type=preferred, backend=backend)

    out, pull = jax.vjp(product, lhs, rhs)
    return out, *pull(d_out.astype(out.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_float32(case, backend):
    args = make(case)
    results = value_and_gradients(*args, backend)
    chex.assert_trees_all_equal_shapes_and_dtypes(results, (args[3], args[0], args[1]))
    for result, expected in zip(results, reference(*args)):
        assert error(result, expected) <= 1e-6
    assert not np.any(results[0][args[2].sum() :]) and not np.any(results[1][args[2].sum() :])


@pytest.mark.smoke
@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("case", ["no multiples", "tail"])
def test_float64(case, backend):
    with jax.enable_x64(True):
        args = make(case, np.float64)
        results = value_and_gradients(*args, backend)
        chex.assert_type(results, jnp.float64)
        for result, expected in zip(results, reference(*args)):
            assert error(result, expected) <= 1e-12


@pytest.mark.fused
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16(backend):
    """One rounding of the result (2^-9 of it), because sums are in float32."""
    args = make("no multiples", jnp.bfloat16)
    results = value_and_gradients(*args, backend)
    chex.assert_type(results, jnp.bfloat16)
    for result, expected in zip(results, reference(*args)):
        assert error(result, expected) <= 2**-8
    out, *gradients = value_and_gradients(*args, backend, jnp.float32)
    chex.assert_type(out, jnp.float32)
    chex.assert_type(gradients, jnp.bfloat16)
    assert error(out, reference(*args)[0]) <= 1e-6


@pytest.mark.fused
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_gradient_over_many_blocks(backend):
    """512 + 639 / 64 = 521.98, which is 520 in bfloat16; added up in bfloat16 it stays 512."""
    lhs = jnp.full((640, 1), 1 / 64, jnp.bfloat16).at[0].set(512)
    sizes = jnp.zeros(8, jnp.int32).at[3].set(640)
    ones = jnp.ones((640, 1), jnp.bfloat16)
    _, _, d_rhs = value_and_gradients(lhs, jnp.ones((8, 1, 1), jnp.bfloat16), sizes, ones, backend)
    np.testing.assert_array_equal(d_rhs.ravel(), [0, 0, 0, 520, 0, 0, 0, 0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_tail_may_hold_anything(backend, bad):
    lhs, rhs, sizes, d_out = make("tail")
    end = int(sizes.sum())
    clean = value_and_gradients(lhs, rhs, sizes, d_out, backend)
    dirty = value_and_gradients(lhs.at[end:].set(bad), rhs, sizes, d_out.at[end:].set(bad), backend)
    chex.assert_trees_all_equal(dirty, clean)
    assert not np.any(dirty[0][end:]) and not np.any(dirty[1][end:])


def test_a_kernel_may_leave_the_tail_as_it_was(monkeypatch):
    """Grouped kernels of accelerators do; a CPU writes 0."""
    kernel = jax.lax.ragged_dot

    def leaves_it(lhs, rhs, sizes, **options):
        tail = jnp.arange(lhs.shape[0])[:, None] >= sizes.sum()
        return jnp.where(tail, jnp.nan, kernel(lhs, rhs, sizes, **options))

    monkeypatch.setattr(jax.lax, "ragged_dot", leaves_it)
    lhs, rhs, sizes, _ = make("tail")
    out = grouped_matmul(lhs, rhs, sizes, backend="ragged_dot")
    assert not np.any(out[sizes.sum() :]) and np.isfinite(out).all()


@pytest.mark.parametrize("backend", PLAIN)
def test_a_groups_nan_stays_its_own(backend):
    lhs, rhs, sizes, d_out = make("no multiples")
    first, second = int(sizes[0]), int(sizes[0] + sizes[1])
    clean = value_and_gradients(lhs, rhs, sizes, d_out, backend)
    row = first + 3
    dirty = value_and_gradients(lhs.at[row].set(np.nan), rhs, sizes, d_out.at[row].set(np.inf), backend)
    assert np.isnan(dirty[0][row]).all() and np.isnan(dirty[2][1]).all()
    for i in (0, 1):
        np.testing.assert_array_equal(np.delete(dirty[i], row, 0), np.delete(clean[i], row, 0))
    np.testing.assert_array_equal(np.delete(dirty[2], 1, 0), np.delete(clean[2], 1, 0))
    if backend != "ragged_dot":  # its form on a CPU multiplies every row, mostly 0, with every matrix
        broken = value_and_gradients(lhs, rhs.at[1].set(np.nan), sizes, d_out, backend)
        for i in (0, 1):
            assert np.isnan(broken[i][first:second]).all()
            others = [np.delete(a[i], slice(first, second), 0) for a in (broken, clean)]
            np.testing.assert_array_equal(*others)


def test_work_follows_the_rows():
    """Blocks that run: none for empty groups and the tail; every row is in one block of its group."""
    assert blocks.block_sizes(70, 4) == (16, 64) and blocks.block_sizes(7, 4) == (7,)
    sizes = {*range(32, 385, 32), 208, 240, 272, 304}  # finer near an even group of 256
    assert blocks.block_sizes(4096, 16) == tuple(sorted(sizes)) and blocks.block_sizes(4096, 64)[-1] == 192
    rows, step, most = 1000, *blocks.block_sizes(1000, 6)

    def work(n):
        last = n - (n - 1) // most * most
        return n - last + (step if last <= step else most) if n else 0

    for sizes in ((0, 0, 0), (0, 1, 0), (32, 0, 33), (most, 64, 1), (2 * most + 1, 9, 0), (10, 10, 580)):
        sizes = (*sizes, 0, 0, 0)

        def count(carry, block):
            seen, run = carry
            ones = jnp.ones((block.size, 1), jnp.int32) * (1 + block.group)
            return block.write(seen, block.rows(seen) + ones), run + block.size

        seen, run = blocks.for_each_block(jnp.asarray(sizes), rows, count, (jnp.zeros((rows, 1), jnp.int32), 0))
        expected = np.repeat([1, 2, 3, 0, 0, 0, 0], [*sizes, rows - sum(sizes)])
        np.testing.assert_array_equal(seen[:, 0], expected)
        assert run == sum(map(work, sizes))


@pytest.mark.parametrize("backend", PLAIN)
def test_in_a_shard_map(backend):
    """Every shard has its own rows and sizes; the gradient of the shared matrices is summed over shards."""
    mesh = compat.make_mesh(jax.devices(), ("data",), (8,))
    sizes = [(3, 0, 2), (0, 0, 0), (6, 0, 0), (2, 2, 2), (0, 6, 0), (1, 1, 1), (0, 0, 1), (5, 1, 0)]
    sizes = jnp.asarray(sizes)
    rng = np.random.default_rng(1)
    lhs, rhs, d_out = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((48, D), (3, D, F), (48, F)))
    rows, whole = compat.PartitionSpec("data"), compat.PartitionSpec()
    run = compat.shard_map(
        lambda lhs, rhs, sizes: grouped_matmul(lhs, rhs, sizes[0], backend=backend),
        mesh,
        (rows, whole, rows),
        rows,
    )

    @jax.jit
    def all_of_it(lhs, rhs, sizes, d_out):
        out, pull = jax.vjp(lambda lhs, rhs: run(lhs, rhs, sizes), lhs, rhs)
        return out, *pull(d_out)

    out, d_lhs, d_rhs = all_of_it(lhs, rhs, sizes, d_out)
    shards = [reference(lhs[6 * i : 6 * i + 6], rhs, sizes[i], d_out[6 * i : 6 * i + 6]) for i in range(8)]
    assert error(out, np.concatenate([s[0] for s in shards])) <= 1e-6
    assert error(d_lhs, np.concatenate([s[1] for s in shards])) <= 1e-6
    assert error(d_rhs, sum(s[2] for s in shards)) <= 1e-6


@pytest.mark.parametrize("backend", PLAIN)
def test_gradient_of_a_gradient(backend):
    """Under jit, in float64, against masked dense products."""
    with jax.enable_x64(True):
        lhs, rhs, sizes, d_out = make("tail", np.float64)
        group = jnp.repeat(jnp.arange(5), jnp.append(sizes, 70 - sizes.sum()), total_repeat_length=70)

        def masked(lhs, rhs):
            return sum(jnp.where((group == e)[:, None], lhs @ rhs[e], 0) for e in range(4))

        def second(product):
            def first(lhs, rhs):
                return jax.grad(lambda *args: jnp.sum(d_out * jnp.sin(product(*args))), (0, 1))(lhs, rhs)

            return jax.jit(jax.grad(lambda *args: sum(jnp.sum(g**2) for g in first(*args)), (0, 1)))(lhs, rhs)

        result = second(lambda lhs, rhs: grouped_matmul(lhs, rhs, sizes, backend=backend))
        for a, b in zip(result, second(masked)):
            assert error(a, b) <= 1e-12


def test_promotes_and_defaults():
    lhs, rhs, sizes, _ = make("tail")
    mixed = grouped_matmul(lhs.astype(jnp.bfloat16), rhs, sizes)
    chex.assert_type(mixed, jnp.float32)
    assert resolve_backend() == resolve_backend("auto") == "blocks"
    np.testing.assert_array_equal(
        grouped_matmul(lhs, rhs, sizes), grouped_matmul(lhs, rhs, sizes.astype(jnp.uint8), backend="blocks")
    )


def test_refusals():
    lhs, rhs, sizes, _ = make("tail")
    shapes = (lhs[0], rhs, sizes), (lhs, rhs[0], sizes), (lhs[:, 1:], rhs, sizes), (lhs, rhs, sizes[1:])
    message = r"lhs \[M, D\], rhs \[E, D, F\], group_sizes \[E\]; got [^\n]+$"
    for args in shapes:
        with pytest.raises(ValueError, match=message):
            grouped_matmul(*args)
    with pytest.raises(ValueError, match="integer group_sizes; got float32$"):
        grouped_matmul(lhs, rhs, sizes.astype(jnp.float32))
    with pytest.raises(ValueError, match="^grouped_matmul lhs: int32, not a float dtype; use float32, or another float$"):
        grouped_matmul(lhs.astype(jnp.int32), rhs, sizes)
    with pytest.raises(ValueError, match="^grouped_matmul preferred_element_type: int32, not a float"):
        grouped_matmul(lhs, rhs, sizes, preferred_element_type=jnp.int32)
    with pytest.raises(ValueError, match="^grouped_matmul group_sizes: one is -1; use 0 or more$"):
        grouped_matmul(lhs, rhs, sizes.at[1].set(-1))
    with pytest.raises(ValueError, match="^grouped_matmul group_sizes: a sum of 106, for M=70 rows; use at most M$"):
        grouped_matmul(lhs, rhs, sizes.at[1].set(66))
    with pytest.raises(ValueError, match="backend='pallas': one of blocks, ragged_dot, megablox, tokamax, loop, auto$"):
        grouped_matmul(lhs, rhs, sizes, backend="pallas")
