"""How a run begins: what each way refuses before the text is read, whose tokenizer it takes, and what may change on resume."""

import re

import pytest

from moe_jax.config import Config, ConfigError, SourceConfig, to_dict
from moe_jax.data import BPETokenizer
from moe_jax.train import loop, start
from moe_jax.train.start import FRESH, WAYS, check_resume, inherited_tokenizer, way_of
from tests.train.small import make_config
from tests.train.states import save_run


def test_fine_tuning_keeps_the_vocabulary(tmp_path):
    tokenizer = BPETokenizer.train(["one two three two one " * 20] * 3, 300)
    save_run(tmp_path, make_config(data__vocab_size=300), tokenizer=tokenizer)
    config = make_config(init__checkpoint=str(tmp_path), data__vocab_size=300)
    assert inherited_tokenizer(config).fingerprint == tokenizer.fingerprint
    for include, taken in (("embed,stack", True), ("output/kernel", True), ("stack", False)):
        config.init.include = include
        assert (inherited_tokenizer(config) is not None) == taken
    config.init.include = ""
    config.data.vocab_size = 400
    with pytest.raises(ConfigError, match="data.vocab_size=400: init.checkpoint=.* has 300; "):
        inherited_tokenizer(config)
    config.data.tokenizer = "bytes"
    with pytest.raises(ConfigError, match="data.tokenizer=bytes: .* has bpe; "):
        inherited_tokenizer(config)
    config.init.checkpoint = ""
    assert inherited_tokenizer(config) is None


@pytest.fixture
def no_text(monkeypatch):
    """A run that would read its text fails."""
    monkeypatch.setattr(loop, "show_log", lambda: None)
    monkeypatch.setattr(loop, "start_devices", lambda mesh: None)
    monkeypatch.setattr(loop, "open_data", lambda *args, **options: pytest.fail("the text was read"))


@pytest.mark.usefixtures("no_text")
@pytest.mark.parametrize("field", ["checkpoint", "upcycle_from"])
@pytest.mark.parametrize("theirs", ["nothing", "damaged", "other tokenizer"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_a_run_to_start_from_that_cannot_be_used_is_named_by_its_field(tmp_path, field, theirs):
    source = tmp_path / "source"
    if theirs != "nothing":
        save_run(source, make_config(model__pattern="dense", data__tokenizer="bytes"))
    if theirs == "damaged":
        next((source / "checkpoints" / "1" / "meta").rglob("metadata")).write_text("{}")
    expected = {
        "nothing": rf"^config.init.{field}={source}: no checkpoint; name the workdir of a run that saved one$",
        "damaged": rf"^config.init.{field}={source}: none of steps \[1\] can be read; put back .* another init.{field}$",
        "other tokenizer": rf"^config.data.tokenizer=bpe: init.{field}={source} has bytes; set it to that",
    }
    with pytest.raises(ConfigError, match=expected[theirs]):
        loop.fit(make_config(**{f"init__{field}": str(source)}), tmp_path / "run")


@pytest.mark.parametrize("steps, said", [(1, True), (2, False)])
def test_a_run_shorter_than_its_warm_up_says_so(tmp_path, monkeypatch, capsys, steps, said):
    class Begun(Exception):
        pass

    def open_data(*args, **options):
        raise Begun

    monkeypatch.setattr(loop, "show_log", lambda: None)
    monkeypatch.setattr(loop, "start_devices", lambda mesh: None)
    monkeypatch.setattr(loop, "open_data", open_data)
    with pytest.raises(Begun):
        loop.fit(make_config(train__steps=steps, optimizer__warmup_steps=2), tmp_path)
    line = "warning: config.optimizer.warmup_steps=2 is more than the steps there are: the warm-up takes all 1\n"
    assert (capsys.readouterr().err == line) == said


def test_the_table_of_ways():
    """A way for every field that names a run, and one without a field, last."""
    assert [way.field for way in WAYS] == ["checkpoint", "upcycle_from", "branch_from", ""]
    assert way_of(make_config()) is FRESH
    assert all(way_of(make_config(**{f"init__{way.field}": "x"})) is way for way in WAYS if way.field)


def change(path, value):
    config = Config()
    *sections, name = path.split(".")
    section = config
    for part in sections:
        section = getattr(section, part)
    setattr(section, name, value)
    return config


FREE = {
    **{"train.log_every": 7, "train.eval_every": 7, "train.eval_batches": 7, "train.checkpoint_every": 7},
    **{
        "train.max_to_keep": 7,
        "train.async_checkpoint": False,
        "train.max_skipped": 7,
        "train.profile_steps": "1:2",
    },
    **{"train.peak_tflops": 7.0, "train.tensorboard": False, "model.scan": False, "model.remat": True},
    **{"data.cache_dir": "x", "sample.prompt": "x", "init.checkpoint": "x", "init.include": "x"},
    **{"init.upcycle_from": "x", "init.branch_from": "x", "init.branch_step": 7, "train.keep_steps": "7"},
    **{"model.residual_init": 0.1},
}
WARNED = {
    **{
        "train.steps": 7,
        "mesh.data": 7,
        "mesh.expert": 7,
        "model.attention": "xla",
        "model.moe.backend": "loop",
    },
    **{"model.moe.exchange": "x", "model.moe.exchange_buffer": 7.0, "model.loss_chunk": 7},
}
REFUSED = {
    **{
        "seed": 7,
        "data.batch_size": 7,
        "data.tokenizer": "bytes",
        "data.sources": (SourceConfig(weight=2.0),),
    },
    **{"train.microbatches": 7, "optimizer.learning_rate": 7.0, "model.width": 7, "model.dtype": "bfloat16"},
    **{"model.moe.top_k": 7, "model.moe.routers.top_k.z_loss": 7.0, "model.moe.execution": "capacity"},
}


@pytest.mark.parametrize("path", [*FREE, *WARNED, *REFUSED])
def test_resume_rule(path):
    if path in REFUSED:
        with pytest.raises(ConfigError, match=r"may not change on resume.*--workdir") as error:
            check_resume(Config(), change(path, REFUSED[path]), ())
        assert f"config.{path}" in str(error.value) and "\n" not in str(error.value)
    else:
        warnings = check_resume(Config(), change(path, {**FREE, **WARNED}[path]), ())
        assert len(warnings) == (path in WARNED)
        assert all(path in warning for warning in warnings)
        assert path != "train.steps" or "1000 -> 7: the schedule stretches" in warnings[0]


def test_the_place_of_the_text_may_change_on_resume():
    """Not the text, which is compared where it is read."""
    old, new = Config(), Config()
    old.data.sources = (SourceConfig(files="a/*.txt", validation_files="v.txt", test_files="t.txt"),)
    new.data.sources = (SourceConfig(files="b/*.txt", validation_files="w.txt", test_files="u.txt"),)
    assert check_resume(old, new, []) == []
    new.data.sources[0].document = "line"
    with pytest.raises(ConfigError, match="document file -> line"):
        check_resume(old, new, [])


def test_resume_names_four_fields_and_counts_the_rest():
    new = Config(seed=7)
    for name in ("layers", "width", "heads", "ffn_width", "norm"):
        setattr(new.model, name, "rows\nof text" if name == "norm" else 7)
    with pytest.raises(ConfigError, match=r"seed 0 -> 7, model.layers 4 -> 7, .* and 2 more"):
        check_resume(Config(), new, ())
    assert check_resume(Config(), Config(), ()) == []


def stable(**options) -> Config:
    config = make_config(model__moe__router="stable", model__moe__top_k=1)
    for name, value in options.items():
        setattr(config.model.moe if name == "top_k" else config.model.moe.routers.stable, name, value)
    return config


@pytest.mark.parametrize(
    "theirs, ours, reason",
    [
        ({}, {}, ""),
        ({}, {"stage_1": 0.5, "light_width": 7}, ""),
        ({"light_router": "window"}, {}, "light_router=embedding.*, and .*light_router=window.* in init.checkpoint"),
        ({}, {"light_router": "balanced"}, "model.moe.routers.stable has .*light_router=balanced"),
        ({"backbone": "base"}, {}, "backbone=affinity"),
        ({"backbone": "top_k", "top_k": 2}, {"backbone": "top_k"}, "top_k=1, and .*top_k=2 in"),
    ],
)
def test_a_state_of_another_kind_is_not_filled_in(monkeypatch, theirs, ours, reason):
    """A table of other columns, or one that was learned where it is to be balanced."""
    monkeypatch.setattr(start, "_other_run", lambda config: {"config": to_dict(stable(**theirs))})
    monkeypatch.setattr(start, "_checkpoint_tokenizer", lambda config: "the same")
    said = start._other_routers(stable(**ours))
    assert re.search(reason, said) if reason else said == ""
