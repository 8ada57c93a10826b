import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import compat
from moe_jax.compat import PartitionSpec
from moe_jax.ops.column_top_k import column_top_k, fits


def reference(values, ids, top_k):
    """By value, then by id."""
    order = np.lexsort((ids, -values), axis=0)[:top_k]
    return np.take_along_axis(values, order, 0), np.take_along_axis(ids, order, 0)


@pytest.mark.parametrize("rows, top_k, levels", [(1, 1, 0), (7, 7, 0), (16, 3, 2), (50, 16, 3), (33, 8, 1), (128, 5, 0)])
def test_equals_a_sort(rows, top_k, levels):
    """With `levels` most values are equal."""
    keys = jax.random.split(jax.random.key(rows), 2)
    values = jax.random.normal(keys[0], (rows, 13)) * 10.0 ** jnp.linspace(-30, 37, 13)
    if levels:
        values = jax.random.randint(keys[0], (rows, 13), -1, levels).astype(jnp.float32)
    ids = jnp.argsort(jax.random.uniform(keys[1], (rows, 13)), axis=0).astype(jnp.int32) * 7
    ours = jax.jit(column_top_k, static_argnums=2)(values, ids, top_k)
    for a, b in zip(ours, reference(np.asarray(values), np.asarray(ids), top_k)):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def test_values_that_are_not_numbers_of_every_day():
    column = jnp.array([0.0, -jnp.inf, jnp.nan, 1e-45, -0.0, jnp.inf, -1e-45])[:, None]
    first = 2**31 - 7  # up to the largest int32
    values, ids = column_top_k(column, jnp.arange(first, first + 7, dtype=jnp.int32)[:, None], 7)
    places = np.asarray(ids)[:, 0] - first
    np.testing.assert_array_equal(places, [2, 5, 3, 0, 4, 6, 1])
    np.testing.assert_array_equal(values, np.asarray(column)[places])


def test_under_a_checked_shard_map_and_only_where_it_is_faster():
    mesh = compat.make_mesh(jax.devices()[:8], ("data",), (8,))
    values, ids = jax.random.normal(jax.random.key(0), (9, 24)), jnp.arange(9, dtype=jnp.int32)[:, None]
    split = PartitionSpec(None, "data")
    mapped = jax.shard_map(lambda v: column_top_k(v, ids, 3), mesh=mesh, in_specs=split, out_specs=split)
    for a, b in zip(jax.jit(mapped)(values), column_top_k(values, ids, 3)):
        np.testing.assert_array_equal(a, b)
    assert fits(1024, 16, jnp.float32) and not fits(1025, 16, jnp.float32) and not fits(8, 2, jnp.float64)
