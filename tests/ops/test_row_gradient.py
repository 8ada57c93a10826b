import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops import row_gradient
from moe_jax.ops.row_gradient import (
    RowGradient,
    SortedRows,
    WholeRows,
    dense_rows,
    fold_rows,
    join_rows,
    sort_rows,
    squared_norm,
    stable_order,
)

N, T, R, M, D = 20, 13, 4, 2, 3
IDS = {
    "mixed": lambda key: jax.random.randint(key, (T, R), 0, N + 3),
    "one row": lambda key: jnp.full((T, R), 7),
    "all different": lambda key: jax.random.permutation(key, T * R).reshape(T, R),
    "none": lambda key: jnp.full((T, R), N + 1),
    "first and last": lambda key: jnp.where(jax.random.bernoulli(key, 0.5, (T, R)), 0, N - 1),
}


def make(kind, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(3), 3)
    weights = jax.random.normal(keys[1], (T, R, M), dtype)
    return RowGradient(IDS[kind](keys[0]), weights, jax.random.normal(keys[2], (T, M, D), dtype))


def reference(gradient):
    ids, weights, vectors = map(np.asarray, gradient)
    table = np.zeros((N, M, D), vectors.dtype)
    for t, r in np.ndindex(ids.shape):
        if ids[t, r] < N:
            table[ids[t, r]] += weights[t, r][:, None] * vectors[t]
    return table


@pytest.mark.parametrize("block, call", [(1, 1000), (5, 4), (1000, 3), (1000, 1000)])
@pytest.mark.parametrize("kind", IDS)
def test_equals_a_loop_over_all_pairs(monkeypatch, kind, block, call):
    monkeypatch.setitem(row_gradient.BLOCK_BYTES, "cpu", block * M * D * 8)
    monkeypatch.setitem(row_gradient.CALL_BYTES, "cpu", call * M * D * 8)
    with jax.enable_x64():
        gradient = make(kind, jnp.float64)
        expected = reference(gradient)
        # A function of its own: the block's size is no argument, and jit would find the last one's program.
        table, norm = jax.jit(lambda g: (dense_rows(g, N), squared_norm(sort_rows(g, N), N)))(gradient)
        np.testing.assert_allclose(table, expected, rtol=0, atol=1e-14)
        np.testing.assert_allclose(norm, (expected**2).sum(), rtol=1e-13)


@pytest.mark.parametrize("form", ["products", "sums", "sorted"])
@pytest.mark.parametrize("kind", IDS)
def test_all_forms_are_one_gradient(monkeypatch, kind, form):
    monkeypatch.setitem(row_gradient.WHOLE_PAIRS, "cpu", 10 if form == "sorted" else 2)
    monkeypatch.setitem(row_gradient.PRODUCT_ROWS, "cpu", N / R if form == "products" else 0)
    monkeypatch.setattr(row_gradient, "MATRIX_BYTES", 5 * N * 8)  # blocks of 5 tokens
    with jax.enable_x64():
        gradient = make(kind, jnp.float64)
        whole, norm = jax.jit(lambda g: ((rows := join_rows(g, N)), squared_norm(rows, N)))(gradient)
        expected = reference(gradient)
        np.testing.assert_allclose(norm, (expected**2).sum(), rtol=1e-13)
        assert isinstance(whole, SortedRows if form == "sorted" else WholeRows)
        if form != "sorted":
            np.testing.assert_allclose(whole.rows, expected, rtol=0, atol=1e-14)
            np.testing.assert_array_equal(whole.touched, np.isin(np.arange(N), gradient.ids))


def test_every_row_comes_once_and_the_other_places_lie_past_the_table(monkeypatch):
    monkeypatch.setitem(row_gradient.BLOCK_BYTES, "cpu", 5 * M * D * 4)
    calls, expected = [], reference(make("mixed"))
    with jax.disable_jit():
        fold_rows(lambda c, ids, rows: calls.append((np.asarray(ids), np.asarray(rows))) or c, 0, sort_rows(make("mixed"), N))
    assert len(calls) == T * R // 5 + 1
    for ids, rows in calls:
        assert len(set(ids.tolist())) == len(ids) == 6
        for row_id, row in zip(ids, rows):
            if row_id < N:
                np.testing.assert_allclose(row, expected[row_id], rtol=0, atol=1e-6)
    seen = np.concatenate([ids[ids < N] for ids, _ in calls])
    np.testing.assert_array_equal(seen, np.unique(np.asarray(make("mixed").ids))[: len(seen)])
    assert set(seen.tolist()) == set(np.asarray(make("mixed").ids).ravel().tolist()) - {N, N + 1, N + 2}


def test_the_tables_size_is_never_in_memory():
    gradient = make("mixed")
    compiled = jax.jit(lambda g: squared_norm(sort_rows(g, 10**8), 10**8)).lower(gradient).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 100_000


@pytest.mark.parametrize(
    "pairs, largest", [(1, 0), (1, 5), (7, 3), (1000, 9), (2**12, 2**20), (2**12 + 1, 2**31 - 1), (2**18, 2**20)]
)
def test_the_order_of_ids_is_stable(pairs, largest):
    ids = np.random.default_rng(pairs).integers(0, largest, pairs, endpoint=True).astype(np.int32)
    order = jax.jit(stable_order, static_argnums=1)(ids, largest)
    np.testing.assert_array_equal(order, np.argsort(ids, kind="stable"))
