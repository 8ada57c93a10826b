"""The command over small runs: every router, odd models, hostile text, and its one-line errors."""

import html.parser
import json
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax.report.__main__ as command
from moe_jax import cli
from moe_jax.config import Config, ModelConfig, MoEConfig, PeerConfig, SourceConfig, to_dict
from moe_jax.config.routers import ROUTER_NAMES
from moe_jax.config.validate import validate
from moe_jax.data import BPETokenizer, ByteTokenizer
from moe_jax.evaluate.__main__ import evaluation_sets
from moe_jax.models.decoder import Decoder
from moe_jax.models.places import by_layer
from moe_jax.report.collect import column_names, dense_layers, observe, routed_layers
from moe_jax.report.history import Series, evaluations, other_sums, series, thinned
from moe_jax.report.page import number, percent, text
from moe_jax.report.passages import colours
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.metrics import MetricsWriter
from moe_jax.train.restore import load_run
from moe_jax.train.routing_metrics import routing_metrics
from tests.models.small import random_variables

pytestmark = [
    # After a read that failed, TensorStore calls back into an event loop that Orbax has closed.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]
HOSTILE = "<script>alert(\"1\")</script> & 'x' \x00\x07\x1b[31m \u202eabc\u202c \u2066 \ufeff é 漢字 עברית $x_1$ </style>\n"
VOID = {"meta", "img", "br", "input"}


class Balanced(html.parser.HTMLParser):
    """Follows the tags of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.wrong, self.attributes, self.text, self.scripts = [], [], [], [], 0
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.scripts += tag == "script"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append((tag, self.getpos()))

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


def check_page(page: str) -> Balanced:
    """Asserts that a page stands alone; returns what was parsed."""
    assert len(page.encode()) < 2_000_000
    assert not re.search(r"https?://|//[a-z]+\.[a-z]|@import|url\(", page, re.IGNORECASE)
    parsed = Balanced(page)
    assert parsed.open == [] and parsed.wrong == []
    for _, name, value in parsed.attributes:
        assert name != "src" or value.startswith("data:image/png;base64,")
        assert name != "href" or value.startswith("#")
        assert not name.startswith("on")
    ids = [value for _, name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for _, name, value in parsed.attributes if name == "href"} <= set(ids)
    return parsed


def make_config(folder, **model) -> Config:
    config = Config()
    config.data.sources = (SourceConfig(name="words", files=f"{folder}/text/*.txt"),)
    config.data.tokenizer, config.data.sequence_length, config.data.batch_size = "bytes", 16, 8
    config.data.held_out_percent, config.data.cache_dir = 30.0, f"{folder}/cache"
    config.mesh.cpu_devices = 0
    moe = MoEConfig(**{"experts": 4} | model.pop("moe", {}))
    config.model = ModelConfig(**{"layers": 2, "width": 8, "ffn_width": 8, "heads": 2, "moe": moe} | model)
    validate(config)
    return config


def make_run(folder, config: Config, tokenizer=None, steps=(1, 2)):
    """A run of random parameters with checkpoints and rows of metrics."""
    tokenizer = tokenizer or ByteTokenizer()
    (folder / "text").mkdir(parents=True, exist_ok=True)
    for i in range(12):
        (folder / "text" / f"{i}.txt").write_text(f"document {i} " + HOSTILE + "word " * 3 * i)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    model = Decoder(config.model, tokenizer.vocab_size)
    meta = {"config": to_dict(config), "tokenizer": tokenizer.to_json(), "data_fingerprint": "?"}
    with Checkpoints(folder, max_to_keep=3, asynchronous=False) as checkpoints:
        for step in steps:
            state = jax.tree.map(jnp.asarray, random_variables(model, seed=step))
            state.setdefault("router_state", {})
            checkpoints.save(step, state | {"step": jnp.int32(step)}, meta)
    token = jnp.ones((1, 1), jnp.int32)
    shapes = jax.eval_shape(lambda v: by_layer(model.apply(v, token, token, token).stats, config.model), state)
    rng = np.random.default_rng(0)
    with MetricsWriter(folder, tensorboard=False) as writer:
        for step in (1, 2, 3):
            stats = jax.tree.map(lambda a: rng.random(a.shape) * 9, shapes)
            row = {"loss": 3.0 / step if step < 3 else np.nan, "learning_rate": 1e-3, "gradient_norm": 1.0}
            row |= {"tokens_per_second": 9.0, "skipped": step - 1, "router/balance_loss": 1.0}
            writer.write(step, row | routing_metrics(stats))
            writer.write(step, {"eval/words/loss": 3.0, "eval/words/bits_per_byte": 2.0})
    return folder


def run(*arguments, capsys):
    """(exit code, stdout, stderr) of the command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        cli.run(command.main, ["command", *arguments], flags=command.define_flags, config_from="workdir")
    return exit.value.code, *capsys.readouterr()


def page_of(folder, *flags, capsys) -> Balanced:
    code, out, err = run(f"--workdir={folder}", "--tokens=300", *flags, capsys=capsys)
    assert code == 0, err
    assert out.strip() == str(folder / "report.html")
    return check_page((folder / "report.html").read_text())


FAST = ("top_k", "soft_moe")


@pytest.mark.parametrize(
    "router", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ROUTER_NAMES]
)
def test_every_router(router, tmp_path, capsys):
    traits = getattr(MoEConfig().routers, router).traits
    top_k = 2 if not traits.top_k or 2 in traits.top_k else 1
    virtual = {"zero_experts": 1, "copy_experts": 1, "constant_experts": 2} if traits.virtual else {}
    config = make_config(tmp_path, moe={"router": router, "top_k": top_k, "allow_noncausal": not traits.causal, **virtual})
    page = page_of(make_run(tmp_path, config), capsys=capsys)
    said = "".join(page.text)
    assert "layer_01" in said and router in said and "The same tokens under step 1 and under step 2" in said
    assert ("matrix is dense" in said) == (router == "soft_moe") == bool(dense_layers(config.model, 257))
    assert ("every token has at most one expert" in said) == (top_k == 1 or router == "soft_moe")
    assert all(name in page.text for name in column_names(config.model))
    pictures = sum(name == "src" for _, name, _ in page.attributes)
    assert pictures == (4 if top_k == 1 or router == "soft_moe" else 5)


def test_what_is_recorded_is_what_the_model_does(tmp_path):
    """Ids, choices, gates and loads against one plain pass over the same rows."""
    config = make_config(tmp_path, moe={"zero_experts": 1})
    folder = make_run(tmp_path, config, steps=(1,))
    loaded = load_run(folder, config)
    flags = cli.own_flags(command.define_flags)
    flags(["command"])
    sets = evaluation_sets(loaded, flags, {})
    seen = observe(loaded, sets, 10**6, 50)
    rows = list(sets["words"].batches(8))
    plain = jax.jit(lambda v, *inputs: loaded.model.apply(v, *inputs, record=True).stats)
    variables = jax.device_get(loaded.variables)
    stats = [plain(variables, b["tokens"], b["positions"], b["segment_ids"]) for b in rows]
    valid = np.concatenate([b["segment_ids"].reshape(-1) > 0 for b in rows])
    assert not valid.all()
    np.testing.assert_array_equal(seen.ids, np.concatenate([b["tokens"].reshape(-1) for b in rows])[valid])
    matrix = np.concatenate([by_layer(s, config.model)["layer_01"]["matrix"] for s in stats])[valid]
    choices = seen.layers["layer_01"]
    np.testing.assert_array_equal(choices.chosen(), matrix > 0)
    np.testing.assert_array_equal(choices.first, matrix.argmax(axis=1))
    assert choices.chosen().sum(axis=1).tolist() == [2] * len(matrix)
    np.testing.assert_array_equal(choices.sums["counts"], (matrix > 0).sum(axis=0)[:4])
    middle = np.concatenate([b["segment_ids"].reshape(-1) > 0 for b in rows[: len(rows) // 2]]).sum()
    np.testing.assert_allclose(choices.gates["words"], matrix[middle : middle + 50], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(seen.passages["words"], seen.ids[middle : middle + 50])
    assert seen.scores["words"]["tokens"] == sets["words"].tokens == len(seen.ids)
    few = observe(loaded, sets, 1, 50)
    assert few.batch == (8, 16) and 0 < len(few.ids) <= 128  # one batch, a row for each of the 8 shards


def test_mixed_blocks_and_hostile_names(tmp_path, capsys):
    """Inserts, two kinds of routed layers' places, E = 1, one checkpoint, sources whose names are markup."""
    config = make_config(
        tmp_path,
        layers=4,
        pattern="dense,routed",
        inserts="first=routed@0,mid=dense@2,Z=routed@4",
        moe={"experts": 1, "top_k": 1},
    )
    assert routed_layers(config.model) == ["first", "layer_01", "layer_03", "Z"]
    folder = make_run(tmp_path, config, steps=(5,))
    name = "<script>\"&'_\u202e$x$"
    files = f"{folder}/text/*.txt"
    page = page_of(folder, f"--source={name}={files}", f"--source=_b={folder}/text/1.txt", capsys=capsys)
    said = "".join(page.text)
    assert page.scripts == 1  # the page's own
    assert "<script>\"&'_\\u202e$x$" in said and "\u202e" not in said and "\x00" not in said
    assert "keeps no older checkpoint" in said
    page_text = (folder / "report.html").read_text()
    assert "&lt;script&gt;&quot;&amp;&#x27;_\\u202e" in page_text
    order = [page.text.index(layer) for layer in ("first", "layer_01", "layer_03", "Z")]
    assert order == sorted(order)


def test_a_dense_model(tmp_path, capsys):
    config = make_config(tmp_path, pattern="dense")
    page = page_of(make_run(tmp_path, config, steps=(2,)), capsys=capsys)
    said = "".join(page.text)
    assert "no routed layers" in said and "Training" in said and "Text by expert" not in said
    assert sum(name == "src" for _, name, _ in page.attributes) == 1  # the curves


@pytest.mark.parametrize("pattern", ["dense,peer", "routed,pkm"])
def test_layers_that_retrieve(pattern, tmp_path, capsys):
    """Figures of each layer's whole pool, with and without routed layers beside it."""
    config = make_config(
        tmp_path,
        pattern=pattern,
        inserts="mid=peer@0",
        peer=PeerConfig(
            experts=64, heads=2, top_k=3, key_width=4, query_norm="layernorm"
        ),  # random running variances are negative
    )
    folder = make_run(tmp_path, config, steps=(2,))
    with MetricsWriter(folder, tensorboard=False, resume_step=3) as writer:
        for step in (1, 3):
            writer.write(step, {"eval/words/router/usage": 0.5, "eval/words/router/unevenness": 1.0})
    said = "".join(page_of(folder, capsys=capsys).text)
    assert "One-neuron experts" in said and "ln 3 = 1.099 nats" in said and "64 experts in a pool" in said
    assert ("no routed layers" in said) == (pattern == "dense,peer")
    # The table's own figures, from the model.
    flags, loaded = cli.own_flags(command.define_flags), load_run(folder, config)
    flags(["command"])
    observed = observe(loaded, evaluation_sets(loaded, flags, {}), 300, 0)
    assert list(observed.retrieved) == ["mid", "layer_01"]
    for name, sums in observed.retrieved.items():
        assert sums["mass"].shape == (64,) and sums["mass"].sum() == pytest.approx(2 * sums["tokens"], rel=1e-5)
        used = np.mean(sums["mass"] > 0)
        assert 0 < used < 1 and f"{name}64{100 * used:.1f} %" in said
    assert evaluations([{"step": 1, "eval/a.b/router/usage": 1.0}], "router/usage").keys() == {"a.b"}


def test_against_itself(tmp_path, capsys):
    folder = make_run(tmp_path, make_config(tmp_path))
    said = "".join(page_of(folder, "--against=2", "--step=2", capsys=capsys).text)
    assert re.search(r"layer_010\.0 %0\.0 %", said)  # nothing changed


@pytest.mark.slow
def test_against_another_run(tmp_path, capsys):
    one, two = (
        make_run(tmp_path / name, make_config(tmp_path / name), steps=steps) for name, steps in (("a", (1, 2)), ("b", (3,)))
    )
    said = "".join(page_of(one, f"--against={two}", "--step=2", capsys=capsys).text)
    assert f"under step 3 of {two} and under step 2" in said


def test_refuses_in_one_line(tmp_path, capsys):
    config = make_config(tmp_path)
    folder = make_run(tmp_path, config)
    other = make_run(tmp_path / "other", make_config(tmp_path, moe={"experts": 3}), steps=(1,))
    tokenizer = BPETokenizer.train(["some words"] * 3, 300)
    words = make_run(tmp_path / "words", make_config(tmp_path), tokenizer, steps=(1,))
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text(json.dumps(to_dict(config)))
    cases = [
        ([f"--workdir={bare}"], "no metrics.jsonl with a row in it"),
        ([f"--workdir={folder}", "--step=7"], "no checkpoint of step 7"),
        ([f"--workdir={folder}", "--tokens=0"], "--tokens=0"),
        ([f"--workdir={folder}", "--source=x"], "not NAME=GLOB"),
        ([f"--workdir={folder}", "--tokens=1", f"--output={folder}"], "error: --output"),
        (
            [f"--workdir={folder}", "--against=9"],
            "error: --against=9: no checkpoint of this step, only of [1, 2]",
        ),
        ([f"--workdir={folder}", f"--against={tmp_path}/nowhere"], "no config.json in it"),
        ([f"--workdir={folder}", f"--against={other}"], "it has other routed layers or experts"),
        ([f"--workdir={folder}", f"--against={words}"], "it has another tokenizer"),
    ]
    for flags, message in cases:
        code, out, err = run(*flags, capsys=capsys)
        last = err.strip().splitlines()[-1]
        assert (code, out) == (2, "") and last.startswith("error: ") and message in last
    (bare / "metrics.jsonl").write_text((folder / "metrics.jsonl").read_text())
    code, _, err = run(f"--workdir={bare}", capsys=capsys)
    assert code == 2 and "no checkpoint" in err.strip().splitlines()[-1]
    code, out, _ = run("--help", capsys=capsys)
    assert code == 0 and "--against" in out and "--source" in out and "--tokens" in out


def test_escaping():
    assert text("<script>\"&'") == "&lt;script&gt;&quot;&amp;&#x27;"
    assert text("a\x00\u202e\u2066\ufeff\ud800\n\tb") == "a\\x00\\u202e\\u2066\\ufeff\\ud800\\n\\tb"
    assert text("&" * 9, 4) == "&amp;&amp;&amp;…"
    for piece in (ByteTokenizer().piece(i) for i in range(257)):
        assert Balanced(f"<p>{text(piece)}</p>").text == [piece]


def test_figures():
    assert [number(v) for v in (None, float("nan"), 0.0, 1234567, 0.12345, 1e-5)] == [
        "–",
        "–",
        "0.000",
        "1,234,567",
        "0.123",
        "1e-05",
    ]
    assert percent(0.1234) == "12.3 %" and percent(float("nan")) == "–"
    for count in (1, 16, 17, 64, 256):
        found = colours(count)
        assert len(set(found)) == count if count <= 64 else len(set(found)) > 250
        for colour in found:  # dark text stays readable
            r, g, b = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
            assert 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.4


def test_series():
    rows = [
        {
            "step": 1,
            "loss": 2.0,
            "router/layer_01/load": [0.5, None],
            "router/layer_01/overflow": 3,
            "router/z_loss": 1.0,
        },
        {"step": 2, "eval/a/loss": 1.0},
        {"step": 4, "loss": None, "router/layer_01/load": [1.0, 0.0]},
    ]
    loss = series(rows, "loss")
    assert loss.steps.tolist() == [1, 4] and loss.values[0] == 2 and np.isnan(loss.values[1])
    assert series(rows, "router/layer_01/load").values.shape == (2, 2)
    assert len(series(rows, "nothing").values) == 0
    sums = other_sums(rows, ["layer_01"])
    assert set(sums) == {"overflow", "z_loss"} and sums["overflow"]["layer_01"].values.tolist() == [3]
    few = thinned(Series(np.arange(1, 8), np.array([1, 3, np.nan, 4, 5, np.nan, np.nan])), 3)
    assert few.steps.tolist() == [2, 4, 7] and few.values.tolist() == [2, 4, 5]


@pytest.mark.slow
def test_large_models_stay_small_pages(tmp_path, capsys):
    """256 experts in 14 routed layers, K = 8, a vocabulary of words, three sources."""
    words = [f"word{i} " for i in range(400)]
    tokenizer = BPETokenizer.train(["".join(words)] * 3, 900)
    config = make_config(tmp_path, layers=14, pattern="routed", moe={"experts": 256, "top_k": 8})
    config.data.tokenizer, config.data.sequence_length = "bpe", 128
    folder = make_run(tmp_path, config, tokenizer)
    rng = np.random.default_rng(0)
    for name in "abc":
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": "".join(rng.choice(words, 9000))}))
    files = [f"--source={name}={folder}/{name}.jsonl" for name in "abc"]
    page = page_of(folder, "--tokens=20000", *files, capsys=capsys)
    said = "".join(page.text)
    assert "4 of the 14 layers" in said and "12 of the 14" not in said


@pytest.mark.slow
def test_a_run_of_the_trainer(tmp_path, capsys):
    """Trained by `fit`, with an average of the parameters."""
    from moe_jax.train.loop import fit

    config = make_config(tmp_path, moe={"router": "remoe"})
    make_run(tmp_path, config)  # for its text
    config.optimizer.warmup_steps, config.optimizer.ema_decay = 2, 0.9
    config.train.steps, config.train.checkpoint_every, config.train.log_every = 12, 6, 2
    folder = tmp_path / "trained"
    assert fit(config, str(folder)) == 0
    started = time.monotonic()
    said = "".join(page_of(folder, capsys=capsys).text)
    assert time.monotonic() - started < 120
    assert "12 of 12; 0 skipped" in said and "under step 6 and under step 12" in said
