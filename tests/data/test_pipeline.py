import itertools
import os
import subprocess
import sys

import numpy as np
import pytest

from moe_jax.config import ConfigError, DataConfig, SourceConfig
from moe_jax.data import ByteTokenizer, evaluation_set, open_data, streams


def write(folder, documents, size=40):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(documents):
        (folder / f"{i:03}.txt").write_text(f"{folder.name} {i} " + "".join(f"{i}w{j} " for j in range(i % size)))


def make_config(tmp_path, *sources, **kwargs):
    settings = {"tokenizer": "bytes", "sequence_length": 16, "held_out_percent": 10.0} | kwargs
    return DataConfig(sources=sources, cache_dir=str(tmp_path / "cache"), **settings)


@pytest.fixture
def config(tmp_path):
    write(tmp_path / "a", 30)
    return make_config(tmp_path, SourceConfig(name="a", files=f"{tmp_path}/a/*.txt"))


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
        assert a[name].dtype == b[name].dtype


def take(iterator, count):
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


@pytest.mark.smoke
def test_resume_equals_the_uninterrupted_stream_across_an_epoch(config):
    data = open_data(config)
    batch_size = 7
    epoch = data.train_rows // batch_size
    assert data.train_rows % batch_size, "an epoch should end inside a batch"
    whole = take(data.train_batches(3, batch_size), 2 * epoch + 5)
    for start in (1, epoch - 1, epoch, epoch + 1, 2 * epoch):
        for a, b in zip(whole[start:], take(data.train_batches(3, batch_size, start), 4)):
            assert_equal(a, b)
        assert_equal(whole[start], data.train_batch(3, batch_size, start))


def test_every_epoch_holds_every_row_once_in_a_new_order(config):
    data = open_data(config)
    rows = data.train_rows
    epochs = [data.train_batch(0, rows, step)["tokens"] for step in range(3)]
    ordered = [sorted(map(tuple, epoch)) for epoch in epochs]
    assert ordered[0] == ordered[1] == ordered[2]
    assert not (epochs[0] == epochs[1]).all() and not (epochs[1] == epochs[2]).all()
    assert not (epochs[1] == data.train_batch(1, rows, 0)["tokens"]).all()
    assert not (epochs[0] == data.train_batch(1, rows, 0)["tokens"]).all()


@pytest.mark.parametrize("processes", [2, 4])
def test_slices_make_the_global_batch(config, processes):
    data = open_data(config)
    share = 8 // processes
    slices = [slice(i * share, (i + 1) * share) for i in range(processes)]
    whole = take(data.train_batches(5, 8, start_step=2), 3)
    parts = [take(data.train_batches(5, 8, start_step=2, rows=rows), 3) for rows in slices]
    for step, batch in enumerate(whole):
        assert batch["tokens"].shape == (8, 16)
        assert_equal(batch, {k: np.concatenate([part[step][k] for part in parts]) for k in batch})
    evaluation = data.evaluation()["a"]
    for batch, *shares in zip(evaluation.batches(8), *[evaluation.batches(8, rows=rows) for rows in slices]):
        assert_equal(batch, {k: np.concatenate([part[k] for part in shares]) for k in batch})


def test_batch_larger_than_the_training_text(config):
    data = open_data(config)
    batch = data.train_batch(0, 3 * data.train_rows, 0)
    assert len({tuple(row) for row in batch["tokens"]}) == data.train_rows


def test_mixture_follows_the_weights(tmp_path):
    write(tmp_path / "a", 30)
    write(tmp_path / "b", 60)
    write(tmp_path / "c", 30)
    sources = [SourceConfig(name=n, files=f"{tmp_path}/{n}/*.txt", weight=w) for n, w in (("a", 3.0), ("b", 1.0))]
    sources.append(SourceConfig(name="c", files=f"{tmp_path}/c/*.txt", weight=0.0))
    config = make_config(tmp_path, *sources, sequence_length=64)
    data = open_data(config)
    names = {"a": 0, "b": 0}
    rows = [bytes(t[t < 256].tolist()) for b in take(data.train_batches(0, 8), 50) for t in b["tokens"]]
    for row in rows:
        owners = [name for name in "abc" if any(f"{name} {i} ".encode() in row for i in range(60))]
        assert "c" not in owners and len(owners) <= 1
        if owners:
            names[owners[0]] += 1
    assert abs(names["a"] / sum(names.values()) - 0.75) < 0.04
    assert set(data.evaluation()) == set(data.evaluation("test")) == {"a", "b", "c"}
    assert set(data.report["c"]) == {"validation", "test"}


def test_evaluation_bytes_and_texts(config):
    for tokenizer in ("bytes", "bpe"):
        config.tokenizer, config.vocab_size = tokenizer, 300
        data = open_data(config)
        for split in ("validation", "test"):
            evaluation = data.evaluation(split)["a"]
            batches = list(evaluation.batches(4))
            assert {batch["tokens"].shape for batch in batches} == {(4, 16)}
            token_bytes = data.tokenizer.token_bytes
            assert sum((token_bytes[b["targets"]] * b["loss_weights"]).sum() for b in batches) == evaluation.bytes
            assert sum(batch["loss_weights"].sum() for batch in batches) == evaluation.tokens
            texts = list(evaluation.texts())
            assert (len(texts), sum(map(len, texts))) == (evaluation.documents, evaluation.bytes)
            assert all(text.startswith(b"a ") for text in texts)
            assert data.report["a"][split]["rows"] == evaluation.rows


def test_limited_evaluation_is_spread_evenly(config):
    config.held_out_percent = 30.0
    evaluation = open_data(config, splits=["validation"], tokenizer=ByteTokenizer()).evaluation()["a"]
    whole = list(evaluation.batches(2))
    limited = list(evaluation.batches(2, limit=3))
    assert len(limited) == 3 < len(whole)
    for i, batch in enumerate(limited):
        assert_equal(batch, whole[i * len(whole) // 3])
    assert len(list(evaluation.batches(2, limit=1000))) == len(whole)


def test_cache_is_reused_until_a_file_changes(config, tmp_path, monkeypatch):
    first = open_data(config)
    built = []
    write_stream = streams._write_stream
    monkeypatch.setattr(streams, "_write_stream", lambda *args: built.append(args[3]) or write_stream(*args))
    again = open_data(config)
    assert not built and again.fingerprint == first.fingerprint and again.report == first.report
    config.sequence_length = 32
    assert open_data(config).fingerprint != first.fingerprint and not built
    config.sequence_length = 16

    path = tmp_path / "a" / "003.txt"
    old = path.stat()
    path.write_text(path.read_text().swapcase())
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    changed = open_data(config)
    assert built and changed.fingerprint != first.fingerprint


def test_bpe_is_trained_once_and_a_given_tokenizer_is_used(config, tmp_path):
    config.tokenizer, config.vocab_size = "bpe", 320
    data = open_data(config)
    assert 257 < data.tokenizer.vocab_size <= 320
    assert open_data(config).tokenizer.fingerprint == data.tokenizer.fingerprint
    assert len(list((tmp_path / "cache" / "tokenizers").iterdir())) == 1
    assert open_data(config, tokenizer=ByteTokenizer()).tokenizer.vocab_size == 257


def test_a_new_evaluation_source_leaves_the_fingerprint(config, tmp_path):
    before = open_data(config).fingerprint
    extra = SourceConfig(name="b", files=f"{tmp_path}/a/00*.txt", weight=0.0)
    config.sources = (*config.sources, extra)
    data = open_data(config)
    assert data.fingerprint == before and set(data.evaluation()) == {"a", "b"}


def test_evaluation_set_from_the_command_line(config, tmp_path):
    tokenizer = ByteTokenizer()
    evaluation = evaluation_set("mine", f"{tmp_path}/a/00*.txt", tokenizer, config)
    assert (evaluation.name, evaluation.documents) == ("mine", 10)
    assert next(evaluation.batches(4))["tokens"].shape == (4, 16)
    with pytest.raises(ConfigError, match="^--source=.*nothing: matches no file"):
        evaluation_set("mine", f"{tmp_path}/nothing", tokenizer, config)
    (tmp_path / "b.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(ConfigError, match="^--text_feature=text: no row has .*; choose one of its texts: body"):
        evaluation_set("mine", f"{tmp_path}/b.jsonl", tokenizer, config)
    assert evaluation_set("mine", f"{tmp_path}/b.jsonl", tokenizer, config, text_feature="body").documents == 1
    (tmp_path / "c.jsonl").write_text('{"text": null}\n' * 3)
    with pytest.raises(ConfigError, match=r"^--source=.*has no text \(left out: 3 null text \(the first: c.jsonl row 1\)\)"):
        evaluation_set("mine", f"{tmp_path}/c.jsonl", tokenizer, config)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ConfigError, match="--source.*no text"):
        evaluation_set("mine", f"{tmp_path}/empty.txt", tokenizer, config)


def test_undecodable_files_are_counted(config, tmp_path):
    (tmp_path / "a" / "latin.txt").write_bytes("é".encode("latin-1"))
    report = open_data(config).report["a"]
    assert sum(counts.get("left out: not UTF-8", 0) for counts in report.values()) == 1
    assert sum(counts["documents"] for counts in report.values()) == 30


def test_what_is_left_out_is_said_with_its_place(config, tmp_path, capsys):
    config.sources[0].files += f",{tmp_path}/rows.jsonl"
    (tmp_path / "a" / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "rows.jsonl").write_text('{"text": "x"}\n{"te\n')
    open_data(config)
    said = "warning: a train: left out: 1 not UTF-8 (the first: latin.txt), 1 not JSON (the first: rows.jsonl row 2)\n"
    assert said in capsys.readouterr().err


def test_held_out_text_of_one_source_in_the_training_text_of_another_is_said(config, tmp_path, capsys):
    config.sources = (*config.sources, SourceConfig(name="b", files=f"{tmp_path}/a/00*.txt", weight=0.0))
    report = open_data(config).report
    trained_on = 10 - sum(report["a"][split]["documents"] for split in ("validation", "test") if split in report["a"])
    assert report["b"]["test"]["in the training text too"] >= trained_on > 0
    assert (
        " documents of b test are in the training text too" in capsys.readouterr().err
        and "in the training text too" not in report["a"]["validation"]
    )


@pytest.mark.parametrize("name", ["cache_dir", "MOE_JAX_CACHE"])
def test_a_cache_that_is_a_file_is_one_line(config, tmp_path, monkeypatch, name):
    (tmp_path / "file").write_text("")
    path, config.cache_dir = config.cache_dir, f"{tmp_path}/file"
    if name == "MOE_JAX_CACHE":
        monkeypatch.setenv(name, config.cache_dir)
        config.cache_dir = ""
    with pytest.raises(ConfigError, match=f"{name}=.*file: is no folder that can be made: File exists; name a folder"):
        open_data(config)
    config.cache_dir = path
    open_data(config)


def test_the_cache_is_found_in_the_home_folder(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config.cache_dir = "~/home cache"
    open_data(config)
    assert (tmp_path / "home cache" / "streams").is_dir()


@pytest.mark.parametrize("content", ["", "{", '{"kind": "bpe"}', None])
def test_a_damaged_tokenizer_is_trained_again_and_said(config, tmp_path, capsys, content):
    config.tokenizer, config.vocab_size = "bpe", 300
    fingerprint = open_data(config).tokenizer.fingerprint
    (path,) = (tmp_path / "cache" / "tokenizers").iterdir()
    path.write_text(path.read_text().replace('"w"', '"y"', 1) if content is None else content)
    assert open_data(config).tokenizer.fingerprint == fingerprint
    assert f"the tokenizer is trained again: {path} holds" in capsys.readouterr().err
    assert open_data(config).tokenizer.fingerprint == fingerprint and not capsys.readouterr().err


def test_too_little_text(tmp_path):
    write(tmp_path / "a", 2)
    config = make_config(tmp_path, SourceConfig(name="a", files=f"{tmp_path}/a/*.txt"))
    with pytest.raises(ConfigError, match=r"sources\[0\].files=.*2 different documents leave .* empty"):
        open_data(config)
    for path in (tmp_path / "a").iterdir():
        path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="left out: 2 not UTF-8"):
        open_data(config)
    config.sources = (SourceConfig(name="a", files=f"{tmp_path}/a/*.txt", weight=0.0),)
    with pytest.raises(ConfigError, match="every weight is 0"):
        open_data(config)
    with pytest.raises(ConfigError, match="has no text in test"):
        open_data(config, tokenizer=ByteTokenizer(), splits=["test"])


def test_remote_cache_is_refused(config):
    config.cache_dir = "gs://bucket/cache"
    with pytest.raises(ConfigError, match="cache_dir"):
        open_data(config)


def test_an_open_iterator_lets_the_process_end(config, tmp_path):
    open_data(config)
    code = (
        "from moe_jax.config import DataConfig, SourceConfig; from moe_jax.data import open_data;"
        f"source = SourceConfig(name='a', files='{tmp_path}/a/*.txt');"
        f"data = open_data(DataConfig(sources=(source,), tokenizer='bytes', cache_dir='{tmp_path}/cache'));"
        "batches = data.train_batches(0, 4); next(batches); print('done')"
    )
    env = os.environ | {"PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=60)
    assert result.returncode == 0 and result.stdout == b"done\n", result.stderr
