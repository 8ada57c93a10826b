import subprocess
import sys

import numpy as np
import pytest

from moe_jax.data import BPETokenizer, ByteTokenizer, Tokenizer

TEXTS = [
    "",
    "a",
    "def f(x):\n\treturn x  # ünï\r\n",
    "\x00\x01\x7f\x80\xff\ufeff\ufffd\uffff",
    "e\u0301 é \u1e9b\u0323 \ufb01 \u212b",
    "👩‍👩‍👧‍👦 🇩🇪 \U0010ffff \u200b\u202e",
    "  leading, trailing   \n\n \t ",
    "<bos> <|endoftext|> [UNK] </s>",
    "日本語 العربية עברית ไทย",
    "x" * 3000 + " 1234567890" * 100,
]


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train(["def f(x): return x + 1\n" * 50, "for i in range(10): print(i)\n" * 50], 400)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, bpe):
    return bpe if request.param == "bpe" else ByteTokenizer()


def random_texts(count):
    random = np.random.default_rng(0)
    planes = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000)]
    for _ in range(count):
        size = random.integers(1, 200)
        bounds = [planes[plane] for plane in random.integers(0, len(planes), size)]
        yield "".join(chr(random.integers(*bound)) for bound in bounds)


@pytest.mark.smoke
def test_round_trip(tokenizer):
    texts = [*TEXTS, *random_texts(200)]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids.dtype == np.int32
        assert tokenizer.decode(ids) == text
        assert tokenizer.bos not in ids
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
        np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_vocabulary(tokenizer):
    assert tokenizer.bos == tokenizer.vocab_size - 1
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes[tokenizer.bos] == 0
    assert (tokenizer.token_bytes[: tokenizer.bos] > 0).all()
    assert tokenizer.decode([tokenizer.bos]) == ""
    assert tokenizer.piece(tokenizer.bos) == "<bos>"
    for i in range(tokenizer.vocab_size):
        assert tokenizer.piece(i).isprintable() and " " not in tokenizer.piece(i)


def test_bytes_are_ids():
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.bos) == (257, 256)
    assert tokenizer.encode("é\n").tolist() == [0xC3, 0xA9, 10]
    assert tokenizer.piece(10) == "\\n" and tokenizer.piece(0xC3) == "\\xc3"


def test_bytes_of_half_a_character_decode_with_a_replacement(tokenizer):
    ids = tokenizer.encode("🙂")
    assert "\ufffd" in tokenizer.decode(ids[:-1]) and len(ids) == 4


def test_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(UnicodeEncodeError):
        tokenizer.encode("a\ud800")


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "deep" / "tokens.json")
    loaded = Tokenizer.load(tmp_path / "deep" / "tokens.json")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["tokens.json"]
    for text in TEXTS:
        np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))


def test_bpe_compresses_what_it_was_trained_on(bpe):
    assert len(bpe.encode("for i in range(10): print(i)\n")) < 15
    assert bpe.vocab_size <= 400


def test_training_does_not_depend_on_the_process():
    code = (
        "import random; from moe_jax.data.tokenizer import BPETokenizer; r = random.Random(0);"
        "t = [''.join(r.choices('abcdef ', k=2000)) for _ in range(20)];"
        "print(BPETokenizer.train(t, 600).fingerprint)"
    )
    prints = set()
    for seed in ("1", "2"):
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path), "RAYON_NUM_THREADS": seed}
        prints.add(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True).stdout)
    assert len(prints) == 1


def test_fingerprints_differ(bpe):
    other = BPETokenizer.train(["other text, other merges " * 50], 400)
    assert len({bpe.fingerprint, other.fingerprint, ByteTokenizer().fingerprint}) == 3
