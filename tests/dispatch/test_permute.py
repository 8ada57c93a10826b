import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch.permute import combine_rows, gather_rows, sort_by_expert

T, K, E, D = 20, 3, 5, 4


def random_ids(seed=0, low=-1, high=E + 3):
    """[T, K] with experts, "no expert" (E) and ids outside on both sides."""
    return jnp.asarray(np.random.default_rng(seed).integers(low, high, (T, K)), jnp.int32)


@pytest.mark.parametrize(
    "ids",
    [random_ids(), random_ids(1, 0, E), jnp.full((T, K), 2, jnp.int32), jnp.full((T, K), E, jnp.int32)],
    ids=["with others", "experts only", "all to one", "nobody"],
)
def test_sort(ids):
    order = jax.jit(sort_by_expert, static_argnums=1)(ids, E)
    chex.assert_shape(order, [(T * K,), (T * K,), (E,)])
    chex.assert_type(order, jnp.int32)
    flat = np.asarray(ids).ravel()
    flat = np.where((flat < 0) | (flat > E), E, flat)
    np.testing.assert_array_equal(order.order, np.argsort(flat, kind="stable"))
    np.testing.assert_array_equal(np.asarray(order.order)[order.inverse], np.arange(T * K))
    np.testing.assert_array_equal(order.group_sizes, np.bincount(flat, minlength=E + 1)[:E])


@pytest.mark.smoke
def test_gather_and_combine():
    """Values and gradients are those of plain indexing, and no gradient is a scatter."""
    order = sort_by_expert(random_ids(), E)
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, gates = jnp.asarray(rng.normal(size=(T, D))), jnp.asarray(rng.normal(size=(T, K)))
        rows, d_x = jnp.asarray(rng.normal(size=(T * K, D))), jnp.asarray(rng.normal(size=(T, D)))

        def plain_gather(x):
            return x[order.order // K]

        def plain_combine(rows, gates):
            return jnp.sum(rows[order.inverse].reshape(T, K, D) * gates[..., None], axis=1)

        def gradients(f, g, *args):
            value, pull = jax.vjp(f, *args)
            return value, pull(g)

        gather = lambda x: gather_rows(x, order)
        combine = lambda rows, gates: combine_rows(rows, gates, order)
        cases = (gather, plain_gather, rows, x), (combine, plain_combine, d_x, rows, gates)
        for ours, plain, *args in cases:
            results = gradients(ours, *args)
            chex.assert_trees_all_close(results, gradients(plain, *args), rtol=1e-12, atol=1e-12)
            assert "scatter" not in str(jax.make_jaxpr(lambda *args: gradients(ours, *args))(*args))
            assert "scatter" in str(jax.make_jaxpr(lambda *args: gradients(plain, *args))(*args))


@pytest.mark.fused
def test_bfloat16_accumulates_in_float32():
    """256 + 1 + 1 + 1 is 256 in bfloat16 steps, 259 -> 260 after one rounding."""
    ids = jnp.asarray([[0, 1, 2, 3]], jnp.int32)
    order = sort_by_expert(ids, 4)
    rows = jnp.asarray([[256.0], [1.0], [1.0], [1.0]], jnp.bfloat16)
    y = combine_rows(rows, jnp.ones((1, 4), jnp.float32), order)
    chex.assert_type(y, jnp.bfloat16)
    assert y[0, 0] == 260
    _, pull = jax.vjp(lambda x: gather_rows(x, order), jnp.zeros((1, 1), jnp.bfloat16))
    assert pull(rows)[0][0, 0] == 260
    # Gates keep their float32 digits: 1/3 in bfloat16 would give 0.33398, thrice 1.00195.
    gates = jnp.full((1, 4), 1 / 3, jnp.float32).at[0, 1].add(2**-12)
    y = combine_rows(jnp.asarray([[3.0], [-1.0], [-1.0], [-1.0]], jnp.bfloat16), gates, order)
    np.testing.assert_allclose(y, -(2**-12), rtol=0.02)
