"""The two passes of a retrieval as one kernel each, whatever the kernel is written in.

Both passes have the same form, so that a backend (`triton`, `mosaic`) is one function:

    run(x [T, D], ids [T, R], pairs, table [N, M, D], outputs=k, inner=f, project=(m, ...), combine=(m, ...))
        -> (y [T, D] or None, tuple of k arrays [T, R])

For every token it fetches its R experts and computes in float32: the dots, products of the rows `project` with x; from them and
the arrays `pairs` [T, R], elementwise, `inner(dots, pairs) -> (k outputs, weights)`; y, the sum of weights times the rows
`combine`. x is None without `project`, and y without `combine`. No [T, R, D] is formed. Every sum runs over the R
places of a token in one fixed order inside one program, without atomics, so that equal inputs give equal bits. A
place with an id of N or more fetches nothing; its dots are 0.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moe_jax.ops.activations import activate


def forward(run: Callable, x, ids, gates, table, activation, reduce=None):
    """See `blocks.forward`. With `reduce` the input rows and the output rows are fetched by a kernel each."""
    _check(x, ids, table)
    inputs, output = _rows(table)
    if reduce is None:
        inner = lambda dots, pairs: (dots, (_hidden_values(activation, dots, pairs[0]),))
        y, hidden = run(x, ids, (gates,), table, outputs=len(inputs), inner=inner, project=inputs, combine=output)
        return y, _stack(hidden, gates)
    hidden = ()
    if inputs:
        hidden = run(x, ids, (), table, outputs=len(inputs), inner=lambda dots, _: (dots, ()), project=inputs, combine=())[1]
    hidden = reduce(_stack(hidden, gates))
    h = _hidden_values(activation, _unstack(hidden), gates)
    return _combine(run, ids, (h,), table, output), hidden


def backward(run: Callable, d_y, x, ids, gates, hidden, table, activation, reduce=None):
    """See `blocks.backward`. With `reduce` as in `forward`."""
    _check(x, ids, table)
    inputs, output = _rows(table)
    d_y = d_y.astype(x.dtype)

    def inner(dots, pairs):
        h, vjp = jax.vjp(lambda gates, *hidden: _hidden_values(activation, hidden, gates), *pairs)
        d_gates, *d_hidden = vjp(dots[0])
        return (d_gates, *d_hidden, h), tuple(d_hidden)

    pairs, outputs = (gates, *_unstack(hidden)), 1 + table.shape[1]
    if reduce is None:
        d_x, results = run(d_y, ids, pairs, table, outputs=outputs, inner=inner, project=output, combine=inputs)
    else:
        _, (d_h,) = run(d_y, ids, (), table, outputs=1, inner=lambda dots, _: (dots, ()), project=output, combine=())
        results, d_hidden = inner((reduce(d_h[..., None])[..., 0],), pairs)
        d_x = _combine(run, ids, d_hidden, table, inputs)
    d_x = jnp.zeros(x.shape, gates.dtype) if d_x is None else d_x
    return d_x, results[0], _stack(results[1:], gates)


def _combine(run, ids, weights, table, rows):
    if not rows:
        return None
    inner = lambda _, pairs: ((), pairs)
    return run(None, ids, weights, table, outputs=0, inner=inner, project=(), combine=rows)[0]


def _rows(table):
    """(the input and gate row, the output row)."""
    m = table.shape[1]
    return tuple(range(m - 1)), (m - 1,)


def _stack(arrays, like):
    return jnp.stack(arrays, axis=-1) if arrays else jnp.zeros((*like.shape, 0), like.dtype)


def _unstack(array):
    return tuple(array[..., m] for m in range(array.shape[-1]))


def _check(x, ids, table):
    """Raises ValueError for what the kernels cannot do."""
    for name, array in (("x", x), ("the table", table)):
        if array.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise ValueError(f"retrieval kernel: {name} of {array.dtype}; use 16 or 32 bits, or the backend blocks")
    if ids.dtype != jnp.int32 or max(table.shape[0], ids.size) >= 2**31:
        raise ValueError(
            f"retrieval kernel: ids {ids.dtype} {ids.shape} of {table.shape[0]} experts are indices beyond int32 in a kernel; "
            "use fewer experts or a smaller batch"
        )


def _hidden_values(activation, hidden, gates):
    """`blocks.hidden_values` of separate arrays."""
    if activation is None:
        return gates
    return gates * (_gelu(*hidden) if activation == "gelu" else activate(activation, *hidden))


def _erf(x):
    """XLA's rational approximation of float32, for kernels whose compiler has none; absolute error below 5e-7."""
    top = (0.00022905065861350646, 0.0034082910107109506, 0.050955695062380861, 0.18520832239976145, 1.128379143519084)
    bottom = (
        -1.1791602954361697e-7,
        0.000023547966471313185,
        0.0010179625278914885,
        0.014070470171167667,
        0.11098505178285362,
        0.49746925110067538,
        1.0,
    )
    x = jnp.clip(x, -3.832506856900711, 3.832506856900711)
    value = lambda factors: functools.reduce(lambda total, factor: total * (x * x) + factor, factors)
    return x * value(top) / value(bottom)


@jax.custom_jvp
def _gelu(h):
    return h * (0.5 + 0.5 * _erf(h * math.sqrt(0.5)))


@_gelu.defjvp
def _gelu_jvp(primals, tangents):
    (h,), (d_h,) = primals, tangents
    density = jnp.exp(-0.5 * h * h) / math.sqrt(2 * math.pi)
    return _gelu(h), d_h * (0.5 + 0.5 * _erf(h * math.sqrt(0.5)) + h * density)
