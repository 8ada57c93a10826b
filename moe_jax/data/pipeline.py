"""From a config to batches: training batches by step, and evaluation sets by name."""

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from etils import epath

from moe_jax.config import ConfigError, DataConfig, SourceConfig
from moe_jax.data.curriculum import Curriculum, RandomOrder
from moe_jax.data.hashing import digest
from moe_jax.data.packing import PackedRows
from moe_jax.data.say import say, say_after
from moe_jax.data.sources import SPLITS, open_sources
from moe_jax.data.splits import GLOBS, describe_left_out, file_splits
from moe_jax.data.streams import TokenStream, open_stream, stream_digest
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.data.vocabulary import open_tokenizer

Batch = dict[str, np.ndarray]
READ_AHEAD = 4  # batches; with those in progress below `curriculum.MARGIN`

# Where the flags of `evaluate` stand for the fields of a source.
_COMMAND_FIELDS = dict.fromkeys(GLOBS.values(), "--source") | {"text_feature": "--text_feature"}


class EvaluationSet:
    """One source's held-out documents, packed.

    Bits per byte of a set = summed nats of its targets / (ln 2 * `bytes`); of some of its batches, the bytes
    are the sum of `tokenizer.token_bytes[targets] * loss_weights`.

    Attributes:
      name: the source.
      documents, bytes: documents, and bytes of their text in UTF-8.
      tokens: targets, the `bos` that ends each document included.
      rows: packed rows.
      empty, repeated: documents left out because they have no text; documents equal to an earlier one.
      left_out: reason -> documents left out because they cannot be read.
      left_out_first: reason -> where the first of them is.
      digest: identifies text and tokenizer.
    """

    def __init__(self, name: str, stream: TokenStream, tokenizer: Tokenizer, config: DataConfig):
        self._stream, self._tokenizer = stream, tokenizer
        self._rows = PackedRows(stream, tokenizer.bos, config.sequence_length, config.document_attention)
        self.name, self.digest = name, stream.digest
        self.documents, self.bytes = stream.documents, stream.bytes
        self.tokens, self.rows = stream.targets, len(self._rows)
        self.empty, self.repeated, self.left_out = stream.empty, stream.repeated, stream.left_out
        self.left_out_first = stream.places

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
      identity: what a checkpoint keeps to tell this text from another, see `check_same_text`; JSON-able.
      report: counts by source and split: documents, bytes, tokens, rows; documents that are empty or "left out: REASON", those
        repeated, and of held-out ones those "in the training text too".
      train_rows: rows in one pass over all training text.
      train_tokens: targets in all training text, the `bos` that ends each document included.
    """

    tokenizer: Tokenizer
    fingerprint: str
    identity: dict[str, Any]
    report: dict[str, dict[str, dict[str, int]]]
    train_rows: int
    train_tokens: int
    _train: list[tuple[float, PackedRows]]
    _evaluation: dict[str, dict[str, EvaluationSet]]

    def order(self, seed: int) -> RandomOrder:
        """Which row of the training text stands where.

        Raises:
          ConfigError: the data was opened without training text.
        """
        return RandomOrder(*self._lengths_and_weights(), seed)

    def curriculum(self, seed: int, batch_size: int, layers: int, config: DataConfig) -> Curriculum:
        """The order that `config.curriculum` asks for; layers: that decide how many experts run.

        Raises:
          ConfigError: as `order`, and of a source with too few rows.
        """
        lengths, weights = self._lengths_and_weights()
        return Curriculum(lengths, weights, seed, batch_size, layers, config.curriculum, config.curriculum_buckets)

    def _lengths_and_weights(self):
        if not self._train:
            raise ConfigError("data.sources", "", "hold no training text", "give a source a weight above 0")
        return [len(source) for _, source in self._train], [weight for weight, _ in self._train]

    def train_dataset(
        self, seed: int, batch_size: int, rows: slice = slice(None), order: RandomOrder | None = None
    ) -> grain.MapDataset:
        """Step -> batch with random access. The global batch depends on (seed, step) and `order` alone, `rows` cuts it.

        order: None: that of `seed`.

        Raises:
          ConfigError: the data was opened without training text.
        """
        order = order or self.order(seed)
        wanted = range(*rows.indices(batch_size))

        def batch(step: int) -> Batch:
            places = [order[step * batch_size + row] for row in wanted]
            return _stack([self._train[source][1][row] for source, row in places])

        return grain.MapDataset.range(sys.maxsize // batch_size).map(batch)

    def train_batch(
        self, seed: int, batch_size: int, step: int, rows: slice = slice(None), order: RandomOrder | None = None
    ) -> Batch:
        """The batch of one step: arrays [rows, S] as in `PackedRows`."""
        return self.train_dataset(seed, batch_size, rows, order)[step]

    def train_batches(
        self,
        seed: int,
        batch_size: int,
        start_step: int = 0,
        rows: slice = slice(None),
        order: RandomOrder | None = None,
    ) -> grain.DatasetIterator:
        """Batches of `start_step`, `start_step` + 1, ... without end, read ahead by a thread until `close()`.

        Args:
          seed: order of the rows.
          batch_size: rows B of a global batch.
          start_step: the only state; to resume, the number of steps taken.
          rows: the rows of every global batch that this process wants; all processes together see all.
          order: None: that of `seed`.

        Yields:
          arrays [rows, S] as in `PackedRows`.
        """
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=READ_AHEAD)
        iterator = iter(self.train_dataset(seed, batch_size, rows, order).to_iter_dataset(options))
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
    with say_after(2.0, "reading the sources of text ...", show_progress):
        sources = open_sources(config, cache_dir)
    training = [source for source in sources if source.weight]
    if not training and ("train" in splits or tokenizer is None):
        raise ConfigError("data.sources", "", "every weight is 0", "give a source a weight above 0")
    tokenizer = tokenizer or open_tokenizer(config, training, cache_dir, show_progress)

    streams: dict[str, dict[str, TokenStream]] = {}
    for i, source in enumerate(sources):
        streams[source.name] = {}
        for split in [split for split in splits if split in source.splits]:
            stream = open_stream(source.splits[split], tokenizer, cache_dir, f"{source.name} {split}", show_progress)
            if not stream.documents:
                raise _no_text(f"data.sources[{i}]", source.name, f"has no text in {split}", stream)
            streams[source.name][split] = stream
    packed = {
        name: {split: _pack(name, split, stream, tokenizer, config) for split, stream in parts.items()}
        for name, parts in streams.items()
    }
    train = [(source.weight, packed[source.name]["train"]) for source in training if "train" in packed[source.name]]
    identities = [(stream_digest(source.splits["train"], tokenizer), float(source.weight)) for source in training]
    return TextData(
        tokenizer=tokenizer,
        fingerprint=digest("data", identities, config.sequence_length, config.document_attention),
        identity=_identity(config, streams),
        report=_report(streams, packed),
        train_rows=sum(len(rows) for _, rows in train),
        train_tokens=sum(parts["train"].targets for parts in streams.values() if "train" in parts),
        _train=train,
        _evaluation={
            split: {name: parts[split] for name, parts in packed.items() if split in parts} for split in ("validation", "test")
        },
    )


def _pack(name: str, split: str, stream: TokenStream, tokenizer: Tokenizer, config: DataConfig) -> PackedRows | EvaluationSet:
    if split != "train":
        return EvaluationSet(name, stream, tokenizer, config)
    return PackedRows(stream, tokenizer.bos, config.sequence_length, config.document_attention, drop_remainder=True)


def _no_text(field: str, value: str, limit: str, stream: TokenStream) -> ConfigError:
    if stream.left_out:
        limit += f" ({describe_left_out(stream.left_out, stream.places)})"
    return ConfigError(field, value, limit, "name files with text")


def _identity(config: DataConfig, streams: dict[str, dict[str, TokenStream]]) -> dict[str, Any]:
    mixture = [[source.name, float(source.weight)] for source in config.sources if source.weight]
    kept = ("content", "documents", "bytes")
    return {
        "mixture": {"sources": mixture, "packing": [config.sequence_length, config.document_attention]},
        "texts": {
            name: {split: {key: getattr(stream, key) for key in kept} for split, stream in parts.items()}
            for name, parts in streams.items()
        },
    }


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
    split = file_splits(source, _COMMAND_FIELDS, 0.0)["test"]
    stream = open_stream(split, tokenizer, _cache_dir(config), name, show_progress)
    if not stream.documents:
        raise _no_text("--source", files, "has no text", stream)
    _warn(name, stream)
    return EvaluationSet(name, stream, tokenizer, config)


def _cache_dir(config: DataConfig) -> epath.Path:
    """The folder of prepared data, which is there from here on."""
    variable = os.environ.get("MOE_JAX_CACHE", "")
    path = config.cache_dir or variable or "~/.cache/moe_jax"
    field = "environment variable MOE_JAX_CACHE" if variable and not config.cache_dir else "data.cache_dir"
    if "://" in path:
        raise ConfigError(field, path, "is not on this machine", "give a local folder")
    try:
        folder = epath.Path(path).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, RuntimeError) as error:
        limit = f"is no folder that can be made: {getattr(error, 'strerror', '') or error}"
        raise ConfigError(field, path, limit, "name a folder that can be written") from error
    return folder


def _report(
    streams: dict[str, dict[str, TokenStream]], packed: dict[str, dict[str, Any]]
) -> dict[str, dict[str, dict[str, int]]]:
    """Counts by source and split; warns of what is left out and of held-out documents that are trained on."""
    trained_on = [np.asarray(parts["train"].hashes) for parts in streams.values() if "train" in parts]
    trained_on = np.unique(np.concatenate(trained_on)) if trained_on else np.zeros(0, np.uint64)
    report = {}
    for name, parts in streams.items():
        report[name] = {}
        for split, stream in parts.items():
            rows = packed[name][split]
            counts = {"documents": stream.documents, "bytes": stream.bytes, "tokens": stream.targets}
            counts["rows"] = rows.rows if isinstance(rows, EvaluationSet) else len(rows)
            counts |= {"empty": stream.empty, "repeated": stream.repeated}
            counts |= {f"left out: {reason}": count for reason, count in stream.left_out.items()}
            _warn(f"{name} {split}", stream)
            if split != "train" and (both := int(np.isin(stream.hashes, trained_on).sum())):
                counts["in the training text too"] = both
                say(f"warning: {both:,} of {stream.documents:,} documents of {name} {split} are in the training text too")
            report[name][split] = counts
    return report


def _warn(label: str, stream: TokenStream) -> None:
    if stream.left_out:
        say(f"warning: {label}: {describe_left_out(stream.left_out, stream.places)}")


def _stack(rows: Sequence[dict[str, np.ndarray]]) -> Batch:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
