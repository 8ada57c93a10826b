"""The config tree: defaults, round trips, differences and the types and rules that `validate` holds."""

import copy
import dataclasses
import json
import pickle

import pytest

from moe_jax import config as c
from moe_jax.config.blocks import block_layers, parse_inserts, parse_pattern
from moe_jax.config.validate import validate


def different(config: c.Config) -> c.Config:
    """A config in which every leaf has another value than in `config`."""
    other = copy.deepcopy(config)
    for _, owner, leaf in c.leaves(other):
        value = getattr(owner, leaf.name)
        new = not value if leaf.type is bool else f"{value}x" if leaf.type is str else value + leaf.type(1)
        setattr(owner, leaf.name, new)
    other.plugins = "json"  # read again, they are imported
    return other


def large() -> c.Config:
    config = c.Config()
    config.data.sources = (
        c.SourceConfig(tfds="python_stdlib"),
        c.SourceConfig(name="mine", files="*.txt", weight=2.0),
    )
    config.model.ffns = (c.FFNConfig("mine", kind="routed"),)
    config.optimizer.groups = (c.ParameterGroup(path="embed", learning_rate_scale=0.1),)
    return config


def test_defaults_are_valid():
    config = c.Config()
    validate(config)
    validate(config, device_count=8)
    assert config == c.Config()


def test_every_leaf_is_plain_and_documented():
    for path, owner, leaf in c.leaves(large()):
        assert leaf.type in (bool, int, float, str), path
        assert type(getattr(owner, leaf.name)) is leaf.type, path
        assert leaf.metadata["doc"].endswith("."), path


def test_leaf_fields_names_every_leaf():
    names = [path.replace("[0]", "[]").replace("[1]", "[]") for path, _, _ in c.leaves(large())]
    assert set(names) == set(c.leaf_fields())


@pytest.mark.parametrize("config", [c.Config(), large(), different(large())], ids=["default", "large", "different"])
def test_round_trip_through_json(config):
    assert c.from_dict(json.loads(json.dumps(c.to_dict(config)))) == config


def test_missing_fields_take_their_defaults():
    assert c.from_dict({}) == c.Config()
    config = c.from_dict({"model": {"moe": {"top_k": 1}}, "data": {"sources": [{"name": "a"}]}})
    assert config.model.moe.top_k == 1
    assert config.data.sources == (c.SourceConfig(name="a"),)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"sed": 1}, "config.sed=1: no such field; did you mean config.seed?"),
        (
            {"model": {"moe": {"topk": 1}}},
            "config.model.moe.topk=1: no such field; did you mean config.model.moe.top_k?",
        ),
        ({"model": 3}, "config.model=3: not a section; give its fields as a JSON object"),
        ([], "config=[]: not a section; give its fields as a JSON object"),
        ({"data": {"sources": {}}}, "config.data.sources={}: not a list; give its items as a JSON list"),
        (
            {"data": {"sources": [1]}},
            "config.data.sources[0]=1: not a section; give its fields as a JSON object",
        ),
    ],
)
def test_from_dict_refuses(tree, message):
    with pytest.raises(c.ConfigError) as error:
        c.from_dict(tree)
    assert str(error.value) == message


def test_differences():
    old, new = large(), large()
    assert c.differences(old, new) == {}
    new.seed = 4
    new.data.sources[1].weight = 3.0
    new.data.sources += (c.SourceConfig(name="third", files="c"),)
    new.optimizer.groups = ()
    found = c.differences(old, new)
    assert found.pop("data.sources[2]") == (None, c.to_dict(new.data.sources[2]))
    assert found.pop("optimizer.groups[0]") == (c.to_dict(old.optimizer.groups[0]), None)
    assert found == {"seed": (0, 4), "data.sources[1].weight": (2.0, 3.0)}


def test_differences_sees_every_leaf():
    assert set(c.differences(large(), different(large()))) == {path for path, _, _ in c.leaves(large())}


def test_config_error_is_one_line():
    error = c.ConfigError("model.pattern", "a\nb\t\x1b" + "x" * 1000, "not a kind", "use\nanother")
    assert str(error).startswith(r"config.model.pattern=a\nb\t\x1bxxx")
    assert str(error).endswith(r"xxx: not a kind; use\nanother")
    assert len(str(error)) < 200
    assert str(c.ConfigError("config.seed", -1, "a", "b")) == "config.seed=-1: a; b"
    assert str(c.ConfigError("--workdir", None, "not given", "name one")) == "--workdir: not given; name one"
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.value) == (str(error), error.value)


def test_validate_converts_ints_and_lists():
    config = c.Config()
    config.model.rope_theta = 500000
    config.data.sources = [c.SourceConfig(tfds="python_stdlib", weight=2)]
    validate(config)
    assert type(config.model.rope_theta) is float
    assert config.data.sources == (c.SourceConfig(tfds="python_stdlib", weight=2.0),)


@pytest.mark.parametrize(("path", "leaf"), [pytest.param(p, f, id=p) for p, _, f in c.leaves(large())])
def test_each_leaf_refuses_another_type(path, leaf):
    config = large()
    for wrong in (None, 1.5 if leaf.type is int else "1", True if leaf.type is not bool else 1, b"x"):
        if isinstance(wrong, leaf.type) and not isinstance(wrong, bool):
            continue  # a str for a str
        owner = {p: o for p, o, _ in c.leaves(config)}[path]
        before = getattr(owner, leaf.name)
        setattr(owner, leaf.name, wrong)
        with pytest.raises(c.ConfigError) as error:
            validate(config)
        assert error.value.field == path
        setattr(owner, leaf.name, before)
    validate(config)


@pytest.mark.parametrize(("path", "leaf"), [pytest.param(p, f, id=p) for p, _, f in c.leaves(large())])
def test_each_leaf_holds_its_limits(path, leaf):
    wrong = []
    if leaf.metadata["choices"]:
        wrong.append("no such choice")
    if leaf.metadata["low"] is not None:
        wrong.append(leaf.type(leaf.metadata["low"]) - 1)
    if leaf.metadata["high"] is not None:
        wrong.append(leaf.type(leaf.metadata["high"]) + 1)
    if leaf.type is float:
        wrong += [float("nan"), float("inf")]
    for value in wrong:
        config = large()
        owner = {p: o for p, o, _ in c.leaves(config)}[path]
        setattr(owner, leaf.name, value)
        with pytest.raises(c.ConfigError) as error:
            validate(config)
        assert error.value.field == path


def test_pattern_and_inserts():
    model = c.ModelConfig(layers=4, pattern="dense,routed", inserts="first=dense@0,mid=routed@2,last=dense@4")
    assert [ffn.name for ffn in parse_pattern(model)] == ["dense", "routed"]
    found = [(insert.name, insert.ffn.name, insert.before) for insert in parse_inserts(model)]
    assert found == [("first", "dense", 0), ("mid", "routed", 2), ("last", "dense", 4)]
    assert not block_layers(c.ModelConfig(pattern="dense"), "routed")
    assert block_layers(c.ModelConfig(pattern="dense", inserts="a=routed@1"), "routed")
    validate(c.Config(model=model))


@pytest.mark.parametrize(
    "changes",
    [
        {"model.activation": "swiglu", "model.ffn_bias": True},
        {"model.pattern": "dense", "model.moe.top_k": 9, "mesh.expert": 16},
        {"model.heads": 3, "model.head_width": 32},
        {"model.positions": "learned", "model.position_offset": 2, "model.max_positions": 256},
        {"model.tied_embeddings": False, "model.row_gradients": True},
        {"model.rope_scaling": "llama3"},
        {"model.moe.execution": "dropless", "model.moe.eval_capacity": 2.0},
        {"model.pattern": "peer", "model.peer.top_k": 1, "model.peer.score": "sigmoid"},
        {"model.pattern": "peer", "model.peer.share_keys": False, "model.peer.query_rank": 64},
        {"model.pattern": "pkm", "model.peer.selector": "token_hash", "model.peer.experts": 130, "model.peer.top_k": 1},
        {"model.moe.execution": "capacity", "model.moe.capacity_priority": "gate", "model.moe.renormalise_kept": True},
        {"mesh.fsdp": 2, "mesh.expert": 2, "mesh.tensor": 2, "mesh.cpu_devices": 8},
        {"model.moe.exchange": "ragged", "model.moe.exchange_buffer": 0, "mesh.expert": 2},
        {"optimizer.warmup_steps": 2000},
        {"train.profile_steps": "1:1001"},
        {"init.checkpoint": "gs://bucket/run", "init.include": "blocks,embed"},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_accepts(changes):
    config = c.Config()
    for path, value in changes.items():
        owner = {p: o for p, o, _ in c.leaves(config)}[path]
        setattr(owner, path.rpartition(".")[2], value)
    validate(config)


@pytest.mark.parametrize(
    ("mesh", "devices", "batch", "message"),
    [
        (
            (-1, 1, 3, 1),
            8,
            24,
            "config.mesh.data=-1: fsdp=1 * expert=3 * tensor=1 = 3 does not divide the 8 devices",
        ),
        (
            (4, 2, 2, 1),
            8,
            16,
            "config.mesh.data=4: data=4 * fsdp=2 * expert=2 * tensor=1 = 16, but there are 8 devices",
        ),
        (
            (-1, 2, 2, 1),
            8,
            12,
            "config.data.batch_size=12: not a multiple of train.microbatches=1 * 8 shards",
        ),
        ((-1, 2, 2, 2), 8, 12, None),
        ((-1, 2, 2, 1), None, 12, None),
        (
            (-1, 2, 2, 1),
            None,
            10,
            "config.data.batch_size=10: not a multiple of train.microbatches=1 * 4 shards",
        ),
        (
            (3, 1, 1, 1),
            None,
            16,
            "config.data.batch_size=16: not a multiple of train.microbatches=1 * 3 shards",
        ),
    ],
)
def test_devices(mesh, devices, batch, message):
    config = c.Config(mesh=c.MeshConfig(*mesh))
    config.model.moe.experts = 12
    config.data.batch_size = batch
    if message is None:
        validate(config, devices)
    else:
        with pytest.raises(c.ConfigError) as error:
            validate(config, devices)
        assert str(error.value).startswith(message)


def test_sources():
    config = c.Config()
    held_out = {"validation_files": "v", "test_files": "t"}
    config.data.sources = (
        c.SourceConfig(files="a", **held_out),
        c.SourceConfig(name="b", weight=0.0, test_files="t"),
    )
    config.data.held_out_percent = 0.0
    validate(config)
    config.data.sources[0].test_files = ""
    with pytest.raises(c.ConfigError, match=r"held_out_percent=0.0: .*data\.sources\[0\]\.test_files"):
        validate(config)


def test_a_weight_that_draws_no_row_is_refused():
    config = c.Config()
    config.data.sources = tuple(c.SourceConfig(name=name, tfds="x", weight=1e6) for name in "ab")
    validate(config)
    config.data.sources[1].weight = 1e-40
    with pytest.raises(
        c.ConfigError, match=r"sources\[1\].weight=1e-40: less than 1e-09 of the largest weight, 1000000.0: no row"
    ) as error:
        validate(config)
    assert error.value.fix == "raise it, or use 0 for evaluation only"
    for weight in (0.0, 1e-3):
        config.data.sources[1].weight = weight
        validate(config)


@pytest.mark.parametrize("config", [None, {}, c.ModelConfig(), c.Config], ids=["None", "dict", "section", "class"])
def test_validate_refuses_what_is_no_config(config):
    with pytest.raises(c.ConfigError, match=r"^config="):
        validate(config)


def test_validate_refuses_a_misspelt_attribute():
    config = c.Config()
    config.model.moe.topk = 1
    with pytest.raises(c.ConfigError, match=r"config.model.moe.topk=1: no such field; did you mean config.model.moe.top_k\?"):
        validate(config)


def test_no_section_is_shared_between_configs():
    first, second = c.Config(), c.Config()
    for entry in dataclasses.fields(c.Config):
        if dataclasses.is_dataclass(entry.type):
            assert getattr(first, entry.name) is not getattr(second, entry.name)
    assert first.data.sources[0] is not second.data.sources[0]
