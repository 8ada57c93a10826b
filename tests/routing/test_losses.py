import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing.losses import balance_loss, z_loss
from moe_jax.routing.statistics import choice_statistics

T, E = 12, 4


def make(seed=0):
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(rng.normal(size=(T, E)))
    return logits, jnp.asarray(rng.uniform(size=T) < 0.6)


@pytest.mark.smoke
def test_balance_against_a_loop():
    with jax.enable_x64(True):
        logits, valid = make()
        p = jax.nn.softmax(logits)
        counts = jnp.asarray([5.0, 0.0, 2.0, 1.0])
        expected, real = 0.0, [t for t in range(T) if valid[t]]
        for e in range(E):
            expected += E * counts[e] / 8 * np.mean([p[t, e] for t in real])
        np.testing.assert_allclose(balance_loss(p, counts, valid), expected, rtol=1e-13)
        # f has no gradient; P has the fractions as its gradient.
        d_p, d_counts = jax.grad(balance_loss, argnums=(0, 1))(p, counts, valid)
        np.testing.assert_allclose(d_p, np.where(valid[:, None], E * counts / 8 / len(real), 0), rtol=1e-13)
        assert not np.any(d_counts)


def test_balance_scale():
    everywhere = jnp.ones(T, bool)
    for k in (1, 2):
        even = balance_loss(jnp.full((T, E), 1 / E), jnp.full(E, T * k / E), everywhere)
        np.testing.assert_allclose(even, 1, rtol=1e-6)
    one = jnp.zeros((T, E)).at[:, 2].set(1)
    np.testing.assert_allclose(balance_loss(one, T * one[0], everywhere), E, rtol=1e-6)


def test_z_against_a_loop():
    with jax.enable_x64(True):
        logits, valid = make()
        terms = [np.log(np.sum(np.exp(logits[t]))) ** 2 for t in range(T) if valid[t]]
        np.testing.assert_allclose(z_loss(logits, valid), np.mean(terms), rtol=1e-13)


def test_padding_may_hold_anything():
    logits, valid = make()
    for bad in (jnp.nan, jnp.inf, 1e30):
        dirty = jnp.where(valid[:, None], logits, bad)
        value = jax.value_and_grad(z_loss)
        chex.assert_trees_all_equal(value(dirty, valid), value(logits, valid))
        value = jax.value_and_grad(balance_loss)
        counts = jnp.ones(E)
        chex.assert_trees_all_equal(value(dirty, counts, valid), value(logits, counts, valid))


def test_nobody_valid():
    nobody = jnp.zeros(T, bool)
    for loss in (lambda p: z_loss(p, nobody), lambda p: balance_loss(p, jnp.zeros(E), nobody)):
        value, gradient = jax.value_and_grad(loss)(jnp.ones((T, E)))
        assert value == 0 and not np.any(gradient)


def test_statistics():
    logits, valid = make()
    p = jax.nn.softmax(logits.astype(jnp.float32))
    ids = jnp.where(valid[:, None], jnp.asarray(np.random.default_rng(1).integers(0, E, (T, 2))), E)
    finite = jnp.ones(T, bool).at[3].set(False)
    stats = choice_statistics(ids, p, valid, finite, E)
    chex.assert_shape([stats["counts"]], (E,))
    chex.assert_shape([stats[name] for name in ("tokens", "entropy_sum", "nonfinite")], ())
    chex.assert_type(list(stats.values()), jnp.float32)
    flat = np.asarray(ids).ravel()
    np.testing.assert_array_equal(stats["counts"], [np.sum(flat == e) for e in range(E)])
    assert stats["tokens"] == np.sum(valid) and stats["nonfinite"] == 1
    entropies = [-sum(q * np.log(q) for q in np.asarray(p[t])) for t in range(T) if valid[t]]
    np.testing.assert_allclose(stats["entropy_sum"], sum(entropies), rtol=1e-5)
    certain = jnp.zeros((T, E)).at[:, 0].set(1)
    assert choice_statistics(ids, certain, valid, finite, E)["entropy_sum"] == 0
