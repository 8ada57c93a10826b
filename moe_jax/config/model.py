"""The model's options."""

import dataclasses

from moe_jax.config.leaf import field
from moe_jax.config.moe import MoEConfig
from moe_jax.config.peer import PeerConfig


@dataclasses.dataclass
class FFNConfig:
    """A feed-forward layer by name, with what its blocks have before it.

    Beside those of `model.ffns` there are four built in, dense, routed, peer and pkm, with the options of the model.
    """

    name: str = field("", "What model.pattern and model.inserts call it.")
    kind: str = field("dense", "What it is.", choices=("dense", "routed", "peer", "pkm"))
    width: int = field(0, "Hidden width F of kind dense; 0: model.ffn_width.", low=0)
    attention: bool = field(True, "Whether its blocks have attention, after a norm, before it.")
    norm: bool = field(True, "Whether a norm stands before it.")
    moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)
    peer: PeerConfig = dataclasses.field(default_factory=PeerConfig)


@dataclasses.dataclass
class ModelConfig:
    """A decoder-only Transformer of repeating groups of blocks."""

    name: str = field("decoder", "Model builder.", choices=("decoder",))
    layers: int = field(4, "Blocks L in the repeating groups; a multiple of the pattern's length.", low=1)
    pattern: str = field(
        "dense,routed",
        "Feed-forward layers of one repeating group, comma-separated: dense, routed, peer, pkm, or names of model.ffns.",
    )
    inserts: str = field(
        "", "Extra named blocks, 'name=layer@i' before block i of the groups, comma-separated; layer: as in pattern."
    )
    width: int = field(128, "Model width D.", low=1)
    ffn_width: int = field(512, "Hidden width F of a dense feed-forward layer.", low=1)
    insert_width: int = field(0, "Hidden width of inserts of the built-in layer dense; 0: ffn_width.", low=0)
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
    residual_init: float = field(
        0.01,
        "Factor on the standard deviation with which all that writes into the residual stream starts: output projections of "
        "attention, feed-forward layers and experts, constant experts, output rows of peer and pkm. For new runs alone: one "
        "that has begun goes on from its own parameters, whatever this is.",
        low=0,
        role="start",
    )
    dtype: str = field("float32", "Compute dtype; parameters are float32.", choices=("float32", "bfloat16"), role="scoring")
    scan: bool = field(True, "Compile one group and loop over it; off: unrolled. Same parameters, same bits.", role="runtime")
    remat: bool = field(False, "Recompute each block in the backward pass instead of storing it. Same bits.", role="runtime")
    attention: str = field("auto", "Attention kernel.", choices=("auto", "xla", "cudnn", "splash"), role="rounding")
    loss_chunk: int = field(1024, "Tokens whose float32 logits are held at once by the cross-entropy.", low=1, role="rounding")
    moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)
    peer: PeerConfig = dataclasses.field(default_factory=PeerConfig)
    ffns: tuple[FFNConfig, ...] = dataclasses.field(
        default=(), metadata={"doc": "Feed-forward layers by name, each with its own kind, width, router and options."}
    )
