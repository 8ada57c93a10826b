"""Generation: the cache changes nothing, rows do not change each other, meshes do not either."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import compat
from moe_jax.config import ConfigError, FFNConfig, ModelConfig, MoEConfig, PeerConfig
from moe_jax.config.routers import ROUTER_NAMES, ExpertChoiceConfig, RoutersConfig, StableConfig
from moe_jax.models import decode, unstack
from moe_jax.models.decode import generate, sample
from moe_jax.models.decoder import Decoder
from moe_jax.parallel.mesh import AXES
from moe_jax.parallel.rules import shardings_of
from tests.models.small import boxed_shapes, random_variables

V, END, TOKENS = 64, 63, 20


def every_layer():
    """A layer with each router that can decode, beside what a layer may have; then layers that retrieve, one pool shared."""
    routers, ffns = RoutersConfig(expert_choice=ExpertChoiceConfig(evaluation="tokens")), []
    for name in ROUTER_NAMES:
        moe = MoEConfig(experts=4, router=name, routers=routers, expert_width=16)
        traits = moe.options.traits
        if traits.causal:
            moe.top_k = min(traits.top_k or (3,))
            moe.zero_experts = moe.copy_experts = moe.constant_experts = int(traits.virtual)
            moe.shared_experts, moe.shared_gate = int(traits.virtual), traits.virtual
            ffns.append(FFNConfig(name=f"by_{name}", kind="routed", moe=moe))
    by_window = RoutersConfig(stable=StableConfig(light_router="window", light_width=8))
    moe = MoEConfig(experts=4, router="stable", top_k=1, routers=by_window, expert_width=16, expert_sublayers=2)
    ffns.append(FFNConfig(name="a_window", kind="routed", moe=moe))
    for kind, shared in (("peer", True), ("pkm", False)):
        peer = PeerConfig(experts=16, heads=2, top_k=2, key_width=8, query_norm="layernorm", share_pool=shared)
        ffns.append(FFNConfig(name=f"a_{kind}", kind=kind, peer=peer))
    names = [ffn.name for ffn in ffns]
    return {
        "layers": len(names),
        "pattern": ",".join(names),
        "inserts": f"early=a_peer@0,late=by_switch@{len(names)}",
        "ffns": tuple(ffns),
        "ffn_bias": True,
    }


MODELS = {
    "every layer": every_layer(),
    "groups": {"pattern": "routed", "inserts": "middle=dense@1"},
    "looped": {"pattern": "dense", "inserts": "middle=routed@1"},
    "rope": {"kv_heads": 2},
    "learned": {
        "positions": "learned",
        "max_positions": 40,
        "inserts": "base=routed@2",
        "tied_embeddings": False,
    },
    "dense bfloat16": {"pattern": "dense", "dtype": "bfloat16", "scan": False},
}


@functools.cache
def make(name="rope"):
    fields = {"layers": 2, "width": 32, "ffn_width": 32, "heads": 4} | MODELS[name]
    model = Decoder(ModelConfig(**fields, moe=MoEConfig(experts=4, top_k=2)), V)
    return model, random_variables(model)


def make_prompts(*lengths):
    rng = np.random.default_rng(0)
    return [np.concatenate([[END], rng.integers(0, END, size=length)]).astype(np.int32) for length in lengths]


PROMPTS = make_prompts(7, 0, 3, 15, 2)


@functools.cache
def _uncached_logits(name):
    model, variables = make(name)

    @jax.jit
    def run(ids, lengths):
        """ids [B, S], lengths [B] -> [B, S, V]."""
        index = jnp.arange(ids.shape[1])
        positions = jnp.broadcast_to(index, ids.shape)
        out = model.apply(variables, ids, positions, (index < lengths[:, None]).astype(jnp.int32))
        return jax.vmap(lambda x: decode._logits(model, x, out.table), 1, 1)(out.x)

    return run


def generate_uncached(name, prompts, tokens, temperature=0.0, top_p=1.0, key=None, first=None):
    """Reads every row from its start for every new token."""
    rows, lengths = (
        np.arange(len(PROMPTS)),
        np.array([*map(len, prompts), *[1] * (len(PROMPTS) - len(prompts))]),
    )
    ids, new = np.zeros((len(rows), 40), np.int32), []
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    ended = np.zeros(len(rows), bool)
    for i in range(tokens):
        logits = np.asarray(_uncached_logits(name)(ids, lengths))[rows, lengths - 1]
        if first is not None and i == 0:
            logits[: len(first)] = np.where(first, logits[: len(first)], -np.inf)
        options = {"greedy": not temperature, "nucleus": top_p < 1}
        token = np.asarray(sample(jnp.asarray(logits), jnp.asarray(lengths), key, temperature, top_p, **options))
        new.append(np.where(ended, END, token))
        ids[rows, lengths] = token
        lengths, ended = lengths + 1, ended | (token == END)
    return np.stack(new, axis=1)[: len(prompts)]


SAMPLING = {"greedy": {}, "drawn": {"temperature": 0.7}, "nucleus": {"temperature": 1.3, "top_p": 0.8}}


CASES = [("rope", "nucleus"), ("learned", "drawn"), ("learned", "greedy"), ("every layer", "greedy"), ("groups", "greedy")]


@pytest.mark.parametrize("name, kind", [*CASES, ("looped", "greedy")])
def test_the_cache_changes_nothing(name, kind, monkeypatch):
    if name == "looped":  # as a model of many blocks
        monkeypatch.setattr(unstack, "MOST_BLOCKS", 1)
    model, variables = make(name)
    sampling = SAMPLING[kind] | ({} if kind == "greedy" else {"key": jax.random.key(5)})
    new = generate(model, variables, PROMPTS, tokens=TOKENS, end_id=END, **sampling)
    assert new.shape == (len(PROMPTS), TOKENS) and new.dtype == np.int32
    np.testing.assert_array_equal(new, generate_uncached(name, PROMPTS, TOKENS, **sampling))
    assert len({tuple(row) for row in new}) == len(PROMPTS)


@pytest.mark.fused
@pytest.mark.parametrize("rows", [1, 4])
def test_a_token_copies_no_cache_and_no_weights(rows):
    model, variables = make("groups")
    static = decode._Static(model, "copies")
    variables = decode._unstack(static, variables, rows=rows)
    ids, lengths = np.ones((rows, 16), np.int32), np.full(rows, 16, np.int32)
    logits, cache = decode._prefill(static, variables, ids, lengths, slots=48)
    args = lengths, (1, END), (jax.random.key(0), 1.0, 1.0), np.ones((rows, 1), bool)
    options = {"new_tokens": 32, "greedy": True, "nucleus": False}
    text = decode._continue.lower(static, variables, logits, cache, *args, **options).compile().as_text()
    loops = text[: text.index("\nENTRY")]
    large = {f"f32[{rows},4,48,8]", "f32[32,32]", "f32[4,32,32]"}
    assert all(shape in text for shape in (f"f32[{rows},4,48,8]", "f32[32,32]"))
    made = re.findall(r"= (\S+?\])(?:{\S+)? (?:copy|slice|dynamic-slice|gather|transpose)\(", loops)
    assert made and not large & set(made)


@pytest.mark.fused
@pytest.mark.smoke
def test_bfloat16_draws_a_best_token():
    """Rounding may decide between two tokens; what is drawn is never worse than that."""
    model, variables = make("dense bfloat16")
    new = generate(model, variables, PROMPTS, tokens=TOKENS, end_id=V)
    ids, lengths = (
        np.zeros((len(PROMPTS), 40), np.int32),
        np.array([len(prompt) + TOKENS for prompt in PROMPTS]),
    )
    for row, prompt in enumerate(PROMPTS):
        ids[row, : lengths[row]] = np.concatenate([prompt, new[row]])
    logits = np.asarray(_uncached_logits("dense bfloat16")(ids, lengths))
    for row, prompt in enumerate(PROMPTS):
        scores = logits[row, len(prompt) - 1 : lengths[row] - 1]
        chosen = scores[np.arange(TOKENS), new[row]]
        assert np.all(chosen >= scores.max(axis=1) - 0.02 * np.abs(scores).max())


def test_rows_do_not_change_each_other():
    model, variables = make()
    run = functools.partial(generate, model, variables, end_id=END, temperature=1.0, top_p=0.9, key=jax.random.key(1))
    together = run(PROMPTS, tokens=TOKENS)
    np.testing.assert_array_equal(run(PROMPTS[:1], tokens=TOKENS), together[:1])
    # Row 2 with other neighbours, and fewer tokens.
    others = make_prompts(4, 11)
    mixed = run([*others, PROMPTS[2], *[PROMPTS[0]] * 2], tokens=17)
    np.testing.assert_array_equal(mixed[2], together[2, :17])
    # The same prompt in another row is another sample.
    assert not np.array_equal(mixed[3], mixed[4])
    other_key = generate(
        model,
        variables,
        PROMPTS,
        tokens=TOKENS,
        end_id=END,
        temperature=1.0,
        top_p=0.9,
        key=jax.random.key(2),
    )
    assert not np.array_equal(other_key, together)


def test_a_document_ends():
    model, variables = make()
    run = functools.partial(generate, model, variables, PROMPTS, tokens=TOKENS, key=jax.random.key(5), **SAMPLING["nucleus"])
    free = run(end_id=V)  # no token has this id
    end = free[1, 6]
    ended = np.cumsum(free == end, axis=1) > 0
    assert ended[1].any() and not ended.all(axis=1).any()
    np.testing.assert_array_equal(run(end_id=end), np.where(ended, end, free))


def test_first_tokens_can_be_limited():
    model, variables = make()
    first = np.ones((5, V), bool)
    first[:2] = False
    first[0, [7, 9]], first[1, 11] = True, True
    for kind in ("greedy", "nucleus"):
        sampling = SAMPLING[kind] | {"key": jax.random.key(5)}
        new = generate(model, variables, PROMPTS, tokens=17, end_id=END, first=first, **sampling)
        assert new[0, 0] in (7, 9) and new[1, 0] == 11
        np.testing.assert_array_equal(new, generate_uncached("rope", PROMPTS, 17, first=first, **sampling))


def test_sampling_follows_the_distribution():
    logits = jnp.log(jnp.array([0.4, 0.1, 0.3, 0.2]))
    rows = 20_000

    def shares(temperature, top_p):
        draw = functools.partial(sample, greedy=False, nucleus=top_p < 1)
        tokens = draw(jnp.tile(logits, (rows, 1)), jnp.zeros(rows, jnp.int32), jax.random.key(0), temperature, top_p)
        return np.bincount(tokens, minlength=4) / rows

    np.testing.assert_allclose(shares(1.0, 1.0), [0.4, 0.1, 0.3, 0.2], atol=0.015)
    np.testing.assert_allclose(shares(0.5, 1.0), np.array([16, 1, 9, 4]) / 30, atol=0.015)
    # The smallest set with at least 0.65 is {0.4, 0.3}; after the temperature 0.5, {0.53, 0.3}.
    np.testing.assert_allclose(shares(1.0, 0.65), np.array([4, 0, 3, 0]) / 7, atol=0.015)
    np.testing.assert_allclose(shares(1.0, 0.75), np.array([4, 0, 3, 2]) / 9, atol=0.015)
    np.testing.assert_allclose(shares(0.5, 0.65), np.array([16, 0, 9, 0]) / 25, atol=0.015)
    np.testing.assert_allclose(shares(1.0, 0.01), [1, 0, 0, 0])
    np.testing.assert_allclose(shares(1.0, np.float32(1e-40)), [1, 0, 0, 0])  # which is 0 to the device


def test_extreme_temperatures():
    """The smallest give the most probable tokens, the largest any: neither overflows or divides by zero."""
    model, variables = make()
    run = functools.partial(generate, model, variables, PROMPTS, tokens=TOKENS, end_id=END, key=jax.random.key(2))
    greedy = run(temperature=0.0)
    for temperature in (1e-320, 1e-40, 1e-30):
        np.testing.assert_array_equal(run(temperature=temperature), greedy, err_msg=str(temperature))
        np.testing.assert_array_equal(run(temperature=temperature, top_p=0.9), greedy, err_msg=str(temperature))
    first = np.zeros((len(PROMPTS), V), bool)
    first[:, [3, 5]] = True
    assert set(run(temperature=1e300, first=first)[:, 0].tolist()) <= {3, 5}
    for bad in ({"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            run(**bad)


def test_few_compilations():
    model, variables = make()
    run = functools.partial(generate, model, variables, end_id=END)
    run(PROMPTS, tokens=TOKENS)
    before = decode._prefill._cache_size(), decode._continue._cache_size()
    for rows, tokens in ((5, 17), (6, 32), (8, 25)):
        assert run(make_prompts(*range(2, rows + 2)), tokens=tokens).shape == (rows, tokens)
    twin = Decoder(dataclasses.replace(model.config), V)
    generate(twin, variables, PROMPTS, tokens=TOKENS, end_id=END)
    assert (decode._prefill._cache_size(), decode._continue._cache_size()) == before


@pytest.mark.parametrize("rows, kind", [(1, "greedy"), (5, "nucleus")])
def test_on_a_mesh(rows, kind):
    model, variables = make()
    run = functools.partial(generate, model, tokens=TOKENS, end_id=END, key=jax.random.key(5), **SAMPLING[kind])
    expected = run(variables, PROMPTS)[:rows]
    mesh = compat.make_mesh(jax.devices(), AXES, (1, 1, 4, 2))
    placed = jax.device_put(variables, shardings_of(boxed_shapes(model), mesh))
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(run(placed, PROMPTS[:rows]), expected)
        unstacked = decode._unstack(decode._Static(model, repr(model)), placed, rows=8 if rows > 1 else 1)
    weight = unstacked["params"]["stack"]["groups"][0]["block_1"]["moe"]["experts"]["w_in"]
    assert weight.sharding.spec == compat.PartitionSpec("expert", None, "tensor")


def test_refusals():
    model, variables = make("learned")
    with pytest.raises(ConfigError, match="max_positions=40: a prompt of 16 tokens and 26 new ones need 41.* at most 25 new"):
        generate(model, variables, PROMPTS, tokens=26, end_id=END)
    assert generate(model, variables, PROMPTS, tokens=25, end_id=V).shape == (5, 25)
    for prompts in ([], [np.zeros(0, np.int32)]):
        with pytest.raises(ValueError, match="at least one"):
            generate(model, variables, prompts, tokens=1, end_id=END)
    with pytest.raises(ValueError, match="needs a key"):
        generate(model, variables, PROMPTS, tokens=1, end_id=END, temperature=1.0)
