import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import PEER, RouterInputs, compat
from moe_jax.layers.ffn import FeedForward
from moe_jax.ops.activations import ACTIVATIONS, SECOND_MOMENT, activate
from moe_jax.ops.retrieval import row_sink
from moe_jax.ops.row_gradient import RowGradient, dense_rows
from moe_jax.routing.product_keys import ProductKeys
from moe_jax.routing.token_hash import TokenHash
from tests.compiled import apply

N, H, K, DK, D = 49, 3, 4, 6, 10


def make(x, dtype=jnp.float32, **options):
    layer = PEER(**{"experts": N, "heads": H, "top_k": K, "key_width": DK, "param_dtype": dtype} | options)
    return layer, nn.unbox(jax.jit(layer.init)(jax.random.key(0), x))


def make_routed(x, dtype=jnp.float32, activation="gelu", **options):
    """A layer whose router has these options."""
    router = ProductKeys(**{"experts": N, "heads": H, "top_k": K, "key_width": DK, "param_dtype": dtype} | options)
    layer = PEER(N, activation=activation, param_dtype=dtype, router=router)
    return layer, nn.unbox(jax.jit(layer.init)(jax.random.key(0), x))


def brute_force(params, x, activation, share_keys, norm, score="softmax", scale=1.0):
    """Every expert of every token, with the gates of those that no head chose 0. x [T, D]."""
    router = params["router"]
    q = x @ router["kernel"]
    if norm == "batchnorm":
        q = (q - q.mean(0)) / jnp.sqrt(q.var(0) + 1e-5) * router["scale"] + router["bias"]
    q = jnp.broadcast_to(q.reshape(len(x), -1, 2 * router["keys"].shape[-1]), (len(x), H, 2 * router["keys"].shape[-1]))
    keys = jnp.broadcast_to(router["keys"], (H, *router["keys"].shape)) if share_keys else router["keys"]
    n = keys.shape[2]
    pairs = jnp.concatenate([jnp.repeat(keys[:, 0], n, axis=1), jnp.tile(keys[:, 1], (1, n, 1))], axis=-1)
    scores = jnp.einsum("thd,hnd->thn", q, pairs)
    kth = jnp.sort(scores, axis=-1)[..., -K, None]
    if score == "softmax":
        gates = jax.nn.softmax(jnp.where(scores >= kth, scores, -jnp.inf), axis=-1)
    else:
        gates = jnp.where(scores >= kth, 1 / (1 + jnp.exp(-scores)) if score == "sigmoid" else scores, 0)
    gates = scale * gates.sum(1)
    table = params["experts"]
    if activation is not None:
        gates = gates * activate(activation, *jnp.einsum("td,nmd->mtn", x, table[:, :-1]))
    return gates @ table[:, -1]


@pytest.mark.parametrize(
    "activation, share_keys, norm",
    [("gelu", True, "batchnorm"), ("swiglu", False, "batchnorm"), ("relu", False, "none"), (None, True, "none")],
)
def test_value_and_every_gradient_equal_brute_force(activation, share_keys, norm):
    with jax.enable_x64():
        x = jax.random.normal(jax.random.key(1), (2, 9, D), jnp.float64)
        layer, variables = make(x, jnp.float64, activation=activation, share_keys=share_keys, query_norm=norm)
        variables = jax.tree.map(lambda a: a.astype(jnp.float64), variables)
        d_y = jax.random.normal(jax.random.key(2), (18, D), jnp.float64)

        def run(f):
            loss = lambda params, x: (jnp.sum(d_y * (y := f(params, x))), y)
            (_, y), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(variables["params"], x)
            return y, grads

        ours = run(lambda p, x: layer.apply({**variables, "params": p}, x, train=True)[0].reshape(18, D))
        expected = run(lambda p, x: brute_force(p, x.reshape(18, D), activation, share_keys, norm))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected)):
            assert np.max(np.abs(a - b)) <= 1e-10 * max(np.max(np.abs(b)), 1e-3)


@pytest.mark.parametrize(
    "activation, share_keys, norm, rank, score, scale",
    [
        ("gelu", False, "batchnorm", 4, "softmax", 4.0),
        ("gelu", True, "none", 0, "raw", 1.0),
        ("swiglu", False, "none", 8, "sigmoid", 0.5),
        (None, False, "batchnorm", 2, "raw", 3.0),
    ],
)
def test_routers_with_options_equal_brute_force(activation, share_keys, norm, rank, score, scale):
    """The value, all gradients, and the parameters' shapes."""
    options = {"share_keys": share_keys, "query_norm": norm, "query_rank": rank, "score": score, "gate_scale": scale}
    with jax.enable_x64():
        x = jax.random.normal(jax.random.key(1), (18, D), jnp.float64)
        layer, variables = make_routed(x, jnp.float64, activation, **options)
        width, own = rank or H * DK, () if share_keys else (H,)
        assert variables["params"]["router"]["kernel"].shape == (D, width)
        assert variables["params"]["router"]["keys"].shape == (*own, 2, 7, (rank or DK) // 2)

        def ours(params, x):
            y, aux = layer.apply({**variables, "params": params}, x, train=True)
            return y, aux.stats

        def expected(params, x):
            return brute_force(params, x, activation, share_keys, norm, score, scale), {}

        results = []
        for f in (ours, expected):
            loss = lambda params, x: (jnp.sum(jnp.sin(3 * (y := f(params, x)[0]))), y)
            results.append(jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(variables["params"], x))
        assert_equal(*results)
        assert all(np.any(leaf) for leaf in jax.tree.leaves(results[1][1]))


def assert_equal(ours, expected):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert np.max(np.abs(a - b)) <= 1e-10 * max(np.max(np.abs(b)), 1e-3)


def token_hash(**options):
    return TokenHash(**{"experts": N, "heads": H, "top_k": K, "vocab_size": 20, "gate_scale": 2.0} | options)


def test_experts_by_the_token_id():
    """A sum over the experts in the table, without parameters of a router; padding gets nothing."""
    with jax.enable_x64():
        x = jax.random.normal(jax.random.key(1), (9, D), jnp.float64)
        ids, valid = jnp.arange(9) % 5, jnp.arange(9) != 3
        inputs = RouterInputs(token_ids=ids, valid=valid)
        layer = PEER(N, router=token_hash(), param_dtype=jnp.float64)
        variables = nn.unbox(jax.jit(lambda key: layer.init(key, x, inputs))(jax.random.key(0)))
        assert set(variables["params"]) == {"experts"}
        table, pool = np.asarray(variables["router_state"]["router"]["table"]), variables["params"]["experts"]
        rows = pool[table[np.asarray(ids)]]

        def ours(pool, x):
            return layer.apply({**variables, "params": {"experts": pool}}, x, inputs)[0]

        def expected(pool, x):
            rows = pool[table[np.asarray(ids)]]
            hidden = jax.nn.gelu(jnp.einsum("td,trd->tr", x, rows[:, :, 0]), approximate=False)
            return jnp.where(valid[:, None], 2 / K * jnp.einsum("tr,trd->td", hidden, rows[:, :, 1]), 0)

        assert rows.shape == (9, H * K, 2, D)
        run = lambda f: jax.jit(jax.value_and_grad(lambda *args: jnp.sum(jnp.sin(f(*args))), (0, 1)))(pool, x)
        assert_equal(run(ours), run(expected))
        with pytest.raises(ValueError, match="token_ids"):
            layer.apply(variables, x)


@pytest.mark.parametrize("split", ["width", pytest.param("experts", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["product keys", pytest.param("token hash", marks=pytest.mark.slow)])
def test_routers_with_options_on_eight_devices(kind, split):
    """Value, statistics and every gradient are those of one."""
    width, experts = 16, 64
    x = jax.random.normal(jax.random.key(1), (24, width))
    inputs = RouterInputs(token_ids=jnp.arange(24) % 7, valid=jnp.arange(24) % 5 != 0, train=True)
    router = token_hash(experts=experts)
    if kind == "product keys":
        router = ProductKeys(experts, H, K, share_keys=False, query_rank=6, score="raw", gate_scale=0.5)
    layer = PEER(experts, split=split, router=router)
    variables = nn.unbox(jax.jit(lambda key: layer.init(key, x, inputs))(jax.random.key(0)))

    def loss(params, x):
        y, aux = layer.apply({**variables, "params": params}, x, inputs)
        return jnp.sum(jnp.sin(y)), (y, aux.stats)

    run = lambda: jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(variables["params"], x)
    one = run()
    with jax.set_mesh(compat.make_mesh(jax.devices(), ("data", "expert"), (2, 4))):
        chex.assert_trees_all_close(jax.device_get(run()), jax.device_get(one), rtol=1e-5, atol=1e-5)


def test_gradient_of_a_gradient():
    """Under jit: of the parameters and x, of the squared norm of all gradients."""
    with jax.enable_x64():
        x = jax.random.normal(jax.random.key(1), (9, D), jnp.float64)
        layer, variables = make(x, jnp.float64)
        variables = jax.tree.map(lambda a: a.astype(jnp.float64), variables)

        def second(f):
            first = jax.grad(lambda *args: jnp.sum(jnp.sin(f(*args))), (0, 1))
            square = lambda *args: sum(jnp.sum(g**2) for g in jax.tree.leaves(first(*args)))
            return jax.jit(jax.grad(square, (0, 1)))(variables["params"], x)

        ours = second(lambda p, x: layer.apply({**variables, "params": p}, x, train=True)[0])
        expected = second(lambda p, x: brute_force(p, x, "gelu", True, "batchnorm"))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
            assert np.max(np.abs(a - b)) <= 1e-10 * max(np.max(np.abs(b)), 1e-3)


@pytest.mark.smoke
def test_one_expert_a_head_is_a_multilayer_perceptron():
    """Gates are 1, so that the heads' neurons form one network of H neurons."""
    with jax.enable_x64():
        x = jax.random.normal(jax.random.key(1), (7, D), jnp.float64)
        layer, variables = make(x, jnp.float64, top_k=1)
        sink = row_sink(7, H, 2, D, jnp.float64)
        y, aux = jax.device_get(jax.jit(layer.apply)({**variables, "row_sinks": {"experts": sink}}, x))
        x, params = np.asarray(x), jax.device_get(variables["params"])
        u, v = np.moveaxis(params["experts"][aux.row_ids["experts"]], 2, 0)
        for t in range(7):
            expected = jax.nn.gelu(x[t] @ u[t].T, approximate=False) @ v[t]
            np.testing.assert_allclose(y[t], expected, rtol=1e-10)


def test_the_sink_has_the_pools_gradient():
    x = jax.random.normal(jax.random.key(1), (20, D))
    layer, variables = make(x)

    def loss(params, sinks):
        y, aux = layer.apply({**variables, "params": params} | sinks, x, train=True)
        return jnp.sum(jnp.sin(y)), aux.row_ids

    dense, ids = jax.jit(jax.grad(loss, has_aux=True))(variables["params"], {})
    assert ids == {}
    sinks = {"row_sinks": {"experts": row_sink(20, H * K, 2, D)}}
    (d_params, d_sinks), ids = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables["params"], sinks)
    gradient = RowGradient(ids["experts"], *d_sinks["row_sinks"]["experts"])
    rows = jax.jit(dense_rows, static_argnums=1)(gradient, N)
    np.testing.assert_allclose(rows, dense["experts"], rtol=1e-5, atol=1e-6)
    assert not d_params["experts"].any()
    chex.assert_trees_all_close(d_params["router"], dense["router"], rtol=1e-5)


@pytest.mark.parametrize("activation, replaces", [("gelu", "gelu"), ("gelu", "swiglu"), ("swiglu", "relu"), (None, "gelu")])
def test_starts_with_the_output_variance_of_what_it_replaces(activation, replaces):
    x = jax.random.normal(jax.random.key(1), (512, 64))
    x = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True))
    layer = PEER(64**2, heads=8, top_k=8, key_width=32, activation=activation, replaces=replaces)
    variables = nn.unbox(jax.jit(layer.init)(jax.random.key(0), x))
    y, _ = apply(layer, variables, x, train=True)
    dense = FeedForward(256, replaces)
    other = jax.jit(dense.apply)(jax.jit(dense.init)(jax.random.key(0), x), x)
    np.testing.assert_allclose(np.var(y), np.var(other), rtol=0.25)


@pytest.mark.parametrize(
    "options",
    [
        {"gate_scale": 8.0},
        {"score": "sigmoid"},
        {"score": "raw", "query_norm": "none", "share_keys": False},
        {"score": "raw", "query_rank": 48, "share_keys": False, "gate_scale": 0.1},
        None,
    ],
    ids=["times K", "sigmoid", "raw", "one query", "token hash"],
)
def test_any_router_starts_with_the_output_variance_of_what_it_replaces(options):
    """And `output_init` scales it."""
    x = jax.random.normal(jax.random.key(1), (512, 64))
    x = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True))
    inputs = RouterInputs(token_ids=jnp.arange(512), train=True)
    router = token_hash(experts=64**2, heads=8, top_k=8, vocab_size=512)
    if options:
        router = ProductKeys(**{"experts": 64**2, "heads": 8, "top_k": 8, "key_width": 32} | options)
    layer = PEER(64**2, router=router, output_init=0.5)
    y, _ = jax.jit(lambda key: layer.apply(layer.init(key, x, inputs), x, inputs))(jax.random.key(0))
    np.testing.assert_allclose(4 * np.var(y), SECOND_MOMENT["gelu"], rtol=0.25)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_second_moments(kind):
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()
    g, h = jnp.meshgrid(jnp.asarray(nodes, jnp.float32), jnp.asarray(nodes, jnp.float32))
    values = activate(kind, h, g) if kind == "swiglu" else activate(kind, h)
    np.testing.assert_allclose(weights @ (np.asarray(values) ** 2) @ weights, SECOND_MOMENT[kind], rtol=1e-3)


def test_padding_and_broken_tokens_leave_the_others_alone():
    x = jax.random.normal(jax.random.key(1), (12, D))
    layer, variables = make(x)
    valid = jnp.arange(12) != 4
    inputs = RouterInputs(valid=valid, train=True)
    run = jax.jit(lambda x: layer.apply(variables, x, inputs)[0])
    y = run(x)
    assert not np.any(y[4])
    other = run(x.at[4].set(jnp.nan))
    np.testing.assert_array_equal(y, other)


def test_the_shared_branch_is_added():
    x = jax.random.normal(jax.random.key(1), (12, D))
    layer, variables = make(x, shared_width=16)
    params = {k: v for k, v in variables["params"].items() if k != "shared"}
    alone, _ = apply(PEER(N, H, K, DK), {**variables, "params": params}, x)
    shared = jax.jit(FeedForward(16, "gelu").apply)({"params": variables["params"]["shared"]}, x)
    np.testing.assert_allclose(apply(layer, variables, x)[0], alone + shared, rtol=1e-5, atol=1e-6)


def test_bfloat16_activations_keep_float32_scores():
    x = jax.random.normal(jax.random.key(1), (12, D)).astype(jnp.bfloat16)
    layer, variables = make(x)
    y, aux = apply(layer, variables, x, train=True)
    assert y.dtype == jnp.bfloat16 and {a.dtype for a in jax.tree.leaves(aux.stats)} == {jnp.dtype("float32")}
    wide, _ = apply(layer, variables, x.astype(jnp.float32), train=True)
    np.testing.assert_allclose(np.asarray(y, np.float32), wide, atol=0.03 * np.abs(wide).max())
