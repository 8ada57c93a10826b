"""The closing results: kept while they are of the newest checkpoint and of what is asked, made again otherwise."""

import json
import math
import types

import jax.numpy as jnp
import pytest

from moe_jax.config import Config
from moe_jax.evaluate import closing
from moe_jax.train.checkpoint import Checkpoints

SCORES = {"documents": 3, "bytes": 5e6, "gzip": 2.0, "xz": 1.5, "xz_each": 1.8}


@pytest.fixture
def scored(monkeypatch):
    """How often the model was scored or sampled."""
    calls = []

    def score(run, sets, show_progress):
        calls.append("score")
        return {"words": SCORES | {"bits_per_byte": math.nan if len(calls) > 1 else 1.25}}

    sets = types.SimpleNamespace(evaluation=lambda split: {"words": types.SimpleNamespace(texts=list)})
    monkeypatch.setattr(closing, "open_data", lambda *args, **options: sets)
    monkeypatch.setattr(closing, "compress_bits_per_byte", lambda texts: {})
    monkeypatch.setattr(closing, "evaluate_sets", score)
    monkeypatch.setattr(closing, "load_run", lambda *args: types.SimpleNamespace(step=1, tokenizer=None))
    monkeypatch.setattr(closing, "sample_text", lambda run, prompts, seed: calls.append("sample") or prompts)
    return calls


def save(workdir, step, value):
    with Checkpoints(workdir, asynchronous=False) as checkpoints:
        checkpoints.save(step, {"w": jnp.float32(value)}, {})


def test_results_follow_the_checkpoint_and_the_question(tmp_path, scored, capsys):
    config, path = Config(), tmp_path / "results.json"
    assert closing.closing_results(config, tmp_path) == 0 and not path.exists()
    config.sample.compare_compressors = True
    save(tmp_path, 1, 0.5)
    for _ in range(2):
        assert closing.closing_results(config, tmp_path) == 0
    out = capsys.readouterr().out
    assert scored == ["score"] and out.count("words: 1.250 bits per byte on 3 held-out documents") == 2
    config.sample.prompt = "a"
    closing.closing_results(config, tmp_path)
    config.sample.prompt = "b"
    closing.closing_results(config, tmp_path)
    assert scored == ["score", *["score", "sample"] * 2]
    # What is not a number is null, and prints so from the file as well.
    closing.closing_results(config, tmp_path)
    assert "NaN" not in path.read_text() and json.loads(path.read_text())["sample"] == "b"
    assert capsys.readouterr().out.count("words: not finite bits per byte") == 3 and len(scored) == 5
    # The same step trained again, and a file that was cut off.
    (tmp_path / "checkpoints" / "1").rename(tmp_path / "old")
    save(tmp_path, 1, 0.75)
    closing.closing_results(config, tmp_path)
    assert len(scored) == 7
    path.write_text(path.read_text()[:50])
    closing.closing_results(config, tmp_path)
    assert len(scored) == 9 and json.loads(path.read_text())["step"] == 1
