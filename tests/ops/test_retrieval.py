import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.activations import activate
from moe_jax.ops.retrieval import BACKENDS, blocks, dense, retrieve, row_sink, rows_of_expert
from moe_jax.ops.row_gradient import RowGradient, dense_rows

N, T, R, D = 30, 11, 6, 8
ACTIVATIONS = [None, "gelu", "relu", "swiglu"]


def make(activation, dtype=jnp.float64):
    keys = jax.random.split(jax.random.key(1), 5)
    m = rows_of_expert(activation)
    ids = jax.random.randint(keys[0], (T, R), 0, N).at[0].set(4).at[1, 3].set(0)
    gates = jax.random.uniform(keys[1], (T, R), dtype).at[2].set(0)
    table = jax.random.normal(keys[2], (N, m, D), dtype)
    x, d_y = jax.random.normal(keys[3], (2, T, D), dtype)
    return (x, ids, gates, table), d_y


def brute_force(activation, x, ids, gates, table):
    """All N experts of every token, times the matrix [T, N] of summed gates."""
    matrix = jnp.zeros((x.shape[0], table.shape[0]), x.dtype).at[jnp.arange(x.shape[0])[:, None], ids].add(gates)
    if activation is not None:
        pre = jnp.einsum("td,nmd->mtn", x, table[:, :-1])
        matrix = matrix * activate(activation, *pre)
    return matrix @ table[:, -1]


def error(a, b):
    return np.max(np.abs(a - b)) / np.max(np.abs(b))


@pytest.mark.parametrize("backend, block", [("blocks", 3), ("blocks", 100), ("dense", 3)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_value_and_gradients_equal_all_experts(monkeypatch, activation, backend, block):
    with jax.enable_x64():
        args, d_y = make(activation)
        monkeypatch.setitem(blocks.BLOCK_BYTES, "cpu", block * R * args[3][0].size * 8)
        monkeypatch.setitem(dense.BLOCK_BYTES, "cpu", block * N * 4)

        def run(f):
            def loss(x, gates, table):
                y = f(x, args[1], gates, table)
                return jnp.sum(y * d_y), y

            (_, y), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(args[0], *args[2:])
            return y, *grads

        ours = run(functools.partial(retrieve, activation=activation, passes=BACKENDS[backend]))
        expected = run(functools.partial(brute_force, activation))
        for a, b in zip(ours[:2] if activation else ours[:1], expected):
            assert error(a, b) < 1e-13
        for a, b in zip(ours[2:], expected[2:]):
            assert error(a, b) < 1e-13
        assert activation or not np.any(ours[1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_sink_has_the_tables_gradient_in_factors(activation):
    with jax.enable_x64():
        (x, ids, gates, table), d_y = make(activation)
        m = table.shape[1]
        loss = lambda table, sink: jnp.sum(d_y * retrieve(x, ids, gates, table, sink, activation=activation))
        dense = jax.grad(loss)(table, None)
        nothing, sink = jax.grad(loss, (0, 1))(table, row_sink(T, R, m, D, jnp.float64))
        assert not np.any(nothing)
        assert error(dense_rows(RowGradient(ids, *sink), N), dense) < 1e-14


def test_ids_that_repeat_add_their_gradients():
    with jax.enable_x64():
        (x, ids, gates, table), _ = make("gelu")
        ids = ids.at[:, 1].set(ids[:, 0])
        grad = jax.grad(lambda table, ids, gates: jnp.sum(jnp.sin(retrieve(x, ids, gates, table))))
        twice = grad(table, ids[:, :2], gates[:, :2])
        once = grad(table, ids[:, :1], gates[:, :1] + gates[:, 1:2])
        assert error(twice, once) < 1e-14


def test_bfloat16_sums_in_float32():
    """2048 equal small terms onto a large one: in bfloat16 each would be lost."""
    table = jnp.concatenate([jnp.full((1, 1, D), 256.0), jnp.full((1, 1, D), 0.5)])
    ids = jnp.ones((1, 2049), jnp.int32).at[0, 0].set(0)
    y = retrieve(jnp.ones((1, D), jnp.bfloat16), ids, jnp.ones(ids.shape), table, activation=None)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y.astype(jnp.float32), 256 + 1024)


def test_no_rows_of_all_tokens_are_held():
    tokens, retrieved, d, n = 512, 64, 128, 4096
    sink = row_sink(tokens, retrieved, 2, d)

    def loss(x, ids, gates, table, sink):
        return jnp.sum(retrieve(x, ids, gates, table, sink))

    shapes = [
        ((tokens, d), jnp.float32),
        ((tokens, retrieved), jnp.int32),
        ((tokens, retrieved), jnp.float32),
        ((n, 2, d), jnp.float32),
    ]
    args = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    compiled = jax.jit(jax.grad(loss, (0, 2, 4))).lower(*args, sink).compile()
    # Rows of all tokens would be 33 MB.
    assert compiled.memory_analysis().temp_size_in_bytes < 4e6


def test_a_table_of_another_shape_is_refused():
    (x, ids, gates, table), _ = make("gelu", jnp.float32)
    with pytest.raises(ValueError, match=r"table \(30, 2, 8\): activation='swiglu' needs \[N, 3, 8\]"):
        retrieve(x, ids, gates, table, activation="swiglu")


def test_no_tokens():
    table = jnp.ones((9, 2, 4))
    loss = lambda x, gates, table: jnp.sum(retrieve(x, jnp.zeros((0, 3), jnp.int32), gates, table))
    d_x, d_gates, d_table = jax.grad(loss, (0, 1, 2))(jnp.zeros((0, 4)), jnp.zeros((0, 3)), table)
    assert d_x.shape == (0, 4) and d_gates.shape == (0, 3) and not d_table.any()
