import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers.ffn import FeedForward
from moe_jax.ops import activations

_erf = np.vectorize(math.erf)
_REFERENCE = {
    "gelu_tanh": lambda h: 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))),
    "gelu": lambda h: 0.5 * h * (1 + _erf(h / math.sqrt(2))),
    "relu": lambda h: np.maximum(h, 0),
    "swiglu": lambda g: g / (1 + np.exp(-g)),
}


@pytest.mark.parametrize("kind, use_bias", [*((k, True) for k in activations.ACTIVATIONS), ("swiglu", False)])
def test_values(kind, use_bias):
    layer = FeedForward(24, kind, use_bias)
    x = jax.random.normal(jax.random.key(0), (2, 3, 8))
    shapes = jax.tree.map(jnp.shape, jax.jit(layer.init)(jax.random.key(1), x)["params"])
    rng = np.random.default_rng(0)
    p = {name: rng.normal(size=box.value).astype(np.float32) for name, box in shapes.items()}
    branches = ["in", "gate"] if kind == "swiglu" else ["in"]
    names = {f"w_{b}" for b in [*branches, "out"]} | ({f"b_{b}" for b in [*branches, "out"]} if use_bias else set())
    assert set(p) == names
    h = {b: np.asarray(x, np.float64) @ p[f"w_{b}"] + p.get(f"b_{b}", 0) for b in branches}
    f = _REFERENCE[kind]
    expected = (f(h["gate"]) * h["in"] if kind == "swiglu" else f(h["in"])) @ p["w_out"] + p.get("b_out", 0)
    y = jax.jit(layer.apply)({"params": p}, x)
    chex.assert_shape(y, x.shape)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_gradients(kind):
    with jax.enable_x64(True):
        layer = FeedForward(6, kind, True, jnp.float64, jnp.float64)
        x = jax.random.normal(jax.random.key(0), (3, 4), jnp.float64)
        variables = jax.jit(layer.init)(jax.random.key(1), x)
        jax.test_util.check_grads(jax.jit(layer.apply), (variables, x), order=1, modes=["rev"], rtol=1e-6)


def test_initialisation_and_axes():
    params = jax.jit(FeedForward(400, "swiglu", True).init)(jax.random.key(0), jnp.zeros((1, 100)))["params"]
    assert params["w_in"].names == params["w_gate"].names == ("embed", "mlp")
    assert params["w_out"].names == ("mlp", "embed")
    assert params["b_in"].names == ("mlp",) and params["b_out"].names == ("embed",)
    for name, fan_in in (("w_in", 100), ("w_gate", 100), ("w_out", 400)):
        np.testing.assert_allclose(params[name].value.std(), fan_in**-0.5, rtol=0.02)
    chex.assert_type(jax.tree.leaves(params), jnp.float32)


def test_bfloat16():
    layer = FeedForward(32, "swiglu", True, jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (4, 16))
    variables = jax.jit(layer.init)(jax.random.key(1), x)
    y = layer.apply(variables, x)
    chex.assert_type(y, jnp.bfloat16)
    wide = FeedForward(32, "swiglu", True).apply(variables, x)
    chex.assert_trees_all_close(y.astype(jnp.float32), wide, atol=0.03)


def test_activate_refusals():
    h = jnp.ones((2,))
    with pytest.raises(ValueError, match="activation='tanh' is unknown"):
        activations.activate("tanh", h)
    with pytest.raises(ValueError, match="'swiglu' needs a gate"):
        activations.activate("swiglu", h)
    with pytest.raises(ValueError, match="'relu' takes no gate"):
        activations.activate("relu", h, h)
    with pytest.raises(ValueError, match="unknown"):
        FeedForward(4, "tanh").init(jax.random.key(0), jnp.ones((1, 2)))
