"""Upcycling: at step 0 the dense run's function, to the bit where it is copied, or a word about why not."""

import dataclasses
import re

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import Config, ConfigError, FFNConfig, MoEConfig, SourceConfig, to_dict
from moe_jax.config.validate import validate
from moe_jax.data import ByteTokenizer
from moe_jax.models.decoder import Decoder
from moe_jax.models.places import by_layer
from moe_jax.parallel.mesh import mesh_from_config
from moe_jax.parallel.rules import shardings_of
from moe_jax.routing.contract import best
from moe_jax.train import loop
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.metrics import read_metrics
from moe_jax.train.restore import load_run
from moe_jax.train.upcycle import (
    check_dense_run,
    departures,
    origins,
    to_experts,
    upcycle,
    upcycle_params,
)
from tests.models.small import boxed_shapes, random_variables
from tests.train.small import make_config

VOCABULARY = 23
WIDTH, HIDDEN = 16, 32
DENSE: dict[str, np.ndarray] = {}  # logits of dense models


def configs(**overrides) -> tuple[Config, Config]:
    """A dense config and the routed one that starts from it; `model__...` of `moe` and `pattern` are the routed one's alone."""
    overrides = {
        "model__pattern": "routed",
        "model__layers": 2,
        "model__width": WIDTH,
        "model__ffn_width": HIDDEN,
        "model__heads": 2,
        "model__moe__experts": 4,
        "init__upcycle_from": "dense",
        "data__tokenizer": "bytes",
    } | overrides
    routed = make_config(**overrides)
    model = dataclasses.replace(
        routed.model, pattern="dense", inserts=routed.model.inserts.replace("=routed@", "=dense@"), moe=Config().model.moe
    )
    return dataclasses.replace(routed, model=model, init=Config().init), routed


def flat(tree):
    return flax.traverse_util.flatten_dict(tree, sep="/")


def cast(tree):
    """Floats as float64 where that is enabled: a scale of the weights is else rounded to float32."""
    wide = jnp.result_type(float)
    return jax.tree.map(lambda a: a.astype(wide) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def upcycled(old: Config, new: Config, group=True):
    """(dense params, {"params", "router_state"} of the routed model); without `group` the router is as it was drawn."""
    dense = cast(random_variables(Decoder(old.model, VOCABULARY))["params"])
    fresh = cast(random_variables(Decoder(new.model, VOCABULARY), seed=1))
    state = fresh.get("router_state", {})
    if new.model.moe.router == "hash":
        state = jax.tree.map(lambda a: np.arange(a.size, dtype=a.dtype).reshape(a.shape) % 4, state)
    plan = origins(flat(fresh["params"]), flat(dense), old.model, new.model)
    made = jax.jit(lambda *trees: upcycle_params(*trees, plan, new.model))(flat(dense), flat(fresh["params"]))
    if not group:
        made |= {path: a for path, a in flat(fresh["params"]).items() if path.endswith("moe/router/kernel")}
    return dense, {"params": flax.traverse_util.unflatten_dict(made, sep="/"), "router_state": state}


def logits(config: Config, variables) -> np.ndarray:
    """[B, S, V] of fixed rows, the last of them with padding."""
    rng = np.random.default_rng(3)
    tokens = jnp.asarray(rng.integers(0, VOCABULARY, (4, 24)), jnp.int32)
    segments = jnp.ones_like(tokens).at[3, 20:].set(0)
    positions = jnp.broadcast_to(jnp.arange(24, dtype=jnp.int32), tokens.shape)
    out = jax.jit(Decoder(config.model, VOCABULARY).apply)(variables, tokens, positions, segments)
    values = np.asarray(out.x, np.float64) @ np.asarray(out.table, np.float64).T
    return values * np.asarray(segments)[..., None]


def difference(old: Config, new: Config, **options) -> float:
    """max|a - b| / max|a| of the logits of the dense and the routed model."""
    dense, routed = upcycled(old, new, **options)
    name = repr(old.model)  # of which there are few
    if name not in DENSE:
        DENSE[name] = logits(old, {"params": dense})
    a, b = DENSE[name], logits(new, routed)
    return np.max(np.abs(a - b)) / np.max(np.abs(a))


def moe(**options):
    return {f"model__moe__{name}": value for name, value in options.items()}


def top_k(**options):
    return moe(**{f"routers__top_k__{name}": value for name, value in options.items()})


BIASES = {"model__activation": "gelu", "model__ffn_bias": True}
KEPT = {
    "swiglu": {},
    "half routed": {"model__pattern": "dense,routed"} | top_k(order="top_k_first", renormalise="never"),
    "biases and inserts": {"model__inserts": "first=dense@0,last=routed@2", **BIASES},
    "two shards": moe(expert_width=HIDDEN // 2),
    "two layers by name": {
        "model__pattern": "whole,halves",
        "model__ffns": (
            FFNConfig("whole", kind="routed", moe=MoEConfig(experts=4)),
            FFNConfig("halves", kind="routed", moe=MoEConfig(experts=8, top_k=4, expert_width=HIDDEN // 2)),
        ),
    },
    "two shards, two copies": moe(expert_width=HIDDEN // 2, top_k=4, experts=6) | BIASES,
    "four shards": moe(expert_width=HIDDEN // 4, top_k=4, experts=8),
    "four shards, two copies": moe(expert_width=HIDDEN // 4, top_k=8, experts=12) | BIASES,
    "three shards": {"model__ffn_width": 33} | moe(expert_width=11, top_k=3, experts=9),
    "two shards by sigmoids": moe(expert_width=HIDDEN // 2, experts=8) | top_k(score="sigmoid", scale=2.5) | BIASES,
    "all experts": moe(top_k=4) | top_k(renormalise="never"),
    "groups within copies": moe(expert_width=HIDDEN // 4, experts=16, top_k=4) | top_k(groups=8, kept_groups=3),
    "hash": moe(router="hash", top_k=1) | BIASES,
    "gshard": moe(router="gshard", routers__gshard__second_expert="all"),
    "shared experts": moe(shared_experts=1) | BIASES,
    "gated shared experts, other parts": moe(shared_experts=2, shared_gate=True)
    | {
        "model__norm": "layernorm",
        "model__positions": "learned",
        "model__tied_embeddings": False,
        "model__kv_heads": 1,
        "model__qkv_bias": True,
        "model__output_bias": True,
        "model__qk_norm": True,
        "model__max_positions": 32,
    },
}


@pytest.mark.parametrize("case", KEPT)
def test_the_step_0_function_is_the_dense_one(case):
    old, new = configs(**KEPT[case])
    validate(new, 1)
    assert departures(old.model, new.model) == ()
    with jax.enable_x64(True):
        old.model.dtype = new.model.dtype = "float64"
        assert difference(old, new) < 1e-12


@pytest.mark.parametrize("case", ["biases and inserts", "four shards, two copies"])
def test_the_same_in_float32(case):
    assert difference(*configs(**KEPT[case])) < 1e-5


def test_shards_need_virtual_groups():
    old, new = configs(**KEPT["four shards"])
    assert difference(old, new, group=False) > 0.01


@pytest.mark.parametrize("shards, top_k", [(2, 2), (2, 4), (3, 6), (4, 8)])
def test_the_best_are_whole_copies_even_where_copies_tie(shards, top_k):
    scores = np.random.default_rng(0).integers(0, 3, (200, 4)).astype(np.float32)
    ids = np.asarray(best(jnp.asarray(scores.repeat(shards, axis=1)), top_k))
    for row in ids:
        copies, counts = np.unique(row // shards, return_counts=True)
        assert len(copies) == top_k // shards and set(counts) == {shards}


DEPARTS = {
    "one expert": (moe(top_k=1), "router=top_k: the gates are raw scores"),
    "no shares": (top_k(renormalise="never"), "router=top_k: the gates are raw scores"),
    "switch": (moe(router="switch", top_k=1), "router=switch: the gates are raw scores"),
    "base": (moe(router="base", top_k=1), "router=base: the gate is a sigmoid"),
    "stable": (moe(router="stable", top_k=1), "router=stable: the gate is a sigmoid"),
    "remoe": (moe(router="remoe"), "router=remoe: the gates are those of a ReLU"),
    "expert choice": (moe(router="expert_choice", allow_noncausal=True), "router=expert_choice: the gates are raw"),
    "soft moe": (moe(router="soft_moe", top_k=1, allow_noncausal=True), "router=soft_moe: experts see mixtures"),
    "zero experts": (moe(zero_experts=2, constant_experts=1), "zero, copy and constant experts"),
    "drops": (moe(eval_capacity=0.5), r"eval_capacity=0.5: evaluation drops"),
    "groups": (moe(expert_width=HIDDEN // 4, experts=12, top_k=4) | top_k(groups=2), "groups=2 cuts"),
}


@pytest.mark.parametrize("case", DEPARTS)
def test_a_function_that_differs_has_a_reason(case):
    overrides, reason = DEPARTS[case]
    old, new = configs(**overrides)
    validate(new, 1)
    assert len(departures(old.model, new.model)) == 1 and re.search(reason, departures(old.model, new.model)[0])


@pytest.mark.parametrize("case", ["one expert", "remoe", "soft moe", "zero experts", "drops", "groups"])
def test_it_differs(case):
    assert difference(*configs(**DEPARTS[case][0])) > 0.01


def test_reasons_of_training_and_of_other_fields():
    old, new = configs(model__rope_theta=500.0, model__moe__router="gshard", model__moe__execution="capacity")
    old.model.rope_theta, old.model.norm_epsilon = 100.0, 1e-5
    reasons = departures(old.model, new.model)
    patterns = (
        "second expert does not run",
        "training drops",
        "norm_epsilon=1e-06, in the dense run 1e-05",
        "rope_theta=500.0",
    )
    assert len(reasons) == 4 and all(re.search(p, r) for p, r in zip(patterns, reasons, strict=True))
    moe = configs(**top_k(scale=2.0))[1].model.moe
    assert moe.options.gate_sum(moe, 1) == (2.0, "")


def test_blocks_are_matched_by_depth_and_name():
    """Where the pattern differs; every leaf to the bit, and nothing of the drawn experts stays."""
    old, new = configs(model__layers=6, model__pattern="dense,routed,dense", model__inserts="a=routed@0,b=dense@6")
    old.model.pattern = "dense,dense"
    dense, routed = upcycled(old, new)
    ours, theirs = by_layer(routed["params"]["stack"], new.model), by_layer(dense["stack"], old.model)
    assert list(ours) == list(theirs) == ["a", *(f"layer_{n:02d}" for n in range(6)), "b"]
    for block, tree in theirs.items():
        assert ("moe" in ours[block]) == (block in ("layer_01", "layer_04", "a"))
        for path, leaf in flat(tree).items():
            if path.startswith("ffn/") and "moe" in ours[block]:
                made = ours[block]["moe"]["experts"][path.removeprefix("ffn/")]
                np.testing.assert_array_equal(made, np.broadcast_to(leaf, (4, *leaf.shape)))
            else:
                np.testing.assert_array_equal(flat(ours[block])[path], leaf)
    drawn = flat(random_variables(Decoder(new.model, VOCABULARY), seed=1)["params"])
    same = [path for path, a in flat(routed["params"]).items() if np.array_equal(a, drawn[path])]
    assert sorted(same) == ["stack/a/moe/router/kernel", "stack/groups/block_1/moe/router/kernel"]


def test_a_leaf_that_goes_nowhere_is_an_error():
    old, new = configs()
    dense, routed = (flat(nn.unbox(boxed_shapes(Decoder(c.model, VOCABULARY)))["params"]) for c in (old, new))
    dense["left"] = dense["embed/embedding"]
    with pytest.raises(ValueError, match="left"):
        origins(routed, dense, old.model, new.model)


def test_the_layout_of_shards():
    w_in, w_out = jnp.arange(12.0).reshape(2, 6), jnp.arange(12.0).reshape(6, 2)
    made = to_experts("w_in", w_in, experts=6, shards=3)
    assert made.shape == (6, 2, 2)
    np.testing.assert_array_equal(made[4], w_in[:, 2:4])
    np.testing.assert_array_equal(to_experts("w_out", w_out, 6, 3, gates=1.5)[5], w_out[4:] * 2)
    np.testing.assert_array_equal(to_experts("b_in", w_in[0], 6, 3)[3], w_in[0, :2])
    np.testing.assert_array_equal(to_experts("b_out", w_out[0], 6, 3, gates=2.0)[1], w_out[0] / 2)


WRONG = {
    "both": ({"init__checkpoint": "x"}, "init.checkpoint=x: excludes init.upcycle_from=dense; empty one"),
    "include": ({"init__include": "embed"}, "init.include=embed: excludes init.upcycle_from=dense; empty one"),
    "no experts": ({"model__pattern": "dense"}, "init.upcycle_from=dense: there are no experts .*; add routed blocks"),
    "width": (moe(expert_width=12), "moe.expert_width=12: does not divide model.ffn_width=32.*; use a divisor"),
    "wider": (moe(expert_width=64), "moe.expert_width=64: does not divide model.ffn_width=32.*; use a divisor"),
    "experts": (moe(expert_width=8, experts=10, top_k=4), "moe.experts=10: not a multiple of .* = 4, .*; use 12"),
    "inserts": (
        {"model__inserts": "a=dense@0,b=routed@2", "model__insert_width": 8},
        "model.insert_width=8: experts of an upcycled insert have model.ffn_width=32; use 0",
    ),
    "top_k": (moe(expert_width=16, top_k=3), "moe.top_k=3: not a multiple of .* = 2, the shards .*; use 4"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refused_before_anything_is_read(case):
    overrides, message = WRONG[case]
    with pytest.raises(ConfigError, match=f"^config.*{message}") as error:
        validate(configs(**overrides)[1], 1)
    assert "\n" not in str(error.value)


def save_dense(workdir, config: Config, params=None):
    """A checkpoint of step 5 of a dense run."""
    meta = {"config": to_dict(config), "tokenizer": ByteTokenizer().to_json(), "step": 5}
    with Checkpoints(workdir, asynchronous=False) as checkpoints:
        checkpoints.save(5, {"params": params or {"x": np.zeros(1)}, "step": jnp.int32(5)}, meta)
    return str(workdir)


UNFIT = {
    "model.layers": 4,
    "model.width": 24,
    "model.ffn_width": 64,
    "model.heads": 4,
    "model.kv_heads": 1,
    "model.head_width": 4,
    "model.norm": "layernorm",
    "model.positions": "none",
    "model.activation": "gelu",
    "model.ffn_bias": True,
    "model.qkv_bias": True,
    "model.output_bias": True,
    "model.qk_norm": True,
    "model.tied_embeddings": False,
    "model.inserts": "first=dense@0",
}


@pytest.fixture(scope="module")
def plain_dense(tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp("plain"), configs()[0])


@pytest.mark.parametrize("field", UNFIT)
def test_a_dense_run_that_does_not_fit_is_refused(plain_dense, field):
    config = configs(init__upcycle_from=plain_dense)[1]
    check_dense_run(config)
    name = field.removeprefix("model.")
    setattr(config.model, name, UNFIT[field])
    with pytest.raises(ConfigError, match=f"^config.*: the dense run .* has .*{field}=.*; make them equal") as error:
        check_dense_run(config)
    assert "\n" not in str(error.value)


def test_widths_of_inserts(tmp_path):
    """Of the dense run, whatever its inserts become; 0 is ffn_width."""
    inserts = {"model__inserts": "a=routed@0", "init__upcycle_from": str(tmp_path)}
    old, new = configs(**inserts)
    old.model.insert_width = HIDDEN
    save_dense(tmp_path, old)
    validate(new, 1)
    check_dense_run(new)
    old.model.insert_width = 8
    new.init.upcycle_from = save_dense(tmp_path / "narrow", old)
    with pytest.raises(ConfigError, match="model.insert_width=32: the dense run .* has model.insert_width=8"):
        check_dense_run(new)


def test_learned_positions_defaults_and_routed_runs(tmp_path):
    old, new = configs(model__positions="learned", init__upcycle_from=str(tmp_path / "learned"))
    save_dense(tmp_path / "learned", old)
    new.model.kv_heads, new.model.head_width = 2, 8  # what the dense run's zeros mean
    check_dense_run(new)
    new.model.max_positions, new.model.width = 64, 12
    with pytest.raises(ConfigError, match="model.width=12: .* has model.width=16, model.max_positions=2048; make"):
        check_dense_run(new)
    new.init.upcycle_from = save_dense(tmp_path / "routed", new)
    with pytest.raises(ConfigError, match="init.upcycle_from=.*pattern=routed .* have blocks with experts; name a dense run"):
        check_dense_run(new)
    new.init.upcycle_from = str(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="nothing: no checkpoint"):
        check_dense_run(new)


@pytest.mark.parametrize("field, value", [("expert_sublayers", 2), ("expert_norm", True)])
def test_experts_that_are_no_dense_layers(tmp_path, field, value):
    old, new = configs(init__upcycle_from=str(tmp_path / "dense"))
    save_dense(tmp_path / "dense", old)
    check_dense_run(new)
    setattr(new.model.moe, field, value)
    with pytest.raises(ConfigError, match=f"^config.model.moe.{field}={value}: an expert must be a feed-forward layer of the"):
        check_dense_run(new)


def test_the_same_on_eight_devices(tmp_path):
    overrides = moe(expert_width=HIDDEN // 2, shared_experts=1) | BIASES
    old, new = configs(init__upcycle_from=str(tmp_path), **overrides)
    vocab_size = ByteTokenizer().vocab_size
    model = Decoder(new.model, vocab_size)
    save_dense(tmp_path, old, random_variables(Decoder(old.model, vocab_size))["params"])
    drawn, made, reports = random_variables(model, seed=1)["params"], [], []
    for devices in (1, 8):
        new.mesh.expert = new.mesh.fsdp = new.mesh.tensor = 2 if devices == 8 else 1
        mesh = mesh_from_config(new.mesh, jax.devices()[:devices])
        with jax.set_mesh(mesh):
            shardings = shardings_of(boxed_shapes(model)["params"], mesh)
            params, report = upcycle(new, jax.device_put(drawn, shardings), vocab_size, mesh)
        assert jax.tree.map(lambda a: a.sharding, params) == shardings
        made.append(jax.device_get(params))
        reports.append(str(report))
    jax.tree.map(np.testing.assert_array_equal, *made)
    assert made[0]["stack"]["groups"]["block_0"]["moe"]["experts"]["w_in"].shape == (2, 4, WIDTH, HIDDEN // 2)
    one = 2 * WIDTH * HIDDEN // 2 + HIDDEN // 2 + WIDTH
    experts, fresh = 2 * 4 * one, 2 * (WIDTH * 4 + one)
    total = sum(a.size for a in jax.tree.leaves(drawn))
    expected = (
        f"step 5: {total - experts - fresh:,} parameters copied, {experts:,} replicated into experts of 1/2 of a dense layer, "
        f"{fresh:,} fresh"
    )
    assert reports[0] == reports[1] and expected in reports[0] and "computes what the dense one does" in reports[0]


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setattr(loop, "show_log", lambda: None)
    monkeypatch.setattr(loop, "start_devices", lambda mesh: None)


@pytest.mark.slow
@pytest.mark.usefixtures("quiet")
def test_a_run_from_a_run(tmp_path, capsys):
    """Trained dense, upcycled with a learning rate of 0, evaluated: the same loss; the average starts at the parameters."""
    rng = np.random.default_rng(0)
    text = "\n\n".join(" ".join(str(a + i * b) for i in range(12)) for a, b in rng.integers(1, 50, (300, 2)))
    (tmp_path / "numbers.txt").write_text(text)
    dense, sparse = str(tmp_path / "dense"), str(tmp_path / "sparse")
    old, new = configs(
        init__upcycle_from=dense,
        train__steps=3,
        train__eval_batches=2,
        train__tensorboard=False,
        data__held_out_percent=10.0,
        data__cache_dir=str(tmp_path / "cache"),
        model__layers=1,
        optimizer__learning_rate=0.0,
        optimizer__ema_decay=0.5,
        mesh__expert=2,
        **moe(expert_width=HIDDEN // 2),
        data__sources=(SourceConfig(name="numbers", files=str(tmp_path / "numbers.txt"), document="paragraph"),),
    )
    old.mesh, old.optimizer = Config().mesh, dataclasses.replace(new.optimizer, learning_rate=0.01, ema_decay=0.0)
    assert loop.fit(old, dense) == loop.fit(new, sparse) == 0
    said = capsys.readouterr().err
    assert f"upcycled from {dense} step 3: " in said and "warning" not in said
    # Evaluation uses the average.
    losses = [row["eval/numbers/loss"] for w in (dense, sparse) for row in read_metrics(w) if "eval/numbers/loss" in row]
    assert len(losses) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-5)
    # And the parameters are those, too.
    new.optimizer.ema_decay = 0.0
    params = flat(load_run(sparse, new).variables["params"])
    theirs = flat(load_run(dense, old).variables["params"])
    np.testing.assert_array_equal(params["embed/embedding"], theirs["embed/embedding"])


@pytest.mark.usefixtures("quiet")
def test_a_resumed_run_does_not_read_the_dense_one(tmp_path, monkeypatch):
    config, read = configs(init__upcycle_from=str(tmp_path / "nothing"))[1], []

    class Stop(Exception):
        pass

    def open_data(*args, **options):
        read.append(options["tokenizer"].vocab_size)
        raise Stop

    monkeypatch.setattr(loop, "open_data", open_data)
    with pytest.raises(ConfigError, match="^config.init.upcycle_from=.*nothing: no checkpoint"):
        loop.fit(config, str(tmp_path / "run"))
    save_dense(tmp_path / "run", config)
    with pytest.raises(Stop):
        loop.fit(config, str(tmp_path / "run"))
    assert read == [ByteTokenizer().vocab_size]
