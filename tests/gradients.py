"""A function beside a slow reference of it: values and gradients."""

import jax
import numpy as np


def value_and_pullback(f, d_y, *args):
    """(f(*args), the gradients of <f, d_y> by each argument), in one compiled program."""

    @jax.jit
    def run(d_y, *args):
        y, pull = jax.vjp(f, *args)
        return y, pull(d_y)

    return jax.device_get(run(d_y, *args))


def assert_like_reference(f, reference, *args, limit):
    """max|a-b| <= limit * max|b| for the value and for every array of the gradients by all of `args`."""
    y = jax.eval_shape(f, *args)
    d_y = np.random.default_rng(3).normal(size=y.shape).astype(y.dtype)
    pairs = value_and_pullback(f, d_y, *args), value_and_pullback(reference, d_y, *args)
    assert jax.tree.structure(pairs[0]) == jax.tree.structure(pairs[1])
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(pairs[0]), jax.tree.leaves(pairs[1]), strict=True):
        assert np.any(b), f"{jax.tree_util.keystr(path)}: the reference is 0"
        error = np.max(np.abs(a - b)) / np.max(np.abs(b))
        assert error <= limit, f"{jax.tree_util.keystr(path)}: {error:.2e}"
