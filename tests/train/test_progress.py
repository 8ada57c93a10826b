"""The progress line: a bar on a terminal, plain lines in a file, nothing elsewhere."""

import io

import pytest

from moe_jax.train.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(monkeypatch, stream, enabled=True):
    monkeypatch.setattr("sys.stderr", stream)
    with ProgressBar(10, initial=4, enabled=enabled) as bar:
        bar.update(5)
        bar.write("evaluated")
        bar.update(6, loss=1.23456, tokens_per_second=12345.6)
        bar.update(10, loss=1.0)
    return stream.getvalue()


def test_plain_lines_in_a_file(monkeypatch):
    lines = run(monkeypatch, io.StringIO()).splitlines()
    assert lines[0] == "evaluated"
    assert lines[1].startswith("step 6/10  loss 1.2346  tokens/s 12,346  left ")
    assert lines[2].startswith("step 10/10  loss 1.0000  left 00:00")
    assert len(lines) == 3 and not any("\r" in line or "\x1b" in line for line in lines)


def test_bar_on_a_terminal(monkeypatch):
    text = run(monkeypatch, Terminal())
    assert "\r" in text and "10/10" in text and "loss=1.0000" in text
    assert "evaluated\n" in text and "step 6/10" not in text


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_disabled(monkeypatch, stream):
    assert run(monkeypatch, stream(), enabled=False) == ""
