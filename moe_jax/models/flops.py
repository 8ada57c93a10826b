"""Model FLOPs, counted from the config: what the mathematics needs, whatever an implementation spends."""

from moe_jax.config import ModelConfig
from moe_jax.ops.activations import is_gated
from moe_jax.validation import parse_inserts, parse_pattern


def forward_flops_per_token(config: ModelConfig, vocab_size: int, sequence_length: int) -> float:
    """Multiply-adds count twice. Attention counts the causal half of S x S; a routed layer K experts, those that are shared
    and the router. Choices of virtual experts count as experts: how many there are is known only when it runs."""
    c, d = config, config.width
    head = c.head_width or d // c.heads
    kv_heads = c.kv_heads or c.heads
    attention = 2 * d * head * (2 * c.heads + 2 * kv_heads) + 2 * sequence_length * head * c.heads
    matrices = 3 if is_gated(c.activation) else 2
    experts = c.moe.top_k + c.moe.shared_experts
    ffn = {
        "dense": 2 * matrices * d * c.ffn_width,
        "routed": 2 * matrices * d * (c.moe.expert_width or c.ffn_width) * experts + router_flops_per_layer(c),
    }
    kinds = parse_pattern(c)
    blocks = list(kinds) * (c.layers // len(kinds)) + [kind for _, kind, _ in parse_inserts(c)]
    return float(sum(attention + ffn[kind] for kind in blocks) + 2 * d * vocab_size)


def router_flops_per_layer(config: ModelConfig) -> float:
    """Of one routed layer and token: a product with the columns of its experts or slots."""
    moe = config.moe
    columns = {"hash": 0, "soft_moe": moe.experts * moe.routers.soft_moe.slots}
    return 2.0 * config.width * columns.get(moe.router, moe.experts + moe.virtual_experts)


def training_flops_per_token(config: ModelConfig, vocab_size: int, sequence_length: int) -> float:
    """Forward plus backward: three times the forward pass. Recomputation is not counted."""
    return 3 * forward_flops_per_token(config, vocab_size, sequence_length)
