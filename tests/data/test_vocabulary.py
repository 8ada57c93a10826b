"""The sample that a tokenizer is trained on, and what is said while it is."""

import re
import time

import pytest

from moe_jax.data.say import say_after
from moe_jax.data.vocabulary import LONGEST_WORD, PART, cut_words


@pytest.mark.parametrize("character", ["a", "7", " ", "=", "\u65e5", "_"])
def test_long_words_are_cut(character):
    """A word of 2^16 letters takes 100 times as long to train on as 2^16 letters in words."""
    text = f"some words {character * (LONGEST_WORD + 100)} more words"
    parts = list(cut_words(text))
    assert "".join(parts) == text
    assert max(len(run) for part in parts for run in re.findall(re.escape(character) + "+", part)) == PART


def test_other_text_stays_whole():
    """So its tokenizer is the one that it always was."""
    text = "def f(x):\n    return x  # " + "-" * LONGEST_WORD + "\n" + "word " * 5000 + "b64/" * 2000
    assert len(list(cut_words(text[: text.index("b64/")]))) == 1
    assert list(cut_words(text)) == [text]  # a long line of short words
    assert list(cut_words("")) == [""]


def test_a_long_wait_is_said_and_a_short_one_is_not(capsys):
    with say_after(0.05, "slow ..."):
        time.sleep(0.3)
    with say_after(5.0, "fast ..."):
        pass
    with say_after(0.05, "hidden ...", enabled=False):
        time.sleep(0.1)
    assert capsys.readouterr().err == "slow ...\n"
