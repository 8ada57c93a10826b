import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.activations import ACTIVATIONS, activate, is_gated
from moe_jax.ops.expert_ffn import expert_ffn

M, D, F = 37, 6, 10
SIZES = (9, 0, 20, 4)


def make(activation, biases, dtype):
    rng = np.random.default_rng(0)
    e = len(SIZES)
    shapes = {"w_in": (e, D, F), "w_out": (e, F, D)} | ({"w_gate": (e, D, F)} if is_gated(activation) else {})
    if biases:
        shapes |= {"b" + name[1:]: (e, shape[-1]) for name, shape in shapes.items()}
    weights = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    return jnp.asarray(rng.normal(size=(M, D)), dtype), weights


def slow(rows, weights, activation):
    """A loop over the experts, each a dense network."""
    out, start = [], 0
    for e, size in enumerate(SIZES):
        x, w = rows[start : start + size], {name: weight[e] for name, weight in weights.items()}
        h = {b: x @ w["w_" + b] + w.get("b_" + b, 0) for b in ("in", "gate") if "w_" + b in w}
        out.append(activate(activation, h["in"], h.get("gate")) @ w["w_out"] + w.get("b_out", 0))
        start += size
    return jnp.concatenate([*out, jnp.zeros((M - start, D), rows.dtype)])


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_value_and_gradients(activation, biases):
    with jax.enable_x64(True):
        rows, weights = make(activation, biases, jnp.float64)
        d_out = jnp.asarray(np.random.default_rng(1).normal(size=(M, D)))

        def run(rows, weights):
            return expert_ffn(rows, weights, jnp.asarray(SIZES, jnp.int32), activation=activation)

        def both(f):
            y, pull = jax.vjp(f, rows, weights)
            return y, pull(d_out)

        result = jax.jit(lambda: both(run))()
        expected = jax.jit(lambda: both(lambda rows, weights: slow(rows, weights, activation)))()
        chex.assert_trees_all_equal_shapes_and_dtypes(result, expected)
        for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected)):
            assert jnp.abs(a - b).max() <= 1e-12 * jnp.abs(b).max()
        # Biases do not reach the rows past the sum.
        assert not np.any(result[0][sum(SIZES) :]) and not np.any(result[1][0][sum(SIZES) :])


def test_tail_may_hold_anything():
    rows, weights = make("swiglu", True, jnp.float32)

    def run(rows):
        def loss(rows, weights):
            return jnp.sum(expert_ffn(rows, weights, jnp.asarray(SIZES), activation="swiglu") ** 2)

        return jax.value_and_grad(loss, argnums=(0, 1))(rows, weights)

    run = jax.jit(run)
    chex.assert_trees_all_equal(run(rows.at[sum(SIZES) :].set(jnp.nan)), run(rows))


def test_bfloat16_bias_gradient_counts_every_row():
    """A bfloat16 sum of ones ends at 256."""
    rows, weights = jnp.zeros((600, D), jnp.bfloat16), make("relu", True, jnp.float32)[1]

    def loss(weights):
        y = expert_ffn(rows, weights, jnp.asarray([0, 600, 0, 0]), activation="relu")
        chex.assert_type(y, jnp.bfloat16)
        return jnp.sum(y.astype(jnp.float32))

    gradient = jax.jit(jax.grad(loss))(weights)["b_out"]
    np.testing.assert_array_equal(gradient, np.asarray([0, 600, 0, 0])[:, None] * np.ones(D))
