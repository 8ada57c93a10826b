"""Experts that are stacks of residual sublayers, each after a norm, against the sum written out in float64."""

import math
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.config.load import load_config
from moe_jax.config.model import FFNConfig
from moe_jax.dispatch.capacity import limit_assignments
from moe_jax.layers.experts import Experts
from moe_jax.layers.moe import MoE
from moe_jax.models.decoder import Decoder
from moe_jax.models.flops import active_parameters, block_flops
from moe_jax.types import ExpertChoice, SlotMix, TokenChoice
from tests.compiled import assert_like_reference
from tests.models.small import boxed_shapes, random_variables

T, D, F, E, C, K = 12, 6, 10, 4, 3, 2
EPSILON = 1e-3
CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def make(norm, sublayers=2):
    """(x [T, D], parameters by sublayer)"""
    rng = np.random.default_rng(0)
    shapes = {"w_in": (E, D, F), "w_gate": (E, D, F), "w_out": (E, F, D), "b_in": (E, F), "b_gate": (E, F), "b_out": (E, D)}
    shapes |= {"norm_scale": (E, D)} | ({"norm_bias": (E, D)} if norm == "layernorm" else {})
    weights = lambda: {name: 0.5 * rng.normal(size=shape) for name, shape in shapes.items()}
    return rng.normal(size=(T, D)), {f"sublayer_{i}": weights() for i in range(sublayers)}


def added(rows, sublayers, e):
    """What the stack of expert e adds to rows [M, D]."""
    x = rows
    for name in sorted(sublayers):
        w = {name: weight[e] for name, weight in sublayers[name].items()}
        n = x - jnp.mean(x, axis=1, keepdims=True) if "norm_bias" in w else x
        n = n / jnp.sqrt(jnp.mean(n**2, axis=1, keepdims=True) + EPSILON) * w["norm_scale"] + w.get("norm_bias", 0)
        h = jax.nn.silu(n @ w["w_gate"] + w["b_gate"]) * (n @ w["w_in"] + w["b_in"])
        x = x + h @ w["w_out"] + w["b_out"]
    return x - rows


def token_choice():
    rng = np.random.default_rng(1)
    return TokenChoice(rng.integers(0, E + 1, (T, K)).astype(np.int32), rng.random((T, K)))


def by_tokens(choice, x, sublayers):
    gates = [jnp.sum(jnp.where(choice.expert_ids == e, choice.gates, 0), axis=1)[:, None] for e in range(E)]
    return sum(gate * added(x, sublayers, e) for e, gate in enumerate(gates))


def by_experts(choice, x, sublayers):
    y = jnp.zeros_like(x)
    for e, (ids, gates) in enumerate(zip(*choice)):
        y = y.at[ids].add(gates[:, None] * added(x[ids], sublayers, e))
    return y


def by_slots(choice, x, sublayers):
    one = lambda e: choice.combine[:, e] @ added(choice.dispatch[:, e].T @ x, sublayers, e)
    return sum(one(e) for e in range(E))


def cases():
    """name -> (choice, slots or None, the reference)"""
    rng = np.random.default_rng(2)
    limited, slots, dropped = limit_assignments(token_choice(), E, C)
    assert dropped
    of_experts = ExpertChoice(rng.integers(0, T, (E, C)).astype(np.int32), rng.random((E, C)))
    mix = SlotMix(rng.random((T, E, C)), rng.random((T, E, C)))
    return {
        "tokens": (token_choice(), None, by_tokens),
        "slots": (limited, slots, by_tokens),
        "experts": (of_experts, None, by_experts),
        "mix": (mix, None, by_slots),
    }


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("kind", ["tokens", "slots", "experts", "mix"])
def test_float64(kind, norm):
    """Values, and gradients of the tokens and of every weight, for all that a router may return."""
    with jax.enable_x64(True):
        (x, sublayers), (choice, slots, reference) = make(norm), cases()[kind]
        layer = Experts(E, F, "swiglu", True, sublayers=2, norm=norm, norm_epsilon=EPSILON)
        ours = lambda x, sublayers: layer.apply({"params": sublayers}, x, choice, slots)[0]
        assert_like_reference(ours, lambda *args: reference(choice, *args), x, sublayers, limit=1e-12)


def test_one_sublayer_with_a_norm():
    """Its parameters stand where those of a plain expert do."""
    with jax.enable_x64(True):
        (x, sublayers), choice = make("layernorm", 1), token_choice()
        layer = Experts(E, F, "swiglu", True, norm="layernorm", norm_epsilon=EPSILON)
        ours = lambda x, weights: layer.apply({"params": weights}, x, choice)[0]
        reference = lambda x, weights: by_tokens(choice, x, {"sublayer_0": weights})
        assert_like_reference(ours, reference, x, sublayers["sublayer_0"], limit=1e-12)


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_the_start_is_the_identity(norm):
    """With outputs that start at 0 a layer adds nothing; one of the config's models is its residual stream alone."""
    layer = MoE(E, F, 1, activation="swiglu", use_bias=True, expert_sublayers=3, norm=norm, output_init=0.0)
    x = np.random.default_rng(0).normal(size=(T, D)).astype(np.float32)
    y, variables = jax.jit(lambda x: layer.init_with_output(jax.random.key(0), x))(x)
    assert set(variables["params"]["experts"]) == {"sublayer_0", "sublayer_1", "sublayer_2"}
    assert not np.any(jax.jit(layer.apply)(variables, x)[0])
    names = {"norm_scale", "norm_bias"} if norm == "layernorm" else {"norm_scale"}
    assert {name for name in variables["params"]["experts"]["sublayer_2"] if "norm" in name} == names


@pytest.mark.parametrize("size, shared, experts", [("base", 124e6, 454e6), ("large", 355e6, 3.22e9)])
def test_the_papers_models_have_its_sizes(size, shared, experts):
    """Within 1 % (table 2); the light router has 2.51 million parameters beside the centroids (appendix A)."""
    config = load_config(str(CONFIGS / f"stablemoe_lm_{size}.py"))
    params = nn.unbox(boxed_shapes(Decoder(config.model, config.data.vocab_size))["params"])
    layer = params["stack"]["stable"]["moe"]
    count = lambda tree: sum(math.prod(a.shape) for a in jax.tree.leaves(tree))
    assert count(layer["experts"]) == pytest.approx(experts, rel=0.01)
    assert count(params) - count(layer) == pytest.approx(shared, rel=0.01)
    assert count(layer["router"]) - count(layer["router"]["backbone"]) == pytest.approx(2.51e6, rel=0.01)


def test_flops_and_active_parameters():
    """Both count each sublayer."""
    ffn = FFNConfig(
        "between", kind="routed", attention=False, norm=False, moe=MoEConfig(experts=E, top_k=1, expert_sublayers=3)
    )
    model = ModelConfig(layers=2, width=8, ffn_width=16, heads=2, pattern="dense", ffns=(ffn,), inserts="extra=between@1")
    cost = block_flops(model, ffn, 32)
    assert cost.attention == 0 and cost.ffn == 3 * 2 * 3 * 8 * 16
    params = random_variables(Decoder(model, 32))["params"]
    experts = sum(a.size for a in jax.tree.leaves(params["stack"]["extra"]["moe"]["experts"]))
    assert experts == E * 3 * (3 * 8 * 16 + 8)
    everything = sum(a.size for a in jax.tree.leaves(params))
    assert active_parameters(model, params) == everything - experts * (E - 1) // E
