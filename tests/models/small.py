"""Parameters for tests. Compiling an initialisation takes longer than the test that wants it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


def boxed_shapes(model: nn.Module) -> dict:
    """ShapeDtypeStructs of the model's variables, boxed with their logical axes."""
    token = jnp.zeros((1, 1), jnp.int32)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), token, token, token + 1))


def random_variables(model: nn.Module, seed: int = 0) -> dict:
    """Every leaf drawn from a normal distribution, around 1 for scales of norms, by the seed and its path."""

    def draw(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rng = np.random.default_rng([seed, *name.encode()])
        center, spread = (1.0, 0.1) if name.endswith("scale") else (0.0, 0.3)
        return rng.normal(center, spread, leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, nn.unbox(boxed_shapes(model)))
