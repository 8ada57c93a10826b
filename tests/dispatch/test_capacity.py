"""Slots against loops over the assignments. Errors are max|a-b| / max|b| of each array."""

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import compat
from moe_jax.dispatch.capacity import PRIORITIES, limit_assignments, run_slots
from moe_jax.ops.counting import slots_per_expert
from moe_jax.ops.expert_ffn import expert_ffn
from moe_jax.types import TokenChoice

T, K, E, D, F = 18, 2, 4, 6, 10
limit = functools.partial(jax.jit, static_argnums=(1, 2, 3))(limit_assignments)


def random_choice(seed, low=-1, high=E + 2, k=K):
    rng = np.random.default_rng(seed)
    ids = jnp.asarray(rng.integers(low, high, (T, k)), jnp.int32)
    # Few different gates, so that some are equal.
    return TokenChoice(ids, jnp.asarray(rng.integers(1, 9, (T, k)) / 8, jnp.float32))


def slow(choice, capacity, priority):
    """Assignment by assignment, in the order of the rule; (choice, assignments in their slots, drops)."""
    ids, gates = np.array(choice.expert_ids), np.array(choice.gates)
    columns, tokens = range(ids.shape[1]), range(T)
    if priority == "token":
        order = [(t, k) for t in tokens for k in columns]
    elif priority == "choice":
        order = [(t, k) for k in columns for t in tokens]
    elif priority == "gate":
        best_first = sorted(tokens, key=lambda t: -max(gates[t]))
        order = [(t, k) for k in columns for t in best_first]
    else:
        order = sorted(((t, k) for t in tokens for k in columns), key=lambda tk: -gates[tk])
    slots, dropped = [[] for _ in range(E)], 0
    for t, k in order:
        e = ids[t, k]
        if 0 <= e < E and len(slots[e]) < capacity:
            slots[e].append(t * ids.shape[1] + k)
        elif 0 <= e <= E:
            dropped += e < E
            ids[t, k], gates[t, k] = E, 0
    return TokenChoice(ids, gates), [row + [ids.size] * (capacity - len(row)) for row in slots], dropped


@pytest.mark.parametrize("priority", PRIORITIES)
@pytest.mark.parametrize("capacity", [1, 3, T])
def test_against_a_loop(capacity, priority):
    choices = [random_choice(0), random_choice(1, 0, E), random_choice(2, 3, 4), random_choice(3, E, E + 1)]
    for choice in choices:
        result, slots, dropped = limit(choice, E, capacity, priority)
        chex.assert_trees_all_equal_shapes_and_dtypes(result, choice)
        chex.assert_shape(dropped, ())
        chex.assert_type([*slots, dropped], jnp.int32)
        expected, assignments, count = slow(choice, capacity, priority)
        chex.assert_trees_all_equal(result, expected)
        np.testing.assert_array_equal(slots.assignment, assignments)
        assert dropped == count
        # The other direction: each kept assignment knows its slot.
        flat, slot = np.asarray(slots.assignment).ravel(), np.full(T * K + 1, E * capacity)
        slot[flat] = np.arange(E * capacity)
        np.testing.assert_array_equal(np.ravel(slots.slot), np.where(np.isin(range(T * K), flat), slot[:-1], E * capacity))
    assert slow(random_choice(2, 3, 4), 3, priority)[2] == T * K - 3  # all to one: the loop does drop


@pytest.mark.parametrize("priority", PRIORITIES)
@pytest.mark.parametrize("k", [1, 3])
def test_other_numbers_of_choices(k, priority):
    choice = random_choice(7, 0, E, k)
    result, slots, dropped = limit(choice, E, 3, priority)
    expected, assignments, count = slow(choice, 3, priority)
    chex.assert_trees_all_equal(result, expected)
    np.testing.assert_array_equal(slots.assignment, assignments)
    assert dropped == count > 0


def test_batch_priority_by_hand():
    """One expert with 2 slots: token 2 has the highest gate, then 0. Of "probs" 0.4 is third, but a second choice here."""
    ids = jnp.asarray([[0, 1], [0, 1], [1, 0]], jnp.int32)
    choice = TokenChoice(ids, jnp.asarray([[0.5, 0.1], [0.3, 0.1], [0.6, 0.4]]))
    kept = {rule: np.asarray(limit_assignments(choice, 2, 2, rule)[0].expert_ids).tolist() for rule in ("gate", "probs")}
    assert kept == {"gate": [[0, 1], [0, 2], [1, 2]], "probs": [[0, 1], [2, 2], [1, 0]]}


def test_the_rules_differ():
    kept = [np.asarray(limit(random_choice(1, 0, E), E, 4, rule)[0].expert_ids) < E for rule in PRIORITIES]
    assert not any(np.array_equal(a, b) for i, a in enumerate(kept) for b in kept[:i])


def test_indices_are_int32_in_64_bits_too():
    with jax.enable_x64(True):
        result, slots, dropped = limit_assignments(random_choice(0), E, 2, "choice")
    chex.assert_type([result.expert_ids, *slots, dropped], jnp.int32)


@pytest.mark.parametrize("priority", PRIORITIES)
def test_causal(priority):
    """Whether a change of later tokens can change what an earlier token gets: never by "token", else it does."""
    choice, later, changes = random_choice(1, 0, E), random_choice(9, 0, E), 0
    before, _, _ = limit(choice, E, 3, priority)
    for t in (2, 7, T - 2):
        changed = jax.tree.map(lambda a, b: a.at[t + 1 :].set(b[t + 1 :]), choice, later)
        after, _, _ = limit(changed, E, 3, priority)
        changes += np.any(before.expert_ids[: t + 1] != after.expert_ids[: t + 1])
    assert (changes == 0) == (priority == "token")


def make_inputs(activation, use_bias, norm=()):
    rng = np.random.default_rng(5)
    draw = lambda *shape: (rng.normal(size=shape) / shape[-2] ** 0.5).astype(np.float32)
    weights = {"w_in": draw(E, D, F), "w_out": draw(E, F, D)}
    if activation == "swiglu":
        weights["w_gate"] = draw(E, D, F)
    if use_bias:
        weights |= {"b" + name[1:]: draw(E, w.shape[-1]) for name, w in weights.items()}
    weights |= {f"norm_{name}": draw(E, D) for name in norm}
    return draw(T, D), weights, draw(T, D)


def with_gradients(run, d_y):
    def both(choice, x, gates, weights):
        y, pull = jax.vjp(lambda *args: run(choice, *args), x, gates, weights)
        return y, pull(d_y.astype(y.dtype))

    return both


def slow_experts(kept, x, gates, weights, activation):
    """Every expert on every token, times its gate or 0."""
    y = jnp.zeros(x.shape, x.dtype)
    for e in range(E):
        one = {name: w[e : e + 1] for name, w in weights.items()}
        rows = expert_ffn(x, one, jnp.array([T]), activation=activation, backend="loop")
        y += jnp.sum(jnp.where(kept.expert_ids == e, gates, 0), axis=1)[:, None] * rows
    return y


def run(choice, x, gates, weights, capacity, priority, activation):
    kept, slots, _ = limit_assignments(TokenChoice(choice.expert_ids, gates), E, capacity, priority)
    return run_slots(x, kept.gates, slots, [weights], activation=activation)


CASES = [
    ("token", "swiglu", True, 3, ()),
    ("choice", "relu", False, 1, ("scale",)),
    ("gate", "gelu_tanh", True, T, ("scale", "bias")),
]


@pytest.mark.smoke
@pytest.mark.parametrize("priority, activation, use_bias, capacity, norm", CASES)
def test_values_and_gradients(priority, activation, use_bias, capacity, norm):
    """Uneven, all to one, nobody routed; NaN in a row that is routed nowhere."""
    options = dict(capacity=capacity, priority=priority, activation=activation)
    x, weights, d_y = make_inputs(activation, use_bias, norm)
    ours = jax.jit(with_gradients(functools.partial(run, **options), d_y))
    reference = jax.jit(with_gradients(functools.partial(slow_experts, activation=activation), d_y))
    for seed, low, high in ((0, -1, E + 2), (2, 3, 4), (3, E, E + 1)):
        choice = random_choice(seed, low, high)
        choice = TokenChoice(choice.expert_ids.at[4].set(E), choice.gates)
        result = ours(choice, x, choice.gates, weights)
        with jax.enable_x64(True):
            args = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (x, choice.gates, weights))
            expected = jax.device_get(reference(slow(choice, capacity, priority)[0], *args))
        for a, b in zip(jax.tree.leaves(jax.device_get(result)), jax.tree.leaves(expected)):
            assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()
        spoilt = ours(choice, np.where(np.arange(T)[:, None] == 4, np.nan, x), choice.gates, weights)
        chex.assert_trees_all_equal(spoilt, result)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(result))


@pytest.mark.parametrize("priority", PRIORITIES)
def test_no_large_arrays_and_no_scatters(priority):
    """Not in the gradient either: nothing has the size of T*E*C, activations never go through a scatter."""
    x, weights, d_y = make_inputs("relu", True)
    choice, capacity = random_choice(0), slots_per_expert(2.0, T, K, E)
    f = with_gradients(functools.partial(run, capacity=capacity, priority=priority, activation="relu"), d_y)
    text = str(jax.make_jaxpr(f)(choice, x, choice.gates, weights))
    sizes = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"[a-z]\d+\[([\d,]+)\]", text)]
    assert max(sizes) == E * capacity * F < T * E * capacity
    assert "scatter" not in text and " gather[" in text


def test_inside_a_shard_map():
    """Two shards with tokens of their own and the same weights: the gradients of both."""
    x, weights, d_y = make_inputs("relu", True)
    choice = random_choice(0)
    mesh = compat.make_mesh(jax.devices()[:2], ("data",), (2,))
    split, whole = compat.PartitionSpec("data"), compat.PartitionSpec()

    def shard(choice, x, gates, weights):
        return run(choice, x, gates, weights, 2, "gate", "relu")

    mapped = with_gradients(compat.shard_map(shard, mesh, (split, split, split, whole), split), d_y)
    result = jax.jit(mapped)(choice, x, choice.gates, weights)

    def halves(choice, x, gates, weights):
        half = lambda i: jax.tree.map(lambda a: a[i * T // 2 : (i + 1) * T // 2], (choice, x, gates))
        return jnp.concatenate([shard(*half(i), weights) for i in range(2)])

    expected = jax.jit(with_gradients(halves, d_y))(choice, x, choice.gates, weights)
    chex.assert_trees_all_close(jax.device_get(result), jax.device_get(expected), atol=1e-5)


@pytest.mark.fused
def test_bfloat16():
    """The sum over a token's experts, over its copies in the gradient, and of a bias's gradient: in float32."""
    ids = jnp.asarray([[0, 1, 2, 3]], jnp.int32)
    kept, slots, _ = limit(TokenChoice(ids, jnp.ones((1, 4))), 4, 1)
    weights = {"w_in": jnp.asarray([256.0, 1, 1, 1]).reshape(4, 1, 1), "w_out": jnp.ones((4, 1, 1))}
    f = lambda x: run_slots(x, kept.gates, slots, [weights], activation="relu")
    one = jnp.ones((1, 1), jnp.bfloat16)
    y, (d_x,) = jax.jit(lambda x: (f(x), jax.vjp(f, x)[1](one)))(one)
    chex.assert_type([y, d_x], jnp.bfloat16)
    assert y[0, 0] == d_x[0, 0] == 260  # 256 + 1 + 1 + 1, rounded once

    many = TokenChoice(jnp.zeros((300, 1), jnp.int32), jnp.ones((300, 1)))
    kept, slots, _ = limit(many, 1, 300)
    weights = {"w_in": jnp.ones((1, 1, 1)), "w_out": jnp.ones((1, 1, 1)), "b_out": jnp.zeros((1, 1))}

    def total(weights):
        return jnp.sum(run_slots(jnp.ones((300, 1), jnp.bfloat16), kept.gates, slots, [weights], activation="relu"))

    assert jax.jit(jax.grad(total))(weights)["b_out"] == 300


@pytest.mark.parametrize("gate_sum", [1.0, 2.5])
def test_renormalised_after_dropping(gate_sum):
    """Value and gradient against a loop over tokens; tokens that keep nothing, and that never had anything."""
    choice = random_choice(4, 0, E, 3)
    choice = choice._replace(expert_ids=choice.expert_ids.at[3].set(E))
    gates = gate_sum * choice.gates / choice.gates.sum(1, keepdims=True)
    weights = jnp.asarray(np.random.default_rng(0).normal(size=gates.shape), jnp.float32)
    stays = np.asarray(limit(choice._replace(gates=gates), E, 4, "token")[0].expert_ids) < E
    lost = stays.sum(1)
    assert set(lost) == {0, 1, 2, 3}

    def ours(gates):
        return jnp.sum(weights * limit_assignments(choice._replace(gates=gates), E, 4, "token", True)[0].gates)

    def slow_sum(gates):
        total = 0.0
        for t in range(T):
            own = [k for k in range(3) if stays[t, k]]
            for k in own:
                total += weights[t, k] * gates[t, k] * sum(gates[t]) / sum(gates[t, j] for j in own)
        return total

    value, gradient = jax.jit(jax.value_and_grad(ours))(gates)
    expected, slow_gradient = jax.value_and_grad(slow_sum)(gates)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, slow_gradient, atol=2e-6)
    kept = limit_assignments(choice._replace(gates=gates), E, 4, "token", True)[0].gates
    np.testing.assert_allclose(kept.sum(1), np.where(lost > 0, gate_sum, 0), rtol=1e-6)
    np.testing.assert_array_equal(kept[lost == 3], gates[lost == 3])  # where nothing was dropped, not a bit is


def test_gates_of_the_kept_have_the_gradient():
    choice = random_choice(4, 0, E)
    kept, _, _ = limit(choice, E, 3, "gate")

    def total(gates):
        return jnp.sum(limit(TokenChoice(choice.expert_ids, gates), E, 3, "gate")[0].gates)

    gradient = jax.grad(total)(choice.gates)
    np.testing.assert_array_equal(gradient, kept.expert_ids < E)


@pytest.mark.parametrize("priority", PRIORITIES)
def test_padding_takes_no_slot(priority):
    """Tokens that are routed nowhere leave the others' slots as they are without them."""
    choice, padding = random_choice(1, 0, E), np.arange(T) % 3 == 1
    padded = TokenChoice(jnp.where(padding[:, None], E, choice.expert_ids), choice.gates)
    kept, slots, dropped = limit(padded, E, 3, priority)
    alone, others, count = limit(jax.tree.map(lambda a: a[~padding], choice), E, 3, priority)
    chex.assert_trees_all_equal(jax.tree.map(lambda a: a[~padding], kept), alone)
    tokens = lambda a, real: np.where(np.asarray(a) < real.size * K, np.append(real, T)[np.asarray(a) // K], T)
    np.testing.assert_array_equal(tokens(slots.assignment, np.arange(T)), tokens(others.assignment, np.arange(T)[~padding]))
    assert dropped == count > 0
    assert not np.any(kept.gates[padding])


def test_slots():
    assert slots_per_expert(1.25, 100, 2, 8) == 32  # ceil(31.25)
    assert slots_per_expert(1.0, 64, 2, 8) == 16
    assert slots_per_expert(1.1, 100, 1, 10) == 11  # 1.1 * 100 > 110 in floating point
    assert slots_per_expert(0.01, 4, 1, 8) == 1
    assert slots_per_expert(100.0, 4, 2, 8) == 4  # an expert gets a token once


def test_refuses_an_unknown_priority():
    with pytest.raises(ValueError, match="^capacity_priority='random': one of token, choice, gate, probs$"):
        limit_assignments(random_choice(0), E, 3, "random")
