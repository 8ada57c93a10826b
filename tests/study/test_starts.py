"""Arms that start from the runs of others, and arms with a base and sources of their own, on paper."""

import copy
import json

import pytest

from moe_jax import cli
from moe_jax.config import Config, ConfigError, SourceConfig, to_dict
from moe_jax.config.study import Arm, study_from_dict, study_to_dict
from moe_jax.study import __main__ as command
from moe_jax.study.description import check_unchanged
from moe_jax.study.measure import open_texts
from moe_jax.study.plan import has_sources_of_study, prepare, run_config
from tests.study.small import make_study

DENSE = Arm("dense", {"model.pattern": "dense,dense"})
UPCYCLED = Arm("upcycled", starts_from="dense", start="upcycle_from")
TUNED = Arm("tuned", {"optimizer.learning_rate": 1e-4, "init.include": "blocks"}, starts_from="upcycled")


def family(*more, **changes):
    return make_study(arms=(DENSE, UPCYCLED, TUNED, *more), baseline="dense", **changes)


def base(**data) -> Config:
    """The study's base with other fields of `data`."""
    config = copy.deepcopy(make_study().base)
    for name, value in data.items():
        setattr(config.data, name, value)
    return config


def test_run_configs():
    study = prepare(
        family(Arm("again", twin_of="tuned"), Arm("capped", {"model.moe.eval_capacity": 1.0}, scores="tuned")), "small"
    )
    config = lambda name, **place: run_config(study, study.arm(name), 5, **place)
    assert config("dense").init == Config().init
    upcycled, tuned = config("upcycled", workdir="runs/x"), config("tuned", workdir="runs/x")
    assert (upcycled.init.checkpoint, upcycled.init.upcycle_from) == ("", "runs/x/runs/dense/seed_5")
    assert (tuned.init.checkpoint, tuned.init.upcycle_from) == ("runs/x/runs/upcycled/seed_5", "")
    assert tuned.init.include == "blocks"
    # An A/A arm, and one that scores, begin where the other one does.
    again = config("again", workdir="runs/x")
    assert to_dict(again) == to_dict(tuned) | {"noise_seed": again.noise_seed} and again.noise_seed != -1
    assert config("capped").init == config("tuned").init
    assert [study.needs(arm) for arm in study.arms] == ["", "dense", "upcycled", "upcycled", "tuned"]
    ancestors = [[one.name for one in study.ancestors(arm)] for arm in study.arms]
    assert ancestors == [[], ["dense"], ["upcycled", "dense"], ["upcycled", "dense"], ["upcycled", "dense"]]


@pytest.mark.parametrize(
    "arms, message",
    [
        (
            [Arm("x", starts_from="nobody")],
            "arm x starts_from=nobody: names no arm that is trained by settings of its own; name one",
        ),
        ([Arm("x", starts_from="t"), Arm("t", twin_of="dense")], "arm x starts_from=t: names no arm that is trained"),
        ([Arm("x", starts_from="s"), Arm("s", scores="dense")], "arm x starts_from=s: names no arm that is trained"),
        ([Arm("x", twin_of="dense", starts_from="dense")], "arm x starts_from=dense: an A/A arm has that of the other"),
        ([Arm("x", scores="dense", starts_from="dense")], "arm x starts_from=dense: the runs of dense are trained; leave it"),
        (
            [Arm("x", starts_from="dense", start="copy")],
            "arm x start='copy': no field of init with the folder of a run; use checkpoint",
        ),
        ([Arm("x", start="upcycle_from")], "arm x start=upcycle_from: starts_from is empty; name an arm"),
        (
            [Arm("x", {"init.checkpoint": "y"}, starts_from="dense")],
            "arm x config.init.checkpoint=y: the arm starts from dense",
        ),
        (
            [Arm("x", {"init.upcycle_from": "y"}, starts_from="dense")],
            "arm x config.init.upcycle_from=y: the arm starts from dense",
        ),
        ([Arm("x", starts_from="x")], "arm x starts_from=x: leads back to x: x from x; let one of them"),
        (
            [Arm("x", starts_from="y"), Arm("y", starts_from="z"), Arm("z", starts_from="x")],
            "arm x starts_from=y: leads back to x: x from y from z from x",
        ),
        ([Arm("x", starts_from="y"), Arm("y", starts_from="y")], "arm x starts_from=y: leads back to y: x from y from y"),
        # What train.py refuses is refused before the first run.
        (
            [Arm("x", {"model.pattern": "dense"}, starts_from="dense", start="upcycle_from")],
            "arm x config.init.upcycle_from=DIR/runs/dense/seed_3: there are no experts in model.pattern=dense",
        ),
        (
            [Arm("x", {"data.vocab_size": 300}, starts_from="dense")],
            "arm x config.data.vocab_size=300: the arm starts from dense, which has 4096",
        ),
        (
            [Arm("x", {"data.tokenizer": "bytes"}, starts_from="dense")],
            "arm x config.data.tokenizer=bytes: the arm starts from dense",
        ),
        ([Arm("x", base="config")], "arm x base='config': not a Config; make a moe_jax.config.Config"),
        ([Arm("x", twin_of="dense", base=Config())], "arm x base: an A/A arm has that of the other"),
        ([Arm("x", scores="dense", base=Config())], "arm x base=Config: the runs of dense are trained"),
        (
            [Arm("x", base=base(sequence_length=512))],
            "arm x base config.data.sequence_length=512: all arms share it: a token's loss depends on how many are "
            "before it; the study's base has 256; make them equal",
        ),
        ([Arm("x", {"model.width": 30}, base=Config())], "arm x config.model.heads=4: does not divide model.width=30"),
        ([Arm("x", full=3)], "arm x full=3: not a dict"),
    ],
)
def test_refused(arms, message):
    with pytest.raises(ConfigError) as error:
        prepare(family(*arms), "small")
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_another_vocabulary_may_start_from_what_has_none():
    prepare(family(Arm("x", {"data.vocab_size": 300, "init.include": "blocks"}, starts_from="dense")), "small")


def test_a_base_of_its_own():
    """Settings are over it; so are the study's for the larger scale, before the arm's own; an A/A arm has it too."""
    wide = base()
    wide.model.width, wide.seed = 256, 9
    arms = Arm("wide", {"train.steps": 700}, base=wide, full={"model.layers": 12}), Arm("again", twin_of="wide")
    study = family(*arms, full={"model.layers": 6, "data.sequence_length": 64})
    small, full = prepare(study, "small"), prepare(study, "full")
    one, again = (run_config(small, small.arm(name), 3) for name in ("wide", "again"))
    assert (one.model.width, one.train.steps, one.model.layers, one.seed) == (256, 700, 4, 3)
    assert to_dict(again) == to_dict(one) | {"noise_seed": again.noise_seed}
    layers = {arm.name: run_config(full, arm, 3).model.layers for arm in full.arms}
    assert layers == {"dense": 6, "upcycled": 6, "tuned": 6, "wide": 12, "again": 12}
    assert {run_config(full, arm, 3).data.sequence_length for arm in full.arms} == {64}
    assert study.base.model.layers == wide.model.layers == 4  # the file's own are as they were
    wide.model.width = 200
    with pytest.raises(ConfigError, match="study full arm wide base config.model.heads=16: does not divide model.width=200"):
        prepare(family(Arm("wide", base=wide), full={"model.heads": 16}), "full")


def test_flags_set_every_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = """
from moe_jax import config as c
def get_config():
    wide = c.Config()
    wide.model.width = {width}
    return c.Study(c.Config(), (c.Arm("plain"), c.Arm("wide", base=wide)), "plain")
"""
    parse = lambda *more: cli.parse(
        ["study", "--workdir=w", "--config=s.py", *more], flags=command.define_flags, config_from="study"
    )[0]
    (tmp_path / "s.py").write_text(text.format(width=256))
    study = parse("--config.train.steps=7")
    assert [study.base.train.steps, study.arms[1].base.train.steps, study.arms[1].base.model.width] == [7, 7, 256]
    (tmp_path / "s.py").write_text(text.format(width="'wide'"))
    with pytest.raises(ConfigError, match="arm wide base config.model.width='wide': a str, not an int"):
        parse()


def test_text_before_the_first_run(tmp_path):
    """Until the run that another starts from is there, its text tells the tokenizer of both."""
    for name, words in (("a", "one two three four"), ("c", "fünf sechs sieben acht")):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{word} {i}" for i in range(60) for word in words.split()))
    first = base(
        sources=(SourceConfig(name="a", files=f"{tmp_path}/a.txt", document="line"),),
        vocab_size=300,
        sequence_length=16,
        held_out_percent=20.0,
        cache_dir=str(tmp_path / "cache"),
    )
    second, third = copy.deepcopy(first), copy.deepcopy(first)
    second.data.sources[0].files = third.data.sources[0].files = f"{tmp_path}/c.txt"
    third.init.include = "blocks"
    configs = {"third": third, "second": second, "first": first, "alone": copy.deepcopy(second)}
    texts = open_texts(configs, {}, {"third": "second", "second": "first"})
    json_of = {name: text.tokenizer.to_json() for name, text in texts.items()}
    assert json_of["second"] == json_of["first"] != json_of["alone"] == json_of["third"]
    assert texts["second"].fingerprint != texts["first"].fingerprint and texts["third"] is texts["alone"]


def test_whose_curves_compare():
    """Weights may differ; other text may not, nor a weight of 0, which holds all of a source's text out."""
    only_a = base(sources=(SourceConfig(name="a", files="a.txt"),))
    more = base(sources=(*base().data.sources, SourceConfig(name="c", files="c.txt")))
    other = base(sources=(SourceConfig(name="a", files="a.txt"), SourceConfig(name="b", files="c.txt")))
    arms = [
        (Arm("weights", {"data.sources[0].weight": 3.0}), True),
        (Arm("no_a", {"data.sources[0].weight": 0.0}), False),
        (Arm("files", {"data.sources[1].files": "c.txt"}), False),
        (Arm("only_a", base=only_a), False),
        (Arm("more", base=more), True),
        (Arm("other", base=other), False),
        (Arm("mended", {"data.sources[1].files": "b.txt"}, base=other), True),
        (Arm("twin", twin_of="only_a"), False),
        (Arm("scores", scores="other"), False),
    ]
    study = prepare(family(*(arm for arm, _ in arms)), "small")
    assert [has_sources_of_study(study, study.arm(arm.name)) for arm, _ in arms] == [expected for _, expected in arms]
    assert all(has_sources_of_study(study, study.arm(name)) for name in ("dense", "upcycled", "tuned"))


def test_description():
    study = prepare(family(Arm("wide", base=base())), "small")
    tree = json.loads(json.dumps(study_to_dict(study)))
    assert study_from_dict(tree) == study
    # One that was written before arms had a base and a start.
    for arm in tree["arms"]:
        for name in ("base", "starts_from", "start"):
            del arm[name]
    old = study_from_dict(tree)
    assert [arm.starts_from for arm in old.arms] == [""] * 4 and old.arm("dense") == study.arm("dense")
    with pytest.raises(ConfigError, match="not a study"):
        study_from_dict(tree | {"arms": ["dense"]})


def test_what_may_not_change():
    begun, wider = family(Arm("wide", base=base())), base()
    wider.model.width = 256
    check_unchanged(begun, family(Arm("wide", base=base()), Arm("more", starts_from="wide")))
    for arm, message in [
        (Arm("wide", base=wider), "arm wide base config.model.width=256: the study in --workdir began with 128; put it back"),
        (Arm("wide"), "arm wide base: the study in --workdir began with one"),
        (
            Arm("wide", base=base(), starts_from="dense"),
            "arm wide starts_from=dense: the study in --workdir began with none; put it back",
        ),
    ]:
        with pytest.raises(ConfigError) as error:
            check_unchanged(begun, family(arm))
        assert str(error.value).startswith(message)
