import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import compat
from moe_jax.models import losses


def _inputs(B=4, S=13, D=6, V=11, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    x, table = jax.random.normal(keys[0], (B, S, D), dtype), jax.random.normal(keys[1], (V, D), dtype)
    weights = jax.random.uniform(keys[3], (B, S), jnp.float32).astype(jnp.promote_types(dtype, jnp.float32))
    return x, table, jax.random.randint(keys[2], (B, S), 0, V), weights.at[:, -2:].set(0).at[0].set(0)


def _plain(x, table, targets, weights):
    log_probabilities = jax.nn.log_softmax(jnp.einsum("BSD,VD->BSV", x, table))
    nats = -jnp.take_along_axis(log_probabilities, targets[..., None], -1)[..., 0]
    return jnp.sum(nats * weights), nats


def _gradients(f):
    """Value and gradients for x, table and weights of 3 * f, to see that the outer derivative arrives."""
    return jax.jit(jax.value_and_grad(lambda x, t, i, w: 3 * f(x, t, i, w)[0], (0, 1, 3)))


def _error(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.abs(a - b).max() / np.abs(b).max()


# 4 rows of 13: one position at a time, an uneven last chunk, all at once.
@pytest.mark.parametrize("chunk", [1, 20, 1000])
def test_exact_in_float64(chunk):
    with jax.enable_x64(True):
        inputs = _inputs(dtype=jnp.float64)
        ours = functools.partial(losses.cross_entropy, chunk=chunk, dtype=jnp.float64)
        for a, b in zip(
            jax.tree.leaves(_gradients(ours)(*inputs)),
            jax.tree.leaves(_gradients(_plain)(*inputs)),
            strict=True,
        ):
            chex.assert_type(a, jnp.float64)
            assert _error(a, b) < 1e-12
        value, total = jax.jit(ours)(*inputs)
        assert _error(value, _plain(*inputs)[0]) < 1e-12 and _error(total, inputs[3].sum()) < 1e-12


# Error = max|a-b| / max|b| against float32: rounding of sums; bfloat16 inputs carry 8 bits.
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_tolerance(dtype, tolerance):
    inputs = _inputs()
    ours = _gradients(functools.partial(losses.cross_entropy, chunk=20, dtype=dtype))(*inputs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(_gradients(_plain)(*inputs)), strict=True):
        chex.assert_type(a, jnp.float32)
        assert _error(a, b) < tolerance


def test_bfloat16_activations_keep_their_dtype():
    x, table, targets, weights = _inputs()
    _, (dx, d_table, _) = _gradients(functools.partial(losses.cross_entropy, dtype=jnp.bfloat16))(
        x.astype(jnp.bfloat16), table, targets, weights
    )
    chex.assert_type([dx, d_table], [jnp.bfloat16, jnp.float32])


def test_per_token():
    x, table, targets, _ = _inputs()
    nats = jax.jit(functools.partial(losses.per_token_cross_entropy, chunk=20))(x, table, targets)
    chex.assert_shape(nats, targets.shape)
    _, expected = _plain(x, table, targets, jnp.ones(targets.shape))
    assert _error(nats, expected) < 1e-6
    gradient = lambda f: jax.jit(jax.grad(lambda x, t: jnp.sum(jnp.sin(f(x, t))), (0, 1)))
    ours = gradient(lambda x, t: losses.per_token_cross_entropy(x, t, targets, chunk=20))(x, table)
    plain = gradient(lambda x, t: _plain(x, t, targets, jnp.ones(targets.shape))[1])(x, table)
    for a, b in zip(ours, plain, strict=True):
        assert _error(a, b) < 1e-6


def test_large_logits_are_finite():
    x, table, targets, weights = _inputs()
    result = _gradients(losses.cross_entropy)(x * 1e4, table, targets, weights)
    chex.assert_tree_all_finite(result)
    assert _error(result[0], _gradients(_plain)(x * 1e4, table, targets, weights)[0]) < 1e-6


def test_logits_are_never_whole():
    B, S, D, V, chunk = 8, 1024, 16, 8192, 256
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((B, S, D), jnp.float32), ((V, D), jnp.float32))]
    shapes += [jax.ShapeDtypeStruct((B, S), jnp.int32), jax.ShapeDtypeStruct((B, S), jnp.float32)]
    ours = functools.partial(losses.cross_entropy, chunk=chunk)
    logits = B * S * V * 4
    for f in (_gradients(ours), jax.jit(ours)):
        temporary = f.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
        # A few arrays of a chunk's logits (1/32 of all), and the table's gradient.
        assert temporary < logits / 8


@pytest.mark.parametrize("names, sizes", [(("data",), (8,)), (("data", "fsdp", "tensor"), (2, 2, 2))])
def test_eight_devices(names, sizes):
    inputs = _inputs(B=8, V=12)
    ours = _gradients(functools.partial(losses.cross_entropy, chunk=32))
    expected = ours(*inputs)
    mesh = compat.make_mesh(jax.devices(), names, sizes)
    batch = compat.PartitionSpec(tuple(name for name in names if name != "tensor"))
    table = compat.PartitionSpec("tensor", "fsdp") if "tensor" in names else compat.PartitionSpec()
    put = lambda a, spec: jax.device_put(a, jax.sharding.NamedSharding(mesh, spec))
    sharded = [put(a, table if i == 1 else batch) for i, a in enumerate(inputs)]
    with jax.set_mesh(mesh):
        result = ours(*sharded)
        text = ours.lower(*sharded).compile().as_text()
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert _error(a, b) < 1e-6
    # The table's gradient crosses the devices once, after the loop: see losses._summed_forward.
    if names == ("data",):
        bodies = [re.search(rf"^{re.escape(n)} .*?^}}", text, re.M | re.S)[0] for n in re.findall(r"body=(%[\w.-]+)", text)]
        assert bodies and "all-reduce" in text and not any("all-reduce" in body for body in bodies)
