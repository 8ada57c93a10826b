"""One Transformer block: attention, then a feed-forward layer of some kind, each after a norm and with a residual."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.config import FFNConfig, ModelConfig, MoEConfig
from moe_jax.config.blocks import expert_width
from moe_jax.layers.attention import Attention
from moe_jax.layers.ffn import FeedForward
from moe_jax.layers.kv_cache import KVCache
from moe_jax.layers.moe import MoE
from moe_jax.layers.norms import make_norm
from moe_jax.layers.peer import PEER
from moe_jax.layers.rotary import Rotary
from moe_jax.routing import ROUTERS, SELECTORS, Router, Sizes
from moe_jax.types import Aux, RouterInputs, SlotMix


class BlockInputs(NamedTuple):
    """What every block of a model sees beside the hidden states.

    token_ids, positions, segment_ids: int32 [B, S]; segment 0 is padding. key: typed PRNG key or None.
    train, record: static, see `RouterInputs`. earlier_ids: int32 [B, S, P] or None, see `earlier_tokens`.
    """

    token_ids: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    key: jax.Array | None = None
    train: bool = False
    record: bool | None = None
    earlier_ids: jax.Array | None = None


def router_inputs(inputs: BlockInputs, layer: jax.Array | int) -> RouterInputs:
    """The same, flattened to [T], with the noise key of block number `layer`."""
    batch, length = inputs.token_ids.shape
    return RouterInputs(
        token_ids=inputs.token_ids.reshape(-1),
        positions=inputs.positions.reshape(-1),
        segment_ids=inputs.segment_ids.reshape(-1),
        valid=inputs.segment_ids.reshape(-1) > 0,
        sequences=jnp.repeat(jnp.arange(batch, dtype=jnp.int32), length),
        key=None if inputs.key is None else jax.random.fold_in(inputs.key, layer),
        train=inputs.train,
        record=inputs.record,
        earlier_ids=None if inputs.earlier_ids is None else inputs.earlier_ids.reshape(batch * length, -1),
    )


def router_sizes(config: MoEConfig, vocab_size: int = 0) -> Sizes:
    """What the router of a layer is built for."""
    return Sizes(config.experts, config.top_k, config.virtual_experts, vocab_size)


def router_of(ffn: FFNConfig, vocab_size: int = 0) -> tuple[Router, Sizes, Any]:
    """The router of a layer that has one, what it is built for, and its options."""
    if ffn.kind == "routed":
        return ROUTERS[ffn.moe.router], router_sizes(ffn.moe, vocab_size), ffn.moe.options
    return SELECTORS[ffn.peer.selector], Sizes(ffn.peer.experts, ffn.peer.top_k, 0, vocab_size), ffn.peer


def mixes_slots(ffn: FFNConfig, width: int, vocab_size: int) -> bool:
    """Whether the router of a routed layer mixes tokens into slots, so that each has a weight for every expert."""
    router, sizes, options = router_of(ffn, vocab_size)
    ids = jnp.zeros(sizes.experts, jnp.int32)  # enough tokens for any K
    inputs = RouterInputs(token_ids=ids, positions=ids, segment_ids=ids + 1, valid=ids == 0, sequences=ids)
    inputs = inputs._replace(earlier_ids=jnp.zeros((len(ids), options.earlier_tokens), jnp.int32))
    x, run = jnp.zeros((len(ids), width)), router.build(sizes, options).init_with_output
    (assignment, _, _), _ = jax.eval_shape(lambda key: run(key, x, inputs), jax.random.key(0))
    return isinstance(assignment, SlotMix)


class Block(nn.Module):
    """A pre-norm block with the feed-forward layer `ffn`.

    Parameters: norm_attention and attention where `ffn.attention`; norm_ffn where `ffn.norm`; those of the layer under ffn, moe
    or peer. `vocab_size` is for routers with a table of token ids.
    """

    config: ModelConfig
    ffn: FFNConfig
    vocab_size: int = 0

    @nn.compact
    def __call__(
        self, x: jax.Array, inputs: BlockInputs, layer: jax.Array | int = 0, cache: KVCache | None = None
    ) -> tuple[jax.Array, Aux | None, KVCache | None]:
        """x [B, S, D] -> (x [B, S, D], Aux or None of a dense block, the cache with these tokens or None)."""
        c, dtype, aux = self.config, jnp.dtype(self.config.dtype), None
        if self.ffn.attention:
            h = make_norm(c.norm, c.norm_epsilon, dtype, name="norm_attention")(x)
            h, cache = self._attention(dtype)(h, inputs.positions, inputs.segment_ids, cache)
            x = x + h
        h = make_norm(c.norm, c.norm_epsilon, dtype, name="norm_ffn")(x) if self.ffn.norm else x
        if self.ffn.kind == "dense":
            width, start = self.ffn.width or c.ffn_width, c.residual_init
            h = FeedForward(width, c.activation, c.ffn_bias, dtype, output_init=start, name="ffn")(h)
        elif self.ffn.kind == "routed":
            h, aux = self._moe()(h, router_inputs(inputs, layer))
        else:
            h, aux = self._peer()(h, router_inputs(inputs, layer))
        return x + h, aux, cache

    def _router(self) -> nn.Module:
        router, sizes, options = router_of(self.ffn, self.vocab_size)
        return router.build(sizes, options)

    def _attention(self, dtype) -> Attention:
        c, rotary = self.config, None
        if c.positions == "rope":
            rotary = Rotary(
                c.rope_theta, c.rope_scaling, c.rope_factor, c.rope_low_frequency, c.rope_high_frequency, c.rope_original_length
            )
        return Attention(
            heads=c.heads,
            kv_heads=c.kv_heads,
            head_width=c.head_width,
            rotary=rotary,
            qk_norm=c.qk_norm,
            norm_epsilon=c.norm_epsilon,
            qkv_bias=c.qkv_bias,
            output_bias=c.output_bias,
            backend=c.attention,
            dtype=dtype,
            output_init=c.residual_init,
            name="attention",
        )

    def _peer(self) -> PEER:
        p = self.ffn.peer
        return PEER(
            p.experts,
            router=self._router(),
            activation=p.activation if self.ffn.kind == "peer" else None,
            replaces=self.config.activation,
            shared_width=p.shared_width,
            split=p.split,
            backend=p.backend,
            output_init=self.config.residual_init,
            name="peer",
        )

    def _moe(self) -> MoE:
        c, m, width = self.config, self.ffn.moe, expert_width(self.config, self.ffn)
        return MoE(
            experts=m.experts,
            width=width,
            top_k=m.top_k,
            router=self._router(),
            activation=c.activation,
            use_bias=c.ffn_bias,
            zero_experts=m.zero_experts,
            copy_experts=m.copy_experts,
            constant_experts=m.constant_experts,
            shared_width=m.shared_experts * width,
            shared_gate=m.shared_gate,
            capacity_factor=m.capacity_factor if m.execution == "capacity" else 0.0,
            eval_capacity=m.eval_capacity,
            capacity_priority=m.capacity_priority,
            renormalise_kept=m.renormalise_kept,
            expert_sublayers=m.expert_sublayers,
            expert_norm=m.expert_norm,
            norm=c.norm,
            norm_epsilon=c.norm_epsilon,
            backend=m.backend,
            exchange=m.exchange,
            exchange_buffer=m.exchange_buffer,
            output_init=c.residual_init,
            name="moe",
        )
