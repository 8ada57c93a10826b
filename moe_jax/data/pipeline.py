"""From a config to batches: training batches by step, and evaluation sets by name."""

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from absl import logging
from etils import epath

from moe_jax.config import ConfigError, DataConfig, SourceConfig
from moe_jax.data.hashing import digest, hash64
from moe_jax.data.packing import FORMAT, PackedRows, TokenStream, open_stream, stream_digest
from moe_jax.data.sources import SPLITS, Source, Split, file_splits, open_sources
from moe_jax.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer

Batch = dict[str, np.ndarray]

SAMPLE_BYTES = 8 * 2**20
SAMPLE_PIECE = 2**16


class EvaluationSet:
    """One source's held-out documents, packed.

    Bits per byte of a set = summed nats of its targets / (ln 2 * `bytes`); of some of its batches, the bytes
    are the sum of `tokenizer.token_bytes[targets] * loss_weights`.

    Attributes:
      name: the source.
      documents, bytes: documents, and bytes of their text in UTF-8.
      tokens: targets, the `bos` that ends each document included.
      rows: packed rows.
      digest: identifies text and tokenizer.
    """

    def __init__(self, name: str, stream: TokenStream, tokenizer: Tokenizer, config: DataConfig):
        self._stream, self._tokenizer = stream, tokenizer
        self._rows = PackedRows(stream, tokenizer.bos, config.sequence_length, config.document_attention)
        self.name, self.digest = name, stream.digest
        self.documents, self.bytes = stream.documents, stream.bytes
        self.tokens, self.rows = stream.targets, len(self._rows)

    def batches(self, batch_size: int, limit: int = 0, rows: slice = slice(None)) -> Iterator[Batch]:
        """Batches in order, all of one shape; the last one is filled up with rows of padding.

        Args:
          batch_size: rows B of a global batch.
          limit: take this many batches, evenly spaced; 0: all.
          rows: the rows of every global batch that this process wants.

        Yields:
          arrays [rows, S] as in `PackedRows`.
        """
        count = -(-self.rows // batch_size)
        chosen = [i * count // limit for i in range(limit)] if 0 < limit < count else range(count)
        for batch in chosen:
            indices = [batch * batch_size + row for row in range(*rows.indices(batch_size))]
            yield _stack([self._rows[i] if i < self.rows else self._rows.padding() for i in indices])

    def texts(self) -> Iterator[bytes]:
        """The UTF-8 of each document, in order."""
        tokens = self._stream.tokens
        starts = np.flatnonzero(tokens == self._tokenizer.bos)
        for start, end in zip(starts[:-1], starts[1:]):
            yield self._tokenizer.decode_bytes(tokens[start + 1 : end])


@dataclasses.dataclass
class TextData:
    """The text of a run: training batches by step and evaluation sets.

    Attributes:
      tokenizer: shared by all sources.
      fingerprint: identifies the training text, its mixture, the tokenizer and the packing.
      report: counts by source and split: documents, bytes, tokens, rows, and undecodable and empty documents
        left out.
      train_rows: rows in one pass over all training text.
      train_tokens: targets in all training text, the `bos` that ends each document included.
    """

    tokenizer: Tokenizer
    fingerprint: str
    report: dict[str, dict[str, dict[str, int]]]
    train_rows: int
    train_tokens: int
    _train: list[tuple[float, PackedRows]]
    _evaluation: dict[str, dict[str, EvaluationSet]]

    def train_dataset(self, seed: int, batch_size: int, rows: slice = slice(None)) -> grain.MapDataset:
        """Step -> batch with random access. The global batch depends on (seed, step) alone, `rows` cuts it.

        Every pass over a source has an order of its own; sources take turns in proportion to their weights.

        Raises:
          ConfigError: the data was opened without training text.
        """
        if not self._train:
            raise ConfigError("data.sources", "", "hold no training text", "give a source a weight above 0")
        parts = [
            grain.MapDataset.source(source).shuffle(hash64(f"{seed}/{i}") % 2**32).repeat()
            for i, (_, source) in enumerate(self._train)
        ]
        weights = [weight for weight, _ in self._train]
        stream = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, weights)
        wanted = range(*rows.indices(batch_size))

        def batch(step: int) -> Batch:
            return _stack([stream[step * batch_size + row] for row in wanted])

        return grain.MapDataset.range(sys.maxsize // batch_size).map(batch)

    def train_batch(self, seed: int, batch_size: int, step: int, rows: slice = slice(None)) -> Batch:
        """The batch of one step: arrays [rows, S] as in `PackedRows`."""
        return self.train_dataset(seed, batch_size, rows)[step]

    def train_batches(
        self, seed: int, batch_size: int, start_step: int = 0, rows: slice = slice(None)
    ) -> grain.DatasetIterator:
        """Batches of `start_step`, `start_step` + 1, ... without end, read ahead by a thread until `close()`.

        Args:
          seed: order of the rows.
          batch_size: rows B of a global batch.
          start_step: the only state; to resume, the number of steps taken.
          rows: the rows of every global batch that this process wants; all processes together see all.

        Yields:
          arrays [rows, S] as in `PackedRows`.
        """
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
        iterator = iter(self.train_dataset(seed, batch_size, rows).to_iter_dataset(options))
        iterator.set_state({"next_index": start_step})
        return iterator

    def token_shares(self) -> np.ndarray:
        """float64 [V]: the share of each id in the training rows, sources mixed by their weights."""
        total = sum(weight for weight, _ in self._train)
        return sum(weight / total * rows.token_shares(self.tokenizer.vocab_size) for weight, rows in self._train)

    def evaluation(self, split: str = "validation") -> dict[str, EvaluationSet]:
        """The evaluation sets of "validation" or "test" by source, for the sources that have one."""
        return dict(self._evaluation.get(split, {}))


def open_data(
    config: DataConfig,
    *,
    tokenizer: Tokenizer | None = None,
    splits: Sequence[str] = SPLITS,
    show_progress: bool = True,
) -> TextData:
    """Finds, tokenises and packs the text of `config`; later calls read the cache.

    Args:
      config: the sources, tokenizer and packing.
      tokenizer: use this one, such as a checkpoint's, rather than training one.
      splits: what will be read; evaluation alone needs no "train".
      show_progress: show a bar for what takes more than two seconds.

    Raises:
      ConfigError: bad input, see `open_sources`; no training text; a split without documents.
    """
    cache_dir = _cache_dir(config)
    sources = open_sources(config, cache_dir)
    training = [(source, f"data.sources[{i}]") for i, source in enumerate(sources) if source.weight]
    if not training and ("train" in splits or tokenizer is None):
        raise ConfigError("data.sources", "", "every weight is 0", "give a source a weight above 0")
    tokenizer = tokenizer or _tokenizer(config, [source for source, _ in training], cache_dir)

    report, train, evaluation = {}, [], {}
    train_tokens = 0
    for i, source in enumerate(sources):
        report[source.name] = {}
        for name in [name for name in splits if name in source.splits]:
            stream = open_stream(source.splits[name], tokenizer, cache_dir, f"{source.name} {name}", show_progress)
            if not stream.documents:
                fix = "give it text, or other files"
                limit = f"has no text in {name} ({stream.undecodable} undecodable documents)"
                raise ConfigError(f"data.sources[{i}]", source.name, limit, fix)
            if name == "train":
                packed = PackedRows(
                    stream,
                    tokenizer.bos,
                    config.sequence_length,
                    config.document_attention,
                    drop_remainder=True,
                )
                train.append((source.weight, packed))
                train_tokens += stream.targets
                rows = len(packed)
            else:
                packed = EvaluationSet(source.name, stream, tokenizer, config)
                evaluation.setdefault(name, {})[source.name] = packed
                rows = packed.rows
            report[source.name][name] = _counts(stream, rows)
    _log(report)
    streams = [(stream_digest(source.splits["train"], tokenizer), float(source.weight)) for source, _ in training]
    return TextData(
        tokenizer=tokenizer,
        fingerprint=digest("data", streams, config.sequence_length, config.document_attention),
        report=report,
        train_rows=sum(len(packed) for _, packed in train),
        train_tokens=train_tokens,
        _train=train,
        _evaluation=evaluation,
    )


def evaluation_set(
    name: str,
    files: str,
    tokenizer: Tokenizer,
    config: DataConfig,
    document: str = "file",
    text_feature: str = "text",
    show_progress: bool = True,
) -> EvaluationSet:
    """An evaluation set of all documents of the files that match comma-separated globs (`--source`).

    Raises:
      ConfigError: no file matches, or the files hold no text.
    """
    source = SourceConfig(name=name, files=files, document=document, text_feature=text_feature, weight=0.0)
    split = file_splits(source, "--source", 0.0)["test"]
    stream = open_stream(split, tokenizer, _cache_dir(config), name, show_progress)
    if not stream.documents:
        raise ConfigError("--source", files, "has no text", "give other files")
    return EvaluationSet(name, stream, tokenizer, config)


def _cache_dir(config: DataConfig) -> epath.Path:
    path = config.cache_dir or os.environ.get("MOE_JAX_CACHE", "") or "~/.cache/moe_jax"
    if "://" in path:
        raise ConfigError("data.cache_dir", path, "is not on this machine", "give a local folder")
    return epath.Path(path).expanduser()


def _tokenizer(config: DataConfig, sources: Sequence[Source], cache_dir: epath.Path) -> Tokenizer:
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    weights = [(source.splits["train"].digest, float(source.weight)) for source in sources]
    path = cache_dir / "tokenizers" / f"{digest('bpe', FORMAT, weights, config.vocab_size)}.json"
    if path.exists():
        return Tokenizer.load(path)
    logging.info("Training a tokenizer of %d tokens.", config.vocab_size)
    total = sum(source.weight for source in sources)
    samples = (_sample(source.splits["train"], int(SAMPLE_BYTES * source.weight / total)) for source in sources)
    tokenizer = BPETokenizer.train((text for sample in samples for text in sample), config.vocab_size)
    tokenizer.save(path)
    return tokenizer


def _sample(split: Split, limit: int) -> Iterator[str]:
    """Pieces of the documents of `split`, spread evenly over them, of about `limit` characters in all."""
    total = sum(len(text) for text in split.documents() if text)
    fraction = min(1.0, limit / max(total, 1))
    seen = taken = 0
    for text in split.documents():
        for start in range(0, len(text or ""), SAMPLE_PIECE):
            piece = text[start : start + SAMPLE_PIECE]
            seen += len(piece)
            if taken + len(piece) / 2 <= seen * fraction:
                taken += len(piece)
                yield piece


def _counts(stream: TokenStream, rows: int) -> dict[str, int]:
    counts = {name: getattr(stream, name) for name in ("documents", "bytes", "undecodable", "empty")}
    return counts | {"tokens": stream.targets, "rows": rows}


def _log(report: dict[str, dict[str, dict[str, int]]]) -> None:
    for source, splits in report.items():
        for split, counts in splits.items():
            level = logging.WARNING if counts["undecodable"] else logging.INFO
            logging.log(level, "%s %s: %s", source, split, ", ".join(f"{v:,} {k}" for k, v in counts.items()))


def _stack(rows: Sequence[dict[str, np.ndarray]]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
