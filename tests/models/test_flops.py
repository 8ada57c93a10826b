import flax.linen as nn
import jax
import numpy as np
import pytest

from moe_jax.config import ModelConfig, PeerConfig
from moe_jax.models.decoder import Decoder
from moe_jax.models.flops import (
    active_parameters,
    experts_run,
    forward_flops_per_token,
    router_flops_per_token,
    training_flops_per_token,
)
from moe_jax.train.state import abstract_variables


def test_counts_by_hand():
    c = ModelConfig(layers=2, width=8, ffn_width=16, heads=2, kv_heads=1, activation="swiglu")
    c.moe.experts, c.moe.top_k, c.moe.expert_width = 4, 2, 12
    attention = 2 * 8 * (8 + 4 + 4 + 8) + 2 * 10 * 8  # q, k, v, o; scores and values over half of S = 10
    dense, routed = 2 * 3 * 8 * 16, 2 * 3 * 8 * 12 * 2 + 2 * 8 * 4
    expected = 2 * attention + dense + routed + 2 * 8 * 50
    assert forward_flops_per_token(c, 50, 10) == expected
    assert training_flops_per_token(c, 50, 10) == 3 * expected


@pytest.mark.parametrize("activation, matrices", [("relu", 2), ("swiglu", 3)])
def test_top_k_scales_the_experts_only(activation, matrices):
    c = ModelConfig(activation=activation)
    c.moe.top_k = 1
    one = forward_flops_per_token(c, 100, 16)
    c.moe.top_k = 2
    assert forward_flops_per_token(c, 100, 16) - one == 2 * 2 * matrices * c.width * c.ffn_width  # 2 routed layers


def test_routers_by_hand():
    c = ModelConfig(layers=4, width=8, inserts="first=routed@0")  # two routed layers in the groups, and one
    c.moe.experts = 5
    assert router_flops_per_token(c) == 3 * 2 * 8 * 5
    c.pattern, c.inserts = "dense", ""
    assert router_flops_per_token(c) == 0


@pytest.mark.parametrize("kind, rows", [("peer", 2), ("pkm", 1)])
def test_retrieval_by_hand(kind, rows):
    c = ModelConfig(layers=1, width=8, pattern=kind, heads=2, activation="gelu", positions="none")
    c.peer = PeerConfig(experts=25, heads=3, top_k=2, key_width=6, shared_width=7)
    experts = 2 * rows * 3 * 2 * 8 + 2 * 2 * 8 * 7
    attention, output = 2 * 4 * 8 * 8 + 2 * 10 * 8, 2 * 8 * 50

    def check(router, count):
        """FLOPs of the router, and parameters of its products."""
        assert router_flops_per_token(c) == router
        assert forward_flops_per_token(c, 50, 10) == attention + experts + router + output
        params = nn.unbox(abstract_variables(Decoder(c, 50)))["params"]["stack"]["groups"]["block_0"]["peer"]
        assert sum(params["router"][name].size for name in ("kernel", "keys") if "router" in params) == count

    check(2 * 3 * (8 * 6 + 2 * 5 * 3), 3 * 8 * 6 + 2 * 5 * 3)
    c.peer.share_keys, c.peer.query_rank = False, 4
    check(2 * (8 * 4 + 3 * 2 * 5 * 2), 8 * 4 + 3 * 2 * 5 * 2)
    c.peer.selector, c.peer.query_rank = "token_hash", 0
    check(0, 0)


def test_active_parameters_by_hand():
    c = ModelConfig(layers=2, width=8, ffn_width=16, heads=2, activation="swiglu", ffn_bias=True)
    c.moe.experts, c.moe.top_k = 4, 1
    params = abstract_variables(Decoder(c, 50))["params"]
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert total - active_parameters(c, params) == 3 * (3 * 8 * 16 + 16 + 16 + 8)
    c.moe.top_k = 4
    assert active_parameters(c, params) == total


def test_the_width_of_dense_inserts():
    """FLOPs and parameters of the insert alone change."""
    c = ModelConfig(layers=2, width=8, ffn_width=16, heads=2, activation="swiglu", inserts="middle=dense@2,other=routed@2")
    variables = lambda: abstract_variables(Decoder(c, 50))["params"]
    flops, size = forward_flops_per_token(c, 50, 10), sum(leaf.size for leaf in jax.tree.leaves(variables()))
    c.insert_width = 6
    params = variables()
    assert flops - forward_flops_per_token(c, 50, 10) == 2 * 3 * 8 * 10
    assert size - sum(leaf.size for leaf in jax.tree.leaves(params)) == 3 * 8 * 10
    shapes = lambda ffn: {leaf.shape[-2:] for leaf in jax.tree.leaves(ffn)}
    assert shapes(params["stack"]["middle"]["ffn"]) == {(8, 6), (6, 8)}
    assert shapes(params["stack"]["groups"]["block_0"]["ffn"]) == {(8, 16), (16, 8)}


def test_a_second_expert_for_some_costs_its_share():
    """The experts' FLOPs are (1 + p) / 2 of top-2's, by the counts of a step; as planned those of the target."""
    c = ModelConfig(layers=1, pattern="routed")
    c.moe.experts, c.moe.top_k, c.moe.router = 4, 2, "adaptive"
    two, one = (forward_flops_per_token(c, 50, 10, {"layer_00": k}) for k in (2.0, 1.0))
    stats = {"layer_00": {"counts": np.asarray([30.0, 40.0, 20.0, 35.0]), "dropped": 0.0, "tokens": 100.0}}
    counted = forward_flops_per_token(c, 50, 10, experts_run(c, stats))
    experts, rest = 2 * (two - one), two - 2 * (two - one)
    assert counted - rest == pytest.approx((1 + 0.25) / 2 * experts, rel=1e-12)
    c.moe.routers.adaptive.target_k = 1.25
    assert forward_flops_per_token(c, 50, 10) == pytest.approx(counted, rel=1e-12)
