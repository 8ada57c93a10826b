"""Experts in arrays of their own, against a loop over the experts in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops.activations import ACTIVATIONS, activate, is_gated
from moe_jax.ops.split_experts import split_expert_ffn
from tests.compiled import assert_like_reference

D, F, E = 6, 10, 5


def make(tokens, k, activation="relu", biases=True):
    """(x, ids with "no expert" and a virtual one among them and nobody at expert 2, gates, weights by name of E arrays)."""
    rng = np.random.default_rng([tokens, k])
    shapes = {"w_in": (D, F), "w_out": (F, D)} | ({"w_gate": (D, F)} if is_gated(activation) else {})
    if biases:
        shapes |= {"b" + name[1:]: shape[1:] for name, shape in shapes.items()}
    weights = {name: tuple(rng.normal(size=shape) for _ in range(E)) for name, shape in shapes.items()}
    ids = rng.choice([0, 1, 3, 4, E, E + 2], (tokens, k)).astype(np.int32)
    return rng.normal(size=(tokens, D)), ids, rng.random((tokens, k)), weights


def stacked(weights):
    return {name: jnp.stack(of_experts) for name, of_experts in weights.items()}


def split(weights):
    return {name: tuple(weight) for name, weight in weights.items()}


def slow(x, ids, gates, weights, activation):
    """Every expert on every token, times its gate or 0."""
    y = 0.0
    for e in range(E):
        w = {name: weight[e] for name, weight in weights.items()}
        h = {b: x @ w["w_" + b] + w.get("b_" + b, 0) for b in ("in", "gate") if "w_" + b in w}
        out = activate(activation, h["in"], h.get("gate")) @ w["w_out"] + w.get("b_out", 0)
        y += jnp.sum(jnp.where(ids == e, gates, 0), axis=1)[:, None] * out
    return y


@pytest.mark.parametrize("activation, tokens, k", [*zip(ACTIVATIONS, (5, 8, 8, 16), (1, 3, 2, 2))])
def test_values_and_gradients(activation, tokens, k):
    """Gradients of the tokens, the gates and every weight; those of an expert without tokens are 0."""
    x, ids, gates, weights = make(tokens, k, activation, biases=activation != "gelu")
    with jax.enable_x64(True):
        ours = lambda x, gates, w: split_expert_ffn(x, ids, gates, [split(w)], activation=activation)
        reference = lambda x, gates, w: slow(x, ids, gates, w, activation)
        assert_like_reference(ours, reference, x, gates, stacked(weights), limit=1e-12)


@pytest.mark.parametrize("norm", [("norm_scale",), ("norm_scale", "norm_bias")])
def test_stacks(norm):
    """Two residual sublayers, each after a norm; the gate multiplies what they add together."""
    tokens, k = 8, 2
    x, ids, gates, first = make(tokens, k)
    rng = np.random.default_rng(1)
    draw = lambda weights: {n: tuple(rng.normal(size=np.shape(w)) for w in ws) for n, ws in weights.items()}
    sublayers = [w | {n: tuple(rng.normal(size=D) for _ in range(E)) for n in norm} for w in (first, draw(first))]

    def reference(x, gates, sublayers):
        y = 0.0
        for e in range(E):
            h = x
            for weights in sublayers:
                w = {name: weight[e] for name, weight in weights.items()}
                n = h - jnp.mean(h, axis=1, keepdims=True) if "norm_bias" in w else h
                n = n / jnp.sqrt(jnp.mean(n**2, axis=1, keepdims=True) + 1e-3) * w["norm_scale"] + w.get("norm_bias", 0)
                h = h + jnp.maximum(n @ w["w_in"] + w["b_in"], 0) @ w["w_out"] + w["b_out"]
            y += jnp.sum(jnp.where(ids == e, gates, 0), axis=1)[:, None] * (h - x)
        return y

    def ours(x, gates, sublayers):
        sublayers = [split(weights) for weights in sublayers]
        return split_expert_ffn(x, ids, gates, sublayers, activation="relu", norm_epsilon=1e-3)

    with jax.enable_x64(True):
        assert_like_reference(ours, reference, x, gates, [stacked(w) for w in sublayers], limit=1e-12)


@pytest.mark.parametrize("ids", [[[0]], [[E - 1]], [[E]], [[3, 1, 3]]])
def test_one_token(ids):
    """Also at one expert twice: the gates are added."""
    ids = np.array(ids, np.int32)
    x, _, gates, weights = make(*ids.shape)
    with jax.enable_x64(True):
        y = jax.jit(split_expert_ffn, static_argnames="activation")(x, ids, gates, [weights], activation="relu")
        np.testing.assert_allclose(y, slow(x, ids, gates, weights, "relu"), rtol=0, atol=1e-12)


def test_tokens_of_others_may_hold_anything():
    """NaN in a token without an expert reaches no value and no gradient."""
    x, ids, gates, weights = jax.tree.map(lambda a: a.astype(np.float32) if a.dtype == float else a, make(8, 2))
    ids[3] = E

    @jax.jit
    def run(x, gates, weights):
        loss = lambda *args: (lambda y: (jnp.sum(y**2), y))(split_expert_ffn(args[0], ids, *args[1:], activation="relu"))
        return jax.grad(loss, (0, 1, 2), has_aux=True)(x, gates, [weights])

    clean = jax.device_get(run(x, gates, weights))
    x[3] = np.nan
    for a, b in zip(jax.tree.leaves(run(x, gates, weights)), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.any(clean[1][3]) and np.all(np.isfinite(clean[1]))


def test_bfloat16_sums_in_float32():
    x, ids, gates, weights = make(8, 2)
    cast = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), tree)
    y = jax.jit(split_expert_ffn, static_argnames="activation")(
        cast(x), ids, gates.astype(np.float32), [cast(weights)], activation="relu"
    )
    expected = slow(x, ids, gates, weights, "relu")
    assert y.dtype == jnp.float32 and np.abs(y - expected).max() <= 0.02 * np.abs(expected).max()
