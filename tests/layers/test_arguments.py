"""What the config refuses, the layers refuse too: in one line, with the argument's name, on one device as on a mesh."""

import jax
import numpy as np
import pytest

from moe_jax import PEER, MoE, RouterInputs, compat
from moe_jax.config.routers import GShardConfig, TopKConfig
from moe_jax.routing.expert_choice import ExpertChoiceRouter
from moe_jax.routing.gshard import GShard
from moe_jax.routing.product_keys import ProductKeys
from moe_jax.routing.soft_moe import SoftMoE
from moe_jax.routing.switch import Switch
from moe_jax.routing.top_k import TopK

X = np.ones((2, 4, 16), np.float32)


def refusal(layer, *args, **options):
    """The message of the ValueError that initialising raises, in shapes alone; one line."""
    with pytest.raises(ValueError) as error:
        jax.eval_shape(lambda: layer.init(jax.random.key(0), *(args or (X,)), **options))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"experts": 0}, "MoE experts=0: at least 1; raise it to 1 or more"),
        ({"width": 0}, "MoE width=0: at least 1; raise it to 1 or more"),
        ({"top_k": 0}, "MoE top_k=0: at least 1; raise it to 1 or more"),
        ({"top_k": 5}, "MoE top_k=5: at most experts=4; lower top_k or raise experts"),
        ({"top_k": 2.0}, "MoE top_k=2.0: a float, not an int; write an int of 1 or more"),
        ({"zero_experts": -1}, "MoE zero_experts=-1: at least 0; raise it to 0 or more"),
        ({"capacity_factor": -1}, "MoE capacity_factor=-1.0: at least 0; raise it to 0 or more"),
        ({"capacity_factor": float("nan")}, "MoE capacity_factor=nan: not a finite number; write a finite number"),
        ({"eval_capacity": -0.5}, "MoE eval_capacity=-0.5: at least 0; raise it to 0 or more"),
        (
            {"capacity_priority": "random"},
            "MoE capacity_priority=random: not a choice; choose token or choice or gate or probs",
        ),
        ({"exchange": "ring"}, "MoE exchange=ring: not a choice; choose auto or gather or all_to_all or ragged"),
        ({"exchange_buffer": 0.5}, "MoE exchange_buffer=0.5: less than an even load needs"),
        ({"backend": "pallas"}, "MoE backend=pallas: not a choice; choose auto or blocks or"),
        ({"activation": "tanh"}, "MoE activation=tanh: not a choice; choose gelu_tanh or"),
        ({"use_bias": "no"}, "MoE use_bias='no': a str, not a bool; write true or false"),
        ({"output_init": -1}, "MoE output_init=-1.0: at least 0; raise it to 0 or more"),
        ({"shared_width": -8}, "MoE shared_width=-8: at least 0; raise it to 0 or more"),
        ({"shared_gate": True}, "MoE shared_gate=True: shared_width=0; raise it, or switch the gate off"),
        (
            {"renormalise_kept": True},
            "MoE renormalise_kept=True: nothing is dropped with capacity_factor=0 and eval_capacity=0; use",
        ),
        ({"router": TopK(8, 2)}, "MoE experts=4: its router was built for 8 experts; give both the same number"),
        ({"router": TopK(4, 2, 1)}, "MoE zero_experts + copy_experts + constant_experts=0: its router was built for 1 virtual"),
        ({"router": TopK(4, 2), "copy_experts": 2}, "copy_experts + constant_experts=2: its router was built for 0 virtual"),
        ({"router": ExpertChoiceRouter(2, 1)}, "MoE experts=4: its router was built for 2 experts; give both the same"),
        ({"router": SoftMoE(8, 1)}, "MoE experts=4: its router was built for 8 experts; give both the same number"),
        (
            {"router": SoftMoE(4, 1), "capacity_factor": 1.0},
            "MoE capacity_factor=1.0: without effect on a router that returns SlotMix",
        ),
        (
            {"router": SoftMoE(4, 1), "exchange": "ragged"},
            "MoE exchange=ragged: without effect on a router that returns SlotMix",
        ),
        ({"router": SoftMoE(4, 1), "zero_experts": 1}, "MoE zero_experts=1: without effect on a router that returns SlotMix"),
        (
            {"router": Switch(4), "capacity_factor": 1.0},
            "MoE top_k=2: its router chooses 1, and the capacity follows top_k; use 1",
        ),
        ({"router": TopK(4, 2, options=TopKConfig(score="tanh"))}, "TopK.options score=tanh: not a choice; choose softmax or"),
        ({"router": GShard(4, options=GShardConfig(threshold=0.0))}, "GShard.options threshold=0.0: at least 1e-06; raise it"),
    ],
)
def test_moe(arguments, message):
    assert message in refusal(MoE(**{"experts": 4, "width": 8} | arguments))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"experts": 0}, "PEER experts=0: at least 1; raise it to 1 or more"),
        ({"experts": 50}, "PEER experts=50: not a square, which two sets of keys need; use 49 or 64"),
        ({"heads": 0}, "PEER heads=0: at least 1; raise it to 1 or more"),
        ({"top_k": 0}, "PEER top_k=0: at least 1; raise it to 1 or more"),
        ({"top_k": 8}, "PEER top_k=8: more than the 7 keys of a half, the root of PEER experts=49; use 7 or less"),
        ({"key_width": 5}, "PEER key_width=5: odd, but each half of a query meets keys of its own; use 6"),
        ({"query_norm": "rms"}, "PEER query_norm=rms: not a choice; choose batchnorm or layernorm or none"),
        ({"activation": "tanh"}, "PEER activation=tanh: not a choice; choose gelu or"),
        ({"replaces": "tanh"}, "PEER replaces=tanh: not a choice; choose gelu_tanh or"),
        ({"split": "rows"}, "PEER split=rows: not a choice; choose width or experts"),
        ({"backend": "cuda"}, "PEER backend=cuda: not a choice; choose auto or blocks or dense or triton or mosaic"),
        ({"shared_width": -1}, "PEER shared_width=-1: at least 0; raise it to 0 or more"),
        ({"output_init": -1.0}, "PEER output_init=-1.0: at least 0; raise it to 0 or more"),
        ({"router": ProductKeys(49)}, "PEER heads=2: without effect on the given router; leave it out, and set it there"),
    ],
)
def test_peer(arguments, message):
    assert message in refusal(PEER(**{"experts": 49, "heads": 2, "top_k": 4, "key_width": 6} | arguments))


def test_peer_with_a_router():
    assert "PEER experts=49: its router was built for 64 experts; give" in refusal(PEER(49, router=ProductKeys(64)))
    assert "ProductKeys top_k=16: more than the 7 keys of a half" in refusal(PEER(49, router=ProductKeys(49)))


@pytest.mark.parametrize("layer", [MoE(4, 8), PEER(49, 2, 4, 6)], ids=["MoE", "PEER"])
def test_inputs(layer):
    what = type(layer).__name__
    assert refusal(layer, X[0, 0]) == f"{what} x [16]: needs the axes [..., S, D]; add one for the tokens"
    message = f"{what} inputs.valid [2, 4]: x is [2, 4, 16]; flatten it to [8], one entry for each position"
    assert refusal(layer, X, RouterInputs(valid=np.ones((2, 4), bool))) == message


def test_numbers_of_numpy_and_the_platforms_choice_pass():
    layer = MoE(np.int64(4), np.int32(8), np.int64(2), capacity_factor=np.float32(1.0), backend="auto", exchange=None)
    jax.eval_shape(lambda: layer.init(jax.random.key(0), X))


@pytest.mark.parametrize(
    "layer, argument, axis",
    [(MoE(6, 8), "MoE experts=6", "expert=4"), (MoE(4, 9), "MoE width=9", "tensor=2"), (MoE(4, 8), "x.shape[-1]=15", "fsdp=2")],
)
def test_shards_that_do_not_divide(layer, argument, axis):
    x = np.ones((8, 15 if "15" in argument else 16), np.float32)
    variables = layer.init(jax.random.key(0), x)
    name = axis.split("=")[0]
    sizes = {"expert": (1, 4, 1), "tensor": (1, 1, 2), "fsdp": (2, 1, 1)}[name]
    with jax.set_mesh(compat.make_mesh(jax.devices()[: np.prod(sizes)], ("fsdp", "expert", "tensor"), sizes)):
        with pytest.raises(ValueError, match=f"^mesh axis {axis}: does not divide ") as error:
            jax.eval_shape(layer.apply, variables, x)
    assert argument in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "layer, state",
    [
        (PEER(49, 2, 4, 6), "mean"),
        (MoE(4, 8, router=TopK(4, 2, options=TopKConfig(bias_rate=0.1))), "bias"),
    ],
    ids=["PEER", "MoE"],
)
def test_a_state_that_is_missing_is_named(layer, state):
    params = jax.eval_shape(lambda: layer.init(jax.random.key(0), X))["params"]
    with pytest.raises(ValueError) as error:
        jax.eval_shape(lambda params: layer.apply({"params": params}, X), params)
    message = str(error.value)
    assert f'"{state}" from collection "router_state"' in message and "\n" not in message
    assert message.endswith("apply it with the collection router_state that init returned, beside params")
