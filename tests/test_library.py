"""`moe_jax` inside other people's code: no config, mesh or trainer of ours."""

import pathlib

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax import PEER, MoE, RouterInputs, grouped_matmul
from moe_jax.config.routers import RoutersConfig, TopKConfig
from moe_jax.routing import ROUTERS, Sizes
from moe_jax.routing.soft_moe import SoftMoE
from moe_jax.routing.top_k import TopK

README = pathlib.Path(__file__).parents[1] / "README.md"


def library_example(text: str) -> str:
    """The first python block under a heading that contains "library"."""
    fenced, heading, block = False, "", None
    for line in text.splitlines(keepends=True):
        if line.startswith("```"):
            if block is not None:
                return "".join(block)
            fenced = not fenced
            block = [] if fenced and line == "```python\n" and "library" in heading.lower() else None
        elif block is not None:
            block.append(line)
        elif not fenced and line.startswith("#"):
            heading = line
    raise AssertionError("no ```python block under a heading with 'library'")


@pytest.mark.skipif(not README.exists(), reason="no README.md yet")
def test_readme_example():
    """It runs as it stands, and ends with a finite scalar `loss`, not 0."""
    names: dict = {}
    exec(compile(library_example(README.read_text()), str(README), "exec"), names)
    chex.assert_shape(names["loss"], ())
    assert np.isfinite(names["loss"]) and names["loss"] > 0


def test_example_is_found():
    other = "# A\n```python\n# library\n```\n"
    one = "## Use as a Library\n```bash\n# 2\n```\n```python\n# 3\n3\n```\n"
    text = other + one + "## B\n```python\n4\n```\n"
    assert library_example(text) == "# 3\n3\n"
    with pytest.raises(AssertionError):
        library_example(other)


class Foreign(nn.Module):
    """Someone's model, with flax's own parameters beside ours and unboxed ones."""

    @nn.compact
    def __call__(self, x):
        h = nn.LayerNorm()(nn.Dense(16)(x))
        y, aux = MoE(experts=4, width=24, activation="swiglu", name="moe")(h)
        return nn.Dense(1)(h + y)[..., 0], aux


def test_foreign_model_trains():
    """With the parameters alone, in anybody's train state, under jit, remat and no mesh."""
    x = np.random.default_rng(0).normal(size=(8, 16, 6)).astype(np.float32)
    target = np.sin(x.sum(-1))
    model, optimizer = Foreign(), optax.adam(1e-2)
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), x)["params"])
    state = optimizer.init(params)
    assert set(params) == {"Dense_0", "LayerNorm_0", "moe", "Dense_1"}

    @jax.jit
    def step(params, state):
        @jax.checkpoint
        def loss(params):
            y, aux = model.apply({"params": params}, x)
            return jnp.mean((y - target) ** 2) + 0.01 * aux.losses["balance"]

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, value, gradients

    losses, new = [], params
    for _ in range(30):
        new, state, value, gradients = step(new, state)
        losses.append(float(value))
    chex.assert_trees_all_equal_shapes_and_dtypes(new, params)
    assert losses[-1] < 0.5 * losses[0]
    for leaf in jax.tree.leaves(gradients):
        assert np.isfinite(leaf).all() and np.any(leaf)


def test_grouped_matmul_alone():
    out = grouped_matmul(jnp.ones((5, 2)), jnp.arange(12.0).reshape(3, 2, 2), jnp.asarray([1, 0, 3]))
    np.testing.assert_array_equal(out, [[2, 4], [18, 20], [18, 20], [18, 20], [0, 0]])


def test_nnx():
    """In one line, with values and gradients of the Linen module."""
    from flax import nnx

    x = np.random.default_rng(0).normal(size=(12, 6)).astype(np.float32)
    with nnx.use_eager_sharding(False):  # the weights name logical axes, and there is no mesh here
        layer = nnx.bridge.ToNNX(MoE(experts=4, width=8), rngs=nnx.Rngs(0)).lazy_init(x)

        @nnx.jit
        def run(layer, x):
            def loss(layer):
                y, aux = layer(x)
                return jnp.sum(y**2) + aux.losses["balance"]

            return nnx.value_and_grad(loss)(layer)

        value, gradients = run(layer, x)
    params = {
        "router": {"kernel": layer.router["kernel"][...]},
        "experts": {name: layer.experts[name][...] for name in ("w_in", "w_out")},
    }

    def loss(params):
        y, aux = MoE(experts=4, width=8).apply({"params": params}, x)
        return jnp.sum(y**2) + aux.losses["balance"]

    expected, d_params = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for part, name in (("experts", "w_in"), ("router", "kernel")):
        np.testing.assert_allclose(gradients[part][name][...], d_params[part][name], rtol=1e-5, atol=1e-6)


def routed(name, **options):
    """A layer of 4 experts with this router, as its options are by default."""
    k = 1 if name in ("switch", "base", "hash", "stable", "soft_moe") else 2
    router = ROUTERS[name].build(Sizes(4, k, vocab_size=11), getattr(RoutersConfig(), name))
    return MoE(4, 8, k, router=router, **options)


EVERYTHING = {"use_bias": True, "zero_experts": 1, "copy_experts": 1, "constant_experts": 2, "shared_width": 8}
EVERYTHING |= {"capacity_factor": 1.0, "capacity_priority": "gate", "renormalise_kept": True, "shared_gate": True}
LAYERS = {name: routed(name) for name in ROUTERS} | {
    "everything": MoE(4, 8, activation="swiglu", **EVERYTHING),
    "ragged_dot": MoE(4, 8, backend="ragged_dot", use_bias=True),
    "PEER": PEER(49, 2, 4, 6, shared_width=8),
    "values": PEER(49, 2, 4, 6, activation=None, query_norm="layernorm"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_bfloat16_under_strict_promotion(name):
    """Every product has a kernel on this platform, which shows only when it runs; nothing relies on implicit promotion."""
    layer, tokens = LAYERS[name], 16
    x = np.random.default_rng(0).normal(size=(2, 8, 16)).astype(jnp.bfloat16)
    inputs = RouterInputs(token_ids=np.arange(tokens) % 11, valid=np.arange(tokens) % 5 != 2, key=jax.random.key(3), train=True)
    variables = nn.unbox(jax.jit(lambda x: layer.init(jax.random.key(0), x, inputs))(x))
    params = variables.pop("params")

    def run(params, x):
        y, aux = layer.apply({"params": params, **variables}, x, inputs)
        return jnp.sum(jnp.square(y.astype(jnp.float32))) + sum(aux.losses.values(), start=jnp.zeros(())), y

    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        (_, y), gradients = jax.block_until_ready(jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))(params, x))
    chex.assert_type(y, jnp.bfloat16)
    chex.assert_type(gradients[1], jnp.bfloat16)
    assert all(np.isfinite(leaf).all() and np.any(leaf) for leaf in jax.tree.leaves((y, gradients)))
    wide = jax.jit(run)(params, x.astype(np.float32))[1]
    np.testing.assert_allclose(y.astype(np.float32), wide, atol=0.03 * np.abs(wide).max())


def test_grouped_matmul_under_strict_promotion():
    """Of two dtypes, with its gradient."""
    lhs, rhs, sizes = np.ones((5, 2), jnp.bfloat16), np.ones((3, 2, 2), np.float32), np.array([1, 0, 3], np.int32)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        product = lambda lhs, rhs: grouped_matmul(lhs, rhs, sizes)
        out, pull = jax.vjp(product, lhs, rhs)
        d_lhs, d_rhs = pull(jnp.ones_like(out))
    np.testing.assert_array_equal(out[:, 0], [2, 2, 2, 2, 0])
    np.testing.assert_array_equal(d_rhs[:, 0, 0], [1, 0, 3])
    chex.assert_type([out, d_lhs, d_rhs], [jnp.float32, jnp.bfloat16, jnp.float32])


@pytest.mark.parametrize("name", ["top_k", "base", "expert_choice", "soft_moe", "everything", "PEER"])
def test_no_tokens(name):
    """Empty in, empty out, gradients of 0; parameters as of any other input."""
    layer, some = LAYERS[name], np.ones((2, 8, 16), np.float32)
    init = lambda x: nn.unbox(layer.init(jax.random.key(0), x))
    variables, x = jax.jit(init)(some[:0]), jnp.asarray(some[:0])
    chex.assert_trees_all_equal_shapes_and_dtypes(variables, jax.eval_shape(init, some))
    params = variables.pop("params")

    def loss(params, x):
        y, aux = layer.apply({"params": params, **variables}, x, RouterInputs(token_ids=jnp.zeros(0, int), train=True))
        return jnp.sum(y) + aux.losses.get("balance", 0.0), (y, aux.stats)

    gradients, (y, stats) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
    chex.assert_shape([y, gradients[1]], (0, 8, 16))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((gradients, stats)))  # NaN counts as any


def test_a_sequence_does_not_depend_on_its_neighbour():
    """The rows of x are the sequences, with inputs that do not number them too."""
    x = np.random.default_rng(0).normal(size=(2, 8, 16)).astype(np.float32)
    other = np.concatenate([x[:1], -x[1:]])
    layer = MoE(4, 8, 1, router=SoftMoE(4, 2))
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    for inputs in (None, RouterInputs(valid=np.ones(16, bool))):
        run = jax.jit(lambda x, inputs=inputs: layer.apply(variables, x, inputs)[0])
        np.testing.assert_allclose(run(x)[0], run(other)[0], atol=1e-6)
        assert np.abs(run(x)[1] - run(other)[1]).max() > 0.01


def test_the_loss_of_each_sequence():
    x = np.random.default_rng(0).normal(size=(3, 8, 16)).astype(np.float32)
    layer = MoE(4, 8, router=TopK(4, 2, options=TopKConfig(sequence_loss=1.0)))
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    loss = lambda x: layer.apply(variables, x, train=True)[1].losses["sequence"]
    alone = [loss(row) for row in x]
    np.testing.assert_allclose(loss(x), np.mean(alone), rtol=1e-5)
    assert abs(loss(x.reshape(1, 24, 16)) - np.mean(alone)) > 1e-3


@pytest.mark.parametrize("layer", [MoE(4, 8), PEER(49, 2, 4, 6)], ids=["MoE", "PEER"])
def test_forward_mode_is_refused_as_documented(layer):
    """With JAX's error. Gradients of gradients are compared in tests/layers."""
    x = np.ones((4, 16), np.float32)
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: layer.apply(variables, x)[0], (x,), (x,))
    assert "jax.jvp" in type(layer).__doc__ and "reverse-mode gradients of any order" in type(layer).__doc__
