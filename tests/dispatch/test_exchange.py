"""The layer on a mesh against the layer on one device, and that against a loop over the assignments."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import compat
from moe_jax.dispatch import exchange as exchange_room
from moe_jax.dispatch.exchange import EXCHANGES, bytes_sent, ragged, resolve_exchange, run_local, run_sharded
from moe_jax.layers.experts import WEIGHT_AXES
from moe_jax.ops.expert_ffn import expert_ffn
from moe_jax.sharding import mesh_spec
from moe_jax.types import TokenChoice

T, K, E, D, F = 16, 2, 4, 6, 8
AXES = ("data", "fsdp", "expert", "tensor")
MESHES = {
    "expert": (AXES, (1, 1, 4, 2)),
    "all": (AXES, (1, 2, 2, 2)),
    "fsdp": (AXES, (2, 2, 1, 2)),
    "few axes": (("expert", "data"), (2, 4)),
    "tensor": (("tensor",), (4,)),
}


def make_mesh(name):
    axes, shape = MESHES[name]
    return compat.make_mesh(jax.devices()[: np.prod(shape)], axes, shape)


def make(tokens, high=E + 1):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    weights = {"w_in": draw(E, D, F), "w_out": draw(E, F, D), "b_in": draw(E, F), "b_out": draw(E, D)}
    ids = jnp.asarray(rng.integers(0, high, (tokens, K)), jnp.int32)
    return draw(tokens, D), TokenChoice(ids, draw(tokens, K)), weights, draw(tokens, D)


def specs(mesh):
    return {name: mesh_spec(mesh, axes) for name, axes in WEIGHT_AXES.items()}


def run_experts(x, weights, order, gates):
    return expert_ffn(
        x,
        weights,
        order.group_sizes,
        activation="relu",
        gates=gates,
        order=order.order,
        inverse=order.inverse,
    )


def slow(x, choice, weights):
    x, gates, w = (jax.tree.map(lambda a: np.asarray(a, np.float64), a) for a in (x, choice.gates, weights))
    y = np.zeros(x.shape)
    for t in range(len(x)):
        for k, e in enumerate(np.asarray(choice.expert_ids[t])):
            if e < E:
                h = np.maximum(x[t] @ w["w_in"][e] + w["b_in"][e], 0)
                y[t] += gates[t, k] * (h @ w["w_out"][e] + w["b_out"][e])
    return y


def with_gradients(run):
    """A function of (x, choice, weights, d_y) that gives (y, gradients of x, gates and weights), statistics."""

    @jax.jit
    def both(x, choice, weights, d_y):
        def f(x, gates, weights):
            return run(x, TokenChoice(choice.expert_ids, gates), weights)

        y, pull, sent = jax.vjp(f, x, choice.gates, weights, has_aux=True)
        return (y, pull(d_y)), sent

    return both


_local = with_gradients(lambda *args: (run_local(*args, run_experts), {}))


@functools.cache
def local(tokens):
    return _local(*make(tokens))[0]


def on_mesh(name, **options):
    mesh = make_mesh(name)
    run = with_gradients(lambda *args: run_sharded(mesh, *args, specs(mesh), run_experts, **options))

    def f(*args):
        with jax.set_mesh(mesh):
            result, sent = run(*args)
        chex.assert_type(list(sent.values()), jnp.float32)
        return result, {name.removeprefix("exchange_"): float(value) for name, value in sent.items()}

    return f


def assert_close(a, b):
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
    for left, right in zip(jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b))):
        assert np.abs(left - right).max() <= 1e-5 * np.abs(right).max()


def test_local():
    x, choice, weights, _ = make(T)
    y, _ = local(T)
    expected = slow(x, choice, weights)
    assert np.abs(y - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name, tokens", [("fsdp", T), ("few axes", T), ("tensor", T), ("fsdp", T + 1)])
def test_gather(name, tokens):
    """Also where there is no axis expert, and where the shards do not divide the tokens."""
    result, sent = on_mesh(name)(*make(tokens))
    assert_close(result, local(tokens))
    assert bool(sent) == (name == "few axes")


@pytest.mark.parametrize("exchange", ["gather", "all_to_all"])
def test_norm_of_an_expert(exchange):
    """Its vectors are the same on the shards of `tensor`, of which each has a part of their gradient."""
    x, choice, weights, d_y = make(T)
    rng = np.random.default_rng(1)
    weights |= {name: jnp.asarray(rng.normal(size=(E, D)), jnp.float32) for name in ("norm_scale", "norm_bias")}
    result, _ = on_mesh("all", exchange=exchange, buffer_factor=0.0)(x, choice, weights, d_y)
    assert_close(result, _local(x, choice, weights, d_y)[0])


def count_sent(choice, tokens, name):
    """Per shard of different tokens: assignments to each shard of its group, int [shards, n]."""
    sizes = dict(zip(*MESHES[name]))
    n, shards = sizes["expert"], np.prod([sizes.get(axis, 1) for axis in compat.BATCH_AXES])
    ids = np.full((-(-tokens // shards) * shards, K), E)
    ids[:tokens] = choice.expert_ids
    pairs = [np.bincount(part.ravel() * n // E, minlength=n + 1)[:n] for part in np.split(ids, shards)]
    return np.stack(pairs)


@pytest.mark.parametrize("exchange", ["all_to_all", "ragged"])
@pytest.mark.parametrize("name, tokens, factor", [("expert", T + 1, 0.0), ("all", T, 0.0), ("all", T + 3, 1.5)])
def test_bounded(name, tokens, factor, exchange):
    """A buffer for everything; one that holds some choices and that others overflow. All counts are exact."""
    run = on_mesh(name, exchange=exchange, buffer_factor=factor)
    x, even, weights, d_y = make(tokens)
    skewed = TokenChoice(jnp.ones_like(even.expert_ids), even.gates)
    for choice in (even, skewed):
        args = x, choice, weights, d_y
        result, sent = run(*args)
        assert_close(result, _local(*args)[0])
        pairs = count_sent(choice, tokens, name)
        n, per_shard = pairs.shape[1], -(-tokens // len(pairs))
        groups = len(pairs) // n
        over = 0
        if factor:
            share = per_shard * K / (n if exchange == "all_to_all" else 1)
            over = overflow(pairs, exchange, np.ceil(factor * share))
            assert (over > 0) == (choice is skewed)
        away = pairs[~np.tile(np.eye(n, dtype=bool), (groups, 1))].sum() / groups
        taken = "gather" if over else exchange
        expected = bytes_sent(taken, n, per_shard, K, D, buffer_factor=factor, rows=away)
        copies = groups * dict(zip(*MESHES[name]))["tensor"]
        assert sent == {"fallback": over > 0, "overflow": over, "bytes": copies * expected}


def overflow(pairs, exchange, room):
    """Rows above `room`, of each pair of shards or of all that a shard receives."""
    n = pairs.shape[1]
    load = pairs if exchange == "all_to_all" else pairs.reshape(-1, n, n).sum(axis=1)
    return np.maximum(load - room, 0).sum()


@pytest.mark.smoke
@pytest.mark.parametrize("exchange", ["all_to_all", "ragged"])
def test_forced_overflow(exchange):
    """A buffer of one row: the values are still exact, and all that did not fit is counted."""
    args = make(T)
    result, sent = on_mesh("all", exchange=exchange, buffer_factor=1e-3)(*args)
    assert_close(result, local(T))
    over = overflow(count_sent(args[1], T, "all"), exchange, 1)
    assert sent["fallback"] == 1 and sent["overflow"] == over > 0


def test_each_shard_runs_its_own_rows():
    """The rows that a shard's experts receive, in all the assignments of their experts."""
    x, choice, weights, _ = make(T, high=3)
    mesh = compat.make_mesh(jax.devices()[:4], ("expert",), (4,))

    def count(x, weights, order, gates):
        # The number of real rows stands in every row.
        sizes = order.group_sizes
        chex.assert_shape([x, order.order, sizes], [(T, D), (T * K,), (1,)])
        real = (jnp.arange(T * K) < sizes.sum())[:, None]
        rows = jnp.where(real, sizes.sum().astype(x.dtype), 0)
        return jnp.broadcast_to(rows[order.inverse].reshape(T, K).sum(1, keepdims=True), (T, D))

    with jax.set_mesh(mesh):
        y, _ = jax.jit(lambda *a: run_sharded(mesh, *a, specs(mesh), count))(x, choice, weights)
    sizes = np.bincount(np.asarray(choice.expert_ids).ravel(), minlength=E)
    expected = np.sum(sizes[choice.expert_ids], axis=-1, keepdims=True)
    np.testing.assert_array_equal(y, np.broadcast_to(expected, (T, D)))
    assert sizes[3] == 0


@pytest.mark.fused
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_bfloat16(exchange):
    """Over the experts of 4 shards, the output and the gradient are 256 + 1 + 1 + 1, rounded once: 260 and not 256."""
    mesh = compat.make_mesh(jax.devices()[:4], ("expert",), (4,))
    choice = TokenChoice(jnp.tile(jnp.arange(4, dtype=jnp.int32), (4, 1)), jnp.ones((4, 4)))
    weights = {"w_in": jnp.asarray([256.0, 1, 1, 1]).reshape(4, 1, 1), "w_out": jnp.ones((4, 1, 1))}
    weights = jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights)
    ones = jnp.ones((4, 1), jnp.bfloat16)
    run = with_gradients(lambda *a: run_sharded(mesh, *a, specs(mesh), run_experts, exchange=exchange, buffer_factor=0.0))
    with jax.set_mesh(mesh):
        (y, (d_x, *_)), _ = run(ones, choice, weights, ones)
    chex.assert_type([y, d_x], jnp.bfloat16)
    np.testing.assert_array_equal(np.stack([y, d_x]).astype(np.float32), 260)


def test_what_would_be_sent_is_logged_once(caplog):
    with caplog.at_level("INFO", logger="moe_jax.dispatch.exchange"):
        for _ in range(2):
            exchange_room._log("ragged", 4, 1000, 3, 1000, jnp.dtype(jnp.float32), 2.0)
    text = "exchange: ragged over 4 shards; MB a layer and pass: gather 96, all_to_all 144, ragged at most 72"
    assert [record.message for record in caplog.records] == [text]


def test_bytes_sent():
    """4 shards of 10 tokens, 3 experts a token, D = 8."""
    assert bytes_sent("gather", 4, 10, 3, 8) == 12 * 10 * 8 * (4 + 4)
    assert bytes_sent("gather", 4, 10, 3, 8, jnp.bfloat16) == 12 * 10 * 8 * (2 + 4)
    assert bytes_sent("all_to_all", 4, 10, 3, 8, buffer_factor=2.0) == 2 * 12 * 15 * 8 * 4
    assert bytes_sent("all_to_all", 4, 10, 3, 8, buffer_factor=100.0) == 2 * 12 * 30 * 8 * 4
    assert bytes_sent("ragged", 4, 10, 3, 8, jnp.bfloat16, rows=7) == 2 * 7 * 8 * 2
    assert bytes_sent("ragged", 4, 10, 3, 8) == bytes_sent("ragged", 4, 10, 3, 8, rows=90)


def test_refusals():
    assert resolve_exchange() == resolve_exchange("auto") == "gather"
    with pytest.raises(ValueError, match="^exchange='ring': one of gather, all_to_all, ragged, auto$"):
        resolve_exchange("ring")
    x, choice, weights, _ = make(T)
    mesh = make_mesh("all")
    with pytest.raises(ValueError, match="^buffer_factor=-1: at least 0; use 0"):
        run_sharded(mesh, x, choice, weights, specs(mesh), run_experts, buffer_factor=-1)


def ragged_all_to_all(rows, out, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """As documented in `jax.lax.ragged_all_to_all`, by whole gathers."""
    me = jax.lax.axis_index(axis_name)
    rows, first, sizes, to = (jax.lax.all_gather(a, axis_name) for a in (rows, input_offsets, send_sizes, output_offsets))
    row = jnp.arange(out.shape[0])
    for source in range(rows.shape[0]):
        place = row - to[source, me]
        mine = (place >= 0) & (place < sizes[source, me])
        block = rows[source].at[first[source, me] + place].get(mode="fill", fill_value=0)
        out = jnp.where(mine[:, None], jnp.where(recv_sizes[source] == sizes[source, me], block, jnp.nan), out)
    return out


def test_ragged_move(monkeypatch):
    """What is emulated on a CPU, and the offsets that the collective is given elsewhere, move the same rows."""
    pairs = np.array([[2, 0, 1, 3], [0, 0, 4, 0], [1, 1, 1, 1], [5, 0, 0, 0]], np.int32)
    rows = np.random.default_rng(0).normal(size=(4, 7, D)).astype(np.float32)
    ends = np.cumsum(pairs, axis=1)
    blocks = [[rows[i, ends[i, j] - pairs[i, j] : ends[i, j]] for i in range(4)] for j in range(4)]
    expected = np.zeros((4, 9, D), np.float32)
    for j in range(4):
        expected[j, : pairs[:, j].sum()] = np.concatenate(blocks[j])
    mesh, split = compat.make_mesh(jax.devices()[:4], ("expert",), (4,)), compat.PartitionSpec("expert")

    def run():
        def shard(rows, cotangent):
            out, pull = jax.vjp(lambda rows: ragged.move(rows, jnp.asarray(pairs), 9), rows[0])
            return out[None], pull(cotangent[0])[0][None]

        with jax.set_mesh(mesh):
            return jax.jit(compat.shard_map(shard, mesh, (split, split), (split, split)))(rows, expected)

    sent = np.where(np.arange(7)[:, None] < ends[:, -1, None, None], rows, 0)
    for platform in ("cpu", "tpu"):
        monkeypatch.setattr(compat, "target_platform", lambda: platform)
        monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
        out, back = run()
        np.testing.assert_array_equal(out, expected)
        np.testing.assert_array_equal(back, sent)
