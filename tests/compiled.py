"""Modules and functions run as one program each: one operation after the other, every one is compiled by itself."""

import jax
import numpy as np


def apply(module, variables, x, *args, **options):
    """`module.apply(variables, x, *args, **options)`; all but the variables and x are constants of the program."""
    return jax.jit(lambda variables, x: module.apply(variables, x, *args, **options))(variables, x)


def value_and_pullback(f, d_y, *args):
    """(f(*args), the gradients of <f, d_y> by each argument)."""

    @jax.jit
    def run(d_y, *args):
        y, pull = jax.vjp(f, *args)
        return y, pull(d_y)

    return jax.device_get(run(d_y, *args))


def assert_like_reference(f, reference, *args, limit):
    """max|a-b| <= limit * max|b| for the value and for every array of the gradients by all of `args`."""
    y = jax.eval_shape(f, *args)
    d_y = np.random.default_rng(3).normal(size=y.shape).astype(y.dtype)
    ours, expected = value_and_pullback(f, d_y, *args), value_and_pullback(reference, d_y, *args)
    assert jax.tree.structure(ours) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(expected)):
        name = jax.tree_util.keystr(path)
        assert np.any(b), f"{name}: the reference is 0"
        error = np.max(np.abs(a - b)) / np.max(np.abs(b))
        assert error <= limit, f"{name}: {error:.2e}"
