import gzip
import hashlib
import json
import shutil
import threading
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from moe_jax.config import ConfigError, DataConfig, SourceConfig
from moe_jax.data import datasets
from moe_jax.data.datasets import prepare
from moe_jax.data.files import PIECE_BYTES, TextFiles
from moe_jax.data.globs import find_files
from moe_jax.data.hashing import HASHES, digest, hash64, hold_out
from moe_jax.data.sources import open_sources
from moe_jax.data.stdlib import PythonStdlib, python_stdlib_config


def read(globs, document="file", text_feature="text"):
    return list(TextFiles(find_files("f", str(globs)), document, text_feature, "f", "text_feature").documents())


def texts(globs, **kwargs):
    return [text for _, text in read(globs, **kwargs)]


def open_one(tmp_path, percent=3.0, **source):
    config = DataConfig(sources=(SourceConfig(**source),), held_out_percent=percent)
    return open_sources(config, epath.Path(tmp_path / "cache"))[0]


def split_texts(source):
    return {name: list(split.documents()) for name, split in source.splits.items()}


def test_hold_out_is_a_partition_with_about_the_share_asked_for():
    hashes = [hash64(str(i)) for i in range(20_000)]
    bounds = hold_out(hashes, ("validation", "test"), 3.0)
    counts = {name: sum(low <= h < high for h in hashes) for name, (low, high) in bounds.items()}
    assert sum(counts.values()) == len(hashes)
    assert abs(counts["validation"] - 600) < 100 and abs(counts["test"] - 600) < 100


def test_hold_out_of_few_documents():
    hashes = [HASHES - 1, HASHES // 2, HASHES - 2]
    bounds = hold_out(hashes, ("validation", "test"), 1.0)
    assert [sum(low <= h < high for h in hashes) for low, high in bounds.values()] == [1, 1, 1]
    for few in ([], [1], [1, 2], [7, 7, 7]):
        with pytest.raises(ValueError, match="empty"):
            hold_out(few, ("validation", "test"), 1.0)


def test_documents_of_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\ntwo\n\n \nthree\u2028é\n".encode())
    assert texts(path) == ["one\r\ntwo\n\n \nthree\u2028é\n"]
    assert texts(path, document="paragraph") == ["one\ntwo", "three\u2028é"]
    assert texts(path, document="line") == ["one", "two", "three\u2028é"]


def test_long_text_is_cut_at_line_ends(tmp_path):
    text = "".join(f"line {i} é\n" for i in range(20_000)) + "é" * 100_000
    (tmp_path / "book.txt").write_text(text)
    documents = read(tmp_path / "book.txt")
    pieces = [piece for _, piece in documents]
    assert "".join(pieces) == text
    assert all(len(piece.encode()) <= PIECE_BYTES for piece in pieces)
    assert all(piece.endswith("\n") for piece in pieces[:-4]) and len(pieces) < 12
    assert len({key for key, _ in documents}) == len(pieces)


def test_gzip_and_jsonl(tmp_path):
    rows = [{"text": "a\nb", "n": 1}, {"text": "", "x": "y"}, {"text": "é"}]
    body = "\n".join(json.dumps(row) for row in rows).encode() + b"\n\n"
    (tmp_path / "a.jsonl").write_bytes(body)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(body))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress("text é".encode()))
    assert texts(tmp_path / "a.jsonl") == texts(tmp_path / "b.jsonl.gz") == ["a\nb", "", "é"]
    assert texts(tmp_path / "c.txt.gz") == ["text é"]
    with pytest.raises(
        ConfigError, match="text_feature=body: no row has such a text, from a.jsonl row 1 on; choose one of its texts: text"
    ):
        texts(tmp_path / "a.jsonl", text_feature="body")


def test_what_cannot_be_read_is_left_out_for_a_reason(tmp_path):
    (tmp_path / "a.txt").write_bytes("latin é".encode("latin-1"))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xff"}\n{"text": "\\ud800"}\n{"te\n')
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"cut off" * 1000)[:-20])
    (tmp_path / "d.txt.gz").write_bytes(b"no gzip")
    (tmp_path / "e.gz").write_bytes(b"\x1f\x8b\x08\0" + b"\0" * 6 + b"\xff" * 20)
    (tmp_path / "f.txt").write_bytes("utf-16".encode("utf-16"))
    assert texts(tmp_path / "*") == [
        ("not UTF-8", "a.txt"),
        "ok",
        ("not UTF-8", "b.jsonl row 2"),
        ("not UTF-8", "b.jsonl row 3"),
        ("not JSON", "b.jsonl row 4"),
        ("gzip cut short", f"c.txt.gz, cut at {(tmp_path / 'c.txt.gz').stat().st_size:,} bytes"),
        ("not gzip", "d.txt.gz"),
        ("damaged gzip", "e.gz"),
        ("UTF-16, not UTF-8", "f.txt"),
    ]


def test_a_byte_order_mark_is_no_text(tmp_path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.txt").write_bytes(mark + b"one\n")
    (tmp_path / "b.jsonl").write_bytes(mark + b'{"text": "two"}\n{"text": "three"}\n')
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(mark + b"four"))
    assert texts(tmp_path / "*") == ["one\n", "two", "three", "four"]
    assert texts(tmp_path / "a.txt", document="line") == ["one"]


def test_suffixes_in_any_case(tmp_path):
    row = b'{"text": "row"}\n'
    for name, data in {
        "A.JSONL": row,
        "b.Jsonl.GZ": gzip.compress(row),
        "c.ndjson": row,
        "d.TXT.GZ": gzip.compress(b"x"),
    }.items():
        (tmp_path / name).write_bytes(data)
    assert texts(tmp_path / "*") == ["row", "row", "row", "x"]


def test_what_is_read_in_another_way_than_before_has_a_digest_of_its_own(tmp_path):
    """Or a run would go on with a stream from before; all other text keeps its digest."""

    def earlier(path, *marks):
        rows = [(path.name, hashlib.blake2b(path.read_bytes()).hexdigest())]
        return digest(digest(rows), ("file", "text"), *marks)

    for name, data, marks in (
        ("a.txt", b"one", ()),
        ("a.jsonl", b'{"text": "one"}', ()),
        ("b.txt", b"\xef\xbb\xbfone", ("without byte order mark",)),
        ("c.JSONL", b'{"text": "one"}', ("kind by suffix in any case",)),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        files = TextFiles(find_files("f", str(path)), "file", "text", "f", "text_feature")
        assert files.digest == earlier(path, *marks)


def test_rows_without_the_text_are_left_out_for_a_reason(tmp_path):
    rows = [{"text": "one"}, {"text": None}, {"body": "x"}, {"text": 7}, ["text"], {"text": ""}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert texts(tmp_path / "a.jsonl") == [
        "one",
        ("null text", "a.jsonl row 2"),
        ("no such feature", "a.jsonl row 3"),
        ("text that is no string", "a.jsonl row 4"),
        ("no such feature", "a.jsonl row 5"),
        "",
    ]


def test_a_name_that_no_row_has_is_refused_after_some_rows(tmp_path):
    with (tmp_path / "a.jsonl").open("w") as f:
        f.write('{"body": "x", "title": "y", "n": 1}\n' * 5000)
        f.write("not JSON, and never read")
    with pytest.raises(
        ConfigError, match="text_feature=text: no row has such a text, .*; choose one of its texts: body, title"
    ):
        texts(tmp_path / "a.jsonl")
    assert len(texts(tmp_path / "a.jsonl", text_feature="body")) == 5001
    (tmp_path / "b.jsonl").write_text("[1]\n")
    with pytest.raises(ConfigError, match="name files whose rows are objects with a text"):
        texts(tmp_path / "b.jsonl")


def test_a_file_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    files = TextFiles(find_files("data.sources[0].files", f"{tmp_path}/a.txt"), "file", "text", "data.sources[0].files", "")
    (tmp_path / "a.txt").unlink()
    for read in (lambda: files.digest, lambda: list(files.documents())):
        with pytest.raises(ConfigError, match=r"sources\[0\].files=a.txt: cannot be read: No such file"):
            read()


def test_splits_by_hash_do_not_overlap_and_stay_when_files_move(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for i in range(60):
            (tmp_path / folder / f"{i}.txt").write_text(f"text {i}")
    splits = split_texts(open_one(tmp_path, 20.0, name="a", files=f"{tmp_path}/one/*.txt"))
    moved = split_texts(open_one(tmp_path, 20.0, name="a", files=f"{tmp_path}/two/*.txt"))
    assert splits == moved
    assert sorted(sum(splits.values(), [])) == sorted(f"text {i}" for i in range(60))
    assert all(splits[name] for name in ("train", "validation", "test"))


def test_repeated_lines_stay_on_one_side(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"line {i % 50}\n" for i in range(500)))
    splits = split_texts(open_one(tmp_path, 20.0, name="a", files=f"{tmp_path}/a.txt", document="line"))
    assert not set(splits["train"]) & (set(splits["validation"]) | set(splits["test"]))


def test_given_splits(tmp_path):
    for name in ("train", "validation", "test"):
        (tmp_path / f"{name}.txt").write_text(name)
    files = {"files": "train", "validation_files": "validation", "test_files": "test"}
    files = {key: f"{tmp_path}/{name}.txt" for key, name in files.items()}
    assert split_texts(open_one(tmp_path, name="a", **files)) == {
        "train": ["train"],
        "validation": ["validation"],
        "test": ["test"],
    }
    held_out = {"name": "a", "weight": 0.0}
    assert split_texts(open_one(tmp_path, **held_out, test_files=files["test_files"])) == {"test": ["test"]}
    whole = split_texts(open_one(tmp_path, **held_out, files=files["files"]))
    assert whole == {"validation": ["train"], "test": ["train"]}
    with pytest.raises(ConfigError, match="is in files too"):
        open_one(tmp_path, name="a", files=f"{tmp_path}/*.txt", test_files=files["test_files"])


def test_no_hold_out_at_zero_percent(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    assert split_texts(open_one(tmp_path, 0.0, name="a", files=f"{tmp_path}/a.txt")) == {"train": ["a"]}


@pytest.mark.parametrize(
    "source, message",
    [
        ({}, "set one of tfds and files"),
        ({"tfds": "python_stdlib", "files": "a.txt"}, "set one of tfds and files"),
        ({"files": "a.txt", "installed_packages": True}, "python_stdlib only"),
        ({"tfds": "no_such_data"}, r"tfds=no_such_data: is no TFDS dataset; .*data\.sources\[0\]\.files"),
        ({"tfds": "python_stdlib:1.0.0"}, "tfds=python_stdlib:1.0.0: names a version .*; write python_stdlib$"),
        ({"tfds": "PythonStdlib"}, "tfds=PythonStdlib: names a version .*; write python_stdlib$"),
        ({"tfds": "python_stdlib:2.0.0"}, "tfds=python_stdlib:2.0.0: TFDS refuses it: .*; write python_stdlib$"),
        ({"tfds": "python_stdlib", "text_feature": "body"}, "text_feature=body: is no feature of python_stdlib.*path, text"),
        ({"tfds": "mnist"}, "text_feature=text: is no feature of mnist"),
        ({"test_files": "a.txt"}, "no training text"),
    ],
)
def test_bad_sources(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match=message):
        open_one(tmp_path, name="a", **source)


def test_duplicate_names(tmp_path):
    source = SourceConfig(name="a", files="x")
    with pytest.raises(ConfigError, match=r"sources\[1\].name=a"):
        open_sources(DataConfig(sources=(source, source)), epath.Path(tmp_path))


class MoeJaxTestText(tfds.core.GeneratorBasedBuilder):
    """Forty texts, a test split, no validation split."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = epath.Path(__file__)

    def _info(self):
        features = {"body": tfds.features.Text(), "number": np.int64}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 40), "test": self._generate_examples(40, 45)}

    def _generate_examples(self, low, high):
        for i in range(low, high):
            yield i, {"body": f"text {i}", "number": i}


class MoeJaxTestNeedsTensorflow(MoeJaxTestText):
    def _split_generators(self, dl_manager):
        raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")


def test_tfds_by_name(tmp_path, monkeypatch):
    make = tfds.builder
    monkeypatch.setattr(tfds, "builder", lambda name: make(name, data_dir=tmp_path / "tfds"))
    source = {"name": "a", "tfds": "moe_jax_test_text"}
    splits = split_texts(open_one(tmp_path, 10.0, text_feature="body", **source))
    assert sorted(splits["test"]) == [f"text {i}" for i in range(40, 45)]
    assert sorted(splits["train"] + splits["validation"]) == sorted(f"text {i}" for i in range(40))
    assert splits["validation"]
    with pytest.raises(ConfigError, match="choose one of its texts: body"):
        open_one(tmp_path, **source)
    with pytest.raises(ConfigError, match="is no text but int"):
        split_texts(open_one(tmp_path, text_feature="number", **source))
    damaged(tmp_path / "tfds/moe_jax_test_text/1.0.0")
    with pytest.raises(ConfigError, match="its prepared files in .*1.0.0 are damaged; delete that folder"):
        split_texts(open_one(tmp_path, 10.0, text_feature="body", **source))
    shutil.rmtree(tmp_path / "tfds/moe_jax_test_text/1.0.0")  # the advice, followed
    assert split_texts(open_one(tmp_path, 10.0, text_feature="body", **source)) == splits
    with pytest.raises(ConfigError, match=r"TFDS needs tensorflow to prepare it; .*data\.sources\[0\]\.files"):
        open_one(tmp_path, name="a", tfds="moe_jax_test_needs_tensorflow", text_feature="body")


class MoeJaxTestDownload(MoeJaxTestText):
    """Its file is on no machine: nobody listens at this port."""

    def _split_generators(self, dl_manager):
        dl_manager.download("http://127.0.0.1:9/text.txt")


def test_a_download_without_a_network_is_one_line_within_seconds(tmp_path, monkeypatch):
    make = tfds.builder
    monkeypatch.setattr(tfds, "builder", lambda name: make(name, data_dir=tmp_path / "tfds"))
    begun = time.monotonic()
    with pytest.raises(ConfigError, match=r"tfds=moe_jax_test_download: cannot be fetched .*; export the text to files"):
        open_one(tmp_path, name="a", tfds="moe_jax_test_download", text_feature="body")
    assert time.monotonic() - begun < 20  # TFDS alone tries for 200 s


@pytest.fixture
def library(tmp_path):
    files = {f"module{i}.py": f"x = {i}\n" for i in range(60)}
    files |= {"pkg/__init__.py": "", "pkg/tests/test_a.py": "no", "test/b.py": "no", "notes.txt": "no"}
    files |= {"idlelib/idle_test/c.py": "no", "site-packages/d.py": "no", "pkg/sub/e.py": "é = 1"}
    for name, text in files.items():
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "lib" / "latin.py").write_bytes(b"# \xe9")
    return tmp_path / "lib"


def test_stdlib_builder(tmp_path, library):
    config = python_stdlib_config(10.0, root=str(library))
    builder = prepare(lambda: PythonStdlib(config=config, data_dir=tmp_path / "tfds"))
    rows = {split: builder.as_data_source(split) for split in ("train", "validation", "test")}
    found = {row["path"].decode(): row["text"].decode() for split in rows.values() for row in split}
    expected = {f"stdlib/module{i}.py": f"x = {i}\n" for i in range(60)} | {"stdlib/pkg/sub/e.py": "é = 1"}
    assert found == expected and sum(len(split) for split in rows.values()) == len(expected)
    assert 40 < len(rows["train"]) < 60
    assert PythonStdlib(config=config, data_dir=tmp_path / "tfds").info.metadata["undecodable"] == 1


def damaged(folder):
    (path,) = folder.glob("*-train.array_record*")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_stdlib_is_prepared_again_and_said(tmp_path, library, monkeypatch, capsys):
    config = python_stdlib_config(10.0, root=str(library))
    monkeypatch.setattr(datasets, "python_stdlib_config", lambda *args: config)
    source = {"name": "a", "tfds": "python_stdlib"}
    first = split_texts(open_one(tmp_path, 10.0, **source))
    (folder,) = (tmp_path / "cache/tfds/python_stdlib").glob("*/1.0.0")
    damaged(folder)
    assert split_texts(open_one(tmp_path, 10.0, **source)) == first
    assert "is damaged and is prepared again" in capsys.readouterr().err
    (folder / "dataset_info.json").write_text("{")
    assert split_texts(open_one(tmp_path, 10.0, **source)) == first
    assert not split_texts(open_one(tmp_path, 10.0, **source))["train"] == [] and not capsys.readouterr().err.count("again") > 1


def test_stdlib_config_names_the_content(library):
    names = {
        python_stdlib_config(3.0, root=str(library)).name,
        python_stdlib_config(3, root=str(library)).name,
    }
    assert len(names) == 1
    names.add(python_stdlib_config(4.0, root=str(library)).name)
    (library / "module1.py").write_text("x = 7\n")
    names.add(python_stdlib_config(3.0, root=str(library)).name)
    (library / "module1.py").rename(library / "renamed.py")
    names.add(python_stdlib_config(3.0, root=str(library)).name)
    assert len(names) == 4


def test_stdlib_prepared_twice_at_once(tmp_path, library):
    config = python_stdlib_config(10.0, root=str(library))
    barrier, rows = threading.Barrier(2), []

    class Waiting(PythonStdlib, skip_registration=True):
        name = "python_stdlib"

        def _generate_examples(self, examples, low, high):
            barrier.wait(timeout=20)
            yield from super()._generate_examples(examples, low, high)

    def build():
        builder = prepare(lambda: Waiting(config=config, data_dir=tmp_path / "tfds"))
        rows.append([row["path"] for row in builder.as_data_source("train")])

    threads = [threading.Thread(target=build) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(rows) == 2 and rows[0] == rows[1]


def test_real_stdlib_is_there(tmp_path):
    verbosity = logging.get_verbosity()
    source = open_one(tmp_path, name="a", tfds="python_stdlib")
    splits = split_texts(source)
    assert len(splits["train"]) > 300 and min(len(splits["validation"]), len(splits["test"])) > 3
    assert sum(len(text) for text in splits["train"]) > 5_000_000
    assert any("class TestCase" in text for text in sum(splits.values(), []))
    assert logging.get_verbosity() == verbosity
