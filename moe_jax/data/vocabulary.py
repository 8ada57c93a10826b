"""The tokenizer of a run: bytes, or BPE trained on a sample of its training text and kept on disk."""

import re
from collections.abc import Iterator, Sequence

from etils import epath

from moe_jax.config import ConfigError, DataConfig
from moe_jax.data.hashing import digest
from moe_jax.data.say import say, say_after
from moe_jax.data.sources import Source
from moe_jax.data.splits import Split
from moe_jax.data.streams import FORMAT
from moe_jax.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer

SAMPLE_BYTES = 8 * 2**20
SAMPLE_PIECE = 2**16

# Each merge looks through every word that has its pair: 1 MB of letters without a space takes 12 s, and 1 s in parts of 64.
LONGEST_WORD = 1024
PART = 64
_SPACES = re.compile(rf"\s{{{LONGEST_WORD + 1}}}")
_WORD = re.compile(r"[^\W\d_]+|\d+|\s+|(?:[^\w\s]|_)+")


def open_tokenizer(
    config: DataConfig, sources: Sequence[Source], cache_dir: epath.Path, show_progress: bool = True
) -> Tokenizer:
    """The tokenizer that `config` asks for, trained on the first call and read from `cache_dir` after that.

    Args:
      config: `tokenizer` and `vocab_size`.
      sources: those with training text.
      cache_dir: folder of prepared data.
      show_progress: say that it takes more than two seconds.

    Raises:
      ConfigError: `cache_dir` cannot be written; a text cannot be read.
    """
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    weights = [(source.splits["train"].digest, float(source.weight)) for source in sources]
    path = cache_dir / "tokenizers" / f"{digest('bpe', FORMAT, weights, config.vocab_size)}.json"
    if path.exists():
        try:
            return Tokenizer.load(path)
        except ValueError as error:
            say(f"the tokenizer is trained again: {error}")
    total = sum(source.weight for source in sources)
    samples = (_sample(source.splits["train"], int(SAMPLE_BYTES * source.weight / total)) for source in sources)
    with say_after(2.0, f"training a tokenizer of {config.vocab_size:,} tokens on a sample of the text ...", show_progress):
        pieces = (part for sample in samples for piece in sample for part in cut_words(piece))
        tokenizer = BPETokenizer.train(pieces, config.vocab_size)
    try:
        tokenizer.save(path)
    except OSError as error:
        fix = "make room there, or name another folder"
        raise ConfigError("data.cache_dir", str(cache_dir), f"cannot be written: {error.strerror or error}", fix) from error
    return tokenizer


def _sample(split: Split, limit: int) -> Iterator[str]:
    """Pieces of the documents of `split`, spread evenly over them, of about `limit` characters in all."""
    total = sum(len(text) for text in split.documents() if isinstance(text, str))
    fraction = min(1.0, limit / max(total, 1))
    seen = taken = 0
    for text in split.documents():
        for start in range(0, len(text) if isinstance(text, str) else 0, SAMPLE_PIECE):
            piece = text[start : start + SAMPLE_PIECE]
            seen += len(piece)
            if taken + len(piece) / 2 <= seen * fraction:
                taken += len(piece)
                yield piece


def cut_words(text: str) -> Iterator[str]:
    """`text`, whole; or cut inside of words of more than LONGEST_WORD letters, digits, spaces or signs, where it has such."""
    start = 0
    if max(map(len, text.split()), default=0) > LONGEST_WORD or _SPACES.search(text):
        for word in _WORD.finditer(text):
            for end in range(word.start() + PART, word.end(), PART) if len(word[0]) > LONGEST_WORD else ():
                yield text[start:end]
                start = end
    yield text[start:]
