"""Text, tokenizer and packing."""

import dataclasses

from moe_jax.config.leaf import field


@dataclasses.dataclass
class SourceConfig:
    """One named source of text."""

    name: str = field("python_stdlib", "Label of the source in reports and metrics; letters, digits, '_', '-', '.'.")
    tfds: str = field("", "TFDS dataset with a text feature, such as 'python_stdlib'; exclusive with `files`.")
    # On resume the text is compared, not the place it is read from.
    files: str = field("", "Comma-separated globs of .txt, .jsonl or .gz files to train on.", role="runtime")
    validation_files: str = field("", "Globs of held-out files; empty: held out of `files` by a hash.", role="runtime")
    test_files: str = field("", "Globs of test files; empty: held out of `files` by a hash.", role="runtime")
    text_feature: str = field("text", "Name of the text in a TFDS example or a .jsonl row.")
    document: str = field("file", "What one document of a .txt is.", choices=("file", "paragraph", "line"))
    installed_packages: bool = field(False, "python_stdlib only: add the sources of the installed packages.")
    weight: float = field(1.0, "Share of training rows, relative to the other sources; 0: evaluation only.", low=0, high=1e15)


@dataclasses.dataclass
class DataConfig:
    """Text, tokenizer and packing. Fixes the data a run sees, together with `seed`."""

    sources: tuple[SourceConfig, ...] = dataclasses.field(
        default_factory=lambda: (SourceConfig(tfds="python_stdlib"),),
        metadata={"doc": "Named sources of text."},
    )
    tokenizer: str = field("bpe", "bytes, or byte-level BPE trained on the training text.", choices=("bytes", "bpe"))
    vocab_size: int = field(4096, "Vocabulary V of a BPE tokenizer; bytes always have 257.", low=300, high=2**20)
    sequence_length: int = field(256, "Tokens S in a packed row.", low=8)
    batch_size: int = field(16, "Rows B in a global batch.", low=1)
    document_attention: bool = field(True, "Keep attention and positions inside a document of a packed row.")
    curriculum: str = field(
        "none",
        "Order of the rows from the second epoch on, by how many experts their tokens took before: mean, over the layers; "
        "cosine, the rule of arXiv:2310.07188; none: random.",
        choices=("none", "mean", "cosine"),
    )
    curriculum_buckets: int = field(16, "Equal parts of an ordered epoch, random inside.", low=1)
    held_out_percent: float = field(
        3.0,
        "Percent of documents in each of validation and test, where the source has no split.",
        low=0,
        high=40,
    )
    cache_dir: str = field("", "Folder of prepared data; empty: $MOE_JAX_CACHE, else ~/.cache/moe_jax.", role="runtime")
