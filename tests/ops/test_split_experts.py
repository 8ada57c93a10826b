"""Experts in arrays of their own, against a loop over the experts in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch.permute import sort_by_expert
from moe_jax.ops.activations import ACTIVATIONS, activate, is_gated
from moe_jax.ops.split_experts import MOST_ROWS, block_rows, split_expert_ffn

D, F, E = 6, 10, 5


def make(tokens, k, activation="relu", biases=True):
    """(x, ids with "no expert" among them and nobody at expert 2, gates, weights by name of E arrays)."""
    rng = np.random.default_rng([tokens, k])
    shapes = {"w_in": (D, F), "w_out": (F, D)} | ({"w_gate": (D, F)} if is_gated(activation) else {})
    if biases:
        shapes |= {"b" + name[1:]: shape[1:] for name, shape in shapes.items()}
    weights = {name: tuple(rng.normal(size=shape) for _ in range(E)) for name, shape in shapes.items()}
    ids = rng.choice([0, 1, 3, 4, E, E + 2], (tokens, k)).astype(np.int32)
    return rng.normal(size=(tokens, D)), ids, rng.random((tokens, k)), weights


def run(x, ids, gates, weights, activation):
    order = sort_by_expert(ids, E)
    gates = gates.reshape(-1)[order.order]
    options = {"activation": activation, "gates": gates, "order": order.order, "inverse": order.inverse}
    return split_expert_ffn(x, weights, order.group_sizes, **options)


def slow(x, ids, gates, weights, activation):
    y = np.zeros_like(x)
    for e in range(E):
        w = {name: of_experts[e] for name, of_experts in weights.items()}
        h = {b: x @ w["w_" + b] + w.get("b_" + b, 0) for b in ("in", "gate") if "w_" + b in w}
        out = activate(activation, h["in"], h.get("gate")) @ w["w_out"] + w.get("b_out", 0)
        y += np.sum(np.where(ids == e, gates, 0), axis=1)[:, None] * out
    return y


@pytest.mark.parametrize("activation, tokens, k", [*zip(ACTIVATIONS, (1, 1, 8, 70), (1, 3, 2, 2))])
def test_values(activation, tokens, k):
    args = make(tokens, k, activation, biases=activation != "gelu")
    with jax.enable_x64(True):
        y = jax.jit(run, static_argnums=4)(*args, activation)
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, slow(*args, activation), rtol=0, atol=1e-13 * np.abs(y).max())


@pytest.mark.parametrize("expert", [0, E - 1, E])
def test_all_to_one(expert):
    """All rows of one expert: more than one block of them."""
    x, ids, gates, weights = make(40, 2)
    ids = np.full_like(ids, expert)
    with jax.enable_x64(True):
        y = jax.jit(run, static_argnums=4)(x, ids, gates, weights, "relu")
        np.testing.assert_allclose(y, slow(x, ids, gates, weights, "relu"), rtol=0, atol=1e-12)


def test_tokens_without_an_expert_may_hold_anything():
    x, ids, gates, weights = jax.tree.map(lambda a: a.astype(np.float32) if a.dtype == float else a, make(8, 2))
    ids[3] = E
    clean = jax.jit(run, static_argnums=4)(x, ids, gates, weights, "relu")
    x[3] = np.nan
    np.testing.assert_array_equal(jax.jit(run, static_argnums=4)(x, ids, gates, weights, "relu"), clean)
    assert not np.any(clean[3]) and np.all(np.isfinite(clean))


def test_bfloat16_sums_in_float32():
    x, ids, gates, weights = make(8, 2)
    cast = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), tree)
    y = jax.jit(run, static_argnums=4)(cast(x), ids, gates.astype(np.float32), cast(weights), "relu")
    expected = slow(x, ids, gates, weights, "relu")
    assert y.dtype == jnp.float32 and np.abs(y - expected).max() <= 0.02 * np.abs(expected).max()


def test_gradients_are_refused():
    x, ids, gates, weights = jax.tree.map(jnp.asarray, make(8, 2))
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.jit(jax.grad(lambda x: jnp.sum(run(x, ids, gates, weights, "relu"))))(x)


def test_block_rows():
    sizes = [(2, 8, 1), (16, 8, 2), (18, 8, 4), (128, 8, 16), (3, 1, 3), (10**6, 8, MOST_ROWS)]
    assert [block_rows(rows, experts) for rows, experts, _ in sizes] == [size for *_, size in sizes]
