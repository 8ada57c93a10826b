import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.config import ParameterGroup
from moe_jax.ops import row_gradient as gradients
from moe_jax.ops.row_gradient import RowGradient, RowSink, dense_rows, join_rows, sort_rows
from moe_jax.train.row_update import init_rows, row_gradient, update_rows
from tests.train.small import make_config

N, M, D, T, R = 12, 2, 3, 5, 4


def make(seed, ids=None):
    keys = jax.random.split(jax.random.key(seed), 3)
    ids = jax.random.randint(keys[0], (T, R), 0, N - 3) if ids is None else ids
    return RowGradient(ids, jax.random.normal(keys[1], (T, R, M)), jax.random.normal(keys[2], (T, M, D)))


FORMS = {"sorted": 10**6, "whole": 1}


@pytest.mark.parametrize("form", FORMS)
def test_adam_of_touched_rows(monkeypatch, form):
    """Each row's n-th update is Adam's n-th update of that row alone; rows without a gradient keep their bits."""
    monkeypatch.setitem(gradients.WHOLE_PAIRS, "cpu", FORMS[form])
    config = make_config(optimizer__groups=(ParameterGroup("pool", 0.5, 0.2),)).optimizer
    table = jax.random.normal(jax.random.key(0), (N, M, D))
    state, expected = init_rows(config, table), np.array(table)
    reference = optax.scale_by_adam(config.b1, config.b2, config.epsilon)
    states = {n: reference.init(table[n]) for n in range(N)}
    update = jax.jit(lambda t, s, g, f: update_rows(config, "pool", t, s, join_rows(g, N), 0.1, f))
    new = table
    for seed, factor in enumerate((0.7, 0.1, 1.0, 0.3)):  # a constant one would not change Adam's direction
        gradient = make(seed)
        new, state = update(new, state, gradient, factor)
        dense = dense_rows(gradient, N)
        for n in np.unique(gradient.ids):
            direction, states[n] = reference.update(factor * dense[n], states[n])
            expected[n] -= 0.1 * 0.5 * (np.asarray(direction) + 0.2 * expected[n])
    np.testing.assert_allclose(new, expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(new[N - 3 :], table[N - 3 :])
    assert state.count[N - 1] == 0 and state.count.max() == 4


@pytest.mark.parametrize("form", FORMS)
def test_adagrad_has_one_number_for_a_row(monkeypatch, form):
    monkeypatch.setitem(gradients.WHOLE_PAIRS, "cpu", FORMS[form])
    config = make_config(optimizer__row_optimizer="adagrad").optimizer
    table = jnp.zeros((N, M, D))
    state = init_rows(config, table)
    chex.assert_shape(state.accumulator, (N,))
    sums, expected = np.zeros(N), np.zeros((N, M, D))
    for seed in range(3):
        gradient = make(seed)
        table, state = update_rows(config, "pool", table, state, join_rows(gradient, N), 0.1)
        dense = np.asarray(dense_rows(gradient, N))
        sums += (dense**2).mean((1, 2))
        expected -= 0.1 * dense / (np.sqrt(sums)[:, None, None] + 1e-8)
    np.testing.assert_allclose(table, expected, rtol=1e-5, atol=1e-7)


def test_a_lookup_and_groups_of_pools_are_the_same_thing():
    lookup = row_gradient(jnp.zeros((N, D)), jnp.array([[3, 3, 1]]), jnp.ones((1, 3, D)))
    np.testing.assert_array_equal(dense_rows(lookup, N)[:, 0].sum(axis=1), D * np.eye(N)[[3, 3, 1]].sum(0))
    parts, groups = 2, 3
    ids = jax.random.randint(jax.random.key(0), (parts, groups, T, R), 0, N + 2)
    weights = jax.random.normal(jax.random.key(1), (parts, groups, T, R, M))
    vectors = jax.random.normal(jax.random.key(2), (parts, groups, T, M, D))
    table = jnp.zeros((groups, N, M, D))
    dense = dense_rows(row_gradient(table, ids, RowSink(weights, vectors)), groups * N).reshape(table.shape)
    for g in range(groups):
        one = sum(dense_rows(RowGradient(ids[p, g], weights[p, g], vectors[p, g]), N) for p in range(parts))
        np.testing.assert_allclose(dense[g], one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adam", "adagrad"])
def test_nothing_of_the_pools_size_is_computed(optimizer):
    """The program reads and writes rows of the pool; every other operation is small."""
    config = make_config(optimizer__row_optimizer=optimizer).optimizer
    table = jax.ShapeDtypeStruct((10**6, M, 64), jnp.float32)
    state = jax.eval_shape(lambda: init_rows(config, jnp.zeros(table.shape)))
    gradient = RowGradient(
        jax.ShapeDtypeStruct((T, R), jnp.int32),
        jax.ShapeDtypeStruct((T, R, M), jnp.float32),
        jax.ShapeDtypeStruct((T, M, 64), jnp.float32),
    )
    update = jax.jit(lambda t, s, g: update_rows(config, "pool", t, s, sort_rows(g, 10**6), 0.1), donate_argnums=(0, 1))
    assert update.lower(table, state, gradient).compile().memory_analysis().temp_size_in_bytes < 10**6
