import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax import compat
from moe_jax.layers.embeddings import LearnedPositions, TokenEmbedding, row_ids

IDS = jnp.array([[3, 1, 3, 0], [9, 3, 1, 1]])


def _loss(layer, variables, target):
    return jnp.sum(jnp.sin(layer.apply(variables, IDS).astype(jnp.float32)) * target)


def test_lookup():
    layer = TokenEmbedding(10, 6)
    variables = jax.jit(layer.init)(jax.random.key(0), IDS)
    table = np.asarray(nn.unbox(variables)["params"]["embedding"])
    y = jax.jit(layer.apply)(variables, IDS)
    chex.assert_shape(y, (2, 4, 6))
    np.testing.assert_array_equal(y, table[np.asarray(IDS)])
    assert variables["params"]["embedding"].names == ("vocab", "embed")
    assert np.isnan(layer.apply(variables, jnp.array([[10]]))).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_row_gradients_sum_to_the_dense_gradient(dtype):
    target = jax.random.normal(jax.random.key(1), (2, 4, 6))
    layer, rows = TokenEmbedding(10, 6, dtype=dtype), TokenEmbedding(10, 6, dtype=dtype, row_gradients=True)
    params = nn.unbox(jax.jit(layer.init)(jax.random.key(0), IDS))["params"]
    dense = jax.grad(lambda p: _loss(layer, {"params": p}, target))(params)["embedding"]
    # Without a sink: the ordinary lookup.
    chex.assert_trees_all_equal(dense, jax.grad(lambda p: _loss(rows, {"params": p}, target))(params)["embedding"])

    sink = {"embedding": jnp.zeros((IDS.size, 6))}
    assert layer.apply({"params": params}, IDS).dtype == dtype
    chex.assert_trees_all_equal(layer.apply({"params": params}, IDS), rows.apply({"params": params, "row_sinks": sink}, IDS))
    d_params, d_sink = jax.jit(jax.grad(lambda p, s: _loss(rows, {"params": p, "row_sinks": s}, target), argnums=(0, 1)))(
        params, sink
    )
    assert not d_params["embedding"].any()
    scattered = jnp.zeros((10, 6)).at[row_ids(IDS)].add(d_sink["embedding"])
    chex.assert_trees_all_close(scattered, dense, rtol=1e-6, atol=1e-7)


def test_no_dense_gradient_is_built():
    layer = TokenEmbedding(100_003, 6, row_gradients=True)
    params = nn.unbox(jax.jit(layer.init)(jax.random.key(0), IDS))["params"]
    grad = jax.jit(jax.grad(lambda s: layer.apply({"params": params, "row_sinks": {"embedding": s}}, IDS).sum()))
    text = grad.lower(jnp.zeros((IDS.size, 6))).compile().as_text()
    assert "scatter" not in text and "f32[100003,6]{1,0} broadcast" not in text


def test_sink_of_a_nested_module_and_wrong_shape():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, ids):
            return TokenEmbedding(10, 6, row_gradients=True, name="tokens")(ids)

    model = Model()
    params = nn.unbox(model.init(jax.random.key(0), IDS))["params"]
    sinks = {"tokens": {"embedding": jnp.zeros((8, 6))}}
    grads = jax.grad(lambda s: model.apply({"params": params, "row_sinks": s}, IDS).sum())(sinks)
    chex.assert_trees_all_equal(grads, jax.tree.map(jnp.ones_like, sinks))
    with pytest.raises(ValueError, match=r"row_sinks/embedding has shape \(7, 6\)"):
        model.apply({"params": params, "row_sinks": {"tokens": {"embedding": jnp.zeros((7, 6))}}}, IDS)


def test_sharded_table():
    layer = TokenEmbedding(16, 8)
    params = nn.unbox(jax.jit(layer.init)(jax.random.key(0), IDS))["params"]
    target = jax.random.normal(jax.random.key(1), (2, 4, 8))
    grad = jax.jit(jax.value_and_grad(lambda p: _loss(layer, {"params": p}, target)))
    expected = grad(params)
    mesh = compat.make_mesh(jax.devices(), ("data", "fsdp", "tensor"), (2, 2, 2))
    sharded = jax.device_put(params, jax.sharding.NamedSharding(mesh, compat.PartitionSpec("tensor", "fsdp")))
    with jax.set_mesh(mesh):
        chex.assert_trees_all_close(grad(sharded), expected, rtol=1e-6)


def test_learned_positions():
    layer = LearnedPositions(5, 6, offset=2)
    positions = jnp.array([[0, 1, 4]])
    variables = jax.jit(layer.init)(jax.random.key(0), positions)
    table = np.asarray(nn.unbox(variables)["params"]["embedding"])
    assert table.shape == (7, 6) and variables["params"]["embedding"].names == ("positions", "embed")
    np.testing.assert_array_equal(layer.apply(variables, positions), table[None, [2, 3, 6]])
    assert np.isnan(layer.apply(variables, jnp.array([[5]]))).all()
