import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax import compat
from moe_jax.layers import attention_kernels, kv_cache
from moe_jax.layers.attention import Attention
from moe_jax.layers.rotary import Rotary

B, S, D = 2, 8, 16
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 2, 0, 0]], np.int32)


def _reference(q, k, v, allowed):
    """Query by query, head by head, in float64. allowed: bool [B, S, M]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    y = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b, s, h in np.ndindex(*q.shape[:3]):
        keys = np.flatnonzero(allowed[b, s])
        scores = k[b, keys, h // group] @ q[b, s, h] / np.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        y[b, s, h] = weights / weights.sum() @ v[b, keys, h // group]
    return y


def _allowed(causal, segments):
    allowed = np.ones((B, S, S), bool)
    if causal:
        allowed &= np.tril(allowed)
    if segments is not None:
        allowed &= segments[:, :, None] == segments[:, None, :]
    return allowed


def _qkv(heads, kv_heads, width=4, batch=B, length=S, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(batch, length, n, width) for n in (heads, kv_heads, kv_heads)]
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize(
    "heads, kv_heads, causal, segmented",
    [(4, 4, True, False), (4, 2, True, True), (3, 1, False, True), (4, 2, False, False)],
)
def test_values(heads, kv_heads, causal, segmented):
    q, k, v = _qkv(heads, kv_heads)
    segments = SEGMENTS if segmented else None
    f = jax.jit(functools.partial(attention_kernels.dot_product_attention, causal=causal))
    y = f(q, k, v, segment_ids=segments)
    expected = _reference(q, k, v, _allowed(causal, segments))
    np.testing.assert_allclose(y, expected, atol=1e-6)
    # A mask comes on top of the others.
    mask = np.ones((B, 1, S, S), bool)
    mask[0, 0, 2, 0] = False
    y = f(q, k, v, segment_ids=segments, mask=mask)
    np.testing.assert_allclose(y, _reference(q, k, v, _allowed(causal, segments) & mask[:, 0]), atol=1e-6)


@jax.jit
def _attention_gradients(q, k, v):
    loss = lambda q, k, v: jnp.sum(jnp.sin(attention_kernels.dot_product_attention(q, k, v, segment_ids=SEGMENTS)))
    return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)


def test_grouped_queries_are_repeated_heads():
    q, k, v = _qkv(6, 2)
    value, (dq, dk, dv) = _attention_gradients(q, k, v)
    value3, (dq3, dk3, dv3) = _attention_gradients(q, *(jnp.repeat(x, 3, axis=2) for x in (k, v)))
    dk3, dv3 = (x.reshape(B, S, 2, 3, 4).sum(3) for x in (dk3, dv3))
    chex.assert_trees_all_close((value, dq, dk, dv), (value3, dq3, dk3, dv3), rtol=1e-5, atol=1e-6)


def test_splash_kernel_interpreted():
    q, k, v = _qkv(4, 2, width=8, batch=2, length=128)
    segments = np.repeat(np.array([[1, 1, 2, 2], [1, 2, 3, 0]], np.int32), 32, axis=1)
    target = jax.random.normal(jax.random.key(1), q.shape)

    def gradients(f):
        return jax.jit(jax.value_and_grad(lambda *x: jnp.sum(f(*x, segment_ids=segments) * target), (0, 1, 2)))

    expected = gradients(attention_kernels.dot_product_attention)(q, k, v)
    splash = functools.partial(attention_kernels.splash_attention, interpret=True)
    value = jnp.sum(jax.jit(splash)(q, k, v, segment_ids=segments) * target)
    chex.assert_trees_all_close(value, expected[0], rtol=1e-4)
    # Two batch shards, and four shards of heads, for which there are too few key heads.
    mesh = compat.make_mesh(jax.devices(), ("data", "tensor"), (2, 4))
    with jax.set_mesh(mesh):
        chex.assert_trees_all_close(gradients(splash)(q, k, v), expected, rtol=1e-4, atol=1e-4)


SHAPE, SHORT, ODD = (8, 256, 4, 64), (8, 100, 4, 64), (8, 101, 4, 64)


@pytest.mark.parametrize(
    "platform, shape, dtype, options, choice, reason",
    [
        ("cpu", SHAPE, jnp.float32, {}, "xla", "the platform is cpu"),
        ("gpu", SHAPE, jnp.bfloat16, dict(capability="9.0"), "cudnn", "the platform is gpu"),
        ("gpu", SHAPE, jnp.float32, dict(capability="9.0"), "xla", "dtype=float32"),
        ("gpu", SHAPE, jnp.bfloat16, dict(capability="7.5"), "xla", "the GPU has 7.5"),
        ("gpu", SHAPE, jnp.bfloat16, dict(capability="gfx90a"), "xla", "needs an NVIDIA GPU"),
        ("gpu", (8, 256, 4, 192), jnp.bfloat16, dict(capability="8.6"), "xla", "head_width=192"),
        ("gpu", (8, 256, 4, 192), jnp.bfloat16, dict(capability="10.0"), "cudnn", "the platform is gpu"),
        ("gpu", ODD, jnp.bfloat16, dict(capability="9.0", segmented=True), "xla", "even lengths"),
        ("gpu", ODD, jnp.bfloat16, dict(capability="9.0"), "cudnn", "the platform is gpu"),
        ("tpu", SHAPE, jnp.float32, dict(segmented=True), "splash", "the platform is tpu"),
        ("tpu", SHAPE, jnp.float32, dict(masked=True), "xla", "no mask"),
        ("tpu", SHORT, jnp.bfloat16, {}, "xla", "S=100"),
        ("tpu", SHAPE, jnp.bfloat16, dict(batch_shards=3), "xla", "B=8"),
    ],
)
def test_choice_of_kernel(platform, shape, dtype, options, choice, reason):
    chosen, why = attention_kernels.choose_backend("auto", platform, shape, shape, dtype, **options)
    assert chosen == choice and reason in why
    assert attention_kernels.choose_backend("xla", platform, shape, shape, dtype, **options) == ("xla", "requested")
    wanted = {"gpu": "cudnn", "tpu": "splash"}.get(platform, "cudnn")
    if choice == wanted:
        assert attention_kernels.choose_backend(wanted, platform, shape, shape, dtype, **options) == (
            wanted,
            "requested",
        )
    else:
        with pytest.raises(ValueError, match=f"attention='{wanted}' cannot run here: .*; use attention='auto'") as error:
            attention_kernels.choose_backend(wanted, platform, shape, shape, dtype, **options)
        assert "\n" not in str(error.value)


def test_choice_is_logged_once(caplog):
    attention_kernels._log_choice.cache_clear()
    with caplog.at_level("INFO"):
        for _ in range(2):
            jax.eval_shape(attention_kernels.dot_product_attention, *_qkv(2, 2))
    assert [r.message for r in caplog.records if "attention" in r.message] == ["attention kernel: xla (the platform is cpu)"]
    with pytest.raises(ValueError, match="attention='flash' is unknown"):
        attention_kernels.choose_backend("flash", "cpu", SHAPE, SHAPE, jnp.float32)


FULL = dict(heads=4, kv_heads=2, head_width=6, rotary=Rotary(), qk_norm=True, qkv_bias=True, output_bias=True)


@functools.cache
def _layer(dtype=jnp.float32):
    layer = Attention(**FULL, dtype=dtype)
    x = jax.random.normal(jax.random.key(0), (B, S, D))
    shapes = nn.unbox(jax.eval_shape(layer.init, jax.random.key(1), x, _positions()))["params"]
    # Random biases and scales too, so that a forgotten one shows.
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.asarray(0.3 * rng.normal(size=p.shape), p.dtype), shapes)
    return jax.jit(lambda *args: layer.apply({"params": params}, *args)), params, x


def _positions():
    return np.broadcast_to(np.arange(S), (B, S))


def test_layer_is_its_parts():
    apply, p, x = _layer()
    y, cache = apply(x, _positions(), SEGMENTS)
    assert cache is None
    chex.assert_shape(y, (B, S, D))
    x, p = np.asarray(x, np.float64), jax.tree.map(lambda a: np.asarray(a, np.float64), p)

    def heads(name):
        h = np.einsum("bsd,dhw->bshw", x, p[f"w_{name}"]) + p[f"b_{name}"]
        if name == "v":
            return h
        h = h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6) * p[f"{name}_norm"]["scale"]
        angle = _positions()[:, :, None, None] * 10000.0 ** (-np.arange(3) / 3)
        turned = (h[..., :3] + 1j * h[..., 3:]) * np.exp(1j * angle)
        return np.concatenate([turned.real, turned.imag], -1)

    attended = _reference(heads("q"), heads("k"), heads("v"), _allowed(True, SEGMENTS))
    expected = np.einsum("bshw,hwd->bsd", attended, p["w_o"]) + p["b_o"]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_layer_parameters():
    layer = Attention(heads=4, qkv_bias=True, output_bias=True, qk_norm=True)
    params = jax.jit(layer.init)(jax.random.key(0), jnp.zeros((1, 4, 256)), jnp.zeros((1, 4), jnp.int32))["params"]
    assert params["w_q"].names == ("embed", "heads", "head") and params["w_k"].names == (
        "embed",
        "kv_heads",
        "head",
    )
    assert params["w_o"].names == ("heads", "head", "embed") and params["b_v"].names == ("kv_heads", "head")
    assert params["q_norm"]["scale"].names == ("head",)
    chex.assert_shape(params["w_q"].value, (256, 4, 64))
    for name in ("w_q", "w_k", "w_v", "w_o"):
        np.testing.assert_allclose(params[name].value.std(), 1 / 16, rtol=0.03)
    init = Attention(heads=4).init
    plain = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 4, 8)), jnp.zeros((1, 4), jnp.int32))["params"]
    assert set(plain) == {"w_q", "w_k", "w_v", "w_o"}


def test_other_documents_and_later_tokens_change_nothing():
    apply, _, x = _layer()
    y, _ = apply(x, _positions(), SEGMENTS)
    # Row 0: the first document; row 1: the padding.
    other, _ = apply(x.at[0, :3].add(1.0).at[1, 6:].add(1.0), _positions(), SEGMENTS)
    np.testing.assert_array_equal(other[0, 3:], y[0, 3:])
    np.testing.assert_array_equal(other[1, :6], y[1, :6])
    later, _ = apply(x.at[:, 5:].add(1.0), _positions(), SEGMENTS)
    np.testing.assert_array_equal(later[:, :5], y[:, :5])
    assert (later[:, 5:] != y[:, 5:]).any()


@pytest.mark.parametrize("causal", [True, False])
def test_padding_is_finite(causal):
    layer = Attention(**FULL, causal=causal)
    x = jnp.zeros((B, S, D)).at[0].set(1.0)
    params = {"params": _layer()[1]}
    segments = np.stack([SEGMENTS[1], np.zeros(S, np.int32)])
    loss = lambda p, x: jnp.sum(layer.apply(p, x, _positions(), segments)[0] ** 2)
    chex.assert_tree_all_finite(jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x))


def test_bfloat16_keeps_parameters():
    apply, params, x = _layer(jnp.bfloat16)
    y, _ = apply(x, _positions(), SEGMENTS)
    chex.assert_type(y, jnp.bfloat16)
    chex.assert_type(jax.tree.leaves(params), jnp.float32)
    wide, _ = _layer()[0](x, _positions(), SEGMENTS)
    chex.assert_trees_all_close(y.astype(jnp.float32), wide, atol=0.1)


def _decode(apply, x, lengths, prompt, padding):
    """Outputs [B, S, D] by a cache: prompts of `lengths` padded to `prompt`, then one token at a time."""
    cache = kv_cache.init_cache(B, S + 1, 2, 6)
    lengths, outputs = np.array(lengths), np.zeros(x.shape)
    slots = np.arange(prompt)[None] - (0 if padding == "right" else prompt - lengths[:, None])
    real = (slots >= 0) & (slots < lengths[:, None])
    source = np.where(real, slots, 0)
    tokens = np.where(real[..., None], np.take_along_axis(np.asarray(x), source[..., None], 1), 7.0)
    y, cache = apply(tokens, source, real.astype(np.int32), cache)
    for b in range(B):
        outputs[b, : lengths[b]] = y[b, real[b]]
    while (lengths < S).any():
        live = lengths < S  # a finished row gets padding
        position = np.minimum(lengths, S - 1)[:, None]
        token = np.take_along_axis(np.asarray(x), position[..., None], 1)
        y, cache = apply(token, position, live[:, None].astype(np.int32), cache)
        outputs[live, lengths[live]] = y[live, 0]
        lengths = lengths + live
    np.testing.assert_array_equal(cache.length, [S, S])
    np.testing.assert_array_equal(cache.segment_ids, [[1] * S + [0]] * B)
    return outputs


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("lengths", [(5, 2), (1, 5)])
def test_cached_is_uncached(lengths, padding):
    apply, _, x = _layer()
    y, _ = apply(x, _positions())
    np.testing.assert_allclose(_decode(apply, x, lengths, 5, padding), y, rtol=1e-5, atol=1e-5)


def test_cache_reports_overflow_and_keeps_what_it_has():
    cache = kv_cache.init_cache(1, 2, 1, 1)
    new = jnp.arange(1.0, 4.0).reshape(1, 3, 1, 1)
    cache, slot = kv_cache.update_cache(cache, new, new, jnp.ones((1, 3), jnp.int32))
    np.testing.assert_array_equal(cache.k[0, 0, :, 0], [1, 2])
    assert cache.length[0] == 3 and slot.tolist() == [[0, 1, 2]]


def test_refusals():
    x, positions = jnp.zeros((1, 2, 6)), jnp.zeros((1, 2), jnp.int32)
    for options, message in (
        (dict(heads=4, kv_heads=3), "heads=4 must be a multiple of kv_heads=3"),
        (dict(heads=4), "width=6 must be a multiple of heads=4"),
        (dict(heads=2, rotary=Rotary()), "head_width=3 is odd"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(Attention(**options).init, jax.random.key(0), x, positions)
    cache = kv_cache.init_cache(1, 2, 2, 3)
    with pytest.raises(ValueError, match="a cache needs causal=True"):
        Attention(heads=2, causal=False).init(jax.random.key(0), x, positions, None, cache)
    # Initialisation needs no kernel, so a model for another machine can be initialised anywhere.
    layer = Attention(heads=2, backend="splash")
    variables = jax.tree.map(jnp.ones_like, jax.eval_shape(layer.init, jax.random.key(0), x, positions))
    with pytest.raises(ValueError, match="attention='splash' cannot run here: it needs a TPU"):
        layer.apply(variables, x, positions)


def test_sharded_heads():
    apply, params, x = _layer()
    expected, _ = apply(x, _positions(), SEGMENTS)
    mesh = compat.make_mesh(jax.devices(), ("data", "fsdp", "tensor"), (2, 2, 2))
    spec = {
        "w_q": (None, "tensor"),
        "w_k": (None, "tensor"),
        "w_v": ("fsdp", "tensor"),
        "w_o": ("tensor", None, "fsdp"),
    }
    layer = Attention(**FULL)
    put = lambda path, p: jax.device_put(p, jax.sharding.NamedSharding(mesh, compat.PartitionSpec(*spec.get(path[-1].key, ()))))
    sharded = jax.tree_util.tree_map_with_path(put, params)
    rows = jax.device_put(x, jax.sharding.NamedSharding(mesh, compat.PartitionSpec("data")))
    with jax.set_mesh(mesh):
        y, _ = jax.jit(lambda p, x: layer.apply({"params": p}, x, _positions(), SEGMENTS))(sharded, rows)
    chex.assert_trees_all_close(y, expected, rtol=1e-5, atol=1e-5)
