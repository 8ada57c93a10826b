"""A run goes on with the same text wherever it lies, and with no other."""

import json
import shutil

import pytest

from moe_jax.config import ConfigError, DataConfig, SourceConfig
from moe_jax.data import check_same_text, open_data


@pytest.fixture
def folder(tmp_path):
    for name in "ab":
        (tmp_path / "text" / name).mkdir(parents=True)
        for i in range(20):
            (tmp_path / "text" / name / f"{i:02}.txt").write_text(f"{name} {i}" + " word" * i)
    return tmp_path / "text"


def open_text(folder, **changes):
    sources = (
        SourceConfig(name="a", files=f"{folder}/a/*.txt"),
        SourceConfig(name="b", files=f"{folder}/b/*.txt", weight=2.0, document=changes.pop("document", "file")),
    )
    settings = {"tokenizer": "bytes", "sequence_length": 16, "held_out_percent": 15.0} | changes
    return open_data(DataConfig(sources=sources, cache_dir=str(folder.parent / "cache"), **settings))


def saved_by(data, *without):
    meta = {"data_fingerprint": data.fingerprint, "text": data.identity}
    return {name: json.loads(json.dumps(value)) for name, value in meta.items() if name not in without}


def find(folder, data, split):
    """A file of source b that is in `split`."""
    if split == "train":
        held_out = {text for name in ("validation", "test") for text in data.evaluation(name)["b"].texts()}
        return next(path for path in sorted((folder / "b").iterdir()) if path.read_bytes() not in held_out)
    text = next(data.evaluation(split)["b"].texts())
    return next(path for path in (folder / "b").iterdir() if path.read_bytes() == text)


def test_a_folder_may_move(folder):
    saved = saved_by(open_text(folder))
    moved = shutil.move(folder, folder.with_name("moved"))
    assert check_same_text(saved, open_text(moved)) == []
    assert check_same_text(saved_by(open_text(moved), "text"), open_text(moved)) == []


def test_the_same_training_text_in_other_files_is_the_same(folder):
    """A byte order mark is no text, so the fingerprint changes and the content does not."""
    data = open_text(folder)
    path = find(folder, data, "train")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    marked = open_text(folder)
    assert marked.fingerprint != data.fingerprint
    assert check_same_text(saved_by(data), marked) == []
    with pytest.raises(ConfigError, match="data.sources=a, b: the training text is not the one"):
        check_same_text(saved_by(data, "text"), marked)


def test_changed_training_text_names_the_source_and_split(folder):
    data = open_text(folder)
    path = find(folder, data, "train")
    text = path.read_text()
    path.write_text(text.swapcase())
    with pytest.raises(ConfigError) as error:
        check_same_text(saved_by(data), open_text(folder))
    counts = data.report["b"]["train"]
    assert str(error.value) == (
        f"config.data.sources[1]=b: train is not the checkpoint's: {counts['documents']} documents of "
        f"{counts['bytes']:,} bytes, but not the same; put the text back as it was, or use another --workdir"
    )
    path.write_text(text + "!!")
    with pytest.raises(ConfigError, match=f"of {counts['bytes']:,} bytes then, .* of {counts['bytes'] + 2:,} bytes now"):
        check_same_text(saved_by(data), open_text(folder))
    for file in (folder / "a").iterdir():
        file.write_text(file.read_text() + "?")
    with pytest.raises(
        ConfigError, match=r"sources\[0\]=a: train is .*; validation is .*; test is .*; other text in b too; put"
    ):
        check_same_text(saved_by(data), open_text(folder))
    for file in (folder / "a").iterdir():
        file.write_text(file.read_text().removesuffix("?"))
    path.write_text(text)  # the advice, followed
    assert check_same_text(saved_by(data), open_text(folder)) == []


def test_changed_held_out_text_is_a_warning(folder):
    data = open_text(folder)
    path = find(folder, data, "validation")
    path.write_text(path.read_text() + "!")
    (warning,) = check_same_text(saved_by(data), open_text(folder))
    assert warning.startswith("the validation text of b is not the checkpoint's:")


def test_another_packing_is_another_text(folder):
    data = open_text(folder)
    with pytest.raises(ConfigError, match="data.sources=a, b"):
        check_same_text(saved_by(data), open_text(folder, sequence_length=32))
