"""StableMoE's router: the equations of both stages, and what stage 2 leaves as it is."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import Config, ConfigError, MoEConfig
from moe_jax.config.routers import StableConfig
from moe_jax.config.validate import validate
from moe_jax.ops.hash_table import balanced_hash_table
from moe_jax.routing.contract import Sizes, Step
from moe_jax.routing.stable import BACKBONES, LIGHT, ROUTER, WINDOW, Affinity, Stable, light_scores
from moe_jax.types import RouterInputs

T, D, E, V, W = 40, 6, 4, 12, 5
SIZES = Sizes(E, 1, 0, V)
OPTIONS = StableConfig(light_width=W)


def params(dtype=np.float64):
    draw = lambda *shape: rng.normal(size=shape).astype(dtype)
    rng = np.random.default_rng(0)
    return {"backbone": {"kernel": draw(D, E)}, "light_embedding": draw(V, W), "light_kernel": draw(W, E)}


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
    return Stable(E, V, Affinity(E), options=options).apply(variables, x, inputs)


def transcription(weights, x, inputs):
    """Equations 5 to 10 token by token, sums divided by the number of tokens: (gates, experts, balance, distillation)."""
    tokens = [t for t in range(T) if inputs.valid[t]]
    even, taken = len(tokens) / E, {}
    affinity = {t: [jnp.sum(weights["backbone"]["kernel"][:, e] * x[t]) for e in range(E)] for t in tokens}
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
        d_weights |= d_weights.pop("backbone")
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
            affinity = np.take_along_axis(x @ weights["backbone"]["kernel"], np.minimum(ids, E - 1)[:, None], axis=-1)
            np.testing.assert_allclose(choice.gates[inputs.valid], 1 / (1 + np.exp(-affinity[inputs.valid])), rtol=1e-12)
            assert losses["balance"] == 0 == losses["distillation"]
            nearest = np.argmax(x @ weights["backbone"]["kernel"], axis=-1)
            assert 0 < stats["agreement_tokens"] == np.sum((nearest == ids) & inputs.valid) < stats["tokens"]

        def value(weights):
            choice, losses, _ = route(weights, x, inputs._replace(train=True), frozen=True)
            return jnp.sum(choice.gates) + losses["balance"] + losses["distillation"]

        gradients = jax.grad(value)(weights)
        assert np.all(np.any(gradients["backbone"]["kernel"] != 0, axis=0)), "the centroids learn on"
        assert not any(np.any(gradients[name]) for name in LIGHT)


def test_who_routes_in_evaluation():
    with jax.enable_x64():
        weights, (x, inputs) = params(), example(train=False)
        light = np.argmax(weights["light_embedding"] @ weights["light_kernel"], axis=-1)[inputs.token_ids]
        nearest = np.argmax(x @ weights["backbone"]["kernel"], axis=-1)
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
        Stable(E, V, Affinity(E)).init(jax.random.key(0), x, inputs._replace(token_ids=None))


def window_inputs(train=True):
    """Those of `example`, with the two ids before each token; the first five tokens are of a document of their own."""
    x, inputs = example(train)
    earlier = np.full((T, 2), -1, np.int32)
    for t in range(T):
        for distance in (1, 2):
            if t - distance >= (0 if t < 5 else 5):
                earlier[t, distance - 1] = inputs.token_ids[t - distance]
    return x, inputs._replace(earlier_ids=earlier)


WINDOW_OPTIONS = StableConfig(light_width=W, light_router="window", light_window=3)


def with_window(frozen=False):
    weights = params() | {WINDOW: np.array([0.7, -1.1, 0.4])}
    return {"params": weights, "router_state": {"frozen": np.asarray(frozen)}}


def test_the_window_reads_its_own_document():
    """Scores, choices and gradients of the light router with a window, in both stages; it has no table."""
    with jax.enable_x64():
        (x, inputs), variables = window_inputs(), with_window()
        module = Stable(E, V, Affinity(E), options=WINDOW_OPTIONS)
        assert set(jax.eval_shape(lambda: module.init(jax.random.key(0), x, inputs))["router_state"]) == {"frozen"}

        def theirs(weights):
            total = 0.0
            nearest = np.argmax(x @ weights["backbone"]["kernel"], axis=-1)
            for t in (t for t in range(T) if inputs.valid[t]):
                word = weights[WINDOW][0] * weights["light_embedding"][inputs.token_ids[t]]
                for i, earlier in enumerate(inputs.earlier_ids[t]):
                    word += weights[WINDOW][i + 1] * weights["light_embedding"][earlier] if earlier >= 0 else 0
                total -= jax.nn.log_softmax(word @ weights["light_kernel"])[nearest[t]]
            return total / np.sum(inputs.valid)

        ours = lambda weights: module.apply(variables | {"params": weights}, x, inputs)[1]["distillation"]
        for a, b in zip(*(jax.tree.leaves(jax.value_and_grad(f)(variables["params"])) for f in (ours, theirs)), strict=True):
            assert np.max(np.abs(a - b)) <= 1e-12 * max(np.max(np.abs(b)), 1e-3)
        frozen = module.apply(with_window(True), x, inputs)
        evaluated = module.apply(variables, x, inputs._replace(train=False))
        np.testing.assert_array_equal(frozen[0].expert_ids, evaluated[0].expert_ids)
        assert frozen[1] == {"balance": 0, "distillation": 0} and set(ROUTER.frozen(with_window()["router_state"])) == {
            *LIGHT,
            WINDOW,
        }
        with pytest.raises(ValueError, match="needs the 2 earlier_ids of each token in its RouterInputs"):
            module.apply(variables, x, inputs._replace(earlier_ids=None))


@pytest.mark.parametrize("backbone, k", [("base", 1), ("switch", 1), ("top_k", 2)])
def test_other_backbones(backbone, k):
    """Their own routing in stage 1, the table's in stage 2 with the gates that they give to its experts.

    What is distilled is what they choose in evaluation.
    """
    with jax.enable_x64():
        moe = MoEConfig(experts=E, top_k=k, router="stable")
        moe.routers.stable.backbone, moe.routers.stable.light_width = backbone, W
        moe.routers.top_k.z_loss, moe.routers.switch.balance_loss = 0.5, 0.25
        sizes, options = Sizes(E, k, 0, V), moe.options
        router, own = ROUTER.build(sizes, options), BACKBONES[backbone].build(sizes, options.of_backbone)
        x, inputs = example()
        variables = jax.tree.map(np.asarray, nn.unbox(router.init(jax.random.key(0), x, inputs)))
        variables["params"] |= {name: value for name, value in params().items() if name != "backbone"}
        state = variables["router_state"]
        of_own = {name: tree["backbone"] for name, tree in variables.items() if "backbone" in tree}
        theirs, losses, stats = own.apply(of_own, x, inputs)
        choice, own_losses, own_stats = router.apply(variables, x, inputs)
        jax.tree.map(np.testing.assert_array_equal, choice, theirs)
        assert {name: own_losses[name] for name in losses} == losses and {*own_losses} == {*losses, "distillation"}
        weights = ROUTER.loss_weights(options)
        assert (
            set(weights) == set(own_losses)
            and weights.get("z", 0.5) in (0.5, 0)
            and weights.get("balance", 0.25) in (0.25, 0.01)
        )
        np.testing.assert_array_equal(own_stats["counts"], stats["counts"])

        greedy = own.apply(of_own, x, inputs._replace(train=False))[0]
        scores = jax.nn.log_softmax(params()["light_embedding"][inputs.token_ids] @ params()["light_kernel"], axis=-1)
        nats = -np.mean(np.take_along_axis(scores, np.minimum(greedy.expert_ids, E - 1), axis=1)[inputs.valid])
        np.testing.assert_allclose(own_losses["distillation"], nats, rtol=1e-12)

        after = ROUTER.update(state, Step(stats, stats, variables["params"], jnp.int32(5), 10), sizes, options)
        table = np.argsort(-(params()["light_embedding"] @ params()["light_kernel"]), axis=1)[:, :k]
        assert after["frozen"] and np.array_equal(np.reshape(after["table"], (V, k)), table)
        if backbone == "top_k":
            assert np.any(after["backbone"]["load"] != state["backbone"]["load"])

        frozen = variables | {"router_state": after}
        choice, none, _ = router.apply(frozen, x, inputs)
        ids = np.asarray(choice.expert_ids)
        np.testing.assert_array_equal(ids[inputs.valid], table[inputs.token_ids][inputs.valid])
        assert np.all(ids[~inputs.valid] == E) and not any(np.asarray(loss) for loss in none.values())
        logits = x @ variables["params"]["backbone"]["kernel"]
        if backbone == "base":
            gates = 1 / (1 + np.exp(-logits))
        else:
            gates = np.exp(logits) / np.sum(np.exp(logits), axis=1, keepdims=True)
        gates = np.take_along_axis(gates, np.minimum(ids, E - 1), axis=1)
        gates = gates / np.sum(gates, axis=1, keepdims=True) if k > 1 else gates
        np.testing.assert_allclose(choice.gates[inputs.valid], gates[inputs.valid], rtol=1e-10)
        light = ROUTER.frozen(after)
        assert set(light) == set(LIGHT) and all(light.values())


def test_a_balanced_table_instead_of_a_light_router():
    """From the first step on, with the live gate; no loss, nothing frozen, the table of Hash layers."""
    options = StableConfig(light_router="balanced")
    assert ROUTER.loss_weights(options) == {"balance": 0.3}
    with jax.enable_x64():
        router, (x, inputs) = ROUTER.build(SIZES, options), example()
        variables = nn.unbox(router.init(jax.random.key(0), x, inputs))
        assert set(variables["params"]) == {"backbone"} and set(variables["router_state"]) == {"table"}
        shares = np.random.default_rng(4).dirichlet(np.ones(V))
        state = ROUTER.start(variables["router_state"], lambda: shares, SIZES, options)
        np.testing.assert_array_equal(state["table"], balanced_hash_table(np.rint(shares * 2**40), E, 0))
        assert ROUTER.frozen(state) == {}
        assert ROUTER.update(state, Step({}, {}, variables["params"], jnp.int32(5), 10), SIZES, options) is state
        kernel = variables["params"]["backbone"]["kernel"]
        for train in (True, False):
            choice, losses, _ = router.apply(variables | {"router_state": state}, x, inputs._replace(train=train))
            ids = np.where(inputs.valid, state["table"][inputs.token_ids], E)
            np.testing.assert_array_equal(choice.expert_ids[:, 0], ids)
            affinity = np.take_along_axis(np.asarray(x @ kernel), np.minimum(ids, E - 1)[:, None], axis=-1)
            np.testing.assert_allclose(choice.gates[inputs.valid], 1 / (1 + np.exp(-affinity[inputs.valid])), rtol=1e-12)
            assert losses == {"balance": 0}


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("stage_1", 1.5, r"config.model.moe.routers.stable.stage_1=1.5: at most 1; lower it to 1 or less"),
        (
            "backbone",
            "expert_choice",
            r"config.model.moe.routers.stable.backbone=expert_choice: not a choice; choose affinity or base or",
        ),
        ("light_window", 1, r"config.model.moe.routers.stable.light_window=1: at least 2"),
    ],
)
def test_bad_settings(field, value, message):
    """A stage 1 of more steps than there are; a backbone in which tokens do not choose; a window of the token alone."""
    config = Config()
    config.model.moe.router, config.model.moe.top_k = "stable", 1
    setattr(config.model.moe.routers.stable, field, value)
    with pytest.raises(ConfigError, match=message) as refused:
        validate(config)
    assert "\n" not in str(refused.value)


def test_the_options_of_a_backbone_are_checked():
    config = Config()
    config.model.moe.router, config.model.moe.top_k = "stable", 1
    config.model.moe.routers.stable.backbone = "base"
    config.model.moe.routers.base.groups = 7
    with pytest.raises(ConfigError, match="model.moe.routers.base.groups=7: does not divide the"):
        validate(config)
    config.model.moe.routers.base.groups, config.model.moe.top_k = 1, 2
    with pytest.raises(ConfigError, match="config.model.moe.top_k=2: model.moe.router=stable knows 1 only"):
        validate(config)
    config.model.moe.routers.stable.backbone = "top_k"
    validate(config)
