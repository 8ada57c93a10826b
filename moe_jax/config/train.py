"""Devices, optimizer, loop, start and end of a run."""

import dataclasses

from moe_jax.config.leaf import ConfigError, field


@dataclasses.dataclass
class MeshConfig:
    """Devices. The batch is sharded over (data, fsdp, expert); the product must be the device count."""

    data: int = field(-1, "Copies of the model; -1: what the other axes leave.", low=-1, role="rounding")
    fsdp: int = field(1, "Shards of every weight's model width.", low=1, role="rounding")
    expert: int = field(1, "Shards of the experts.", low=1, role="rounding")
    tensor: int = field(1, "Shards of heads and hidden widths.", low=1, role="rounding")
    cpu_devices: int = field(
        0,
        "Emulate this many devices on the CPU, in each process; 0: the devices that are there.",
        low=0,
        high=512,
        role="rounding",
    )


@dataclasses.dataclass
class ParameterGroup:
    """Other optimizer settings for the parameters whose path matches."""

    path: str = field("", "Regular expression, searched in the 'a/b/c' path of a parameter; the first match counts.")
    learning_rate_scale: float = field(
        1.0, "Multiplies the learning rate; 0: frozen, without a gradient, moments, decay or an average.", low=0
    )
    weight_decay: float = field(-1.0, "Weight decay; -1: the optimizer's.", low=-1)


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float = field(3e-3, "Peak learning rate.", low=0)
    warmup_steps: int = field(100, "Steps of linear warm-up; of a run with fewer steps, all.", low=0)
    schedule: str = field(
        "cosine",
        "After the warm-up: a decay to the last step; or wsd, which is stable at the peak, then decays linearly over the last "
        "decay_fraction of the steps (arXiv:2404.06395).",
        choices=("cosine", "linear", "constant", "wsd"),
    )
    final_fraction: float = field(0.1, "Learning rate at the end, as a fraction of the peak.", low=0, high=1)
    decay_fraction: float = field(0.2, "Share of all steps that the decay of schedule=wsd takes.", low=0, high=1)
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
        default=(), metadata={"doc": "Other settings for parameters by path; on resume they may change only to freeze."}
    )


@dataclasses.dataclass
class TrainConfig:
    """The loop."""

    steps: int = field(1000, "Optimizer steps.", low=1, role="runtime")
    microbatches: int = field(1, "Parts of a batch whose gradients are accumulated in one step.", low=1)
    log_every: int = field(20, "Steps between training rows in metrics.jsonl.", low=1, role="runtime")
    eval_every: int = field(500, "Steps between evaluations; 0: only at the end.", low=0, role="runtime")
    checkpoint_every: int = field(500, "Steps between checkpoints; 0: only at the end.", low=0, role="runtime")
    eval_batches: int = field(
        16, "Validation batches per source of an evaluation during training; 0: all.", low=0, role="runtime"
    )
    max_to_keep: int = field(2, "Checkpoints kept.", low=1, role="runtime")
    keep_steps: str = field(
        "", "Comma-separated steps whose checkpoints are saved and never deleted, such as those to branch from.", role="runtime"
    )
    async_checkpoint: bool = field(True, "Write checkpoints while training goes on.", role="runtime")
    max_skipped: int = field(
        10, "Stop after this many steps in a row with a non-finite loss or gradient.", low=1, role="runtime"
    )
    profile_steps: str = field("", "'10:13' writes a profiler trace of steps 10, 11 and 12.", role="runtime")
    peak_tflops: float = field(
        0.0, "Peak TFLOP/s of one device for the MFU; 0: known for common devices.", low=0, role="runtime"
    )
    routing_snapshots: int = field(
        0,
        "How often in the run the experts of the same held-out tokens are recorded in routing.npz; 0: never.",
        low=0,
        role="runtime",
    )
    routing_tokens: int = field(4096, "How many tokens those are.", low=1, role="runtime")
    tensorboard: bool = field(True, "Write TensorBoard events beside metrics.jsonl.", role="runtime")


def kept_steps(config: TrainConfig) -> tuple[int, ...]:
    """The steps of `keep_steps`, in order.

    Raises:
      ConfigError: one is not a step.
    """
    texts = [text.strip() for text in config.keep_steps.split(",")] if config.keep_steps else []
    if not all(text.isascii() and text.isdigit() and int(text) for text in texts):
        raise ConfigError("train.keep_steps", config.keep_steps, "not steps of 1 or more", "write such as 400,800")
    return tuple(sorted(set(map(int, texts))))


@dataclasses.dataclass
class InitConfig:
    """Where parameters come from before the first step."""

    checkpoint: str = field("", "Workdir of another run whose newest checkpoint, and tokenizer, to start from.", role="runtime")
    include: str = field("", "Comma-separated path prefixes to fill; empty: all.", role="runtime")
    upcycle_from: str = field(
        "",
        "Workdir of a dense run whose feed-forward layers become the experts: whole ones, or 1/G of one where "
        "model.moe.expert_width is ffn_width / G (arXiv:2212.05055).",
        role="runtime",
    )
    branch_from: str = field(
        "",
        "Workdir of another run to go on from: parameters, moments, routers' state, place in the text and step. All that "
        "fixes numbers is that run's, but for the schedule and the steps.",
        role="runtime",
    )
    branch_step: int = field(0, "Step of branch_from's checkpoint; 0: the newest.", low=0, role="runtime")


@dataclasses.dataclass
class SampleConfig:
    """The sample and the comparison that end a training run."""

    prompt: str = field("", "Text to continue at the end of training; empty: no sample.", role="runtime")
    tokens: int = field(128, "Tokens of the sample.", low=1, role="runtime")
    temperature: float = field(0.8, "Sampling temperature; 0: greedy.", low=0, role="runtime")
    top_p: float = field(
        0.95, "Sample from the smallest set of tokens with this probability.", low=0.01, high=1, role="runtime"
    )
    stop: str = field("", "End the sample before this text.", role="runtime")
    compare_compressors: bool = field(
        False, "End with bits per byte on the test files beside gzip -9 and xz -9.", role="runtime"
    )
