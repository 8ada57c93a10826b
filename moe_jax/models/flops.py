"""Model FLOPs and active parameters, counted from the config: what the mathematics needs, whatever an implementation spends."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from moe_jax.config import FFNConfig, ModelConfig
from moe_jax.config.blocks import RETRIEVING, block_layers, expert_width
from moe_jax.models.places import deciding_places, places, pool_path, stacked_places
from moe_jax.ops.activations import is_gated
from moe_jax.ops.retrieval import rows_of_expert


class BlockFlops(NamedTuple):
    """FLOPs of one token in one block, forward; a multiply-add counts 2. last: the part of `ffn` that is its last product."""

    attention: float
    ffn: float
    router: float
    last: float


def forward_flops_per_token(
    config: ModelConfig, vocab_size: int, sequence_length: int, experts: Mapping[str, float] | None = None
) -> float:
    """FLOPs of one token in the forward pass; a multiply-add counts 2.

    Attention counts the causal half of S x S. A routed layer counts its experts, the shared ones and the router.

    Args:
      config: the model's.
      vocab_size: V.
      sequence_length: S.
      experts: how many experts ran for a token, by the name of the block (`experts_run`); a block that is missing counts K, or
        what the router's options say. Only such counts tell which choices were virtual experts, which cost nothing.
    """
    blocks = 0.0
    for place in places(config):
        cost = block_flops(config, place.ffn, sequence_length, (experts or {}).get(place.name))
        blocks += cost.attention + cost.ffn + cost.router
    return blocks + 2.0 * config.width * vocab_size


def block_flops(config: ModelConfig, ffn: FFNConfig, sequence_length: int, experts: float | None = None) -> BlockFlops:
    """What one block costs a token; experts: how many of a routed layer ran for it, None: as planned."""
    c, d = config, config.width
    head, kv_heads = c.head_width or d // c.heads, c.kv_heads or c.heads
    attention = 2 * d * head * (2 * c.heads + 2 * kv_heads) + 2 * sequence_length * head * c.heads if ffn.attention else 0
    matrices = 3 if is_gated(c.activation) else 2
    if ffn.kind == "dense":
        return BlockFlops(attention, 2 * matrices * d * ffn.width, 0.0, 2 * d * ffn.width)
    if ffn.kind == "routed":
        moe, width = ffn.moe, expert_width(c, ffn)
        experts = moe.options.experts_per_token(moe, sequence_length) if experts is None else experts
        routed = 2 * matrices * d * width * (experts * moe.expert_sublayers + moe.shared_experts)
        return BlockFlops(attention, routed, 2.0 * d * moe.options.columns(moe), 2 * d * width * experts)
    peer = ffn.peer
    rows = rows_of_expert(peer.activation if ffn.kind == "peer" else None)
    retrieval = 2.0 * peer.selector_products(d)
    return BlockFlops(attention, 2 * d * (rows * peer.heads * peer.top_k + matrices * peer.shared_width), retrieval, 0.0)


def router_flops_per_token(config: ModelConfig) -> float:
    """The routers' share of `forward_flops_per_token`.

    A routed layer counts the product with the router's columns, and with slots the two that mix tokens into slots and back. A
    layer that retrieves counts the queries and their scores.
    """
    return sum(block_flops(config, ffn, 1).router for ffn in block_layers(config))


def training_flops_per_token(
    config: ModelConfig, vocab_size: int, sequence_length: int, experts: Mapping[str, float] | None = None
) -> float:
    """FLOPs of one token, forward and backward: 3 times `forward_flops_per_token`. Recomputation is not counted."""
    return 3 * forward_flops_per_token(config, vocab_size, sequence_length, experts)


def experts_run(config: ModelConfig, stats: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Experts with matrices that ran for a token, by block, from the counts of a step, where the router decides how many.

    Args:
      config: the model's.
      stats: statistics by block (`by_layer`), on the host.
    """
    experts = {}
    for place in deciding_places(config):
        if sums := stats.get(place.name):
            experts[place.name] = experts_per_token(sums)
    return experts


def experts_per_token(sums: Mapping[str, Any]) -> float:
    """Experts with matrices that ran for a token on average, from the statistics of a routed layer, on the host."""
    return float((sums["counts"].sum() - sums["dropped"]) / max(float(sums["tokens"]), 1.0))


def active_parameters(config: ModelConfig, params: Any) -> int:
    """Parameters that a token meets: all but (E - K) / E of each routed layer's experts, and (N - H K) / N of a pool's.

    Args:
      config: the model's.
      params: its parameters, arrays or ShapeDtypeStructs.
    """
    shares: dict[str, tuple[int, int]] = {}  # prefix of a path -> what of how many experts a token meets
    for place in stacked_places(config, "routed"):
        shares[f"{place.own_experts}/"] = place.ffn.moe.top_k, place.ffn.moe.experts
    for place in stacked_places(config, *RETRIEVING):
        peer = place.ffn.peer
        uses = block_layers(config).count(place.ffn) if peer.share_pool else 1
        shares[pool_path(place)] = min(uses * peer.heads * peer.top_k, peer.experts), peer.experts
    active = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        used, of = next((share for prefix, share in shares.items() if name.startswith(prefix)), (1, 1))
        active += math.prod(leaf.shape) * used // of
    return active
