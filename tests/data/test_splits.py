"""Held-out text is no training text."""

import gzip
import hashlib
import json
import os
import pathlib

import pytest

from moe_jax.config import Config, ConfigError, DataConfig, SourceConfig
from moe_jax.config.validate import validate
from moe_jax.data import open_data
from moe_jax.data.hashing import digest


def open_one(folder, percent=10.0, **source):
    config = DataConfig(
        sources=(SourceConfig(name="a", **source),),
        tokenizer="bytes",
        sequence_length=16,
        held_out_percent=percent,
        cache_dir=str(folder / "cache"),
    )
    validate(Config(data=config))
    return open_data(config)


def texts(data):
    """Documents by split, read back from the streams."""
    found = {split: list(data.evaluation(split)["a"].texts()) for split in ("validation", "test")}
    stream = data._train[0][1]._stream
    return found | {"train": bytes(t if t < 256 else 0 for t in stream.tokens).decode().split("\0")[1:-1]}


def write(folder, texts):
    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i:02}.txt").write_text(text)


# Fingerprints and documents of train, validation and test from before equal texts were looked for.
EARLIER = {
    "files": ("25d4f0e37ad4c81f8bd666b081c13169", [25, 4, 1]),
    "rows": ("0d311f3a72a396a6e2267a34477d51e0", [34, 4, 2]),
    "lines": ("102322f5a45fb4380c7bbfb1f08211c3", [32, 3, 5]),
    "named": ("ecb19ed0e8de911055afe7adc58b21c5", [26, 1, 4]),
}


@pytest.mark.parametrize("name", EARLIER)
def test_text_without_equal_documents_keeps_its_split_and_fingerprint(tmp_path, name):
    write(tmp_path / "a", [f"text {i} " + "word " * i for i in range(30)])
    rows = [{"text": f"row {i % 25}", "n": i} for i in range(40)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "c.txt").write_text("".join(f"line {i}\n" for i in range(40)))
    (tmp_path / "d.txt").write_text("held out")
    source = {
        "files": {"files": f"{tmp_path}/a/*.txt"},
        "rows": {"files": f"{tmp_path}/b.jsonl"},
        "lines": {"files": f"{tmp_path}/c.txt", "document": "line"},
        "named": {"files": f"{tmp_path}/a/*.txt", "validation_files": f"{tmp_path}/d.txt"},
    }[name]
    data = open_one(tmp_path, **source)
    counts = [data.report["a"][split]["documents"] for split in ("train", "validation", "test")]
    assert (data.fingerprint, counts) == EARLIER[name]


def test_equal_files_are_on_one_side(tmp_path):
    write(tmp_path / "a", [f"text {i}" for i in range(30)])
    before = open_one(tmp_path, files=f"{tmp_path}/a/*.txt").fingerprint
    for i in range(40):
        (tmp_path / "a" / f"copy{i:02}.txt").write_text("the same text")
    for i in range(5):
        (tmp_path / "a" / f"zip{i}.txt.gz").write_bytes(gzip.compress(f"text {i}".encode()))
    data = open_one(tmp_path, files=f"{tmp_path}/a/*")
    found = {split: list(map(str, documents)) for split, documents in texts(data).items()}
    assert sum(map(len, found.values())) == 75 and data.fingerprint != before
    assert min(map(len, found.values())) > 0
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not set(found[one]) & set(found[other])
    report = data.report["a"]
    assert sum(counts["repeated"] for counts in report.values()) == 39 + 5
    assert not any("in the training text too" in counts for counts in report.values())


def test_nothing_but_copies_cannot_be_split(tmp_path):
    write(tmp_path / "a", ["the same text"] * 40)
    with pytest.raises(ConfigError, match="1 different documents leave .* empty"):
        open_one(tmp_path, files=f"{tmp_path}/a/*.txt")


def test_equal_pieces_of_long_files_are_on_one_side(tmp_path):
    line = "a line of a book that is longer than a piece\n"
    write(tmp_path / "a", [line * 3000 + f"the end {i}\n" for i in range(20)])
    found = texts(open_one(tmp_path, files=f"{tmp_path}/a/*.txt"))
    train = {text.encode() for text in found["train"]}
    assert not train & {*found["validation"], *found["test"]} and found["validation"] and found["test"]


def test_copies_that_need_not_move_leave_the_fingerprint(tmp_path):
    """A checkpoint of such text may still be resumed: the hashes of names had put the two on one side."""
    write(tmp_path / "a", [f"text {i}" for i in range(30)])
    trained = texts(open_one(tmp_path, files=f"{tmp_path}/a/*.txt"))["train"]
    one, other = trained[0], trained[1]
    path = next(path for path in sorted((tmp_path / "a").iterdir()) if path.read_text() == other)
    path.write_text(one)
    data = open_one(tmp_path, files=f"{tmp_path}/a/*.txt")
    assert data.report["a"]["train"]["repeated"] == 1
    stream = digest("stream", 1, earlier_digest(tmp_path / "a"), data.tokenizer.fingerprint)
    assert data._train[0][1]._stream.digest == stream


def earlier_digest(folder):
    rows = [(path.name, hashlib.blake2b(path.read_bytes()).hexdigest()) for path in sorted(folder.iterdir())]
    return digest("held out", digest(digest(rows), ("file", "text")), ["validation", "test"], 10.0, "train")


@pytest.mark.parametrize("way", ["relative", "symbolic link", "hard link", "folder link"])
def test_a_held_out_file_is_no_training_file_by_whatever_path(tmp_path, monkeypatch, way):
    write(tmp_path / "base", [f"text {i}" for i in range(5)])
    monkeypatch.chdir(tmp_path)
    held_out = pathlib.Path("elsewhere.txt")
    if way == "relative":
        held_out = tmp_path / "base" / "00.txt"
    elif way == "symbolic link":
        held_out.symlink_to(tmp_path / "base" / "00.txt")
    elif way == "hard link":
        os.link("base/00.txt", held_out)
    else:
        pathlib.Path("other").symlink_to("base")
        held_out = pathlib.Path("other/00.txt")
    with pytest.raises(ConfigError, match=r"validation_files=.* is in files too, as base/00.txt; make the globs disjoint"):
        open_one(tmp_path, files="base/*.txt", validation_files=str(held_out))
    data = open_one(tmp_path, files="base/0[1-4].txt", validation_files=str(held_out))  # the advice, followed
    assert data.report["a"]["validation"]["documents"] == 1


def test_a_copy_among_named_held_out_files_is_said(tmp_path, capsys):
    write(tmp_path / "base", [f"text {i}" for i in range(9)])
    write(tmp_path / "held", ["text 3", "another text", "text 4"])
    files = {"files": f"{tmp_path}/base/*.txt", "validation_files": f"{tmp_path}/held/*.txt"}
    data = open_one(tmp_path, **files)
    assert data.report["a"]["validation"]["in the training text too"] == 2
    assert "warning: 2 of 3 documents of a validation are in the training text too\n" in capsys.readouterr().err


def test_advice_on_too_few_documents_works(tmp_path):
    (tmp_path / "book.txt").write_text("\n\n".join(f"paragraph {i}" for i in range(9)))
    with pytest.raises(ConfigError, match="1 different documents leave") as error:
        open_one(tmp_path, files=f"{tmp_path}/book.txt")
    assert error.value.fix.startswith("set data.sources[0].document=paragraph, or add documents, or name other files")
    assert "held_out_percent" not in error.value.fix
    open_one(tmp_path, files=f"{tmp_path}/book.txt", document="paragraph")
    write(tmp_path / "more", [f"text {i}" for i in range(9)])
    open_one(tmp_path, files=f"{tmp_path}/book.txt,{tmp_path}/more/*.txt")
    open_one(
        tmp_path, files=f"{tmp_path}/book.txt", validation_files=f"{tmp_path}/more/01.txt", test_files=f"{tmp_path}/more/02.txt"
    )
    with pytest.raises(ConfigError, match="raise it or name the files"):
        open_one(tmp_path, 0.0, files=f"{tmp_path}/more/*.txt")
    open_one(tmp_path, 1.0, files=f"{tmp_path}/more/*.txt")


def test_advice_where_lines_are_all_there_is(tmp_path):
    (tmp_path / "list.txt").write_text("one\ntwo\nthree\nfour\n")
    with pytest.raises(ConfigError, match="set data.sources\\[0\\].document=line, or"):
        open_one(tmp_path, files=f"{tmp_path}/list.txt")
    open_one(tmp_path, files=f"{tmp_path}/list.txt", document="line")
