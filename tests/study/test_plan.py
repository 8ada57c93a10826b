"""A study's file, its arms as configs, and what may change after the first run."""

import copy
import dataclasses
import itertools
import json
import pathlib
import runpy

import flax.linen as nn
import jax
import pytest

from moe_jax import cli
from moe_jax.config import ConfigError, ModelConfig, leaf_fields, leaves, to_dict
from moe_jax.config.study import Arm, Curve, study_from_dict, study_to_dict
from moe_jax.models.decoder import Decoder
from moe_jax.models.flops import training_flops_per_token
from moe_jax.study import __main__ as command
from moe_jax.study.description import check_unchanged, load_description
from moe_jax.study.plan import prepare, run_config
from tests.models.small import boxed_shapes
from tests.study.small import make_study, write_study

FILE = """
from moe_jax import config as c
from moe_jax.config.study import Arm, Study

def get_config(text="64"):
    config = c.Config()
    config.model.width = int(text)
    arms = (Arm("routed"), Arm("dense", {"model.pattern": "dense,dense"}))
    return Study(config, arms, "routed", full={"train.steps": 2000, "model.layers": 8})
"""


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"arms": ()}, "study arms=(): not a tuple of Arm"),
        ({"arms": (Arm("a"), "b")}, "not a tuple of Arm"),
        ({"seeds": 3}, "study seeds=3: not a tuple of seeds"),
        ({"seeds": ()}, "study seeds=(): not a tuple of seeds"),
        ({"seeds": (1, 1)}, "study seeds=(1, 1): not different integers"),
        ({"seeds": (-1,)}, "not different integers from 0"),
        ({"seeds": (1.0,)}, "not different integers from 0"),
        ({"target_loss": -1.0}, "study target_loss=-1.0: not a number 0 or more"),
        ({"epochs_limit": 0}, "study epochs_limit=0: not a number above 0"),
        ({"baseline": "nobody"}, "study baseline=nobody: no arm with settings of its own; name one of routed, dense"),
        ({"baseline": "twin"}, "study baseline=twin: no arm"),
        ({"arms": (Arm("a/b"),)}, "name of an arm='a/b': not a label; use letters"),
        ({"arms": (Arm(".."),)}, "name of an arm='..': not a label"),
        ({"arms": (Arm("routed"), Arm("routed"))}, "arm routed: there twice; rename one"),
        ({"arms": (Arm("routed"), Arm("t", twin_of="x"))}, "arm t twin_of=x: names no arm"),
        ({"arms": (Arm("routed"), Arm("t", twin_of="u"), Arm("u", twin_of="routed"))}, "arm t twin_of=u: names no arm"),
        ({"arms": (Arm("routed"), Arm("t", {"seed": 1}, "routed"))}, "arm t settings={'seed': 1}: an A/A arm"),
        ({"arms": (Arm("routed", ["a"]),)}, "arm routed settings=['a']: not a dict"),
        (
            {"arms": (Arm("routed"), Arm("s", scores="t"))},
            "arm s scores=t: names no arm that is trained by settings of its own; name one of routed",
        ),
        ({"arms": (Arm("routed"), Arm("s", scores="s"))}, "arm s scores=s: names no arm"),
        (
            {"arms": (Arm("routed"), Arm("s", {"train.steps": 9}, scores="routed"))},
            "arm s config.train.steps=9: the runs of routed are trained",
        ),
        (
            {"arms": (Arm("routed"), Arm("s", {"mesh.expert": 2}, scores="routed"))},
            "arm s config.mesh.expert=2: the runs of routed are trained",
        ),
        (
            {"arms": (Arm("routed"), Arm("s", {"model.width": 64}, scores="routed"))},
            "arm s config.model.width=64: no option of evaluation, and the runs of routed are trained; leave it out",
        ),
        (
            {"arms": (Arm("routed"), Arm("s", {"model.residual_init": 0.1}, scores="routed"))},
            "arm s config.model.residual_init=0.1: no option of evaluation",
        ),
        (
            {
                "arms": (Arm("routed"), Arm("s", full={"model.moe.zero_experts": 2}, scores="routed")),
                "full": {"train.steps": 900},
                "scale": "full",
            },
            "arm s config.model.moe.zero_experts=2: no option of evaluation",
        ),
        ({"arms": (Arm("routed"), Arm("s", baseline="t"))}, "arm s baseline=t: names no arm"),
        (
            {"arms": (Arm("routed"), Arm("s", twin_of="routed", baseline="routed"))},
            "arm s baseline=routed: an A/A arm has that of the other",
        ),
        (
            {"arms": (Arm("routed"), Arm("s", scores="routed"), Arm("t", twin_of="s"))},
            "arm t twin_of=s: it has no runs of its own",
        ),
        ({"arms": (Arm("routed"), Arm("s", scores="routed")), "baseline": "s"}, "study baseline=s: no arm"),
        ({"shown": ("nobody",)}, "study shown=nobody: no arm; name one of routed, twin, dense"),
        ({"shown": "dense"}, "study shown='dense': not a tuple; write such as ('arm',)"),
        ({"shown": None}, "study shown=None: not a tuple"),
        ({"curves": None}, "study curves=None: not a tuple"),
        ({"curves": Curve("c", "t", "x", {})}, "study curves=Curve(name='c', title='t'"),
        ({"curves": (Curve("c", "t", None, {}),)}, "curve c x=None: not a str"),
        ({"curves": (Curve("c", "t", "x", {}, "loss"),)}, "curve c metrics='loss': not a tuple; write such as ('loss',)"),
        ({"curves": (Curve("c", "t", "x", {}, 3),)}, "curve c metrics=3: not a tuple"),
        ({"curves": (Curve("c", "t", "x", {}, (3,)),)}, "curve c metrics=3: no metric"),
        ({"curves": ("a",)}, "study curves='a': no Curve"),
        ({"curves": (Curve("loss", "t", "x", {}),)}, "curve loss: a picture of that name is there"),
        ({"curves": (Curve("c", "t", "x", {"": ["dense"]}),)}, "curve c lines={'': ['dense']}: not a dict of dicts"),
        ({"curves": (Curve("c", "t", "x", {"a": {"nobody": 1}}),)}, "curve c line a=nobody: no arm"),
        (
            {"curves": (Curve("c", "t", "x", {"": {"dense": 0}}),)},
            "curve c arm dense=0: not a number above 0, or the path of one",
        ),
        (
            {"curves": (Curve("c", "t", "x", {"": {"dense": "model.widht"}}),)},
            "curve c arm dense='model.widht': not a number above 0",
        ),
        (
            {"curves": (Curve("c", "t", "x", {"": {"dense": 1}}, ("speed",)),)},
            "curve c metrics=speed: no metric of a run; use loss, bits_per_byte, usage",
        ),
        ({"full": {"model.widht": 1}, "scale": "full"}, "study full config.model.widht=1: no such field; did you mean"),
        ({"scale": "full"}, "--scale=full: the study has no settings for it"),
    ],
)
def test_refused(changes, message):
    scale = changes.pop("scale", "small")
    with pytest.raises(ConfigError) as error:
        prepare(make_study(**changes), scale)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model.widht": 64}, "arm x config.model.widht=64: no such field; did you mean config.model.width?"),
        ({"model.width": "wide"}, "arm x config.model.width=wide: not an int; write an int of 1 or more"),
        ({"model.width": 64.0}, "arm x config.model.width=64.0: not an int"),
        ({"model.scan": "yes"}, "arm x config.model.scan=yes: not a bool"),
        ({"model.moe.top_k": 9}, "arm x config.model.moe.top_k=9: at most model.moe.experts=8; lower top_k"),
        ({"model.moe": 9}, "arm x config.model.moe=9: a section, not a field"),
        ({"model.width": [1]}, "arm x config.model.width=[1]: a list, not a bool, int, float or str"),
        ({"seed": 1}, "arm x config.seed=1: all arms share it: every arm is trained from every seed; name it in the study's"),
        (
            {"noise_seed": 1},
            "arm x config.noise_seed=1: all arms share it: only an A/A arm has another; make an Arm with twin_of",
        ),
        ({"data.sequence_length": 8}, "arm x config.data.sequence_length=8: all arms share it: a token's loss depends on"),
        ({"data.held_out_percent": 9.0}, "arm x config.data.held_out_percent=9.0: all arms share it: it parts the text"),
        ({"data.sources[2].weight": 2.0}, "arm x config.data.sources[2].weight=2.0: data.sources has 2 items"),
    ],
)
def test_settings_are_those_of_the_command_line(settings, message):
    study = make_study(arms=(Arm("routed"), Arm("x", settings)))
    with pytest.raises(ConfigError) as error:
        prepare(study, "small")
    assert str(error.value).startswith(message)


SCORED = [
    path for path, leaf in leaf_fields(ModelConfig).items() if leaf.metadata["role"] not in ("", "start") and "[]" not in path
]


@pytest.mark.slow
@pytest.mark.parametrize("path", SCORED)
def test_what_an_arm_that_scores_may_change_keeps_the_shapes(path):
    model = ModelConfig(layers=1, pattern="peer" if path.startswith("peer.") else "routed", width=16, ffn_width=16, heads=2)
    model.moe.router = path.split(".")[2] if path.startswith("moe.routers.") else "top_k"
    model.moe.eval_capacity = 2.0 if model.moe.router == "top_k" else 0.0  # without a capacity no gate can be renormalised
    shapes = lambda: jax.tree.map(lambda leaf: leaf.shape, nn.unbox(boxed_shapes(Decoder(model, 23))))
    before = shapes()
    owner, leaf = next((owner, leaf) for at, owner, leaf in leaves(model) if at == path)
    old, choices = getattr(owner, leaf.name), leaf.metadata["choices"]
    other = {bool: lambda: not old, int: lambda: old + 1, float: lambda: old / 2}
    setattr(owner, leaf.name, next(x for x in choices if x != old) if choices else other[leaf.type]())
    assert shapes() == before


def test_run_configs():
    study = prepare(make_study(full={"model.layers": 6}), "full")
    base = study.base
    assert base.model.layers == 6 and study.full == {}
    routed, twin, dense = (run_config(study, arm, 5) for arm in study.arms)
    assert routed.seed == 5 and routed.noise_seed == -1 and to_dict(routed) == to_dict(base) | {"seed": 5}
    # The A/A arm has the same settings, and noise of its own for every seed.
    assert twin.noise_seed not in (-1, 5) and to_dict(twin) == to_dict(routed) | {"noise_seed": twin.noise_seed}
    assert run_config(study, study.arm("twin"), 3).noise_seed != twin.noise_seed
    assert dense.model.pattern == "dense,dense" and base.model.pattern == "dense,routed" and base.seed == 0


def test_an_arm_that_scores_has_the_other_ones_settings():
    arms = (Arm("routed"), Arm("one", {"model.moe.top_k": 1}, full={"model.moe.experts": 4}, baseline="one"))
    arms += Arm("capped", {"model.moe.eval_capacity": 1.0}, scores="one"), Arm("again", twin_of="one")
    curve = Curve("c", "t", "x", {"": {"one": "model.moe.experts", "routed": 2}})
    study = prepare(make_study(arms=arms, curves=(curve,), full={"model.layers": 6}), "full")
    one, capped = (run_config(study, study.arm(name), 5) for name in ("one", "capped"))
    assert capped.model.moe.eval_capacity == 1.0 and one.model.moe.eval_capacity == 0.0
    capped.model.moe.eval_capacity = 0.0
    assert to_dict(capped) == to_dict(one) and one.model.moe.experts == 4
    assert [study.baseline_of(arm) for arm in study.arms] == ["routed", "one", "one", "one"]
    assert [arm.name for arm in study.trained()] == ["routed", "one", "again"]
    assert study.curves[0].lines == {"": {"one": 4, "routed": 2}}


# Percent of a step's FLOPs over those of `dense`, as the file of the study says; those of other arms differ by less than 1.
FLOPS = {
    "small": {"n32": -4.1, "n64": -2.7, "n256": 5.5, "n512": 16.4, "64x8": 1.4, "token_hash": -11.0},
    "full": {"n32": -1.1, "n64": -0.7, "n256": 1.5, "n512": 4.4, "64x8": 0.1},
}
STUDIES = pathlib.Path(__file__).resolve().parents[2] / "configs" / "studies"


def parts_of(file):
    """The studies of a file by part, and its docstring."""
    names = runpy.run_path(str(file))
    parts = {part: (part,) for part in names["PARTS"]} if "PARTS" in names else {"": ()}
    return {part: names["get_config"](*arguments) for part, arguments in parts.items()}, names["__doc__"]


@pytest.mark.parametrize("file", sorted(STUDIES.glob("*.py")), ids=lambda file: file.stem)
def test_the_studies_of_this_repository(file):
    """Every arm of every part can be built, at both scales, and the docstring says how to run it."""
    studies, doc = parts_of(file)
    assert f"--config=configs/studies/{file.name}" in doc
    for part, study in studies.items():
        for scale in ("small", "full") if study.full else ("small",):
            prepared = prepare(study, scale)
            for arm in prepared.arms:
                run_config(prepared, arm, 10)
        assert part in doc


@pytest.mark.parametrize("scale", FLOPS)
def test_equal_flops_beside_peer(scale):
    studies, doc = parts_of(STUDIES / "peer.py")
    stated = [line.split() for line in doc.splitlines()]
    assert ["--scale", *FLOPS["small"]] in stated
    percents = [FLOPS[scale].get(name) for name in FLOPS["small"]]
    cells = [("-",) if value is None else (f"{value:+.1f}", "%") for value in percents]
    assert [scale, *itertools.chain(*cells)] in stated
    for study in studies.values():
        if scale == "full" and not study.full:
            continue
        prepared = prepare(study, scale)
        configs = {arm.name: run_config(prepared, arm, 10) for arm in prepared.trained()}
        flops = {
            name: training_flops_per_token(config.model, config.data.vocab_size, config.data.sequence_length)
            for name, config in configs.items()
        }
        for name, value in flops.items():
            percent = 100 * (value / flops["dense"] - 1)
            expected = FLOPS[scale].get(name.removeprefix("peer_").removeprefix("moe_").removesuffix("_time"))
            assert abs(percent) < 1 if expected is None else round(percent, 1) == expected, name
            assert name not in ("peer", "pkm", "hash") or value == flops["dense"]
    half, whole = (prepare(studies[part], scale) for part in ("half", "whole"))
    for arm in half.arms:
        if not arm.equal_time_to:
            config = run_config(whole, whole.arm(arm.name), 10)
            assert 2 * run_config(half, arm, 10).train.steps == config.train.steps
            tokens = config.train.steps * config.data.batch_size * config.data.sequence_length
            assert round(tokens / 1e6, 1) == {"small": 2.0, "full": 9.8}[scale]


def test_json():
    curve = Curve("c", "t", "x", {"": {"dense": 1.0}}, ("loss", "usage"), log=False)
    arms = (*make_study().arms, Arm("s", scores="routed", baseline="dense"))
    study = make_study(full={"model.layers": 6}, target_loss=2.5, title="T", arms=arms, curves=(curve,), shown=("dense",))
    again = study_from_dict(json.loads(json.dumps(study_to_dict(study))))
    assert again == study
    for bad in ({}, {"arms": 3}, study_to_dict(study) | {"arms": [{"nam": 1}]}):
        with pytest.raises(ConfigError, match="not a study"):
            study_from_dict(bad)


def test_what_may_change(tmp_path):
    begun = make_study()
    assert load_description(tmp_path) is None
    write_study(tmp_path, begun)
    kept, about = load_description(tmp_path)
    assert kept == begun and about["scale"] == "small"
    check_unchanged(kept, make_study())
    check_unchanged(kept, make_study(seeds=(0, 3, 5, 7), arms=(*begun.arms, Arm("wide", {"model.width": 256}))))
    wider = copy.deepcopy(begun.base)
    wider.model.width = 256
    routed, twin, dense = begun.arms
    other = dataclasses.replace(dense, settings={"model.pattern": "dense"})
    for changes, message in [
        ({"base": wider}, r"config.model.width=256: the study in --workdir began with 128; put it back"),
        ({"arms": (routed, twin, other)}, r"arm dense settings={'model.pattern': 'dense'}: .* began with .*dense,dense"),
        ({"arms": (routed, dense)}, r"arm twin: the study in --workdir began with it"),
        ({"seeds": (3,)}, r"study seeds=\(3,\): .* began with seed 5 too"),
        ({"baseline": "dense"}, r"study baseline=dense: .* began with routed"),
        ({"target_loss": 2.0}, r"study target_loss=2.0: .* began with 0.0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            check_unchanged(kept, make_study(**changes))
    (tmp_path / "description.json").write_text("{")
    with pytest.raises(ConfigError, match="description.json: JSONDecodeError"):
        load_description(tmp_path)


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.py").write_text(FILE)
    (tmp_path / "plain.py").write_text("from moe_jax import config as c\ndef get_config():\n    return c.Config()\n")
    return tmp_path


def parse(*arguments):
    return cli.parse(["study", "--workdir=w", *arguments], flags=command.define_flags, config_from="study")


def test_the_command_line(files):
    study, flags = parse("--config=study.py:32", "--config.train.steps=700", "--config.seed", "4", "--jobs=2")
    assert (study.base.model.width, study.base.train.steps, study.base.seed) == (
        32,
        700,
        4,
    ) and flags.jobs == 2
    assert study.full == {"model.layers": 8}  # the command line wins over the larger scale
    assert prepare(study, "full").base.train.steps == 700
    assert parse("--summary")[0] is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config=plain.py"], "get_config() returns a Config; return a moe_jax.config.Study"),
        (["--config=study.py", "--config.model.widht=3"], "config.model.widht=3: no such field"),
        (["--config.model.width=3"], "--config: not given"),
        ([], "--config: not given; write --config=FILE, or --summary"),
        (["--summary"], "--workdir=w: no description.json in it; name the folder of a study"),
        (["--config=study.py", "--scale=large"], "--scale=large: value should be one of <small|full>"),
        (["--config=study.py", "--jobs=0"], "--jobs=0: "),
        (["--config=study.py:30"], "arm routed config.model.heads=4: does not divide model.width=30"),
        (["--config=study.py", "--workdir=gs://a/b", "--summary"], "--workdir=gs://a/b: not on this machine"),
    ],
)
def test_one_line(files, capsys, arguments, message, monkeypatch):
    monkeypatch.setattr(cli, "_check_workdir", lambda path, must_exist: None)
    with pytest.raises(SystemExit) as stop:
        cli.run(
            command.main,
            ["study", "--workdir=w", *arguments],
            flags=command.define_flags,
            config_from="study",
        )
    err = capsys.readouterr().err
    assert stop.value.code == 2 and message in err and err.count("\n") == 1
    assert not (files / "w" / "description.json").exists()


def test_train_says_what_to_do_with_a_study(files):
    with pytest.raises(ConfigError, match=r"returns a Study; run it with python -m moe_jax.study"):
        cli.parse(["train.py", "--config=study.py", "--workdir=w"])


def test_help(files, capsys):
    for argument, text in (("--help", "--scale=VALUE"), ("--config.help", "config.noise_seed = -1 ")):
        with pytest.raises(SystemExit) as stop:
            cli.run(command.main, ["study", argument], flags=command.define_flags, config_from="study")
        assert stop.value.code == 0 and text in capsys.readouterr().out
