import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch.permute import sort_by_expert
from moe_jax.ops.activations import ACTIVATIONS, activate, is_gated
from moe_jax.ops.expert_ffn import expert_ffn, expert_stack
from moe_jax.ops.norms import layer_norm, rms_norm

M, D, F = 37, 6, 10
SIZES = (9, 0, 20, 4)


def make(activation, biases, dtype):
    rng = np.random.default_rng(0)
    e = len(SIZES)
    shapes = {"w_in": (e, D, F), "w_out": (e, F, D)} | ({"w_gate": (e, D, F)} if is_gated(activation) else {})
    if biases:
        shapes |= {"b" + name[1:]: (e, shape[-1]) for name, shape in shapes.items()}
    weights = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    return jnp.asarray(rng.normal(size=(M, D)), dtype), weights


def slow(rows, weights, gates, activation):
    """A loop over the experts, each a dense network."""
    out, start = [], 0
    for e, size in enumerate(SIZES):
        x, w = rows[start : start + size], {name: weight[e] for name, weight in weights.items()}
        if "norm_bias" in w:
            x = layer_norm(x, w["norm_scale"], w["norm_bias"], 1e-5)
        elif "norm_scale" in w:
            x = rms_norm(x, w["norm_scale"], 1e-5)
        h = {b: x @ w["w_" + b] + w.get("b_" + b, 0) for b in ("in", "gate") if "w_" + b in w}
        y = activate(activation, h["in"], h.get("gate")) @ w["w_out"] + w.get("b_out", 0)
        out.append(y if gates is None else y * gates[start : start + size, None])
        start += size
    return jnp.concatenate([*out, jnp.zeros((M - start, D), rows.dtype)])


NORMS = ((), ("norm_scale",), ("norm_scale", "norm_bias"))


@pytest.mark.parametrize("backend", ["blocks", "ragged_dot", "loop"])
@pytest.mark.parametrize(
    "activation, biases, norm, gated_rows",
    [(a, a != "gelu", NORMS[i % 3], a != "relu") for i, a in enumerate(ACTIVATIONS)] + [("relu", True, NORMS[2], True)],
)
def test_value_and_gradients(activation, biases, norm, gated_rows, backend):
    """Of the tokens, the gates and every weight, against a loop over the experts in float64."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        rows, weights = make(activation, biases, jnp.float64)
        weights |= {name: jnp.asarray(rng.normal(size=(len(SIZES), D))) for name in norm}
        d_out, gates = (jnp.asarray(rng.normal(size=s)) for s in ((M, D), (M,)))
        gates = gates if gated_rows else None

        def run(rows, weights, gates):
            sizes = jnp.asarray(SIZES, jnp.int32)
            return expert_ffn(rows, weights, sizes, activation=activation, gates=gates, backend=backend)

        def both(f):
            y, pull = jax.vjp(f, rows, weights, gates)
            return y, pull(d_out)

        result = jax.jit(lambda: both(run))()
        expected = jax.jit(lambda: both(lambda *args: slow(*args, activation)))()
        chex.assert_trees_all_equal_shapes_and_dtypes(result, expected)
        for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected)):
            assert jnp.abs(a - b).max() <= 1e-12 * jnp.abs(b).max()
        # Biases do not reach the rows past the sum.
        assert not np.any(result[0][sum(SIZES) :]) and not np.any(result[1][0][sum(SIZES) :])


@pytest.mark.parametrize("backend", ["blocks", "ragged_dot"])
def test_rows_of_tokens(backend):
    """With `order` the rows are taken from tokens and added up to tokens: values and gradients."""
    tokens, k, experts = 21, 3, 5
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        ids = jnp.asarray(rng.integers(0, experts + 1, (tokens, k)), jnp.int32)  # some have no expert
        x, d_y = (jnp.asarray(rng.normal(size=(tokens, D))) for _ in range(2))
        gates = jnp.asarray(rng.random((tokens, k)))
        weights = {"w_in": rng.normal(size=(experts, D, F)), "w_out": rng.normal(size=(experts, F, D))}
        weights = {name: jnp.asarray(w) for name, w in weights.items()}

        def routed(x, gates, weights):
            order = sort_by_expert(ids, experts)
            return expert_ffn(
                x,
                weights,
                order.group_sizes,
                activation="gelu_tanh",
                gates=gates.reshape(-1)[order.order],
                order=order.order,
                inverse=order.inverse,
                backend=backend,
            )

        def every_expert(x, gates, weights):
            h = activate("gelu_tanh", jnp.einsum("td,edf->etf", x, weights["w_in"]))
            outputs = jnp.einsum("etf,efd->etd", h, weights["w_out"])
            return jnp.einsum("etd,tke,tk->td", outputs, jax.nn.one_hot(ids, experts), gates)

        def both(f):
            y, pull = jax.vjp(f, x, gates, weights)
            return y, pull(d_y)

        result, expected = (jax.jit(lambda f=f: both(f))() for f in (routed, every_expert))
        for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
            assert jnp.abs(a - b).max() <= 1e-12 * jnp.abs(b).max()


def test_what_lives_between_the_passes():
    """At E = 64, K = 8: the tokens, the ids and gates, and one hidden row for each row (the compiler's count of outputs)."""
    tokens, k, experts, width = 256, 8, 64, 64
    shapes = {"w_in": (experts, D, width), "w_out": (experts, width, D)}
    weights = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    x = jax.ShapeDtypeStruct((tokens, D), jnp.float32)
    ids = jax.ShapeDtypeStruct((tokens, k), jnp.int32)
    gates = jax.ShapeDtypeStruct((tokens, k), jnp.float32)

    def forward(x, ids, gates, weights):
        def layer(x, gates, weights):
            order = sort_by_expert(ids, experts)
            options = {
                "order": order.order,
                "inverse": order.inverse,
                "gates": gates.reshape(-1)[order.order],
            }
            return expert_ffn(x, weights, order.group_sizes, activation="gelu_tanh", **options)

        return jax.vjp(layer, x, gates, weights)

    compiled = jax.jit(forward).lower(x, ids, gates, weights).compile()
    kept = compiled.memory_analysis().output_size_in_bytes
    kept -= sum(4 * int(np.prod(shape)) for shape in shapes.values()) + 4 * tokens * D
    minimum = 4 * (tokens * D + 2 * tokens * k + tokens * k * width)
    assert minimum <= kept <= 1.25 * minimum, kept / minimum


def test_stack_of_sublayers():
    """BASE's expert: each sublayer normalises, projects and adds; the result is what they add together. Gradients of all."""
    with jax.enable_x64(True):
        rows, _ = make("relu", True, jnp.float64)
        rng = np.random.default_rng(5)
        sublayers = []
        for _ in range(3):
            weights = make("relu", True, jnp.float64)[1]
            weights |= {name: rng.normal(size=(len(SIZES), D)) for name in NORMS[2]}
            sublayers.append({name: jnp.asarray(w * rng.normal()) for name, w in weights.items()})
        d_out = jnp.asarray(rng.normal(size=(M, D)))

        def stack(rows, sublayers):
            return expert_stack(rows, sublayers, jnp.asarray(SIZES), activation="relu")

        def one_by_one(rows, sublayers):
            x = rows
            for weights in sublayers:
                x = x + slow(x, weights, None, "relu")
            return x - rows

        def both(f):
            y, pull = jax.vjp(f, rows, sublayers)
            return y, pull(d_out)

        result, expected = (jax.jit(lambda f=f: both(f))() for f in (stack, one_by_one))
        for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
            assert jnp.abs(a - b).max() <= 1e-12 * jnp.abs(b).max()
        assert not np.any(result[0][sum(SIZES) :]) and not np.any(result[1][0][sum(SIZES) :])


def test_tail_may_hold_anything():
    rows, weights = make("swiglu", True, jnp.float32)

    def run(rows):
        def loss(rows, weights):
            return jnp.sum(expert_ffn(rows, weights, jnp.asarray(SIZES), activation="swiglu") ** 2)

        return jax.value_and_grad(loss, argnums=(0, 1))(rows, weights)

    run = jax.jit(run)
    chex.assert_trees_all_equal(run(rows.at[sum(SIZES) :].set(jnp.nan)), run(rows))


def test_bfloat16_bias_gradient_counts_every_row():
    """A bfloat16 sum of ones ends at 256."""
    rows, weights = jnp.zeros((600, D), jnp.bfloat16), make("relu", True, jnp.float32)[1]

    def loss(weights):
        y = expert_ffn(rows, weights, jnp.asarray([0, 600, 0, 0]), activation="relu")
        chex.assert_type(y, jnp.bfloat16)
        return jnp.sum(y.astype(jnp.float32))

    gradient = jax.jit(jax.grad(loss))(weights)["b_out"]
    np.testing.assert_array_equal(gradient, np.asarray([0, 600, 0, 0])[:, None] * np.ones(D))
