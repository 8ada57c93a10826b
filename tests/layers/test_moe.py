"""The routed layer against a loop over experts in float64. Errors are max|a-b| / max|b| of each array."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from moe_jax import compat
from moe_jax.config.routers import AdaptiveConfig
from moe_jax.layers.experts import Experts
from moe_jax.layers.moe import MoE
from moe_jax.routing.adaptive import Adaptive
from moe_jax.routing.soft_moe import SoftMoE
from moe_jax.types import RouterInputs, TokenChoice

T, D, F, E = 32, 8, 12, 8
AXES = ("data", "fsdp", "expert", "tensor")
MESHES = [(1, 1, 8, 1), (2, 2, 2, 1), (1, 2, 4, 1), (1, 1, 4, 2), (8, 1, 1, 1)]
FLOAT32, FLOAT64 = 1e-5, 1e-12

ACTIVATIONS = {
    "gelu": lambda h: 0.5 * h * (1 + jax.scipy.special.erf(h / jnp.sqrt(2.0))),
    "relu": lambda h: jnp.where(h > 0, h, 0.0),
    "swiglu": lambda g: g / (1 + jnp.exp(-g)),
}


def make_mesh(shape, axes=AXES):
    return compat.make_mesh(jax.devices(), axes, shape)


def make_params(activation, use_bias, tokens=T, seed=0):
    """(parameters, x [T, D], cotangent [T, D]) in float32."""
    rng = np.random.default_rng(seed)
    weights = {"w_in": (E, D, F), "w_out": (E, F, D)}
    if activation == "swiglu":
        weights["w_gate"] = (E, D, F)
    if use_bias:
        weights |= {"b" + name[1:]: (E, shape[-1]) for name, shape in weights.items()}
    draw = lambda *shape: (rng.normal(size=shape) * 2 / shape[-2] ** 0.5).astype(np.float32)
    params = {"router": {"kernel": draw(D, E)}, "experts": {name: draw(*s) for name, s in weights.items()}}
    return params, draw(tokens, D) * 2, draw(tokens, D)


def slow_experts(weights, x, ids, gates, activation):
    """Every expert on every token, times its gate or 0."""
    f, y = ACTIVATIONS[activation], 0.0
    for e in range(E):
        w = {name: weight[e] for name, weight in weights.items()}
        h = {b: x @ w["w_" + b] + w.get("b_" + b, 0.0) for b in ("in", "gate") if "w_" + b in w}
        h = f(h["gate"]) * h["in"] if "gate" in h else f(h["in"])
        y += jnp.sum(jnp.where(ids == e, gates, 0), axis=-1)[:, None] * (h @ w["w_out"] + w.get("b_out", 0.0))
    return y


def slow_layer(params, x, valid, top_k, activation):
    """y and the losses of softmax top-k."""
    logits = x @ params["router"]["kernel"]
    p = jnp.exp(logits) / jnp.sum(jnp.exp(logits), axis=-1, keepdims=True)
    ids = jnp.argsort(-p, axis=-1)[:, :top_k]
    gates = jnp.take_along_axis(p, ids, axis=-1)
    gates = gates / jnp.sum(gates, axis=-1, keepdims=True) if top_k > 1 else gates
    ids, real = jnp.where(valid[:, None], ids, E), jnp.sum(valid)
    shares = jnp.stack([jnp.sum(ids == e) for e in range(E)]) / (real * top_k)
    balance = E * jnp.sum(shares * jnp.sum(jnp.where(valid[:, None], p, 0), axis=0) / real)
    z = jnp.sum(jnp.where(valid, jnp.log(jnp.sum(jnp.exp(logits), axis=-1)) ** 2, 0)) / real
    return slow_experts(params["experts"], x, ids, gates, activation), {"balance": balance, "z": z}


def with_gradients(f, d_y):
    """(y, losses, gradients of params and x) of f(params, x) -> (y, losses), for d_y and 0.3 per loss."""

    def run(params, x):
        (y, losses), pull = jax.vjp(f, params, x)
        d_losses = jax.tree.map(lambda loss: jnp.full_like(loss, 0.3), losses)
        return y, losses, pull((d_y.astype(y.dtype), d_losses))

    return run


def layer_function(layer, valid):
    def f(params, x):
        y, aux = layer.apply({"params": params}, x, RouterInputs(valid=valid))
        return y, aux.losses

    return f


@functools.cache
def expected(activation, use_bias, top_k, tokens=T, padded=False):
    params, x, d_y = make_params(activation, use_bias, tokens)
    valid = valid_tokens(tokens, padded)
    with jax.enable_x64(True):
        params, x, d_y = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (params, x, d_y))
        f = with_gradients(lambda params, x: slow_layer(params, x, valid, top_k, activation), d_y)
        return jax.device_get(jax.jit(f)(params, x))


def valid_tokens(tokens, padded):
    return np.arange(tokens) % 5 != 3 if padded else np.ones(tokens, bool)


def assert_errors(result, reference, bound):
    chex.assert_trees_all_equal_shapes(result, reference)
    results = jax.tree_util.tree_leaves_with_path(jax.device_get(result))
    for (path, a), b in zip(results, jax.tree.leaves(reference)):
        name = jax.tree_util.keystr(path)
        assert np.abs(b).max() > 0, f"{name} is 0"
        error = np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max()
        assert error <= bound, f"{name}: {error:.2e}"


@pytest.mark.smoke
@pytest.mark.parametrize("activation, use_bias, top_k", [("swiglu", True, 2), ("gelu", True, 1), ("relu", False, 3)])
def test_float64(activation, use_bias, top_k):
    params, x, d_y = make_params(activation, use_bias)
    layer = MoE(E, F, top_k, activation=activation, use_bias=use_bias)
    reference = expected(activation, use_bias, top_k, padded=True)
    run = with_gradients(layer_function(layer, valid_tokens(T, True)), d_y)
    with jax.enable_x64(True):
        params, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (params, x))
        result = jax.jit(run)(params, x)
        chex.assert_type(jax.tree.leaves(result), jnp.float64)
        assert_errors(result, reference, FLOAT64)


@pytest.mark.parametrize("options", [{}, {"capacity_factor": 8.0}], ids=["blocks", "slots"])
def test_gradient_of_a_gradient(options):
    """Under jit, in float64: of the parameters and x, of the squared norm of all gradients."""
    params, x, d_y = make_params("swiglu", True)
    layer, valid = MoE(E, F, 2, activation="swiglu", use_bias=True, **options), valid_tokens(T, True)

    def second(f):
        def loss(params, x):
            y, losses = f(params, x)
            return jnp.sum(d_y * jnp.sin(y)) + sum(losses.values())

        def square(params, x):
            return sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(loss, (0, 1))(params, x)))

        return jax.device_get(jax.jit(jax.grad(square, (0, 1)))(params, x))

    def ours(params, x):
        y, aux = layer.apply({"params": params}, x, RouterInputs(valid=valid, train=True))
        return y, aux.losses

    with jax.enable_x64(True):
        params, x, d_y = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (params, x, d_y))
        assert_errors(second(ours), second(lambda params, x: slow_layer(params, x, valid, 2, "swiglu")), 1e-10)


def test_without_jit():
    params, x, _ = make_params("relu", False)
    run = layer_function(MoE(E, F, 3, activation="relu"), valid_tokens(T, True))
    assert_errors(run(params, x), expected("relu", False, 3, padded=True)[:2], FLOAT32)


@pytest.mark.parametrize("backend", ["blocks", "ragged_dot", "loop"])
def test_backends(backend):
    params, x, d_y = make_params("swiglu", True)
    layer = MoE(E, F, 2, activation="swiglu", use_bias=True, backend=backend)
    run = with_gradients(layer_function(layer, valid_tokens(T, True)), d_y)
    assert_errors(jax.jit(run)(params, x), expected("swiglu", True, 2, padded=True), FLOAT32)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_meshes(shape):
    params, x, d_y = make_params("swiglu", True)
    layer = MoE(E, F, 2, activation="swiglu", use_bias=True)
    run = with_gradients(layer_function(layer, valid_tokens(T, True)), d_y)
    mesh = make_mesh(shape)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, compat.PartitionSpec(compat.BATCH_AXES)))
        result = jax.jit(run)(params, x)
    assert_errors(result, expected("swiglu", True, 2, padded=True), FLOAT32)


@pytest.mark.parametrize("shape", [(2, 2, 2, 1), (1, 2, 2, 2)], ids=str)
def test_tokens_that_the_shards_do_not_divide(shape):
    params, x, d_y = make_params("swiglu", True, tokens=30)
    layer = MoE(E, F, 2, activation="swiglu", use_bias=True)
    run = with_gradients(layer_function(layer, valid_tokens(30, False)), d_y)
    with jax.set_mesh(make_mesh(shape)):
        result = jax.jit(run)(params, x)
    assert_errors(result, expected("swiglu", True, 2, tokens=30), FLOAT32)


def test_float64_on_a_mesh():
    params, x, d_y = make_params("gelu", True)
    with jax.enable_x64(True), jax.set_mesh(make_mesh((1, 2, 2, 2))):
        params, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (params, x))
        layer = MoE(E, F, 1, activation="gelu", use_bias=True)
        run = with_gradients(layer_function(layer, valid_tokens(T, True)), d_y)
        assert_errors(jax.jit(run)(params, x), expected("gelu", True, 1, padded=True), FLOAT64)


def patterns():
    """ids [T, 2] by name; E is "no expert"."""
    t = np.arange(T)
    return {
        "even": np.stack([t % E, (t + 3) % E], -1),
        "uneven": np.stack([np.minimum(t // 3, E - 1), np.full(T, 1)], -1),
        "empty": np.stack([t % 2, 6 + t % 2], -1),
        "all to one": np.stack([np.full(T, 5), np.full(T, E)], -1),
        "padded": np.where((t % 3 == 0)[:, None], E, np.stack([t % E, (t + 1) % E], -1)),
        "half of the shards": np.stack([t % 4, (t + 1) % 4], -1),
    }


@pytest.mark.parametrize("shape", [None, (1, 1, 8, 1), (1, 2, 2, 2)], ids=str)
def test_patterns(shape):
    """Given choices, also those that no softmax makes. Gradients of the gates too."""
    params, x, d_y = make_params("relu", True)
    gates = np.random.default_rng(1).uniform(size=(T, 2)).astype(np.float32)
    layer = Experts(E, F, "relu", True)

    def gradients(f):
        def run(ids, weights, x, gates):
            y, pull = jax.vjp(lambda weights, x, gates: f(ids, weights, x, gates), weights, x, gates)
            return y, pull(d_y.astype(y.dtype))

        return jax.jit(run)

    ours = gradients(lambda ids, w, x, gates: layer.apply({"params": w}, x, TokenChoice(ids, gates))[0])
    slow = gradients(lambda ids, w, x, gates: slow_experts(w, x, ids, gates, "relu"))
    for ids in patterns().values():
        ids = ids.astype(np.int32)
        args = params["experts"], x, gates
        if shape is None:
            result = ours(ids, *args)
        else:
            with jax.set_mesh(make_mesh(shape)):
                result = ours(ids, *args)
        with jax.enable_x64(True):
            reference = jax.device_get(slow(ids, *jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), args)))
        assert_errors(result, reference, FLOAT32)


def test_nobody_is_routed():
    params, x, _ = make_params("relu", True)
    choice = TokenChoice(jnp.full((T, 2), E, jnp.int32), jnp.zeros((T, 2)))

    layer = Experts(E, F, "relu", True)

    @jax.jit
    def run(weights, x):
        y, pull = jax.vjp(lambda w, x: layer.apply({"params": w}, x, choice)[0], weights, x)
        return y, pull(jnp.ones_like(y))

    assert not any(np.any(leaf) for leaf in jax.tree.leaves(run(params["experts"], x)))


def test_variables():
    """The parameters, their logical axes, and the variance of one expert's own fan-in."""
    wide = MoE(4, 200, activation="swiglu", use_bias=True)
    variables = jax.jit(wide.init)(jax.random.key(0), jnp.zeros((3, 50)))
    experts = variables["params"]["experts"]
    axes = {
        "w_in": ("experts", "embed", "mlp"),
        "w_gate": ("experts", "embed", "mlp"),
        "w_out": ("experts", "mlp", "embed"),
        "b_in": ("experts", "mlp"),
        "b_gate": ("experts", "mlp"),
        "b_out": ("experts", None),
    }
    assert {name: box.names for name, box in experts.items()} == axes
    shapes = {
        "w_in": (4, 50, 200),
        "w_gate": (4, 50, 200),
        "w_out": (4, 200, 50),
        "b_in": (4, 200),
        "b_gate": (4, 200),
        "b_out": (4, 50),
    }
    assert {name: box.value.shape for name, box in experts.items()} == shapes
    for name in ("w_in", "w_gate", "w_out"):
        weight = np.asarray(experts[name].value)
        np.testing.assert_allclose(weight.std(), shapes[name][1] ** -0.5, rtol=0.02)
        assert abs(np.corrcoef(*weight[:2].reshape(2, -1))[0, 1]) < 0.05
    chex.assert_type(jax.tree.leaves(variables), jnp.float32)


def test_shapes_and_dtypes():
    layer = MoE(4, 6, dtype=jnp.bfloat16)
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 8)).astype(np.float32)
    variables = jax.jit(layer.init)(jax.random.key(1), x)
    y, aux = jax.jit(layer.apply)(variables, x)
    chex.assert_shape(y, x.shape)
    chex.assert_type([y, aux.losses["z"], aux.stats["counts"]], [jnp.bfloat16, jnp.float32, jnp.float32])
    flat, same = jax.jit(MoE(4, 6).apply)(variables, x.reshape(-1, 8))
    chex.assert_shape([aux.rows["experts"], same.rows["experts"]], [(6,), (1,)])
    chex.assert_trees_all_equal(aux._replace(rows={}), same._replace(rows={}))
    y = np.asarray(y, np.float32).reshape(-1, 8)
    np.testing.assert_allclose(y, flat, atol=0.02 * np.abs(flat).max())


def test_capacity():
    """Drops are counted and add 0; evaluation keeps everything unless told otherwise."""
    params, x, _ = make_params("relu", False)
    x = np.tile(x[:1], (T, 1))  # all tokens choose alike

    @functools.partial(jax.jit, static_argnames=("train", "factor", "evaluation"))
    def run(train, factor, evaluation):
        layer = MoE(E, F, 2, activation="relu", capacity_factor=factor, eval_capacity=evaluation)
        return layer.apply({"params": params}, x, train=train)

    full, aux = run(True, 0.0, 0.0)
    assert aux.stats["dropped"] == 0 and aux.stats["counts"].max() == T
    slots = 10  # ceil(1.25 * 32 * 2 / 8)
    for y, aux in (run(True, 1.25, 0.0), run(False, 0.0, 1.25)):
        assert aux.stats["dropped"] == 2 * (T - slots) and aux.stats["counts"].max() == T
        np.testing.assert_allclose(y[:slots], full[:slots], rtol=1e-5)
        assert not np.any(y[slots:])
    y, aux = run(False, 1.25, 0.0)
    np.testing.assert_array_equal(y, full)
    assert aux.stats["dropped"] == 0


@pytest.mark.parametrize("most, options", [(T, {}), (T, {"eval_capacity": 0.5}), (1, {}), (T, {"router": SoftMoE(E, 1)})])
def test_weights_in_parts(most, options, monkeypatch):
    """Each weight as a tuple of its experts' parts: few tokens, a capacity, many tokens, other assignments."""
    monkeypatch.setattr("moe_jax.layers.experts.MOST_TOKENS", most)
    params, x, _ = make_params("swiglu", True)
    layer = MoE(E, F, 2, activation="swiglu", use_bias=True, **options)
    if "router" in options:
        params["router"] = nn.unbox(jax.jit(layer.init)(jax.random.key(0), x))["params"]["router"]
    parts = params | {"experts": {name: tuple(weight) for name, weight in params["experts"].items()}}
    run = jax.jit(lambda params, x: layer.apply({"params": params}, x, RouterInputs(valid=valid_tokens(T, True))))
    (y, aux), (expected, same) = run(parts, x), run(params, x)
    assert_errors(y, jax.device_get(expected), FLOAT32)
    chex.assert_trees_all_equal(aux, same)
    assert (aux.stats["dropped"] > 0) == ("eval_capacity" in options)


@pytest.mark.parametrize("priority", ["token", "choice", "gate"])
def test_capacity_on_a_mesh(priority):
    """What is kept and dropped is the same as on one device, where slots run instead; gradients too."""
    params, x, d_y = make_params("swiglu", True)
    layer = MoE(E, F, 2, activation="swiglu", use_bias=True, capacity_factor=0.7, capacity_priority=priority)

    def f(params, x):
        y, aux = layer.apply({"params": params}, x, RouterInputs(valid=valid_tokens(T, True), train=True))
        return y, {**aux.losses, "dropped": aux.stats["dropped"]}

    run = with_gradients(f, d_y)
    alone = jax.device_get(jax.jit(run)(params, x))
    assert alone[1]["dropped"] > 0
    with jax.set_mesh(make_mesh((1, 2, 2, 2))):
        result = jax.jit(run)(params, x)
    assert_errors(result, alone, FLOAT32)


def test_own_router():
    """Any module that keeps the contract; its parameters are under `router`."""

    class ByTokenId(nn.Module):
        @nn.compact
        def __call__(self, x, inputs):
            scale = self.param("scale", nn.initializers.ones, ())
            ids = inputs.token_ids[:, None] % 4
            choice = TokenChoice(ids, jnp.ones(ids.shape) * scale)
            return choice, {"mine": scale}, {"tokens": jnp.float32(len(x))}

    x, inputs = jnp.ones((6, D)), RouterInputs(token_ids=np.arange(6), train=None)
    layer = MoE(4, F, 1, router=ByTokenId())
    variables = jax.jit(layer.init)(jax.random.key(0), x, inputs)
    assert set(variables["params"]) == {"router", "experts"} and "router_state" not in variables
    y, aux = jax.device_get(jax.jit(layer.apply)(variables, x, inputs))
    np.testing.assert_array_equal(y[:2], y[4:])
    assert np.any(y[0] != y[1]) and set(aux.losses) == {"mine"} and set(aux.stats) == {"tokens", "dropped"}


def test_meshes_of_others():
    """Missing and unknown axes; Explicit ones are refused."""
    params, x, _ = make_params("relu", True)
    layer = MoE(E, F, 2, activation="relu", use_bias=True)
    run = lambda params, x: layer.apply({"params": params}, x)[0]
    alone = jax.jit(run)(params, x)
    for shape, axes in (((4, 2), ("batch", "model")), ((8,), ("expert",)), ((4, 2), ("data", "sequence"))):
        with jax.set_mesh(make_mesh(shape, axes)):
            np.testing.assert_allclose(jax.jit(run)(params, x), alone, atol=1e-5 * np.abs(alone).max())
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(compat.AxisType.Explicit,))):
        with pytest.raises(ValueError, match=r"^MoE under a mesh of Explicit axes \('data',\): make"):
            run(params, x)


def test_a_second_expert_that_is_not_wanted_is_not_sent():
    """By the ragged exchange: D numbers there and back for each choice of an expert on another device, none for "no expert"."""
    mesh, tokens, width, experts = compat.make_mesh(jax.devices(), ("expert",), (8,)), 64, 16, 16
    x = jax.random.normal(jax.random.key(0), (8, tokens // 8, width))
    sent = []
    for threshold in (-1.0, 0.1, 1.0):
        layer = MoE(
            experts, 8, 2, Adaptive(experts, options=AdaptiveConfig(threshold=threshold)), exchange="ragged", exchange_buffer=0
        )
        params = nn.meta.unbox(layer.init(jax.random.key(1), x)["params"])
        with jax.set_mesh(mesh):
            aux = jax.jit(lambda p, x: layer.apply({"params": p}, x, RouterInputs(record=True)))(params, x)[1]
        chosen = np.asarray(aux.stats["matrix"]) > 0
        home = np.arange(tokens) // 8
        remote = sum(chosen[t, e] for t in range(tokens) for e in range(experts) if e // 2 != home[t])
        assert aux.stats["exchange_bytes"] == 2 * width * 4 * remote
        sent.append(int(remote))
    assert sent[0] < sent[1] < sent[2]
