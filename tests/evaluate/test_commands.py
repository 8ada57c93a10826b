"""The commands `evaluate` and `generate` over a saved run: what they print, and their one-line errors."""

import gzip
import json
import math

import jax
import numpy as np
import pytest

import moe_jax.evaluate.__main__ as evaluate_command
from moe_jax import cli, generate
from moe_jax.config import Config, ConfigError, ModelConfig, MoEConfig, SampleConfig, SourceConfig, to_dict
from moe_jax.data import BPETokenizer, ByteTokenizer
from moe_jax.evaluate import finite
from moe_jax.evaluate.compression import compress_bits_per_byte
from moe_jax.models.decoder import Decoder
from moe_jax.train.checkpoint import Checkpoints
from moe_jax.train.restore import LoadedRun, load_run
from tests.models.small import random_variables

pytestmark = [
    # After a read that failed, TensorStore calls back into an event loop that Orbax has closed.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]
TOKENIZER = ByteTokenizer()


def make_config(folder):
    config = Config()
    config.data.sources = (SourceConfig(name="words", files=f"{folder}/text/*.txt"),)
    config.data.tokenizer, config.data.sequence_length, config.data.batch_size = "bytes", 16, 8
    config.data.held_out_percent, config.data.cache_dir = 20.0, f"{folder}/cache"
    config.model = ModelConfig(layers=2, width=16, ffn_width=16, heads=2, moe=MoEConfig(experts=4))
    config.sample = SampleConfig(tokens=10)
    config.optimizer.ema_decay = 0.9
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of random parameters: step 1, and step 2 with an average."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text").mkdir()
    for i in range(30):
        (folder / "text" / f"{i}.txt").write_text(f"document {i} " + "word " * i)
    config = make_config(folder)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    model = Decoder(config.model, TOKENIZER.vocab_size)
    meta = {"config": to_dict(config), "tokenizer": TOKENIZER.to_json(), "data_fingerprint": "?"}
    with Checkpoints(folder, max_to_keep=2, asynchronous=False) as checkpoints:
        for step in (1, 2):
            state = jax.tree.map(jax.numpy.asarray, random_variables(model, seed=step))
            state |= {
                "ema": jax.tree.map(lambda a: a / 2, state["params"]),
                "opt_state": {"m": jax.numpy.ones(3)},
            }
            checkpoints.save(step, state | {"step": jax.numpy.int32(step)}, meta)
    return folder


def run(module, *arguments, capsys):
    """(exit code, stdout, stderr) of a command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        cli.run(module.main, ["command", *arguments], flags=module.define_flags, config_from="workdir")
    return exit.value.code, *capsys.readouterr()


def test_the_average_is_used_unless_told_otherwise(workdir):
    config = make_config(workdir)
    loaded = load_run(workdir, config)
    assert loaded.step == 2 and loaded.mesh.size == 8
    expected = random_variables(loaded.model, seed=2)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b / 2), loaded.variables["params"], expected["params"])
    jax.tree.map(np.testing.assert_array_equal, loaded.variables["router_state"], expected["router_state"])
    config.optimizer.ema_decay = 0.0
    config.mesh.expert, config.mesh.tensor = 4, 2
    plain = load_run(workdir, config, step=1)
    expected = random_variables(loaded.model, seed=1)
    jax.tree.map(np.testing.assert_array_equal, plain.variables["params"], expected["params"])
    w_in = plain.variables["params"]["stack"]["groups"]["block_1"]["moe"]["experts"]["w_in"]
    assert w_in.shape == (1, 4, 16, 16) and w_in.sharding.shard_shape(w_in.shape) == (1, 1, 16, 8)


def test_load_run_refuses(workdir, tmp_path):
    config = make_config(workdir)
    with pytest.raises(ConfigError, match="no checkpoint of step 7, only of"):
        load_run(workdir, config, step=7)
    with pytest.raises(ConfigError, match="no checkpoint"):
        load_run(tmp_path, config)
    config.model.width = 32
    with pytest.raises(ConfigError, match=r"does not fit: .* is float32 \["):
        load_run(workdir, config)


def test_evaluate(workdir, capsys):
    output = workdir / "scores.json"
    code, out, err = run(evaluate_command, f"--workdir={workdir}", "--compare", f"--output={output}", capsys=capsys)
    assert code == 0
    report = json.loads(out)
    assert report == json.loads(output.read_text())
    assert report["step"] == 2 and report["split"] == "test" and list(report["sources"]) == ["words"]
    scores = report["sources"]["words"]
    assert scores["bits_per_byte"] == pytest.approx(scores["loss"] * scores["tokens"] / math.log(2) / scores["bytes"])
    assert scores["tokens"] == scores["bytes"] + scores["documents"]
    assert 0 < scores["gzip"] and 0 < scores["xz"] < scores["xz_each"]
    assert scores["router/dropped"] == 0


@pytest.fixture
def odd_files(tmp_path):
    """Three lines to score, one of them twice, and one document for each reason to leave one out."""
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "a.txt").write_text("one\n")
    (folder / "copy.txt").write_text("one\n")
    (folder / "latin.txt").write_bytes("é".encode("latin-1"))
    (folder / "rows.jsonl").write_text('{"line": "two"}\n{"line": null}\n{"text": ""}\n{"li\n{"line": ""}\n')
    (folder / "zip.txt.gz").write_bytes(gzip.compress(b"three" * 99)[:-9])
    return folder


def test_evaluate_other_text(workdir, tmp_path, odd_files, capsys):
    (tmp_path / "poem.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "poem.jsonl").write_text('{"line": "four"}\n')
    flags = (f"--workdir={workdir}", "--document=line", "--text_feature=line", "--step=1")
    sources = [
        f"--source={name}={files}"
        for name, files in (("lines", tmp_path / "*.txt"), ("rows", tmp_path / "*.jsonl"), ("odd", odd_files / "*"))
    ]
    code, out, err = run(evaluate_command, *flags, *sources, "--batches=1", "--compare", capsys=capsys)
    assert code == 0, err
    report = json.loads(out)
    assert report["step"] == 1 and "split" not in report
    assert {name: scores["documents"] for name, scores in report["sources"].items()} == {"lines": 3, "rows": 1, "odd": 3}
    assert report["sources"]["rows"]["gzip"] == compress_bits_per_byte([b"four"])["gzip"]
    assert report["sources"]["lines"]["left_out"] == report["sources"]["lines"]["left_out_first"] == {}
    odd = report["sources"]["odd"]
    assert (odd["repeated"], odd["empty"]) == (1, 1) and set(odd["left_out"].values()) == {1}
    assert odd["left_out_first"] == {
        "not UTF-8": "latin.txt",
        "null text": "rows.jsonl row 2",
        "no such feature": "rows.jsonl row 3",
        "not JSON": "rows.jsonl row 4",
        "gzip cut short": f"zip.txt.gz, cut at {(odd_files / 'zip.txt.gz').stat().st_size} bytes",
    }
    said = ", ".join(f"1 {reason} (the first: {place})" for reason, place in odd["left_out_first"].items())
    assert f"warning: odd: left out: {said}\n" in err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--source=x"], "--source=x: not NAME=GLOB"),
        (["--source=a=b", "--source=a=c"], "the name a is there twice"),
        (["--source=a=/nowhere/*.txt"], "--source=/nowhere/*.txt: matches no file"),
        (["--source=a=base/**.txt"], "--source=base/**.txt: has ** beside other characters of a name; write base/**/*.txt"),
        (["--config.data.cache_dir=/dev/null"], "config.data.cache_dir=/dev/null: is no folder that can be made"),
        (["--step=5"], "no checkpoint of step 5"),
        (["--split=train"], "--split=train"),
        (["--config.mesh.tensor=3"], "config.mesh.tensor=3"),
        (["--config.mesh.data=2"], "the product must be the device count, 8"),
    ],
)
def test_evaluate_refuses_in_one_line(workdir, flags, message, capsys):
    code, out, err = run(evaluate_command, f"--workdir={workdir}", *flags, capsys=capsys)
    last = err.strip().splitlines()[-1]
    assert (code, out) == (2, "") and last.startswith("error: ") and message in last


def test_not_finite_is_null():
    tree = {"a": math.nan, "b": {"c": math.inf, "d": 1.5, "e": 3}}
    assert finite(tree) == {"a": None, "b": {"c": None, "d": 1.5, "e": 3}}


def test_generate(workdir, capsys):
    flags = (f"--workdir={workdir}", "--temperature=1.5", "--seed=3")
    code, out, err = run(generate, *flags, "--prompt=def ", capsys=capsys)
    assert code == 0 and out.startswith("def ") and len(out.encode()) > 5
    assert run(generate, *flags, "--prompt", "def ", capsys=capsys)[1] == out
    code, both, err = run(generate, *flags, "--prompt=def ", "--prompt=é", capsys=capsys)
    assert both.startswith(f"=== 1 of 2 ===\n{out}\n=== 2 of 2 ===\né")
    code, other, err = run(generate, *flags, "--prompt=def ", "--tokens=3", capsys=capsys)
    assert out.startswith(other.rstrip("\n\ufffd"))


def test_generate_refuses_in_one_line(workdir, capsys):
    for flags, message in (
        ([], "--prompt: not given"),
        (["--prompt=a", "--tokens=0"], "config.sample.tokens=0"),
        (["--prompt=a", "--top_p=2"], "config.sample.top_p=2"),
        (["--prompt=a\udc80"], "is no UTF-8"),
    ):
        code, out, err = run(generate, f"--workdir={workdir}", *flags, capsys=capsys)
        last = err.strip().splitlines()[-1]
        assert (code, out) == (2, "") and last.startswith("error: ") and message in last


def test_help(capsys):
    for module in (generate, evaluate_command):
        code, out, _ = run(module, "--help", capsys=capsys)
        assert code == 0 and "--workdir" in out and "--step" in out


def test_a_prompts_last_token_is_drawn_again():
    """With a model that knows only whole words, a prompt may stop inside of one."""
    tokenizer = BPETokenizer.train(["def define(deft): return deft define " * 20] * 3, 300)
    starts, first = generate._starts(tokenizer, ["x def", "", "é"])
    pieces = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
    assert tokenizer.decode(starts[0]) in ("x", "x ")
    rest = "x def".removeprefix(tokenizer.decode(starts[0])).encode()
    assert {pieces[i] for i in np.flatnonzero(first[0])} == {piece for piece in pieces if piece.startswith(rest)}
    assert first[0].sum() > 1 and not first[0][tokenizer.bos]
    assert starts[1].tolist() == [tokenizer.bos] and first[1].all()
    assert all(start[0] == tokenizer.bos for start in starts)


def test_samples_end(workdir):
    loaded = load_run(workdir, make_config(workdir))
    sample = SampleConfig(tokens=12, temperature=1.5, top_p=1.0)
    prompts = ["word ", "", "é"]
    texts = generate.sample_text(loaded, prompts, sample, seed=1)
    assert all(text.startswith(prompt) and len(text) > len(prompt) for text, prompt in zip(texts, prompts))
    assert isinstance(loaded, LoadedRun) and texts == generate.sample_text(loaded, prompts, sample, seed=1)
    stop = texts[0][len("word ") + 3]
    sample.stop = stop
    stopped = generate.sample_text(loaded, prompts, sample, seed=1)[0]
    assert stopped == "word " + texts[0].removeprefix("word ").split(stop)[0]
