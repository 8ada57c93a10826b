"""`moe_jax` inside other people's code: no config, mesh or trainer of ours."""

import pathlib

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax import MoE, grouped_matmul

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
