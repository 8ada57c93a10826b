"""Streams on disk: what is left out is counted, a damaged copy is made again."""

import json
import os
import threading

import pytest
from etils import epath

from moe_jax.config import ConfigError
from moe_jax.data import BPETokenizer, ByteTokenizer, streams
from moe_jax.data.files import LeftOut
from moe_jax.data.splits import Split
from moe_jax.data.streams import open_stream
from tests.data.test_packing import TEXTS, make_stream


def test_left_out_documents_are_counted(tmp_path):
    lost = [LeftOut("not UTF-8", "x.txt"), LeftOut("not JSON", "y.jsonl row 3"), LeftOut("not UTF-8", "z.txt")]
    stream = make_stream(["a", lost[0], "", "b", *lost[1:], "a"], tmp_path)
    assert (stream.documents, stream.empty, stream.repeated) == (3, 1, 1)
    assert stream.left_out == {"not UTF-8": 2, "not JSON": 1}
    assert stream.places == {"not UTF-8": "x.txt", "not JSON": "y.jsonl row 3"}


def test_wide_vocabulary_and_cache(tmp_path):
    class Wide(ByteTokenizer):
        fingerprint = "wide"
        calls = 0

        def encode_batch(self, texts):
            self.calls += 1
            return [ids + 69_000 for ids in super().encode_batch(texts)]

    tokenizer = Wide()
    tokenizer.bos, tokenizer.vocab_size = 70_000, 70_001
    for _ in range(2):
        split = Split(lambda: iter(["ab"]), digest="x")
        stream = open_stream(split, tokenizer, epath.Path(tmp_path), "wide", show_progress=False)
        assert stream.tokens.tolist() == [70_000, 69_097, 69_098, 70_000]
    assert tokenizer.calls == 1


def test_concurrent_builds_agree(tmp_path):
    barrier, streams = threading.Barrier(4), []

    def documents():
        barrier.wait(timeout=20)
        yield from TEXTS

    def build():
        split = Split(documents, digest="same")
        streams.append(open_stream(split, ByteTokenizer(), epath.Path(tmp_path), "same", show_progress=False))

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(streams) == 4
    assert len({stream.tokens.tobytes() for stream in streams}) == 1
    assert len(list((tmp_path / "streams").iterdir())) == 1


def test_a_failed_build_leaves_nothing(tmp_path):
    def documents():
        yield "a"
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError):
        open_stream(Split(documents, "bad"), ByteTokenizer(), epath.Path(tmp_path), "bad", show_progress=False)
    assert not list((tmp_path / "streams").iterdir())


@pytest.fixture
def built(monkeypatch):
    """Labels of the streams that are built."""
    labels, write = [], streams._write_stream
    monkeypatch.setattr(streams, "_write_stream", lambda *args: labels.append(args[3]) or write(*args))
    return labels


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def drop(path):
    path.unlink()


@pytest.mark.parametrize("name", ["tokens.bin", "hashes.bin", "facts.json"])
@pytest.mark.parametrize("damage", [cut, flip, drop])
def test_a_damaged_stream_is_made_again_and_said(tmp_path, built, capsys, damage, name):
    first = make_stream(TEXTS, tmp_path)
    assert make_stream(TEXTS, tmp_path).content == first.content and built == ["texts"]
    whole, (folder,) = first.tokens.tobytes(), (tmp_path / "streams").iterdir()
    damage(folder / name)
    again = make_stream(TEXTS, tmp_path)
    assert (again.tokens.tobytes(), again.hashes.tolist()) == (whole, first.hashes.tolist())
    assert (again.digest, again.content, again.documents) == (first.digest, first.content, first.documents)
    assert built == ["texts", "texts"] and [path.name for path in (tmp_path / "streams").iterdir()] == [folder.name]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"texts: its tokens in {folder} are damaged (") and line.endswith("and are made again")
    if damage is cut and name != "facts.json":
        assert f"({name} has " in line and " bytes, not " in line


def make_older(folder):
    """Takes from a stream what was not kept once."""
    facts = json.loads((folder / "facts.json").read_text())
    old = {key: facts[key] for key in ("documents", "bytes", "empty", "dtype")} | {
        "undecodable": sum(facts["left_out"].values())
    }
    (folder / "stream.json").write_text(json.dumps(old))
    (folder / "facts.json").unlink()
    (folder / "hashes.bin").unlink()


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_an_older_stream_is_described_not_made_again(tmp_path, built, capsys, kind):
    tokenizer = ByteTokenizer() if kind == "bytes" else BPETokenizer.train(["hello world, hello words"] * 9, 270)
    split = Split(lambda: iter([*TEXTS, LeftOut("not JSON", "a"), ""]), digest="x")
    first = open_stream(split, tokenizer, epath.Path(tmp_path), "older")
    tokens = first.tokens.tolist()  # before the file below the map is cut
    (folder,) = (tmp_path / "streams").iterdir()
    make_older(folder)
    for _ in range(2):
        again = open_stream(split, tokenizer, epath.Path(tmp_path), "older")
        assert (again.tokens.tolist(), again.hashes.tolist()) == (tokens, first.hashes.tolist())
        assert (again.digest, again.content, again.bytes, again.empty) == (first.digest, first.content, first.bytes, 1)
        assert again.left_out == {"not UTF-8 or not JSON": 1}
    assert built == ["older"] and not capsys.readouterr().err
    make_older(folder)
    cut(folder / "tokens.bin")
    assert open_stream(split, tokenizer, epath.Path(tmp_path), "older").tokens.tolist() == tokens
    assert built == ["older"] * 2 and "not those that were counted" in capsys.readouterr().err


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(path, *args):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(streams, "sync", full)
    with pytest.raises(ConfigError, match="data.cache_dir=.*: cannot be written: No space left on device; make room"):
        make_stream(TEXTS, tmp_path)
    assert not list((tmp_path / "streams").iterdir())
