import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.product_keys import product_top_k


@pytest.mark.parametrize("n, k", [(1, 1), (5, 5), (16, 1), (32, 8), (40, 16), (64, 32)])
def test_equals_a_search_over_all_pairs(n, k):
    halves = jax.random.normal(jax.random.key(n + k), (2, 7, 3, n))
    scores, ids = jax.jit(product_top_k, static_argnums=2)(*halves, k)
    chex.assert_shape([scores, ids], (7, 3, k))
    sums = (halves[0][..., :, None] + halves[1][..., None, :]).reshape(7, 3, n * n)
    expected, expected_ids = jax.lax.top_k(sums, k)
    np.testing.assert_array_equal(scores, expected)
    np.testing.assert_array_equal(ids, expected_ids)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_ties_give_different_ids_and_the_best_scores(levels):
    halves = jax.random.randint(jax.random.key(levels), (2, 50, 12), 0, levels).astype(jnp.float32)
    scores, ids = product_top_k(*halves, 9)
    sums = (halves[0][:, :, None] + halves[1][:, None, :]).reshape(50, 144)
    np.testing.assert_array_equal(scores, jax.lax.top_k(sums, 9)[0])
    np.testing.assert_array_equal(jnp.take_along_axis(sums, ids, axis=1), scores)
    assert all(len(set(row)) == 9 for row in np.asarray(ids).tolist())


def test_gradient_reaches_the_chosen_halves_alone():
    halves = jax.random.normal(jax.random.key(0), (2, 8))
    weights = jnp.array([1.0, 10.0, 100.0])
    d_halves = jax.grad(lambda halves: jnp.sum(weights * product_top_k(*halves, 3)[0]))(halves)
    expected = np.zeros((2, 8))
    for weight, i in zip(weights, product_top_k(*halves, 3)[1]):
        expected[0, i // 8] += weight
        expected[1, i % 8] += weight
    np.testing.assert_array_equal(d_halves, expected)


def test_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="top_k=5: at most the 4 keys"):
        product_top_k(jnp.zeros(4), jnp.zeros(4), 5)
    with pytest.raises(ValueError, match="do not fit into int32"):
        jax.eval_shape(lambda s: product_top_k(s, s, 5), jax.ShapeDtypeStruct((46341,), jnp.float32))
