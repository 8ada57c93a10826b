import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config.model import ModelConfig
from moe_jax.config.moe import MoEConfig
from moe_jax.config.routers import HashConfig
from moe_jax.routing.contract import Sizes
from moe_jax.routing.hash import Hash, start
from moe_jax.train.router_state import start_router_state
from moe_jax.types import RouterInputs

E, VOCABULARY = 4, 50


def test_the_expert_is_that_of_the_token_id():
    table = np.random.default_rng(0).integers(0, E, VOCABULARY).astype(np.int32)
    ids = np.arange(VOCABULARY, dtype=np.int32)[::-1]
    variables = {"router_state": {"table": jnp.asarray(table)}}
    inputs = RouterInputs(token_ids=jnp.asarray(ids))
    choice, losses, stats = Hash(E, VOCABULARY).apply(variables, jnp.ones((VOCABULARY, 3)), inputs)
    np.testing.assert_array_equal(choice.expert_ids[:, 0], table[ids])
    np.testing.assert_array_equal(choice.gates, 1)
    assert losses == {} and stats["entropy_sum"] == 0
    with pytest.raises(ValueError, match="token_ids"):
        Hash(E, VOCABULARY).apply(variables, jnp.ones((3, 3)), RouterInputs())


def test_start_balances_over_the_text():
    shares = 1 / np.arange(1, VOCABULARY + 1)
    shares[5] = 0
    shares /= shares.sum()
    sizes = Sizes(E, 1, 0, VOCABULARY)
    random = {"table": np.random.default_rng(0).integers(0, E, VOCABULARY).astype(np.int32)}
    assert start(random, None, sizes, HashConfig(table="random")) is random
    load = lambda table: np.bincount(table, weights=shares, minlength=E).max() * E
    assert load(start(random, lambda: shares, sizes, HashConfig())["table"]) < 1.05 < load(random["table"])


def test_start_of_stacked_and_single_layers():
    """Each layer keeps its shape, and only a router that asks has the text counted."""
    table = jnp.zeros((2, VOCABULARY), jnp.int32)
    layer = lambda table: {"moe": {"router": {"table": table}}}
    state = {"stack": {"groups": {"block_1": layer(table)}, "first": layer(table[0])}}
    shares = np.full(VOCABULARY, 1 / VOCABULARY)
    config = ModelConfig(inserts="first=routed@0", moe=MoEConfig(experts=E, top_k=1, router="hash"))
    new = start_router_state(state, lambda: shares, config, VOCABULARY)["stack"]
    stacked, single = (new["groups"]["block_1"], new["first"])
    np.testing.assert_array_equal(stacked["moe"]["router"]["table"][0], single["moe"]["router"]["table"])
    counts = np.bincount(np.asarray(single["moe"]["router"]["table"]), minlength=E)
    assert counts.max() - counts.min() <= 1
    assert start_router_state(state, None, ModelConfig(inserts="first=routed@0"), VOCABULARY) is state
