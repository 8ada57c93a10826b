"""Zero, copy, constant and shared experts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.layers.moe import MoE
from moe_jax.layers.virtual_experts import VirtualExperts
from moe_jax.types import RouterInputs, TokenChoice
from tests.compiled import apply, assert_like_reference

T, D, E, F, K = 20, 6, 3, 5, 2
ZEROS, COPIES, CONSTANTS = 2, 1, 2


def test_against_a_loop():
    rng = np.random.default_rng(0)
    columns = E + 1 + ZEROS + COPIES + CONSTANTS
    ids = np.stack([rng.permutation(columns)[:4] for _ in range(T)]).astype(np.int32)
    choice = TokenChoice(jnp.asarray(ids), jnp.asarray(rng.uniform(size=ids.shape), jnp.float32))
    x = jnp.asarray(rng.normal(size=(T, D)), jnp.float32)
    layer = VirtualExperts(E, ZEROS, COPIES, CONSTANTS)
    params = nn.unbox(jax.jit(layer.init)(jax.random.key(0), x, choice)["params"])

    def slow(params, x):
        y = jnp.zeros_like(x)
        for t in range(T):
            for k in range(4):
                j = ids[t, k] - E - 1
                if ZEROS <= j < ZEROS + COPIES:
                    y = y.at[t].add(choice.gates[t, k] * x[t])
                elif j >= ZEROS + COPIES:
                    c = j - ZEROS - COPIES
                    a, b = jax.nn.softmax(x[t] @ params["mix"][c])
                    y = y.at[t].add(choice.gates[t, k] * (a * x[t] + b * params["constant"][c]))
        return y

    fast = lambda params, x: layer.apply({"params": params}, x, choice)
    assert_like_reference(fast, slow, params, x, limit=1e-5)


def test_they_cost_no_rows():
    """A token whose choices are all virtual has no row in the experts' products."""
    layer = MoE(E, F, K, zero_experts=ZEROS, copy_experts=COPIES)
    x = jax.random.normal(jax.random.key(1), (T, D))
    params = nn.unbox(jax.jit(layer.init)(jax.random.key(0), x)["params"])
    assert params["router"]["kernel"].shape == (D, E + ZEROS + COPIES)
    kernel = jnp.zeros_like(params["router"]["kernel"]).at[:, E:].set(1.0).at[:, -1].set(2.0)
    y, aux = apply(layer, {"params": params | {"router": {"kernel": kernel}}}, jnp.abs(x))
    assert aux.stats["counts"].sum() == 0 and aux.stats["virtual_counts"].sum() == T * K
    # First a copy, second a zero expert: x times the copy's gate.
    gate = jax.nn.softmax(jnp.stack([2 * jnp.abs(x).sum(1), jnp.abs(x).sum(1)], 1), axis=1)[:, :1]
    np.testing.assert_allclose(y, gate * jnp.abs(x), rtol=1e-5)


def test_shared():
    x = jax.random.normal(jax.random.key(1), (2, T // 2, D))
    plain, shared = MoE(E, F, K), MoE(E, F, K, shared_width=7, shared_gate=True)
    params = nn.unbox(jax.jit(shared.init)(jax.random.key(0), x)["params"])
    routed = apply(plain, {"params": {name: params[name] for name in ("router", "experts")}}, x)[0]
    w = params["shared"]
    added = jax.nn.gelu(x @ w["w_in"]) @ w["w_out"] * jax.nn.sigmoid(x @ params["shared_gate"])
    np.testing.assert_allclose(apply(shared, {"params": params}, x)[0], routed + added, rtol=1e-4, atol=1e-5)


def test_record_gives_the_matrix():
    layer = MoE(E, F, K, zero_experts=1)
    x = jax.random.normal(jax.random.key(1), (T, D))
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    matrix = apply(layer, variables, x, RouterInputs(record=True))[1].stats["matrix"]
    assert matrix.shape == (T, E + 1)
    np.testing.assert_array_equal(np.sum(matrix > 0, axis=1), K)
    np.testing.assert_allclose(np.sum(matrix, axis=1), 1, rtol=1e-5)
    assert "matrix" not in apply(layer, variables, x)[1].stats
