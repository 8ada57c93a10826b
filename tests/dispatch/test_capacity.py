import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dispatch.capacity import limit_assignments, slots_per_expert
from moe_jax.types import TokenChoice

T, K, E = 18, 2, 4
limit = functools.partial(jax.jit, static_argnums=(1, 2))(limit_assignments)


def random_choice(seed, low=-1, high=E + 2):
    rng = np.random.default_rng(seed)
    ids = jnp.asarray(rng.integers(low, high, (T, K)), jnp.int32)
    return TokenChoice(ids, jnp.asarray(rng.uniform(0.1, 1, (T, K)), jnp.float32))


def slow(choice, capacity):
    """Token by token, the first choice before the second."""
    ids, gates = np.array(choice.expert_ids), np.array(choice.gates)
    used, dropped = [0] * E, 0
    for t in range(T):
        for k in range(K):
            e = ids[t, k]
            if e == E:
                gates[t, k] = 0
            elif 0 <= e < E:
                used[e] += 1
                if used[e] > capacity:
                    ids[t, k], gates[t, k] = E, 0
                    dropped += 1
    return TokenChoice(ids, gates), dropped


@pytest.mark.parametrize("capacity", [1, 3, T])
def test_against_a_loop(capacity):
    choices = [random_choice(0), random_choice(1, 0, E), random_choice(2, 3, 4), random_choice(3, E, E + 1)]
    for choice in choices:
        result, dropped = limit(choice, E, capacity)
        chex.assert_trees_all_equal_shapes_and_dtypes(result, choice)
        chex.assert_shape(dropped, ())
        chex.assert_type(dropped, jnp.int32)
        expected, count = slow(choice, capacity)
        chex.assert_trees_all_equal(result, expected)
        assert dropped == count
    assert slow(random_choice(2, 3, 4), 3)[1] == T * K - 3  # all to one: the loop does drop


def test_counts_are_int32_in_64_bits_too():
    with jax.enable_x64(True):
        result, dropped = limit_assignments(random_choice(0), E, 2)
    chex.assert_type([result.expert_ids, dropped], jnp.int32)


def test_causal():
    choice = random_choice(0)
    before, _ = limit(choice, E, 3)
    later = random_choice(9)
    for t in (0, 7, T - 2):
        changed = jax.tree.map(lambda a, b: a.at[t + 1 :].set(b[t + 1 :]), choice, later)
        after, _ = limit(changed, E, 3)
        chex.assert_trees_all_equal(*(jax.tree.map(lambda a: a[: t + 1], c) for c in (before, after)))


def test_gates_of_the_kept_have_the_gradient():
    choice = random_choice(4, 0, E)
    kept, _ = limit(choice, E, 3)

    def total(gates):
        return jnp.sum(limit(TokenChoice(choice.expert_ids, gates), E, 3)[0].gates)

    gradient = jax.grad(total)(choice.gates)
    np.testing.assert_array_equal(gradient, kept.expert_ids < E)


def test_slots():
    assert slots_per_expert(1.25, 100, 2, 8) == 32  # ceil(31.25)
    assert slots_per_expert(1.0, 64, 2, 8) == 16
    assert slots_per_expert(1.1, 100, 1, 10) == 11  # 1.1 * 100 > 110 in floating point
    assert slots_per_expert(0.01, 4, 1, 8) == 1
    assert slots_per_expert(100.0, 4, 2, 8) == 4  # an expert gets a token once
