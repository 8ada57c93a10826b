"""Layers that retrieve one-neuron experts."""

from moe_jax.config.blocks import block_layers
from moe_jax.config.leaf import ConfigError
from moe_jax.config.model import FFNConfig
from moe_jax.config.peer import PeerConfig
from moe_jax.config.run import Config
from moe_jax.config.validate.common import check_product_keys, must_divide


def check_retrieval(config: Config, ffn: FFNConfig, path: str) -> None:
    """That the options of a layer that retrieves, at the dotted path `path`, fit together."""
    peer, mesh = ffn.peer, config.mesh
    _check_selector(peer, path)
    field = "model.width" if peer.split == "width" else path + "experts"
    total = config.model.width if peer.split == "width" else peer.experts
    must_divide("mesh.expert", mesh.expert, field, total)
    width = config.model.width // (mesh.expert if peer.split == "width" else 1)
    if peer.backend == "mosaic" and width % 128:
        limit = f"{width} values of an expert's row on a device, and its copies are multiples of 128"
        raise ConfigError(path + "backend", peer.backend, limit, f"use {path}backend=auto, or another model.width")
    if peer.shared_width:
        must_divide("mesh.tensor", mesh.tensor, path + "shared_width", peer.shared_width)
    layers = block_layers(config.model).count(ffn)
    if layers * peer.experts >= 2**31:
        limit = f"with {layers} such blocks {layers * peer.experts} ids, which do not fit into int32"
        raise ConfigError(path + "experts", peer.experts, limit, "use fewer experts or blocks")
    pairs = config.data.batch_size * config.data.sequence_length * peer.heads * peer.top_k * layers
    if pairs >= 2**31:
        limit = f"{pairs} pairs of a token and an expert in a step, which int32 cannot count"
        raise ConfigError(path + "heads", peer.heads, limit, "use fewer heads, a smaller top_k or a smaller batch")
    if peer.row_gradients and config.optimizer.ema_decay:
        limit = f"an average of all of the pool, with {path}row_gradients=true"
        raise ConfigError("optimizer.ema_decay", config.optimizer.ema_decay, limit, f"use 0, or {path}row_gradients=false")


def _check_selector(peer: PeerConfig, path: str) -> None:
    if peer.searches:
        check_product_keys(path, peer.experts, peer.top_k, peer.key_width, peer.share_keys, peer.query_rank)
        if peer.top_k == 1 and peer.score == "softmax":
            limit = "the softmax over one score is 1, so that the router gets no gradient"
            raise ConfigError(path + "top_k", 1, limit, f"use 2 or more, or another {path}score")
        return
    for name, default in (("query_rank", 0), ("score", "softmax")):
        if getattr(peer, name) != default:
            limit = f"without effect on {path}selector={peer.selector}, which has neither queries nor scores"
            raise ConfigError(path + name, getattr(peer, name), limit, f"use {default}")
    if peer.heads * peer.top_k > peer.experts:
        limit = f"{peer.heads * peer.top_k} different experts for a token with {path}heads={peer.heads}"
        fix = f"use {peer.heads * peer.top_k} or more, or a smaller heads or top_k"
        raise ConfigError(path + "experts", peer.experts, limit, fix)
