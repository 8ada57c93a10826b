"""Every router inside the whole training step: learning, its state, several devices, a broken token, generation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config.routers import ROUTER_NAMES
from moe_jax.models.decode import generate
from moe_jax.routing import ROUTERS
from moe_jax.train.router_state import start_router_state
from tests.train.small import VOCABULARY, Runner, make_batch, make_config

ONE_EXPERT = ("switch", "base", "hash", "stable", "soft_moe")


def config_of(router, **overrides):
    config = make_config(
        model__moe__router=router,
        model__moe__experts=4,
        model__moe__top_k=1 if router in ONE_EXPERT else 2,
        model__moe__allow_noncausal=True,
        model__moe__routers__top_k__bias_rate=0.01,
        model__moe__routers__adaptive__target_k=1.5,
        model__moe__routers__remoe__start_weight=0.1,
        # Near 0 gradients that are 0 but for rounding would move a parameter by a whole learning rate.
        optimizer__epsilon=1e-3,
        **overrides,
    )
    return config


def router_state(runner):
    return jax.device_get(runner.state["router_state"].get("stack", {}))


# Each compiles a training step, which takes longer than the rest.
SOME = [name if name in ("hash", "expert_choice") else pytest.param(name, marks=pytest.mark.slow) for name in ROUTER_NAMES]


@pytest.mark.parametrize("router", SOME)
def test_it_learns(router):
    config = config_of(router)
    runner = Runner(config)
    runner.state["router_state"] = start_router_state(
        runner.state["router_state"], lambda: np.full(VOCABULARY, 1 / VOCABULARY), config.model, VOCABULARY
    )
    before, losses = router_state(runner), []
    for step in range(12):
        metrics = runner.step(make_batch(step))
        losses.append(float(metrics["loss"]))
    assert np.all(np.isfinite(losses)) and losses[-1] < losses[0] - 0.1
    after = router_state(runner)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, before)
    changed = any(np.any(a != b) for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before)))
    assert changed == (ROUTERS[router].update is not None)
    if config.model.moe.options.traits.causal:
        check_generation(runner)
    check_a_broken_token_skips_the_step(runner)


def check_generation(runner):
    """With a cache as without: the router sees one token at a time, or all."""
    variables = {name: runner.state[name] for name in ("params", "router_state")}
    prompts = [np.asarray([1, 3, 5], np.int32), np.asarray([4, 4], np.int32)]
    new = generate(runner.model, variables, prompts, tokens=4, end_id=VOCABULARY - 1)
    for prompt, tokens in zip(prompts, new):
        text = np.concatenate([prompt, tokens])[None]
        out = jax.jit(runner.model.apply)(
            variables, text, np.arange(text.size, dtype=np.int32)[None], np.ones_like(text, np.int32)
        )
        best = np.argmax(np.asarray(out.x @ out.table.T)[0], axis=-1)
        np.testing.assert_array_equal(tokens, best[len(prompt) - 1 : -1])


def check_a_broken_token_skips_the_step(runner):
    """A token with an embedding that is not finite is counted as such by the router, and nothing is learned from it."""
    embed = runner.state["params"]["embed"]
    embed["embedding"] = jax.device_put(embed["embedding"].at[7].set(jnp.nan), embed["embedding"].sharding)
    before, batch = jax.device_get(runner.state), make_batch(0)
    assert np.any(batch["tokens"] == 7)
    metrics = runner.step(batch)
    assert metrics["skipped_in_row"] == 1 and np.sum(metrics["stats"]["groups"]["block_0"]["nonfinite"]) > 0
    after = jax.device_get(runner.state)
    for name in ("params", "opt_state", "router_state"):
        chex.assert_trees_all_equal(after[name], before[name])


@pytest.mark.slow
@pytest.mark.parametrize("router", ROUTER_NAMES)
def test_eight_devices_are_one(router):
    """Losses and counts of four steps; the mesh splits tokens, experts and widths."""
    one = Runner(config_of(router))
    eight = Runner(config_of(router, mesh__data=2, mesh__expert=2, mesh__tensor=2), devices=8)
    for step in range(4):
        a, b = one.step(make_batch(step)), eight.step(make_batch(step))
        np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-5)
        counts = [np.asarray(m["stats"]["groups"]["block_0"]["counts"]) for m in (a, b)]
        np.testing.assert_allclose(counts[1], counts[0], rtol=1e-4)
    chex.assert_trees_all_close(router_state(eight), router_state(one), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "router, change",
    [
        *(
            (router, change)
            for router in ("top_k", "remoe")
            for change in ("model__remat", "model__scan", "train__microbatches")
        ),
        *((router, "train__microbatches") for router in ("adaptive", "expert_threshold", "quantile")),
    ],
)
def test_state_outside_the_gradient_is_updated_once_a_step(router, change):
    """Under recomputation, unrolled, and by the counts of the whole step where it is cut into 2 or 4."""
    values = {"model__remat": [True], "model__scan": [False], "train__microbatches": [2, 4]}[change]
    quiet = {"model__moe__routers__top_k__balance_loss": 0.0, "model__moe__routers__top_k__z_loss": 0.0}
    if router == "quantile":
        router, quiet = "top_k", quiet | {"model__moe__routers__top_k__bias_rule": "quantile"}
    want = Runner(config_of(router, **quiet))
    want.step(make_batch(0))
    for value in values:
        got = Runner(config_of(router, **quiet, **{change: value}))
        got.step(make_batch(0))
        chex.assert_trees_all_equal(router_state(got), router_state(want))


def test_microbatches_share_the_router_losses():
    """Of two microbatches that are alike each has half of the losses: the gradient is that of one."""
    batch = {name: np.repeat(rows[::2], 2, axis=0) for name, rows in make_batch(0).items()}
    strong = {"model__moe__routers__top_k__balance_loss": 1.0, "model__moe__routers__top_k__z_loss": 0.1}
    one, two = (Runner(config_of("top_k", train__microbatches=parts, **strong)).step(batch) for parts in (1, 2))
    np.testing.assert_allclose(two["gradient_norm"], one["gradient_norm"], rtol=1e-4)
