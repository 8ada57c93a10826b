import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import compat
from moe_jax.dispatch.retrieval import sharded_passes
from moe_jax.layers.peer import POOL_AXES
from moe_jax.ops.retrieval import retrieve, row_sink, rows_of_expert
from moe_jax.sharding import mesh_spec

N, R, D = 24, 6, 16
MESHES = {"expert=8": (("expert",), (8,)), "data=2,expert=4": (("data", "expert"), (2, 4)), "data=8": (("data",), (8,))}


def table_spec(split):
    return mesh_spec(compat.current_mesh(), POOL_AXES[split])


def error(a, b):
    return np.max(np.abs(a - b)) / np.max(np.abs(b))


@pytest.mark.parametrize(
    "mesh, activation, split, tokens, backend",
    [
        ("expert=8", "gelu", "width", 16, "blocks"),
        ("data=2,expert=4", "swiglu", "width", 21, "dense"),
        ("expert=8", "gelu", "experts", 21, "dense"),
        ("data=2,expert=4", "swiglu", "width", 21, "blocks"),
        ("data=2,expert=4", None, "width", 21, "blocks"),
        ("expert=8", "swiglu", "experts", 21, "blocks"),
        ("data=2,expert=4", None, "experts", 16, "blocks"),
        ("data=8", "gelu", "experts", 21, "blocks"),
    ],
)
def test_eight_devices_are_one(mesh, activation, split, tokens, backend):
    """Value and every gradient, that of the pool in both forms; some places of some tokens hold no expert."""
    keys = jax.random.split(jax.random.key(tokens), 5)
    rows = rows_of_expert(activation)
    ids = jax.random.randint(keys[0], (tokens, R), 0, N + 2)
    x, d_y = jax.random.normal(keys[1], (2, tokens, D))
    gates, pool = jax.random.uniform(keys[2], (tokens, R)), jax.random.normal(keys[3], (N, rows, D))
    sink = row_sink(tokens, R, rows, D)

    def run(passes, sink):
        def loss(x, gates, pool, sink):
            y = retrieve(x, ids, gates, pool, sink, activation=activation, **passes)
            return jnp.sum(y * d_y), y

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(x, gates, pool, sink)

    names, sizes = MESHES[mesh]
    with jax.set_mesh(compat.make_mesh(jax.devices()[:8], names, sizes)):
        passes = {"passes": sharded_passes(compat.current_mesh(), table_spec(split), backend)}
        for form in (None, sink):
            ours, expected = run(passes, form), run({}, form)
            for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected)):
                assert error(a, b) < 1e-5 if np.any(b) else not np.any(a)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend, split, activation", [("triton", "width", "swiglu"), ("mosaic", "width", "gelu"), ("mosaic", "experts", None)]
)
def test_kernels_on_eight_devices(backend, split, activation):
    """Interpreted: the kernels' two parts around the all-reduce, and whole experts of which most are another device's."""
    tokens, width = 13, 512
    keys = jax.random.split(jax.random.key(1), 4)
    rows = rows_of_expert(activation)
    ids = jax.random.randint(keys[0], (tokens, R), 0, N + 2)
    x, d_y = jax.random.normal(keys[1], (2, tokens, width))
    gates, pool = jax.random.uniform(keys[2], (tokens, R)), jax.random.normal(keys[3], (N, rows, width))

    def run(**passes):
        def loss(x, gates, pool):
            y = retrieve(x, ids, gates, pool, activation=activation, **passes)
            return jnp.sum(y * d_y), y

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(x, gates, pool)

    with jax.set_mesh(compat.make_mesh(jax.devices()[:8], ("data", "expert"), (2, 4))):
        ours = run(passes=sharded_passes(compat.current_mesh(), table_spec(split), backend))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(run())):
            assert error(a, b) < 1e-5 if np.any(b) else not np.any(a)


def test_the_collectives_are_those_that_are_documented():
    mesh = compat.make_mesh(jax.devices()[:8], ("expert",), (8,))
    with jax.set_mesh(mesh):
        passes = sharded_passes(compat.current_mesh(), table_spec("width"))
        f = jax.jit(lambda x, ids, gates, pool: retrieve(x, ids, gates, pool, passes=passes))
        args = jnp.zeros((16, D)), jnp.zeros((16, R), jnp.int32), jnp.zeros((16, R)), jnp.zeros((N, 2, D))
        text = f.lower(*args).as_text()
    assert text.count("stablehlo.all_to_all") == 2 and text.count("stablehlo.all_reduce") == 1
