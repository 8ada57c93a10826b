"""Model FLOPs and active parameters, counted from the config: what the mathematics needs, whatever an implementation spends."""

import math
from typing import Any

import jax

from moe_jax.config import ModelConfig
from moe_jax.config.blocks import RETRIEVING, block_kinds, parse_inserts
from moe_jax.ops.activations import is_gated
from moe_jax.ops.retrieval import rows_of_expert


def forward_flops_per_token(config: ModelConfig, vocab_size: int, sequence_length: int) -> float:
    """Multiply-adds count twice. Attention counts the causal half of S x S; a routed layer K experts, those that are shared
    and the router. Choices of virtual experts count as experts: how many there are is known only when it runs."""
    c, d = config, config.width
    head = c.head_width or d // c.heads
    kv_heads = c.kv_heads or c.heads
    attention = 2 * d * head * (2 * c.heads + 2 * kv_heads) + 2 * sequence_length * head * c.heads
    matrices = 3 if is_gated(c.activation) else 2
    experts = experts_per_token(c, sequence_length) + c.moe.shared_experts
    ffn = {
        "dense": 2 * matrices * d * c.ffn_width,
        "routed": 2 * matrices * d * (c.moe.expert_width or c.ffn_width) * experts,
    }
    for kind in RETRIEVING:
        rows = rows_of_expert(c.peer.activation if kind == "peer" else None)
        ffn[kind] = 2 * d * (rows * c.peer.heads * c.peer.top_k + matrices * c.peer.shared_width)
    blocks = sum(attention + ffn[kind] for kind in block_kinds(c))
    blocks += 2 * matrices * d * extra_insert_width(c)
    return blocks + router_flops_per_token(c) + 2.0 * d * vocab_size


def extra_insert_width(config: ModelConfig) -> int:
    """What `insert_width` adds to the hidden widths of all dense blocks; negative where it is below `ffn_width`."""
    inserts = sum(kind == "dense" for _, kind, _ in parse_inserts(config))
    return inserts * (config.insert_width - config.ffn_width) if config.insert_width else 0


def experts_per_token(config: ModelConfig, sequence_length: int) -> float:
    """How many experts' work a token brings: K, or where a sequence fills slots, their number over its length."""
    moe = config.moe
    return moe.experts * moe.routers.soft_moe.slots / sequence_length if moe.router == "soft_moe" else moe.top_k


def router_flops_per_token(config: ModelConfig) -> float:
    """The routers' share of the forward pass: a product with the columns of experts in every routed layer; with slots also the
    two that mix tokens into them and back; in every layer that retrieves the queries and their scores."""
    moe = config.moe
    columns = {"hash": 0, "soft_moe": 3 * moe.experts * moe.routers.soft_moe.slots}
    columns = columns.get(moe.router, moe.experts + moe.virtual_experts)
    kinds, peer = block_kinds(config), config.peer
    retrieving = sum(kind in RETRIEVING for kind in kinds)
    # The query network, and its halves against sqrt(N) keys each.
    retrieval = 2.0 * peer.heads * peer.key_width * (config.width + math.isqrt(peer.experts))
    return 2.0 * config.width * columns * kinds.count("routed") + retrieval * retrieving


def training_flops_per_token(config: ModelConfig, vocab_size: int, sequence_length: int) -> float:
    """Forward plus backward: three times the forward pass. Recomputation is not counted."""
    return 3 * forward_flops_per_token(config, vocab_size, sequence_length)


def active_parameters(config: ModelConfig, params: Any) -> int:
    """Parameters that a token meets: all but (E - K) / E of each routed layer's experts, and (N - H K) / N of a pool's.

    Args:
      config: the model's.
      params: its parameters, arrays or ShapeDtypeStructs.
    """
    moe, active = config.moe, 0
    retrieving = sum(kind in RETRIEVING for kind in block_kinds(config))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        size = math.prod(leaf.shape)
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        if "experts" not in names:
            active += size
        elif "peer" in names or "pool" in names:
            uses = retrieving if "pool" in names else 1
            active += size * min(uses * config.peer.heads * config.peer.top_k, config.peer.experts) // config.peer.experts
        else:
            active += size * moe.top_k // moe.experts
    return active
