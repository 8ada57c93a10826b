"""StableMoE's router: the equations of both stages, and what stage 2 leaves as it is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config.routers import StableConfig
from moe_jax.routing.contract import Sizes, Step
from moe_jax.routing.stable import LIGHT, ROUTER, Stable, light_scores
from moe_jax.types import RouterInputs

T, D, E, V, W = 40, 6, 4, 12, 5
SIZES = Sizes(E, 1, 0, V)
OPTIONS = StableConfig(light_width=W)


def params(dtype=np.float64):
    draw = np.random.default_rng(0).normal
    shapes = {"kernel": (D, E), "light_embedding": (V, W), "light_kernel": (W, E)}
    return {name: draw(size=shape).astype(dtype) for name, shape in shapes.items()}


def example(train=True):
    """Hidden states, and inputs of which every fifth token is padding."""
    rng = np.random.default_rng(1)
    ids, valid = rng.integers(0, V, T).astype(np.int32), np.arange(T) % 5 > 0
    return rng.normal(size=(T, D)) + 0.5, RouterInputs(token_ids=ids, valid=valid, train=train)


def state(frozen=False):
    table = np.random.default_rng(2).integers(0, E, V).astype(np.int32)
    return {"frozen": np.asarray(frozen), "table": table}


def route(weights, x, inputs, frozen=False, options=OPTIONS):
    variables = {"params": weights, "router_state": state(frozen)}
    return Stable(E, V, options, param_dtype=jnp.float64).apply(variables, x, inputs)


def transcription(weights, x, inputs):
    """Equations 5 to 10 token by token, sums divided by the number of tokens: (gates, experts, balance, distillation)."""
    tokens = [t for t in range(T) if inputs.valid[t]]
    even, taken = len(tokens) / E, {}
    affinity = {t: [jnp.sum(weights["kernel"][:, e] * x[t]) for e in range(E)] for t in tokens}
    for t in tokens:
        taken[t] = int(np.argmax([float(jax.lax.stop_gradient(s)) for s in affinity[t]]))
    sigmoid = {t: 1 / (1 + jnp.exp(-affinity[t][taken[t]])) for t in tokens}
    balance = distillation = 0.0
    for e in range(E):
        members = [t for t in tokens if taken[t] == e]
        balance += (len(members) - even) / even * sum(sigmoid[t] for t in members)
    for t in tokens:
        word = weights["light_embedding"][inputs.token_ids[t]]
        scores = [jnp.sum(weights["light_kernel"][:, e] * word) for e in range(E)]
        distillation -= jnp.log(jnp.exp(scores[taken[t]]) / sum(jnp.exp(s) for s in scores))
    return sigmoid, taken, balance / len(tokens), distillation / len(tokens)


def error(a, b):
    return np.max(np.abs(np.asarray(a) - b)) / np.max(np.abs(b))


def test_stage_1_is_the_papers_equations():
    """Gates, both losses and the gradients of all three, in float64."""
    with jax.enable_x64():
        weights, (x, inputs) = params(), example()
        factors = np.random.default_rng(3).normal(size=T)

        def ours(weights, x):
            choice, losses, _ = route(weights, x, inputs)
            return jnp.stack([jnp.sum(factors[:, None] * choice.gates), losses["balance"], losses["distillation"]])

        def theirs(weights, x):
            gates, _, *losses = transcription(weights, x, inputs)
            return jnp.stack([sum(factors[t] * gate for t, gate in gates.items()), *losses])

        choice, _, stats = route(weights, x, inputs)
        taken = transcription(weights, x, inputs)[1]
        assert {t: int(choice.expert_ids[t, 0]) for t in taken} == taken
        assert np.all(np.asarray(choice.expert_ids)[~inputs.valid] == E) and stats["counts"].max() > T / E
        assert error(ours(weights, x), theirs(weights, x)) < 1e-9
        got, want = (jax.jacrev(f, argnums=(0, 1))(weights, x) for f in (ours, theirs))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            for i in range(3):  # of each term by itself
                assert np.max(np.abs(a[i] - b[i])) <= 1e-9 * max(np.max(np.abs(b[i])), 1e-3)
        d_weights, d_x = got
        for name, moved in {"kernel": (0, 1), "light_embedding": (2,), "light_kernel": (2,)}.items():
            assert [i for i in range(3) if np.any(d_weights[name][i])] == list(moved), name
        assert [i for i in range(3) if np.any(d_x[i])] == [0, 1]


def test_stage_2_reads_the_table_and_gates_by_the_affinity():
    with jax.enable_x64():
        weights, (x, inputs) = params(), example()
        for train in (True, False):
            inputs = inputs._replace(train=train)
            choice, losses, stats = route(weights, x, inputs, frozen=True)
            ids = np.where(inputs.valid, state()["table"][inputs.token_ids], E)
            np.testing.assert_array_equal(choice.expert_ids[:, 0], ids)
            affinity = np.take_along_axis(x @ weights["kernel"], np.minimum(ids, E - 1)[:, None], axis=-1)
            np.testing.assert_allclose(choice.gates[inputs.valid], 1 / (1 + np.exp(-affinity[inputs.valid])), rtol=1e-12)
            assert losses["balance"] == 0 == losses["distillation"]
            nearest = np.argmax(x @ weights["kernel"], axis=-1)
            assert 0 < stats["agreement_tokens"] == np.sum((nearest == ids) & inputs.valid) < stats["tokens"]

        def value(weights):
            choice, losses, _ = route(weights, x, inputs._replace(train=True), frozen=True)
            return jnp.sum(choice.gates) + losses["balance"] + losses["distillation"]

        gradients = jax.grad(value)(weights)
        assert np.all(np.any(gradients["kernel"] != 0, axis=0)), "the centroids learn on"
        assert not any(np.any(gradients[name]) for name in LIGHT)


def test_who_routes_in_evaluation():
    with jax.enable_x64():
        weights, (x, inputs) = params(), example(train=False)
        light = np.argmax(weights["light_embedding"] @ weights["light_kernel"], axis=-1)[inputs.token_ids]
        nearest = np.argmax(x @ weights["kernel"], axis=-1)
        assert np.any(light != nearest)
        for evaluation, want in (("light", light), ("backbone", nearest)):
            options = StableConfig(light_width=W, evaluation=evaluation)
            choice, _, stats = route(weights, x, inputs, options=options)
            np.testing.assert_array_equal(choice.expert_ids[:, 0], np.where(inputs.valid, want, E))
            assert stats["agreement_tokens"] == np.sum((light == nearest) & inputs.valid)
        choice, *_ = route(weights, x, inputs._replace(train=True))
        np.testing.assert_array_equal(choice.expert_ids[:, 0], np.where(inputs.valid, nearest, E))


@pytest.mark.parametrize("share, steps, last", [(0.1, 100, 10), (0.1, 101, 11), (0.3, 10, 3), (1e-6, 10, 1), (0.999, 10, 10)])
def test_the_switch_comes_after_the_last_step_of_stage_1(share, steps, last):
    options, weights = StableConfig(light_width=W, stage_1=share), params(np.float32)
    assert options.stage_1_steps(steps) == last
    now = {"frozen": jnp.zeros((), bool), "table": jnp.zeros(V, jnp.int32)}
    for number in range(1, steps + 1):
        now = ROUTER.update(now, Step({}, {}, weights, jnp.int32(number), steps), SIZES, options)
        assert bool(now["frozen"]) == (number >= last) and np.any(now["table"]) == (number >= last)
        assert all(bool(flag) == (number >= last) for flag in ROUTER.frozen(now).values())
    want = np.argmax(light_scores(weights["light_embedding"], weights["light_kernel"], jnp.float32), axis=-1)
    np.testing.assert_array_equal(now["table"], want)


def test_a_table_once_made_stays():
    """Whatever the number of steps becomes on resume; one that comes too late for its last step of stage 1 makes it then."""
    options, weights = StableConfig(light_width=W), params(np.float32)
    update = lambda now, number, steps: ROUTER.update(now, Step({}, {}, weights, jnp.int32(number), steps), SIZES, options)
    for steps in (10, 1000):
        after = update(jax.tree.map(jnp.asarray, state(frozen=True)), 50, steps)
        assert after["frozen"] and np.array_equal(after["table"], state()["table"])
    late = update(jax.tree.map(jnp.asarray, state()), 50, 100)
    assert late["frozen"] and not np.array_equal(late["table"], state()["table"])


def test_without_a_second_stage():
    options = StableConfig(light_width=W, stage_1=1.0)
    now = {"frozen": jnp.zeros((), bool), "table": jnp.zeros(V, jnp.int32)}
    assert ROUTER.update(now, Step({}, {}, params(), jnp.int32(10), 10), SIZES, options) is now


def test_token_ids_are_needed():
    x, inputs = example()
    with pytest.raises(ValueError, match="the router stable needs token_ids in its RouterInputs"):
        Stable(E, V).init(jax.random.key(0), x, inputs._replace(token_ids=None))
