"""The configuration: one tree of mutable dataclasses, and what may stand in it.

Every leaf is a plain `bool`, `int`, `float` or `str` and carries its documentation, range and choices, so the
flag parser (`moe_jax.cli`), `--config.help` and `validate` all read this one place. An empty string or 0 means "off" or
"derived", as the field says; there are no None-able fields, because flags cannot set them.
"""

import dataclasses
import difflib
import itertools
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from moe_jax.config_field import ConfigError, field, one_line
from moe_jax.config_moe import MoEConfig
from moe_jax.config_peer import PeerConfig

__all__ = [
    "Config",
    "ConfigError",
    "DataConfig",
    "InitConfig",
    "MeshConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParameterGroup",
    "PeerConfig",
    "SampleConfig",
    "SourceConfig",
    "TrainConfig",
    "differences",
    "field",
    "from_dict",
    "item_type",
    "leaf_types",
    "leaves",
    "nearest",
    "one_line",
    "to_dict",
    "unknown_field",
]


@dataclasses.dataclass
class SourceConfig:
    """One named source of text."""

    name: str = field("python_stdlib", "Label of the source in reports and metrics; letters, digits, '_', '-', '.'.")
    tfds: str = field("", "TFDS dataset with a text feature, such as 'python_stdlib'; exclusive with `files`.")
    files: str = field("", "Comma-separated globs of .txt, .jsonl or .gz files to train on.")
    validation_files: str = field("", "Globs of held-out files; empty: held out of `files` by a hash.")
    test_files: str = field("", "Globs of test files; empty: held out of `files` by a hash.")
    text_feature: str = field("text", "Name of the text in a TFDS example or a .jsonl row.")
    document: str = field("file", "What one document of a .txt is.", choices=("file", "paragraph", "line"))
    installed_packages: bool = field(False, "python_stdlib only: add the sources of the installed packages.")
    weight: float = field(1.0, "Share of training rows, relative to the other sources; 0: evaluation only.", low=0)


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
    held_out_percent: float = field(
        3.0,
        "Percent of documents in each of validation and test, where the source has no split.",
        low=0,
        high=40,
    )
    cache_dir: str = field("", "Folder of prepared data; empty: $MOE_JAX_CACHE, else ~/.cache/moe_jax.")


@dataclasses.dataclass
class ModelConfig:
    """A decoder-only Transformer of repeating groups of blocks."""

    name: str = field("decoder", "Model builder.", choices=("decoder",))
    layers: int = field(4, "Blocks L in the repeating groups; a multiple of the pattern's length.", low=1)
    pattern: str = field(
        "dense,routed", "Feed-forward kinds of one repeating group, comma-separated: dense, routed, peer, pkm."
    )
    inserts: str = field("", "Extra named blocks, 'name=kind@i' before block i of the groups, comma-separated.")
    width: int = field(128, "Model width D.", low=1)
    ffn_width: int = field(512, "Hidden width F of a dense feed-forward layer.", low=1)
    insert_width: int = field(0, "Hidden width of dense inserts; 0: ffn_width.", low=0)
    heads: int = field(4, "Query heads H.", low=1)
    kv_heads: int = field(0, "Key and value heads of grouped-query attention; 0: as many as query heads.", low=0)
    head_width: int = field(0, "Width of a head; 0: width / heads.", low=0)
    norm: str = field("rmsnorm", "Normalisation.", choices=("rmsnorm", "layernorm"))
    norm_epsilon: float = field(1e-6, "Added to the variance.", low=0)
    positions: str = field("rope", "Position information.", choices=("rope", "learned", "none"))
    rope_theta: float = field(10000.0, "Base of the rotary frequencies.", low=1)
    rope_scaling: str = field("none", "Stretching of the rotary frequencies.", choices=("none", "linear", "llama3"))
    rope_factor: float = field(8.0, "Stretch of rope_scaling.", low=1)
    rope_low_frequency: float = field(1.0, "llama3: wavelengths above original_length / this are fully stretched.", low=0)
    rope_high_frequency: float = field(4.0, "llama3: wavelengths below original_length / this stay.", low=0)
    rope_original_length: int = field(8192, "llama3: context length before the stretch.", low=1)
    max_positions: int = field(2048, "Rows of the learned position table, offset excluded.", low=1)
    position_offset: int = field(0, "First row of the learned position table in use (OPT: 2).", low=0)
    activation: str = field("swiglu", "Feed-forward nonlinearity.", choices=("gelu_tanh", "gelu", "relu", "swiglu"))
    qkv_bias: bool = field(False, "Biases of the query, key and value projections.")
    output_bias: bool = field(False, "Bias of the attention output projection.")
    ffn_bias: bool = field(False, "Biases of feed-forward layers and experts.")
    qk_norm: bool = field(False, "RMSNorm over each head's query and key.")
    tied_embeddings: bool = field(True, "Use the token embedding as the output projection.")
    row_gradients: bool = field(False, "Row-wise gradients and updates of the token embedding; needs tied_embeddings=False.")
    init_std: float = field(0.02, "Standard deviation of embeddings; other weights are scaled by fan-in.", low=0)
    dtype: str = field("float32", "Compute dtype; parameters are float32.", choices=("float32", "bfloat16"))
    scan: bool = field(True, "Compile one group and loop over it; off: unrolled. Same parameters, same bits.")
    remat: bool = field(False, "Recompute each block in the backward pass instead of storing it. Same bits.")
    attention: str = field("auto", "Attention kernel.", choices=("auto", "xla", "cudnn", "splash"))
    loss_chunk: int = field(1024, "Tokens whose float32 logits are held at once by the cross-entropy.", low=1)
    moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)
    peer: PeerConfig = dataclasses.field(default_factory=PeerConfig)


@dataclasses.dataclass
class MeshConfig:
    """Devices. The batch is sharded over (data, fsdp, expert); the product must be the device count."""

    data: int = field(-1, "Copies of the model; -1: what the other axes leave.", low=-1)
    fsdp: int = field(1, "Shards of every weight's model width.", low=1)
    expert: int = field(1, "Shards of the experts.", low=1)
    tensor: int = field(1, "Shards of heads and hidden widths.", low=1)
    cpu_devices: int = field(
        0,
        "Emulate this many devices on the CPU, in each process; 0: the devices that are there.",
        low=0,
        high=512,
    )


@dataclasses.dataclass
class ParameterGroup:
    """Other optimizer settings for the parameters whose path matches."""

    path: str = field("", "Regular expression, searched in the 'a/b/c' path of a parameter; the first match counts.")
    learning_rate_scale: float = field(1.0, "Multiplies the learning rate; 0: frozen.", low=0)
    weight_decay: float = field(-1.0, "Weight decay; -1: the optimizer's.", low=-1)


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float = field(3e-3, "Peak learning rate.", low=0)
    warmup_steps: int = field(100, "Steps of linear warm-up.", low=0)
    schedule: str = field("cosine", "Decay after the warm-up.", choices=("cosine", "linear", "constant"))
    final_fraction: float = field(0.1, "Learning rate at the end, as a fraction of the peak.", low=0, high=1)
    b1: float = field(0.9, "Decay of the first moment.", low=0, high=0.999999)
    b2: float = field(0.95, "Decay of the second moment.", low=0, high=0.999999)
    epsilon: float = field(1e-8, "Added to the root of the second moment.", low=0)
    weight_decay: float = field(0.1, "Decoupled weight decay of matrices; vectors and norms have none.", low=0)
    row_optimizer: str = field(
        "adam",
        "For tables with row-wise gradients: adam, or adagrad with one accumulator for a row.",
        choices=("adam", "adagrad"),
    )
    clip_norm: float = field(1.0, "Limit of the gradient's global norm; 0: none.", low=0)
    ema_decay: float = field(0.0, "Decay of an average of the parameters that evaluation uses; 0: none.", low=0, high=0.999999)
    groups: tuple[ParameterGroup, ...] = dataclasses.field(
        default=(), metadata={"doc": "Other settings for parameters by path."}
    )


@dataclasses.dataclass
class TrainConfig:
    """The loop."""

    steps: int = field(1000, "Optimizer steps.", low=1)
    microbatches: int = field(1, "Parts of a batch whose gradients are accumulated in one step.", low=1)
    log_every: int = field(20, "Steps between training rows in metrics.jsonl.", low=1)
    eval_every: int = field(500, "Steps between evaluations; 0: only at the end.", low=0)
    checkpoint_every: int = field(500, "Steps between checkpoints; 0: only at the end.", low=0)
    eval_batches: int = field(16, "Validation batches per source of an evaluation during training; 0: all.", low=0)
    max_to_keep: int = field(2, "Checkpoints kept.", low=1)
    async_checkpoint: bool = field(True, "Write checkpoints while training goes on.")
    max_skipped: int = field(10, "Stop after this many steps in a row with a non-finite loss or gradient.", low=1)
    profile_steps: str = field("", "'10:13' writes a profiler trace of steps 10, 11 and 12.")
    peak_tflops: float = field(0.0, "Peak TFLOP/s of one device for the MFU; 0: known for common devices.", low=0)
    tensorboard: bool = field(True, "Write TensorBoard events beside metrics.jsonl.")


@dataclasses.dataclass
class InitConfig:
    """Where parameters come from before the first step."""

    checkpoint: str = field("", "Workdir of another run whose newest checkpoint, and tokenizer, to start from.")
    include: str = field("", "Comma-separated path prefixes to fill; empty: all.")
    upcycle_from: str = field(
        "",
        "Workdir of a dense run whose feed-forward layers become the experts: whole ones, or 1/G of one where "
        "model.moe.expert_width is ffn_width / G (arXiv:2212.05055).",
    )


@dataclasses.dataclass
class SampleConfig:
    """The sample and the comparison that end a training run."""

    prompt: str = field("", "Text to continue at the end of training; empty: no sample.")
    tokens: int = field(128, "Tokens of the sample.", low=1)
    temperature: float = field(0.8, "Sampling temperature; 0: greedy.", low=0)
    top_p: float = field(0.95, "Sample from the smallest set of tokens with this probability.", low=0.01, high=1)
    stop: str = field("", "End the sample before this text.")
    compare_compressors: bool = field(False, "End with bits per byte on the test files beside gzip -9 and xz -9.")


@dataclasses.dataclass
class Config:
    """A run."""

    seed: int = field(0, "Fixes initialisation and data order, and noise where noise_seed is -1.", low=0, high=2**31 - 1)
    noise_seed: int = field(-1, "Fixes the routers' noise alone; -1: `seed`.", low=-1, high=2**31 - 1)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    sample: SampleConfig = dataclasses.field(default_factory=SampleConfig)


def item_type(leaf: dataclasses.Field) -> type | None:
    """The dataclass of the items of a tuple field; None: not a tuple."""
    return typing.get_args(leaf.type)[0] if typing.get_origin(leaf.type) is tuple else None


def leaves(section: Any, path: str = "") -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """All leaves of a config or section as (dotted path, the object that holds it, field), in file order."""
    for entry in dataclasses.fields(section):
        name, value = f"{path}{entry.name}", getattr(section, entry.name)
        if item_type(entry):
            for i, item in enumerate(value):
                yield from leaves(item, f"{name}[{i}].")
        elif dataclasses.is_dataclass(entry.type):
            yield from leaves(value, f"{name}.")
        else:
            yield name, section, entry


def leaf_types(section: type = Config, path: str = "") -> dict[str, type]:
    """Dotted path -> type of all leaves there can be, with '[]' for any item of a tuple."""
    found = {}
    for entry in dataclasses.fields(section):
        if item := item_type(entry):
            found |= leaf_types(item, f"{path}{entry.name}[].")
        elif dataclasses.is_dataclass(entry.type):
            found |= leaf_types(entry.type, f"{path}{entry.name}.")
        else:
            found[f"{path}{entry.name}"] = entry.type
    return found


def nearest(path: str, known: Iterable[str]) -> str:
    """The known dotted path most like `path`, by its last name first; empty: none is close."""

    def likeness(candidate: str) -> tuple[float, float]:
        last, whole = path.rpartition(".")[2], difflib.SequenceMatcher(None, path, candidate).ratio()
        return difflib.SequenceMatcher(None, last, candidate.rpartition(".")[2]).ratio(), whole

    best = max(known, key=likeness, default="")
    return best if best and max(likeness(best)) >= 0.6 else ""


def unknown_field(path: str, value: Any, known: Iterable[str]) -> ConfigError:
    """The error for a field that does not exist, with the nearest one that does."""
    near = nearest(path, known)
    fix = f"did you mean config.{near}?" if near else "--config.help lists all fields"
    return ConfigError(path, value, "no such field", fix)


def to_dict(config: Any) -> Any:
    """A config, or a section of one, as nested dicts, lists and plain values, ready for JSON."""
    if dataclasses.is_dataclass(config):
        return {entry.name: to_dict(getattr(config, entry.name)) for entry in dataclasses.fields(config)}
    return [to_dict(item) for item in config] if isinstance(config, tuple) else config


def from_dict(tree: dict[str, Any]) -> Config:
    """The config that `to_dict` wrote. Fields that are missing take their defaults, so older files load.

    Raises:
      ConfigError: `tree` has a field that does not exist, or no section where one is due. Leaf values are left
        to `moe_jax.validation.validate`.
    """
    return _section_from_dict(Config, tree, "")


def _section_from_dict(section: type, tree: Any, path: str) -> Any:
    if not isinstance(tree, dict):
        raise ConfigError(path.rstrip(".") or "config", tree, "not a section", "give its fields as a JSON object")
    entries = {entry.name: entry for entry in dataclasses.fields(section)}
    values = {}
    for name, value in tree.items():
        if name not in entries:
            raise unknown_field(f"{path}{name}", value, [f"{path}{known}" for known in entries])
        if item := item_type(entries[name]):
            if not isinstance(value, list | tuple):
                raise ConfigError(f"{path}{name}", value, "not a list", "give its items as a JSON list")
            value = tuple(_section_from_dict(item, x, f"{path}{name}[{i}].") for i, x in enumerate(value))
        elif dataclasses.is_dataclass(entries[name].type):
            value = _section_from_dict(entries[name].type, value, f"{path}{name}.")
        values[name] = value
    return section(**values)


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted path -> (old value, new value) of all fields that differ.

    Tuples are compared item by item ('data.sources[0].weight'); an item that only one side has is one entry,
    its fields in a dict against None.
    """
    return _differences(to_dict(old), to_dict(new), "")


def _differences(old: Any, new: Any, path: str) -> dict[str, tuple[Any, Any]]:
    found = {}
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old | new:
            found |= _differences(old.get(name), new.get(name), f"{path}.{name}" if path else name)
    elif isinstance(old, list) and isinstance(new, list):
        for i, (a, b) in enumerate(itertools.zip_longest(old, new)):
            found |= _differences(a, b, f"{path}[{i}]")
    elif old != new:
        found[path] = (old, new)
    return found
