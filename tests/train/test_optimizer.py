import re

import chex
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.config import ConfigError, ParameterGroup
from moe_jax.models.decoder import Decoder
from moe_jax.ops.row_gradient import sort_rows
from moe_jax.train.optimizer import check_groups, group_factors, learning_rate, make_optimizer, stable_steps
from moe_jax.train.row_update import init_rows, row_gradient, update_rows
from tests.models.small import boxed_shapes
from tests.train.small import Runner, make_batch, make_config


@pytest.mark.parametrize("schedule, middle", [("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)])
def test_schedule(schedule, middle):
    config = make_config(
        train__steps=110,
        optimizer__warmup_steps=10,
        optimizer__schedule=schedule,
        optimizer__learning_rate=1.0,
    )
    rate = [float(learning_rate(config.optimizer, config.train, jnp.asarray(step))) for step in range(110)]
    np.testing.assert_allclose(rate[:10], np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(rate[60], middle, rtol=1e-6)
    assert all(a >= b for a, b in zip(rate[10:], rate[11:]))
    last = {"cosine": 0.1, "linear": 0.1, "constant": 1.0}[schedule]
    np.testing.assert_allclose(rate[-1], last, atol=0.02)


def test_wsd():
    """Warm-up, then exactly the peak, then a line that would reach its end one step after the last."""
    config = make_config(
        train__steps=100,
        optimizer__warmup_steps=10,
        optimizer__schedule="wsd",
        optimizer__learning_rate=0.3,
        optimizer__final_fraction=0.25,
        optimizer__decay_fraction=0.4,
    )

    def rates(steps=100):
        return np.asarray(learning_rate(config.optimizer, config.train, jnp.arange(steps)))

    found, peak = rates(), np.float32(0.3)
    np.testing.assert_allclose(found[:10], 0.03 * np.arange(1, 11), rtol=1e-6)
    assert (found[10:60] == peak).all() and stable_steps(config.optimizer, config.train) == 60
    np.testing.assert_allclose(found[60:], 0.3 * (1 - 0.75 * np.arange(40) / 40), rtol=1e-5)
    assert found[61] < peak
    np.testing.assert_allclose(rates(102)[100:], 0.075, rtol=1e-5)
    # A decay of all steps begins after the warm-up, and one of none is none.
    config.optimizer.decay_fraction = 1.0
    np.testing.assert_allclose(rates()[[10, 55]], [0.3, 0.3 * (1 - 0.75 / 2)], rtol=1e-5)
    config.optimizer.decay_fraction = 0.0
    assert (rates()[10:] == peak).all()


def test_a_short_run_warms_up_as_long_as_it_lasts():
    """And with more steps, as after a resume, as long as the config says."""
    config = make_config(optimizer__warmup_steps=40, optimizer__learning_rate=1.0)
    rates = {}
    for steps in (30, 1000):
        config.train.steps = steps
        rates[steps] = [float(learning_rate(config.optimizer, config.train, jnp.asarray(step))) for step in range(60)]
    np.testing.assert_allclose(rates[30][:30], np.arange(1, 31) / 30, rtol=1e-6)
    np.testing.assert_allclose(rates[1000][:40], np.arange(1, 41) / 40, rtol=1e-6)
    assert rates[1000][40] == 1.0 and rates[1000][59] < 1.0


TINY = ("clip_norm", "epsilon", "learning_rate", "weight_decay", "ema_decay", "final_fraction")


@pytest.mark.parametrize("name, row_optimizer", [(None, "adam"), (None, "adagrad"), *((name, "adam") for name in TINY)])
def test_no_setting_is_too_small(name, row_optimizer):
    """Below the smallest float32, or 0 where that is allowed: a parameter without a gradient stays, the others are finite."""
    value = {} if name is None else {f"optimizer__{name}": 1e-40}
    config = make_config(**{"optimizer__epsilon": 0.0} | value).optimizer
    config.row_optimizer = row_optimizer
    table, params = jnp.ones((3, 2)), {"used": jnp.ones(3), "unused": jnp.ones(3)}
    optimizer, rate = make_optimizer(config), learning_rate(config, make_config().train, jnp.asarray(3))
    state, rows = optimizer.init(params), init_rows(config, table)
    for size in (1.0, 1e-25, 1e-40):
        gradient = {"used": jnp.full(3, size), "unused": jnp.zeros(3)}
        updates, state = optimizer.update(gradient, state, params)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
        by_row = row_gradient(table, jnp.asarray([0, 1]), jnp.asarray([[size, size], [0.0, 0.0]]))
        table, rows = update_rows(config, "embed", table, rows, sort_rows(by_row, 3), rate)
        chex.assert_tree_all_finite((params, table, state, rows))
    np.testing.assert_array_equal(table[1:], 1.0)


def test_a_tiny_clip_norm_takes_tiny_steps():
    runner = Runner(make_config(optimizer__clip_norm=1e-40, optimizer__epsilon=1e-40, optimizer__weight_decay=0.0))
    losses = runner.losses(3)
    assert np.isfinite(losses).all() and runner.state["skipped"] == 0
    chex.assert_tree_all_finite(jax.device_get(runner.state))


def test_equals_optax_adamw():
    config = make_config().optimizer
    ffn = {"w_in": jnp.ones((3, 2)), "b_in": jnp.ones(2), "norm_scale": jnp.ones((3, 2))}
    params = {"ffn": ffn, "norm": {"scale": jnp.ones(2)}}
    decayed = {"ffn": {"w_in": True, "b_in": False, "norm_scale": False}, "norm": {"scale": False}}
    reference = optax.adamw(0.1, config.b1, config.b2, config.epsilon, weight_decay=config.weight_decay, mask=decayed)
    ours = make_optimizer(config)
    theirs, mine = (params, reference.init(params)), (params, ours.init(params))
    for i in range(3):
        gradient = jax.tree.map(lambda a: jnp.cos(a * (i + 1)), params)
        updates, state = reference.update(gradient, theirs[1], theirs[0])
        theirs = optax.apply_updates(theirs[0], updates), state
        updates, state = ours.update(gradient, mine[1], mine[0])
        mine = jax.tree.map(lambda p, u: p - 0.1 * u, mine[0], updates), state
    chex.assert_trees_all_close(mine[0], theirs[0], rtol=1e-6)


def test_groups_first_match_counts():
    groups = (ParameterGroup("experts", 0.25), ParameterGroup("stack", 0.5, 0.3))
    params = {"embed": {"embedding": 1.0}, "stack": {"experts": {"w_in": 1.0}, "router": {"kernel": 1.0}}}
    scales, decays = group_factors(make_config(optimizer__groups=groups).optimizer, params)
    assert scales == {"embed": {"embedding": 1.0}, "stack": {"experts": {"w_in": 0.25}, "router": {"kernel": 0.5}}}
    assert decays == {"embed": {"embedding": 0.1}, "stack": {"experts": {"w_in": 0.1}, "router": {"kernel": 0.3}}}


@pytest.mark.parametrize("shared", [False, True])
def test_groups_of_a_layer_that_retrieves(shared):
    """Pool, keys and query network by a path each; the keys may be without decay, the pool is."""
    peer = {"experts": 16, "heads": 2, "top_k": 2, "key_width": 4, "share_pool": shared}
    config = make_config(model__pattern="peer", **{f"model__peer__{name}": value for name, value in peer.items()})
    pool = "pool/experts$" if shared else "peer/experts$"
    config.optimizer.groups = (
        ParameterGroup(pool, 3.0),
        ParameterGroup("peer/router/keys$", 0.3, 0.0),
        ParameterGroup("peer/router/kernel$", 0.5),
    )
    params = nn.unbox(boxed_shapes(Decoder(config.model, 23)))["params"]
    check_groups(config.optimizer, params)
    found = flax.traverse_util.flatten_dict(jax.tree.map(lambda *a: a, *group_factors(config.optimizer, params)), sep="/")
    found = {path.split("/")[-1]: value for path, value in found.items() if re.search("/(peer|pool)/", path)}
    usual = {"scale": (1.0, 0.0), "bias": (1.0, 0.0)}
    assert found == usual | {"experts": (3.0, 0.0), "keys": (0.3, 0.0), "kernel": (0.5, 0.1)}


def test_a_group_without_effect_is_refused():
    params = {"embed": {"embedding": 1.0}, "stack": {"router": 1.0, "w_in": 1.0}}

    def check(*paths):
        groups = tuple(ParameterGroup(path) for path in paths)
        check_groups(make_config(optimizer__groups=groups).optimizer, params)

    check()
    check("router", "stack", "embed")
    near = {"embedd_typo": "embed/embedding", "stak/w_inn": "stack/w_in", "ruoter": "stack/router", "^w_in$": "stack/w_in"}
    for path, nearest in near.items():
        with pytest.raises(
            ConfigError, match=rf"groups\[1\].path={re.escape(path)}: matches no parameter; did you mean {nearest}\?$"
        ):
            check("embed", path)
    with pytest.raises(ConfigError, match=r"groups\[1\].path=router: all that it matches is in a group before"):
        check("stack", "router")


def test_ema_follows_the_parameters():
    runner = Runner(make_config(optimizer__ema_decay=0.75))
    before = jax.device_get(runner.state["params"])
    runner.step(make_batch(0))
    expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, before, jax.device_get(runner.state["params"]))
    chex.assert_trees_all_close(jax.device_get(runner.state["ema"]), expected, rtol=1e-5, atol=1e-7)
