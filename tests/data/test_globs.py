"""Files by glob: found as people mean it, each once, or refused in one line whose advice works."""

import os

import pytest

from moe_jax.config import ConfigError
from moe_jax.data import globs
from moe_jax.data.globs import find_files


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def names(pattern):
    return [name for name, _ in find_files("data.sources[0].files", str(pattern))]


def test_globs(tmp_path):
    make(tmp_path, "b.txt", "a.txt", "deep/er/c.txt", "deep/d.md", "[odd].txt")
    assert names(f"{tmp_path}/**/*.txt, {tmp_path}/a.txt,{tmp_path}/deep/*.md") == [
        "[odd].txt",
        "a.txt",
        "b.txt",
        "d.md",
        "deep/er/c.txt",
    ]
    assert names(tmp_path / "b.txt") == ["b.txt"]
    assert names(tmp_path / "*/*.md") == names(tmp_path / "**/d.md") == names(tmp_path / "d*/d.md") == ["deep/d.md"]
    for pattern in (
        f"{tmp_path}/a.txt,{tmp_path}/*.nothing",
        tmp_path / "nowhere/*.txt",
        tmp_path / "a.txt/*",
        f"{tmp_path}/",
        tmp_path / "deep",
    ):
        with pytest.raises(ConfigError, match="matches no file"):
            names(pattern)
    with pytest.raises(ConfigError, match="remote path"):
        names("gs://bucket/**/*.txt")


def test_a_relative_glob_and_the_home_folder(tmp_path, monkeypatch):
    make(tmp_path, "a.txt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names("*.txt") == names("a.txt") == names("./a.txt") == names("~/*.txt") == names("~/a.txt") == ["a.txt"]
    with pytest.raises(ConfigError, match="matches no file"):
        names("~nobody_of_this_name/*.txt")


def test_stars_beside_characters_are_refused_with_a_glob_that_works(tmp_path):
    make(tmp_path, "f1.txt", "deep/f2.txt", "deep/g.txt")
    for part, found in (("**.txt", ["deep/f2.txt", "deep/g.txt", "f1.txt"]), ("f**.txt", ["deep/f2.txt", "f1.txt"])):
        with pytest.raises(ConfigError, match=r"has \*\* beside other characters") as error:
            names(tmp_path / part)
        assert names(error.value.fix.removeprefix("write ")) == found


def test_names_with_wildcards_and_commas(tmp_path):
    make(tmp_path, "notes [2024]/a*b.txt", "notes [2024]/[x].txt", "x.txt", "a,b.txt")
    assert names(tmp_path / "notes [2024]/*.txt") == ["notes [2024]/[x].txt", "notes [2024]/a*b.txt"]
    assert names(tmp_path / "notes [2024]/[x].txt") == ["notes [2024]/[x].txt"]
    with pytest.raises(ConfigError, match="a comma separates globs, so write [?] for one in a name"):
        names(tmp_path / "a,b.txt")
    assert names(tmp_path / "a?b.txt") == ["a,b.txt"]


def test_hidden_names_need_a_dot_and_are_said(tmp_path, capsys):
    make(tmp_path, "a.txt", ".b.txt", ".git/c.txt", "deep/.d.txt")
    assert names(tmp_path / "**/*.txt") == ["a.txt"]
    assert "leaves out 3 hidden files and folders, such as" in capsys.readouterr().err
    assert names(tmp_path / ".*.txt") == names(tmp_path / ".b.txt") == [".b.txt"]
    assert names(tmp_path / ".git/*.txt") == ["c.txt"] and names(tmp_path / ".g*/*.txt") == [".git/c.txt"]


def test_a_file_is_read_once_by_whatever_path(tmp_path, monkeypatch, capsys):
    make(tmp_path, "one/a.txt", "one/b.txt")
    os.symlink(tmp_path / "one/a.txt", tmp_path / "one/c.txt")
    os.link(tmp_path / "one/b.txt", tmp_path / "one/d.txt")
    os.symlink(tmp_path / "one", tmp_path / "two")
    os.symlink(tmp_path / "gone", tmp_path / "one/lost.txt")
    monkeypatch.chdir(tmp_path)
    assert names("one/*.txt") == names(f"one/*.txt,{tmp_path}/one/a.txt,two/*.txt") == ["a.txt", "b.txt"]
    said = capsys.readouterr().err
    assert "2 paths of data.sources[0].files lead to a file that it has already" in said
    assert "leaves out 1 links that lead nowhere, such as one/lost.txt" in said


def test_a_folder_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    make(tmp_path, "a.txt", "deep/b.txt")
    scan = os.scandir

    def refuse(path):
        if path.endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(globs.os, "scandir", refuse)  # root, whom the tests may run as, may read everything
    with pytest.raises(ConfigError, match=r"files=.*: cannot be searched: Permission denied \(.*deep\)"):
        names(tmp_path / "**/*.txt")
    with pytest.raises(ConfigError, match="is no path: .*null"):
        names("a\0b.txt")
