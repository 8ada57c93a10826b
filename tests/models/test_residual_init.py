"""The start of what writes into the residual stream."""

import re

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import FFNConfig, ModelConfig, MoEConfig, PeerConfig
from moe_jax.models.decoder import Decoder

PEER = PeerConfig(experts=16, heads=2, top_k=2, key_width=4, shared_width=8)
# Every kind of layer, in groups and as inserts.
FFNS = (
    FFNConfig("constants", kind="routed", moe=MoEConfig(experts=2, constant_experts=2, shared_experts=1, shared_gate=True)),
    FFNConfig("soft", kind="routed", moe=MoEConfig(experts=2, router="soft_moe", allow_noncausal=True)),
)
MODEL = {"pattern": "dense,routed,peer", "layers": 6, "inserts": "a=constants@0,b=soft@3,c=pkm@6"}
SCALED = re.compile(r"/(w_o|w_out|constant)$")


def start(**fields):
    """Path -> parameter of a model from one key."""
    small = MODEL | {"residual_init": 1.0, "width": 8, "ffn_width": 12, "heads": 2, "ffn_bias": True, "output_bias": True}
    config = ModelConfig(**small, moe=MoEConfig(experts=3), peer=PEER, ffns=FFNS)
    for name, value in fields.items():
        setattr(config, name, value)
    token = jnp.zeros((1, 1), jnp.int32)
    params = jax.jit(lambda key: Decoder(config, 11).init(key, token, token, token + 1))(jax.random.key(3, impl="unsafe_rbg"))[
        "params"
    ]
    return flax.traverse_util.flatten_dict(jax.device_get(nn.unbox(params)), sep="/")


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_it_scales_what_writes_into_the_stream_and_nothing_else(scan):
    """To the bit: a half is exact."""
    one, half = start(), start(residual_init=0.5, scan=scan)
    assert one.keys() == half.keys()
    pools, scaled = 0, []
    for path, before in one.items():
        after = half[path]
        if path.endswith("peer/experts"):
            pools += 1
            np.testing.assert_array_equal(after[..., -1, :], before[..., -1, :] / 2)
            np.testing.assert_array_equal(after[..., :-1, :], before[..., :-1, :])
            continue
        if SCALED.search(path):
            scaled.append(path)
            assert np.any(before)
        np.testing.assert_array_equal(after, before / 2 if SCALED.search(path) else before, path)
    assert pools == 2 and not [path for path in one if re.search(r"b_o(ut)?$", path) and np.any(one[path])]
    # Attention of 3 blocks in groups and 3 inserts; a dense layer, 3 of experts, those beside the experts of one and of two
    # pools; the vectors of constant experts.
    assert len(scaled) == (3 + 3) + (1 + 3 + 1 + 2) + 1


@pytest.mark.slow
def test_a_shared_pool():
    one, tenth = (
        start(peer=PeerConfig(experts=16, heads=2, top_k=2, key_width=4, share_pool=True), inserts="", **fields)
        for fields in ({}, {"residual_init": 0.125})
    )
    np.testing.assert_array_equal(tenth["stack/pool/experts"][:, -1], one["stack/pool/experts"][:, -1] / 8)
    np.testing.assert_array_equal(tenth["stack/pool/experts"][:, 0], one["stack/pool/experts"][:, 0])
