import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import compat
from moe_jax.compat import PartitionSpec
from moe_jax.ops import product_keys
from moe_jax.ops.product_keys import product_search, product_top_k


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


def search_whole(queries, keys, top_k):
    """`product_search` in one piece, differentiated by JAX."""
    pattern = "thpd,pnd->pthn" if keys.ndim == 3 else "thpd,hpnd->pthn"
    return product_top_k(*jnp.einsum(pattern, queries, keys), top_k)


def of_search(search, queries, keys, d_scores):
    """(scores, ids, the gradients of queries and keys)."""
    (scores, ids), vjp = jax.vjp(lambda *args: search(*args, d_scores.shape[-1]), queries, keys)
    return scores, ids, *vjp((d_scores, np.zeros(ids.shape, jax.dtypes.float0)))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("block_tokens, tokens", [(4, 0), (4, 13), (1, 3), (100, 13)])
def test_a_search_in_blocks_is_the_search(monkeypatch, block_tokens, tokens, own):
    heads, half, n, top_k = 3, 4, 9, 5
    monkeypatch.setitem(product_keys.BLOCK_BYTES, "cpu", block_tokens * 2 * heads * n * 8)
    with jax.enable_x64():
        keys = jax.random.split(jax.random.key(tokens), 3)
        queries = jax.random.normal(keys[0], (tokens, heads, 2, half), jnp.float64)
        table = jax.random.normal(keys[1], (*[heads] * own, 2, n, half), jnp.float64)
        d_scores = jax.random.normal(keys[2], (tokens, heads, top_k), jnp.float64)
        ours = jax.jit(lambda *args: of_search(product_search, *args))(queries, table, d_scores)
        expected = of_search(search_whole, queries, table, d_scores)
    np.testing.assert_array_equal(ours[1], expected[1])
    for a, b in zip(ours, expected):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("tokens, needed", [(64, 3), (48, 3), (40, 4), (56, 4)])
def test_every_device_has_its_share_of_each_block(monkeypatch, tokens, needed):
    monkeypatch.setitem(product_keys.BLOCK_BYTES, "cpu", -(-tokens // 8 // needed) * 2 * 2 * 9 * 4)
    mesh = compat.make_mesh(jax.devices()[:8], ("data",), (8,))
    queries, keys = jnp.zeros((tokens, 2, 2, 4)), jnp.zeros((2, 9, 4))
    with jax.set_mesh(mesh):
        text = str(jax.make_jaxpr(lambda *args: product_search(*args, 3))(queries, keys))
    blocks = int(re.search(r"scan\[.*?length=(\d+)", text, re.DOTALL)[1])
    assert blocks >= 2 and tokens // 8 % blocks == 0


def test_a_search_in_blocks_under_a_checked_shard_map(monkeypatch):
    monkeypatch.setitem(product_keys.BLOCK_BYTES, "cpu", 2 * 2 * 9 * 4)
    mesh = compat.make_mesh(jax.devices()[:8], ("data",), (8,))
    keys = jax.random.split(jax.random.key(0), 3)
    queries, table = jax.random.normal(keys[0], (24, 2, 2, 4)), jax.random.normal(keys[1], (2, 9, 4))
    d_scores, split = jax.random.normal(keys[2], (24, 2, 3)), PartitionSpec("data")
    mapped = jax.shard_map(
        lambda *args: of_search(product_search, *args),
        mesh=mesh,
        in_specs=(split, PartitionSpec(), split),
        out_specs=(split, split, split, PartitionSpec()),
    )
    for a, b in zip(jax.jit(mapped)(queries, table, d_scores), of_search(search_whole, queries, table, d_scores)):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)


@pytest.mark.parametrize("devices, own", [(1, True), (8, False)])
def test_float32_finds_the_experts_that_float64_finds(devices, own):
    """The search of a CPU in one precision, beside all n*n experts in the other; also with queries that tie all of them."""
    tokens, heads, half, n, top_k = 16, 3, 4, 11, 5
    keys = jax.random.split(jax.random.key(0), 3)
    queries = jax.random.normal(keys[0], (tokens, heads, 2, half)).at[0].set(0)
    table = jax.random.normal(keys[1], (*[heads] * own, 2, n, half))
    d_scores = jax.random.normal(keys[2], (tokens, heads, top_k))
    with jax.set_mesh(compat.make_mesh(jax.devices()[:devices], ("data",), (devices,))):
        place = jax.jit(lambda a: compat.constrain(a, ("data",), (), (), ()))
        ours = jax.jit(lambda *args: of_search(product_search, *args))(place(queries), table, d_scores)
    with jax.enable_x64():
        wide = [jnp.asarray(np.asarray(a), jnp.float64) for a in (queries, table, d_scores)]
        halves = jnp.einsum("thpd,hpnd->pthn", wide[0], jnp.broadcast_to(wide[1], (heads, 2, n, half)))
        sums = np.asarray(halves[0][..., :, None] + halves[1][..., None, :]).reshape(tokens, heads, n * n)
        best, chosen = jax.lax.top_k(sums, top_k)
        expected = of_search(search_whole, *wide)
    np.testing.assert_array_equal(ours[1], chosen)
    np.testing.assert_allclose(ours[0], best, rtol=0, atol=2e-6)
    assert all(len(set(row)) == top_k for row in np.asarray(ours[1]).reshape(-1, top_k).tolist())
    # The tied token's ids are others there: only its share of the queries' gradient, of the keys' none, depends on them.
    np.testing.assert_allclose(ours[2][1:], expected[2][1:], rtol=0, atol=5e-6)
    np.testing.assert_allclose(ours[3], expected[3], rtol=0, atol=5e-6)
