"""The layer on a mesh against the layer on one device, and that against a loop over the assignments."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import compat
from moe_jax.dispatch.gather_exchange import run_local, run_sharded
from moe_jax.ops.expert_ffn import expert_ffn
from moe_jax.types import TokenChoice

T, K, E, D, F = 16, 2, 4, 6, 8
MESHES = {
    "expert": (("data", "fsdp", "expert", "tensor"), (1, 1, 4, 2)),
    "fsdp": (("data", "fsdp", "expert", "tensor"), (2, 2, 1, 2)),
    "few axes": (("expert", "data"), (2, 4)),
    "tensor": (("tensor",), (4,)),
}


def make(tokens, high=E + 1):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    weights = {"w_in": draw(E, D, F), "w_out": draw(E, F, D), "b_in": draw(E, F), "b_out": draw(E, D)}
    ids = jnp.asarray(rng.integers(0, high, (tokens, K)), jnp.int32)
    return draw(tokens, D), TokenChoice(ids, draw(tokens, K)), weights, draw(tokens, D)


def run_experts(rows, weights, group_sizes):
    return expert_ffn(rows, weights, group_sizes, activation="relu")


def slow(x, choice, weights):
    x, gates, w = (jax.tree.map(lambda a: np.asarray(a, np.float64), a) for a in (x, choice.gates, weights))
    y = np.zeros(x.shape)
    for t in range(len(x)):
        for k, e in enumerate(np.asarray(choice.expert_ids[t])):
            if e < E:
                h = np.maximum(x[t] @ w["w_in"][e] + w["b_in"][e], 0)
                y[t] += gates[t, k] * (h @ w["w_out"][e] + w["b_out"][e])
    return y


def with_gradients(run, x, choice, weights, d_y):
    def f(x, gates, weights):
        return run(x, TokenChoice(choice.expert_ids, gates), weights, run_experts)

    @jax.jit
    def both(x, gates, weights):
        y, pull = jax.vjp(f, x, gates, weights)
        return y, pull(d_y)

    return both(x, choice.gates, weights)


@functools.cache
def local(tokens):
    return with_gradients(run_local, *make(tokens))


def assert_close(a, b):
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
    for left, right in zip(jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b))):
        assert np.abs(left - right).max() <= 1e-5 * np.abs(right).max()


def test_local():
    x, choice, weights, _ = make(T)
    y, _ = local(T)
    expected = slow(x, choice, weights)
    assert np.abs(y - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name, tokens", [*zip(MESHES, [T] * 4), ("expert", T + 1), ("fsdp", T + 1)])
def test_sharded_is_local(name, tokens):
    axes, shape = MESHES[name]
    args = make(tokens)
    mesh = compat.make_mesh(jax.devices()[: np.prod(shape)], axes, shape)
    with jax.set_mesh(mesh):
        result = with_gradients(lambda *a: run_sharded(mesh, *a), *args)
    assert_close(result, local(tokens))


def test_each_shard_runs_its_own_rows():
    """The rows that a shard's experts receive, in all the assignments of their experts."""
    x, choice, weights, _ = make(T, high=3)
    mesh = compat.make_mesh(jax.devices()[:4], ("expert",), (4,))

    def count(rows, weights, group_sizes):
        # The number of real rows stands in every row.
        chex.assert_shape([rows, group_sizes], [(T * K, D), (1,)])
        real = (jnp.arange(rows.shape[0]) < group_sizes.sum())[:, None]
        return jnp.where(real, group_sizes.sum().astype(rows.dtype), 0) * jnp.ones_like(rows)

    ones = TokenChoice(choice.expert_ids, jnp.ones((T, K)))
    with jax.set_mesh(mesh):
        y = jax.jit(lambda *a: run_sharded(mesh, *a, count))(x, ones, weights)
    sizes = np.bincount(np.asarray(choice.expert_ids).ravel(), minlength=E)
    expected = np.sum(sizes[choice.expert_ids], axis=-1, keepdims=True)
    np.testing.assert_array_equal(y, np.broadcast_to(expected, (T, D)))
    assert sizes[3] == 0
