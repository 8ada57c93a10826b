"""The experts' feed-forward networks over rows sorted by expert, forward and backward in one pass each.

With `x` the row, n = norm(x) or x, and s the row's gate,

    y = s * (act(n w_in + b_in, n w_gate + b_gate) w_out + b_out).

The gate multiplies rows of D values, forward y and backward d_y; its gradient comes from the hidden row and needs no y.
Between the two passes live x, the ids and gates, and the projections before the activation; rows, activations and outputs
are made again from them.
"""

import functools
from typing import NamedTuple, Sequence

import jax
import jax.numpy as jnp

from moe_jax import compat
from moe_jax.ops.activations import activate, is_gated
from moe_jax.ops.counting import real_rows
from moe_jax.ops.grouped_matmul import BACKENDS, blocks, group_products, resolve_backend, rows_times_groups
from moe_jax.ops.norms import norm_before
from moe_jax.ops.precision import accumulator, standard_promotion
from moe_jax.ops.residual_stack import Weights, residual_stack


class _Static(NamedTuple):
    """What the computation depends on beside arrays; keep: whether the forward pass returns the hidden rows."""

    activation: str
    norm_epsilon: float
    backend: str
    keep: bool = True


def expert_ffn(
    x: jax.Array,
    weights: Weights,
    group_sizes: jax.Array,
    *,
    activation: str,
    gates: jax.Array | None = None,
    order: jax.Array | None = None,
    inverse: jax.Array | None = None,
    norm_epsilon: float = 1e-5,
    backend: str | None = None,
) -> jax.Array:
    """Each group of rows through its expert.

    Args:
      x: [M, D] rows sorted by expert; with `order`, [T, D] tokens.
      weights: w_in [E, D, F], w_out [E, F, D]; w_gate [E, D, F] for a gated activation; optionally the biases
        b_in, b_gate [E, F], b_out [E, D], and of a norm before the projections norm_scale [E, D] (RMS norm), with
        norm_bias [E, D] (layer norm). Compute happens in the dtype of `x`, sums in float32 at least.
      group_sizes: int32 [E]; rows past their sum give 0.
      activation: see `moe_jax.ops.activations.activate`.
      gates: [M], what each row's output is multiplied by; None: 1.
      order, inverse: int32 [T*K], [T*K] of `moe_jax.dispatch.permute.sort_by_expert`: row i is x[order[i] // K], gathered on
        the way and never stored, and the rows of a token are added up.
      norm_epsilon: of the norm.
      backend: of `grouped_matmul`. `blocks` runs each block of rows through the whole network while it is in the cache;
        `loop` is the reference, differentiated by JAX.

    Returns:
      [M, D] in the dtype of `x`; with `order`, [T, D] in float32 at least.
    """
    static = _Static(activation, norm_epsilon, resolve_backend(backend))
    dtype = x.dtype
    weights = {name: weight.astype(dtype) for name, weight in weights.items()}
    gates = None if gates is None else gates.astype(accumulator(dtype))[:, None]
    axes = compat.varying_axes(x, group_sizes, *weights.values(), *([] if gates is None else [gates]))
    args = jax.tree.map(lambda a: compat.vary(a, axes), (x, weights, gates, group_sizes, order, inverse))
    if static.backend == "loop":
        x, weights, gates, group_sizes, order, inverse = args
        rows = _forward_whole(x, weights, gates, group_sizes, order, static)[0]
        return rows if order is None else _sum_of_tokens(rows, inverse, x.shape[0])
    return _expert_ffn(*args, static)


def expert_stack(
    rows: jax.Array, sublayers: Sequence[Weights], group_sizes: jax.Array, *, axis: str | None = None, **options
) -> jax.Array:
    """What each row's expert adds to it, where an expert is a stack of sublayers.

    Args:
      rows: [M, D] sorted by expert.
      sublayers: the weights of each, as in `expert_ffn`.
      group_sizes: int32 [E]; rows past their sum give 0.
      axis: mesh axis that splits F, inside a shard_map; see `residual_stack`.
      **options: `activation`, `norm_epsilon` and `backend` of `expert_ffn`.

    Returns:
      [M, D] in the dtype of `rows`.
    """
    return residual_stack(rows, sublayers, lambda rows, weights: expert_ffn(rows, weights, group_sizes, **options), axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _expert_ffn(x, weights, gates, group_sizes, order, inverse, static):
    return _vjp_forward(x, weights, gates, group_sizes, order, inverse, static, keep=False)[0]


def _vjp_forward(x, weights, gates, group_sizes, order, inverse, static, keep=True):
    y, hidden = _run(_forward_blocks, _forward_whole, static._replace(keep=keep), x, weights, gates, group_sizes, order)
    if order is not None:
        y = _sum_of_tokens(y, inverse, x.shape[0])
    return y, (x, weights, gates, group_sizes, order, inverse, hidden)


@standard_promotion()
def _vjp_backward(static, residuals, d_y):
    x, weights, gates, group_sizes, order, inverse, hidden = residuals
    args = x, weights, gates, group_sizes, order, hidden, jnp.asarray(d_y, x.dtype)
    d_rows, d_gates, d_weights = _run(_backward_blocks, _backward_whole, static, *args)
    d_x = d_rows if order is None else _sum_of_tokens(d_rows, inverse, x.shape[0]).astype(x.dtype)
    return d_x, d_weights, d_gates, None, None, None


_expert_ffn.defvjp(_vjp_forward, _vjp_backward)


def _run(by_block, whole, static, *args):
    """One pass, in one of its two forms, fit to be differentiated once more."""
    return _run_by_block(by_block, whole, static, *args) if static.backend == "blocks" else whole(*args, static)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _run_by_block(by_block, whole, static, *args):
    return by_block(*args, static)


@standard_promotion()
def _by_block_backward(by_block, whole, static, args, cotangents):
    # JAX cannot differentiate the loop over blocks, whose length is not known when it is traced: the gradient of a
    # gradient runs all rows at once.
    return jax.vjp(lambda *args: whole(*args, static), *args)[1](cotangents)


_run_by_block.defvjp(lambda by_block, whole, static, *args: (by_block(*args, static), args), _by_block_backward)


def _sum_of_tokens(rows, inverse, tokens):
    """[T*K, D] -> [T, D] in float32 at least: a gather by the inverse, never a scatter-add."""
    return rows[inverse].reshape(tokens, -1, rows.shape[1]).sum(1, dtype=accumulator(rows.dtype))


# One network on the rows at hand. `w` is the product with the rows' own experts: of a block of one group, or of all rows.


def _project_in(x, w, static):
    """Rows [m, D] -> (normalised rows [m, D], {"in": [m, F], "gate": [m, F]} before the activation)."""
    n = norm_before(x, w.vectors("norm_"), static.norm_epsilon)
    names = ("in", "gate") if is_gated(static.activation) else ("in",)
    return n, {name: _plus(w.product(n, "w_" + name), w.vectors("b_" + name)).astype(x.dtype) for name in names}


def _activate(hidden, static):
    return activate(static.activation, hidden["in"], hidden.get("gate"))


def _project_out(hidden, gates, w, static):
    """-> [m, D] in float32 at least."""
    y = _plus(w.product(_activate(hidden, static), "w_out"), w.vectors("b_out"))
    return y if gates is None else y * gates


def _backward(x, hidden, gates, d_y, w, static):
    """(d_x [m, D], d_gates [m, 1] or None); what the weights get goes to `w.add` and `w.add_rows`."""
    a, pull = jax.vjp(lambda hidden: _activate(hidden, static), hidden)
    d_a, d_gates = w.product_transposed(d_y, "w_out"), None
    bias = w.vectors("b_out")
    if gates is not None:
        d_gates = jnp.sum(d_a * a.astype(gates.dtype), axis=1, keepdims=True)
        for b in bias.values():
            d_gates = d_gates + jnp.sum(d_y * b, axis=1, keepdims=True)
        d_a, d_y = d_a * gates, d_y * gates
    w.add("w_out", a, d_y.astype(x.dtype))
    for name in bias:
        w.add_rows(name, d_y)
    (d_hidden,) = pull(d_a.astype(x.dtype))
    n, pull = jax.vjp(lambda x, vectors: norm_before(x, vectors, static.norm_epsilon), x, w.vectors("norm_"))
    d_n = 0
    for name, d in d_hidden.items():
        w.add("w_" + name, n, d)
        for bias in w.vectors("b_" + name):
            w.add_rows(bias, d)
        d_n = d_n + w.product_transposed(d, "w_" + name)
    d_x, d_vectors = pull(d_n.astype(n.dtype))
    for name, d in d_vectors.items():
        w.add_rows(name, d)
    return d_x, d_gates


def _plus(y, vectors):
    return functools.reduce(jnp.add, vectors.values(), y)


class _OfBlock:
    """The weights of a block's expert; gradients are added to `grads` {name: [E, ...]}."""

    def __init__(self, block, weights, grads=None):
        self.block, self.weights, self.grads = block, weights, grads

    def product(self, rows, name):
        return blocks.dot(rows, self.block.of_group(self.weights[name]), (1, 0))

    def product_transposed(self, rows, name):
        return blocks.dot(rows, self.block.of_group(self.weights[name]), (1, 1))

    def vectors(self, prefix):
        """{name: [m, X]} of those that there are, the same in each row, in float32 at least."""
        vectors = {name: self.block.of_group(v) for name, v in self.weights.items() if name.startswith(prefix)}
        return {
            name: jnp.broadcast_to(v, (self.block.size, v.shape[0])).astype(accumulator(v.dtype)) for name, v in vectors.items()
        }

    def add(self, name, a, b):
        self.grads[name] = self.block.add_to_group(self.grads[name], blocks.dot(a, b, (0, 0)))

    def add_rows(self, name, rows):
        total = jnp.sum(rows, axis=0, dtype=self.grads[name].dtype)
        self.grads[name] = self.block.add_to_group(self.grads[name], total)


class _OfAll:
    """The weights of all experts, for all M rows."""

    def __init__(self, weights, group_sizes, rows, backend):
        self.weights, self.group_sizes, self.grads = weights, group_sizes, {}
        if backend == "loop":  # the reference: JAX differentiates it
            self.rows_times_groups, self.group_products = BACKENDS[backend][:2]
        else:
            self.rows_times_groups = functools.partial(rows_times_groups, backend=backend)
            self.group_products = functools.partial(group_products, backend=backend)
        groups = group_sizes.shape[0]
        self.group = jnp.repeat(jnp.arange(groups), group_sizes, total_repeat_length=rows)
        self.real = real_rows(rows, group_sizes)

    def product(self, rows, name):
        # Where nothing is added to it before it is rounded, the kernel rounds it and writes half the bytes.
        out = accumulator(rows.dtype) if "b_" + name[2:] in self.weights else rows.dtype
        return self.rows_times_groups(rows, self.weights[name], self.group_sizes, out, transposed=False)

    def product_transposed(self, rows, name):
        out = accumulator(rows.dtype) if "w_gate" in self.weights else rows.dtype
        return self.rows_times_groups(rows, self.weights[name], self.group_sizes, out, transposed=True)

    def vectors(self, prefix):
        vectors = {name: v for name, v in self.weights.items() if name.startswith(prefix)}
        return {name: jnp.where(self.real, v.astype(accumulator(v.dtype))[self.group], 0) for name, v in vectors.items()}

    def add(self, name, a, b):
        self.grads[name] = self.group_products(a, b, self.group_sizes, self.weights[name].dtype)

    def add_rows(self, name, rows):
        # A sum of rows is a product with ones: the grouped kernels know how not to add row by row.
        ones = jnp.ones((rows.shape[0], 1), rows.dtype)
        total = self.group_products(ones, rows, self.group_sizes, self.weights[name].dtype)
        self.grads[name] = total[:, 0]


# All rows at once.


def _forward_whole(x, weights, gates, group_sizes, order, static):
    rows = _rows(x, order)
    w = _OfAll(weights, group_sizes, rows.shape[0], static.backend)
    rows, gates = jax.tree.map(lambda a: jnp.where(w.real, a, 0), (rows, gates))
    _, hidden = _project_in(rows, w, static)
    y = _project_out(hidden, gates, w, static).astype(x.dtype)
    return y, hidden if static.keep else {}


def _backward_whole(x, weights, gates, group_sizes, order, hidden, d_y, static):
    rows, d_y = _rows(x, order), _rows(d_y, order)
    w = _OfAll(weights, group_sizes, rows.shape[0], static.backend)
    rows, gates, hidden, d_y = jax.tree.map(lambda a: jnp.where(w.real, a, 0), (rows, gates, hidden, d_y))
    return *_backward(rows, hidden, gates, d_y, w, static), w.grads


def _rows(x, order):
    return x if order is None else x[order // (order.shape[0] // x.shape[0])]


# Block by block.


def _forward_blocks(x, weights, gates, group_sizes, order, static):
    rows, like = _row_count(x, order), group_sizes
    names = ("in", "gate") if is_gated(static.activation) else ("in",)
    width = weights["w_in"].shape[2]
    y = compat.zeros((rows, x.shape[1]), x.dtype, like=like)
    hidden = {name: compat.empty((rows, width), x.dtype, like=like) for name in names} if static.keep else {}
    if rows == 0:
        return y, hidden

    def body(carry, block):
        y, kept = carry
        w = _OfBlock(block, weights)
        _, hidden = _project_in(_block_rows(x, order, block), w, static)
        out = _project_out(hidden, None if gates is None else block.rows(gates), w, static)
        kept = {name: block.write(kept[name], hidden[name]) for name in kept}
        return block.write(y, out), kept

    return blocks.for_each_block(group_sizes, rows, body, (y, hidden))


def _backward_blocks(x, weights, gates, group_sizes, order, hidden, d_y, static):
    rows, like = _row_count(x, order), group_sizes
    d_rows = compat.zeros((rows, x.shape[1]), x.dtype, like=like)
    d_gates = None if gates is None else compat.zeros(gates.shape, gates.dtype, like=like)
    new = compat.empty if rows else compat.zeros
    grads = {name: new(w.shape, accumulator(w.dtype), like=like) for name, w in weights.items()}

    def body(carry, block):
        d_rows, d_gates, grads = carry
        w = _OfBlock(block, weights, dict(grads))
        # 0 in the rows of other groups: they would enter the sums over rows.
        d, g = _backward(
            jnp.where(block.valid, _block_rows(x, order, block), 0),
            {name: block.valid_rows(h) for name, h in hidden.items()},
            None if gates is None else block.valid_rows(gates),
            jnp.where(block.valid, _block_rows(d_y, order, block), 0),
            w,
            static,
        )
        return block.write(d_rows, d), None if gates is None else block.write(d_gates, g), w.grads

    if rows > 0:
        d_rows, d_gates, grads = blocks.for_each_block(group_sizes, rows, body, (d_rows, d_gates, grads), empty_groups=True)
    grads = {name: grads[name].astype(w.dtype) for name, w in weights.items()}
    return d_rows, d_gates, grads


def _row_count(x, order):
    return (x if order is None else order).shape[0]


def _block_rows(x, order, block):
    return block.rows(x) if order is None else x[block.rows(order) // (order.shape[0] // x.shape[0])]
