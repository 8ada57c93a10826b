"""The decoder: the same numbers however it is compiled, documents apart, every parameter with its axes."""

import dataclasses
import functools

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.models.decoder import Decoder
from moe_jax.models.losses import cross_entropy
from moe_jax.models.places import by_layer
from moe_jax.models.stack import init_stack_cache
from tests.compiled import apply
from tests.models.small import boxed_shapes, random_variables

B, S, V = 2, 12, 61


def make_model(**fields):
    moe = MoEConfig(experts=4, top_k=2)
    small = {"layers": 4, "width": 16, "ffn_width": 24, "heads": 2, "loss_chunk": 16, "residual_init": 1.0, "moe": moe} | fields
    return Decoder(ModelConfig(**small), V)


def make_batch(seed=0):
    """Two documents in row 0; one and padding in row 1."""
    ids = jax.random.randint(jax.random.key(seed), (B, S), 0, V)
    segments = jnp.array([[1] * 5 + [2] * 7, [1] * 9 + [0] * 3])
    positions = jnp.array([[*range(5), *range(7)], [*range(9), 0, 0, 0]])
    return ids, positions, segments


@functools.cache
def default():
    model = make_model()
    return model, random_variables(model)


def loss_and_gradients(model, variables):
    ids, positions, segments = make_batch()

    @jax.jit
    def run(params, state):
        def loss(params):
            variables = {"params": params} | state
            out = model.apply(variables, ids, positions, segments, key=jax.random.key(3), train=True)
            nats, _ = cross_entropy(out.x, out.table, jnp.roll(ids, -1, 1), (segments > 0).astype(jnp.float32), chunk=16)
            return nats + 0.1 * sum(jax.tree.leaves(out.losses)), out.stats

        return jax.value_and_grad(loss, has_aux=True)(params)

    return run(variables["params"], {name: tree for name, tree in variables.items() if name != "params"})


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# Written out of order on purpose.
INSERTS = "last=dense@4,base=dense@2"


@pytest.mark.fused
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"inserts": INSERTS}, marks=pytest.mark.slow),
        {"layers": 2, "pattern": "dense", "positions": "learned", "dtype": "bfloat16"},
    ],
    ids=["inserts", "dense bfloat16"],
)
def test_scan_is_unrolled_is_remat_bit_for_bit(fields):
    model = make_model(**fields)
    variables, result = random_variables(model), None
    for scan, remat in ((True, False), (False, False), (True, True)):
        other = Decoder(dataclasses.replace(model.config, scan=scan, remat=remat), V)
        assert boxed_shapes(other) == boxed_shapes(model)
        new = loss_and_gradients(other, variables)
        result = result or new
        assert np.isfinite(new[0][0])
        assert_same_bits(result, new)
    # Every parameter matters.
    flat = flax.traverse_util.flatten_dict(result[1], sep="/")
    assert not [path for path, gradient in flat.items() if not np.any(gradient)]


@pytest.mark.fused
def test_routed_bfloat16_is_unrolled_bit_for_bit():
    """Values and routing; what XLA fuses it may keep in float32, but not from group to group."""
    model = make_model(pattern="routed,dense", positions="learned", dtype="bfloat16")
    variables = random_variables(model)
    unrolled = Decoder(dataclasses.replace(model.config, scan=False), V)
    a, b = (apply(decoder, variables, *make_batch()) for decoder in (model, unrolled))
    assert_same_bits((a.x, a.stats, a.losses), (b.x, b.stats, b.losses))


def test_initialisation_of_groups_differs():
    model = make_model(pattern="dense", layers=2)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(1), *make_batch()))["params"]
    for path, leaf in flax.traverse_util.flatten_dict(params["stack"]["groups"], sep="/").items():
        assert leaf.shape[0] == 2
        assert path.endswith("scale") == np.array_equal(leaf[0], leaf[1]), path
    assert 0.01 < np.abs(params["embed"]["embedding"]).mean() < 0.03


@pytest.mark.fused
@pytest.mark.parametrize("ffn", ["routed,dense", "dense"])
def test_documents_do_not_see_each_other(ffn):
    model = make_model(pattern=ffn)
    variables, (ids, positions, segments) = random_variables(model), make_batch()
    run = jax.jit(lambda ids: model.apply(variables, ids, positions, segments).x)
    before = run(ids)
    first = run(ids.at[0, :5].set((ids[0, :5] + 1) % V))
    np.testing.assert_array_equal(first[0, 5:], before[0, 5:])
    np.testing.assert_array_equal(first[1], before[1])
    padding = run(ids.at[1, 9:].set(0))
    np.testing.assert_array_equal(padding[1, :9], before[1, :9])
    # Causal: a token changes itself and what follows in its document, nothing else.
    later = run(ids.at[0, 8].set((ids[0, 8] + 1) % V))
    changed = np.any(np.asarray(later != before), axis=-1)
    np.testing.assert_array_equal(changed[0], np.arange(S) >= 8)
    assert not changed[1].any()


@pytest.mark.smoke
def test_a_document_scores_the_same_alone():
    model, variables = default()
    ids, positions, segments = make_batch()
    packed = jax.jit(model.apply)(variables, ids, positions, segments).x[0, 5:]
    alone = jax.jit(model.apply)(variables, ids[:1, 5:], positions[:1, 5:], segments[:1, 5:]).x[0]
    np.testing.assert_allclose(packed, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"inserts": "base=routed@4,first=dense@0"},
        {
            "pattern": "dense",
            "positions": "learned",
            "norm": "layernorm",
            "activation": "gelu",
            "tied_embeddings": False,
            "qkv_bias": True,
            "output_bias": True,
            "ffn_bias": True,
        },
        {"pattern": "routed", "positions": "none", "qk_norm": True, "ffn_bias": True, "activation": "relu"},
    ],
    ids=["inserts", "dense", "routed"],
)
def test_every_parameter_has_logical_axes(fields):
    model = make_model(**fields)
    boxed = boxed_shapes(model)["params"]
    leaves = jax.tree.leaves_with_path(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata))
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert isinstance(leaf, nn.LogicallyPartitioned), name
        assert len(leaf.names) == leaf.value.ndim, name
        assert (leaf.names[0] == "layers") == ("stack/groups/" in name), name
    top = {"embed", "stack", "norm_final"}
    top |= {"positions"} if model.config.positions == "learned" else set()
    assert set(boxed) == top | (set() if model.config.tied_embeddings else {"output"})
    out = jax.jit(model.apply)(random_variables(model), *make_batch())
    assert out.x.shape == (B, S, 16) and out.table.shape == (V, 16)
    assert np.isfinite(out.x).all()


def test_positions():
    ids, positions, segments = make_batch()
    for kind, absolute in (("rope", False), ("learned", True), ("none", False)):
        model = make_model(positions=kind, pattern="dense", layers=1, max_positions=20)
        run = jax.jit(functools.partial(model.apply, random_variables(model)))
        before = run(ids, positions, segments).x
        # Rotations are relative: moving a whole document changes nothing but rounding.
        moved = run(ids, positions + 5, segments).x
        assert np.allclose(before, moved, rtol=1e-4, atol=1e-5) != absolute, kind
        stretched = run(ids, positions * 2, segments).x
        assert np.allclose(before, stretched, rtol=1e-4, atol=1e-5) == (kind == "none"), kind


def test_bfloat16_computes_narrow_and_keeps_wide_parameters():
    model, variables = default()
    narrow = Decoder(dataclasses.replace(model.config, dtype="bfloat16"), V)
    assert {leaf.dtype for leaf in jax.tree.leaves(boxed_shapes(narrow))} == {jnp.dtype(jnp.float32)}
    x = jax.jit(narrow.apply)(variables, *make_batch()).x
    assert x.dtype == jnp.bfloat16
    wide = np.asarray(jax.jit(model.apply)(variables, *make_batch()).x)
    assert np.abs(wide - np.asarray(x, np.float32)).max() < 0.1 * np.abs(wide).max()


def test_statistics_by_layer():
    model = make_model(inserts="base=routed@2,plain=dense@0")
    out = jax.jit(model.apply)(random_variables(model), *make_batch())
    layers = by_layer(out.stats, model.config)
    assert list(layers) == ["layer_01", "base", "layer_03"]
    for stats in layers.values():
        assert stats["tokens"] == 21 and stats["counts"].sum() == 42 and stats["counts"].shape == (4,)
        assert stats["dropped"] == 0 and stats["nonfinite"] == 0
    losses = out.losses["routed"]
    assert set(out.losses) == {"routed"} and set(losses) == {"balance", "z"} and losses["balance"].shape == ()
    dense = make_model(pattern="dense")
    out = jax.jit(dense.apply)(random_variables(dense), *make_batch())
    assert by_layer(out.stats, dense.config) == {} and out.losses == {} and out.cache is None


def test_layers_are_in_order_of_depth():
    config = make_model(layers=120, pattern="routed").config
    layers = by_layer({"groups": {"block_0": {"counts": np.arange(120)}}}, config)
    assert [stats["counts"] for stats in layers.values()] == [*range(120)]
    assert list(layers)[99:101] == ["layer_99", "layer_100"]


def test_a_forward_pass_writes_no_router_state():
    model, variables = default()
    _, written = apply(model, variables, *make_batch(), train=True, mutable=["router_state"])
    assert_same_bits(written.get("router_state", {}), variables["router_state"])


def test_cache_in_parts_is_the_whole():
    """A document read in two parts through the cache gives the vectors of one call."""
    model = make_model(inserts=INSERTS + ",again=routed@2", heads=4, kv_heads=2, positions="learned")
    variables, ids = random_variables(model), make_batch()[0]
    positions = jnp.broadcast_to(jnp.arange(S), (B, S))
    run = jax.jit(model.apply)
    whole = run(variables, ids, positions, jnp.ones_like(ids)).x
    cache, parts = init_stack_cache(model.config, B, S), []
    for part in (slice(0, S // 2), slice(S // 2, S)):
        out = run(variables, ids[:, part], positions[:, part], jnp.ones_like(ids[:, part]), cache=cache)
        parts, cache = [*parts, out.x], out.cache
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=1e-4, atol=1e-5)
