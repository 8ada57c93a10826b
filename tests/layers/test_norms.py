import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers import norms


def _reference(kind, x, scale, bias, epsilon):
    x = np.asarray(x, np.float64)
    if kind == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale
    return y + bias if kind == "layernorm" else y


@pytest.mark.parametrize("kind", norms.NORMS)
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_values(kind, offset):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(2, 5, 16)) + offset).astype(np.float32)
    scale, bias = rng.normal(size=16).astype(np.float32), rng.normal(size=16).astype(np.float32)
    layer = norms.make_norm(kind, 1e-5)
    params = {"scale": scale, "bias": bias} if kind == "layernorm" else {"scale": scale}
    y = jax.jit(layer.apply)({"params": params}, x)
    # At an offset of 100 the float32 input itself has lost two of its seven digits.
    np.testing.assert_allclose(y, _reference(kind, x, scale, bias, 1e-5), atol=1e-5 if offset == 0 else 1e-3, rtol=1e-5)


@pytest.mark.fused
@pytest.mark.parametrize("kind", norms.NORMS)
def test_bfloat16_rounds_only_the_result(kind):
    x = jax.random.normal(jax.random.key(0), (3, 64), jnp.bfloat16)
    layer = norms.make_norm(kind, 1e-6, jnp.bfloat16)
    variables = jax.jit(layer.init)(jax.random.key(1), x)
    y = layer.apply(variables, x)
    chex.assert_type(y, jnp.bfloat16)
    chex.assert_type(jax.tree.leaves(variables), jnp.float32)
    wide = norms.make_norm(kind, 1e-6, jnp.float32).apply(variables, x)
    chex.assert_trees_all_equal(y, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize("kind", norms.NORMS)
def test_gradients(kind):
    layer = norms.make_norm(kind, 1e-6)
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (3, 8), jnp.float64)
        layer = type(layer)(dtype=jnp.float64, param_dtype=jnp.float64)
        variables = jax.jit(layer.init)(jax.random.key(1), x)
        jax.test_util.check_grads(jax.jit(layer.apply), (variables, x), order=1, modes=["rev"], rtol=1e-6)


@pytest.mark.parametrize("kind", norms.NORMS)
def test_zeros_have_finite_gradients(kind):
    layer = norms.make_norm(kind)
    variables = jax.jit(layer.init)(jax.random.key(0), jnp.zeros((2, 4)))
    chex.assert_tree_all_finite(jax.grad(lambda x: layer.apply(variables, x).sum())(jnp.zeros((2, 4))))


def test_logical_axes_and_unknown_kind():
    variables = norms.make_norm("layernorm", name="n").init(jax.random.key(0), jnp.zeros((2, 4)))
    assert variables["params"]["scale"].names == ("norm",)
    with pytest.raises(ValueError, match="norm='batchnorm' is unknown"):
        norms.make_norm("batchnorm")
