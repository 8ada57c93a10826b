"""Our routers and layer against the golden files of `make_golden.py`.

Errors are max|a-b| / max|b| of each array.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config.routers import GShardConfig, SwitchConfig, TopKConfig
from moe_jax.dispatch.capacity import limit_assignments
from moe_jax.layers.moe import MoE
from moe_jax.layers.peer import PEER
from moe_jax.routing import ROUTERS
from moe_jax.routing.contract import Sizes, score
from moe_jax.types import RouterInputs, TokenChoice

FOLDER = pathlib.Path(__file__).parent
GOLDEN = FOLDER / "golden"
PEER_FILE = "peer_own_keys"
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}


class Setting(NamedTuple):
    """What of ours answers a golden file.

    router, options, top_k: the router. layer: attributes of `MoE`; None: the router is compared alone.
    balance: the library's balance loss over ours. priority: of capacity, where there is any. train: whether in
    training.
    """

    router: str
    options: Any
    top_k: int
    layer: dict[str, Any] | None
    balance: float = 1
    priority: str = "token"
    train: bool = False


RELU = {"activation": "relu"}
GELU = {"activation": "gelu", "use_bias": True}
SWIGLU = {"activation": "swiglu"}
DEEPSEEK_V3 = {"score": "sigmoid", "renormalise": "always", "scale": 2.5, "groups": 4, "kept_groups": 2}
SETTINGS = {
    "switch_dropless": Setting("switch", SwitchConfig(), 1, RELU),
    "switch_capacity": Setting("switch", SwitchConfig(), 1, RELU | {"capacity_factor": 1.0}, train=True),
    # The Mixtral family counts the K assignments of a token where we take shares: its loss is K when even.
    "mixtral_top_2": Setting("top_k", TopKConfig(), 2, SWIGLU, balance=2),
    "olmoe_top_3": Setting("top_k", TopKConfig(renormalise="never"), 3, SWIGLU, balance=3),
    "qwen2_moe_shared": Setting(
        "top_k", TopKConfig(renormalise="never"), 2, SWIGLU | {"shared_width": 14, "shared_gate": True}, balance=2
    ),
    "gpt_oss_router": Setting("top_k", TopKConfig(order="top_k_first", renormalise="never"), 3, None),
    "deepseek_v3_no_bias": Setting("top_k", TopKConfig(**DEEPSEEK_V3), 3, SWIGLU | {"shared_width": 24}),
    "deepseek_v3_bias": Setting("top_k", TopKConfig(**DEEPSEEK_V3, bias_rate=1e-3), 3, SWIGLU | {"shared_width": 24}),
    "deepseek_v4_router": Setting("top_k", TopKConfig(score="sqrt_softplus", scale=1.5, bias_rate=1e-3), 3, None),
    "nllb_top_2_router": Setting("gshard", GShardConfig(eval_second_expert="all"), 2, None, priority="choice"),
    # st-moe-pytorch has int(factor * T / E) slots where we have ceil(factor * T * K / E).
    "st_moe_threshold": Setting(
        "gshard",
        GShardConfig(eval_second_expert="threshold", threshold=0.2),
        2,
        GELU | {"eval_capacity": 1.0, "capacity_priority": "choice"},
        priority="choice",
    ),
    "st_moe_random": Setting(
        "gshard",
        GShardConfig(second_expert="random", threshold=0.2),
        2,
        GELU,
        priority="choice",
        train=True,
    ),
}


def load(name, dtype=None, folder=GOLDEN):
    """(arrays, meta), the arrays of floats as `dtype`."""
    with np.load(folder / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    meta = json.loads(str(arrays.pop("meta")))
    cast = lambda a: a.astype(dtype) if dtype and a.dtype.kind == "f" else a
    return {key: cast(array) for key, array in arrays.items()}, meta


def dtypes(name):
    """What the golden file is exact enough for."""
    return ("float32", "float64") if load(name)[1]["dtype"] == "float64" else ("float32",)


def error(a, b):
    # Finite: a NaN would be lost in the maximum over errors.
    assert (a.shape, a.dtype) == (b.shape, b.dtype) and np.any(b) and np.all(np.isfinite(a))
    return np.max(np.abs(a - b)) / np.max(np.abs(b))


def tree(golden, prefix=""):
    """The parameters by our names in the golden file, or with the prefix `grad_` their gradients."""
    parameters = {"router": {"kernel": golden[prefix + "kernel"]}, "experts": {}, "shared": {}}
    for name in ("w_in", "w_gate", "w_out", "b_in", "b_out"):
        for room, key in (("experts", prefix + name), ("shared", f"{prefix}shared_{name}")):
            if key in golden:
                parameters[room][name] = golden[key]
    if prefix + "shared_kernel" in golden:
        parameters["shared_gate"] = golden[prefix + "shared_kernel"]
    return {room: values for room, values in parameters.items() if len(values)}


class Answer(NamedTuple):
    """choice: after capacity. y: None where the router is compared alone."""

    choice: TokenChoice
    losses: dict[str, jax.Array]
    y: jax.Array | None


def answer(setting, golden, meta, params, x):
    """What our router and our layer say of x."""
    tokens, experts = golden["logits"].shape
    inputs = RouterInputs(train=setting.train, key=jax.random.key(0))
    router = ROUTERS[setting.router].build(Sizes(experts, setting.top_k), setting.options)
    state = {"bias": golden["bias"]} if getattr(setting.options, "bias_rate", 0) else {}
    choice, losses, _ = router.apply({"params": params["router"], "router_state": state}, x, inputs)
    if "capacity" in meta:
        choice, _, _ = limit_assignments(choice, experts, meta["capacity"], setting.priority)
    if setting.layer is None:
        return Answer(choice, losses, None)
    layer = MoE(experts, golden["w_in"].shape[2], setting.top_k, router=router, **setting.layer)
    y, aux = layer.apply({"params": params, "router_state": {"router": state}}, x, inputs)
    return Answer(choice, aux.losses, y)


def objective(params, x, setting, golden, meta):
    """The product of y, or of the gates as a matrix [T, E], with its cotangent; and the answer."""
    found = answer(setting, golden, meta, params, x)
    if found.y is not None:
        return jnp.sum(found.y * golden["d_y"]), found
    chosen = jax.nn.one_hot(found.choice.expert_ids, golden["logits"].shape[1], dtype=found.choice.gates.dtype)
    return jnp.sum(jnp.einsum("TK,TKE->TE", found.choice.gates, chosen) * golden["d_combine"]), found


@pytest.mark.parametrize("name, dtype", [(name, dtype) for name in SETTINGS for dtype in dtypes(name)])
def test_golden(name, dtype, monkeypatch):
    """Logits, choice, gates, losses, output and all gradients."""
    setting, (golden, meta) = SETTINGS[name], load(name, dtype)
    draws = []

    def uniform(key, shape, dtype):
        draws.append(shape)
        return jnp.asarray(golden["draws"], dtype)

    monkeypatch.setattr(jax.random, "uniform", uniform)
    with jax.enable_x64(dtype == "float64"):
        x, params = jnp.asarray(golden["x"]), jax.tree.map(jnp.asarray, tree(golden))
        run = functools.partial(objective, setting=setting, golden=golden, meta=meta)

        @jax.jit
        def everything(params, x):
            gradients, found = jax.grad(run, argnums=(0, 1), has_aux=True)(params, x)
            loss_gradients = jax.jacobian(lambda params: run(params, x)[1].losses)(params)
            logits = score(x, params["router"]["kernel"], RouterInputs()).logits
            return logits, found, gradients, loss_gradients

        logits, found, gradients, loss_gradients = jax.tree.map(np.asarray, everything(params, x))

    assert set(draws) == ({golden["draws"].shape} if name == "st_moe_random" else set())
    order = np.argsort(found.choice.expert_ids, axis=1, kind="stable")
    np.testing.assert_array_equal(np.take_along_axis(found.choice.expert_ids, order, 1), golden["ids"])
    errors = {
        "logits": error(logits, golden["logits"]),
        "gates": error(np.take_along_axis(found.choice.gates, order, 1), golden["gates"]),
        "gradients": jax.tree.map(error, gradients, (tree(golden, "grad_"), golden["grad_x"])),
    }
    if found.y is not None:
        errors["y"] = error(found.y, golden["y"])
    for loss, factor in (("balance", setting.balance), ("z", 1)):
        if f"loss_{loss}" in golden:
            errors[loss] = error(factor * found.losses[loss], golden[f"loss_{loss}"])
            kernel = loss_gradients[loss]["router"]["kernel"]
            errors[f"{loss}_gradient"] = error(factor * kernel, golden[f"{loss}_grad_kernel"])
    # In float64 too the libraries count the shares of the balance loss in float32.
    shares = [errors.pop(key) for key in ("balance", "balance_gradient") if key in errors]
    assert max(shares, default=0) < TOLERANCE["float32"]
    assert max(jax.tree.leaves(errors)) < TOLERANCE[dtype], errors


@pytest.mark.parametrize("dtype", dtypes(PEER_FILE))
def test_peer(dtype):
    """Output and all gradients, with the keys of each head."""
    golden, meta = load(PEER_FILE, dtype)
    with jax.enable_x64(dtype == "float64"):
        arrays = jax.tree.map(jnp.asarray, golden)
        (heads, _, n, half), experts = arrays["keys"].shape, arrays["experts"]
        layer = PEER(n * n, heads, meta["top_k"], 2 * half, share_keys=False, query_norm="none")

        def run(params, x):
            y, _ = layer.apply({"params": params}, x)
            return jnp.sum(y * arrays["d_y"]), y

        params = {"router": {"kernel": arrays["kernel"], "keys": arrays["keys"]}, "experts": experts}
        (d_params, d_x), y = jax.jit(jax.grad(run, (0, 1), has_aux=True))(params, arrays["x"])
        found = {"y": y, "grad_x": d_x, "grad_experts": d_params["experts"]}
        found |= {f"grad_{name}": d for name, d in d_params["router"].items()}
        errors = {name: error(np.asarray(a), golden[name]) for name, a in found.items()}
    assert max(errors.values()) < TOLERANCE[dtype], errors


def test_what_is_golden():
    """A setting a file; each says where it is from; small enough to stay in the repository."""
    assert sorted(path.stem for path in GOLDEN.iterdir()) == sorted([*SETTINGS, PEER_FILE])
    for name in [*SETTINGS, PEER_FILE]:
        arrays, meta = load(name)
        assert meta["name"] == name and {"numpy", "torch", "transformers"} <= set(meta["versions"])
        assert meta["shapes"] == {key: list(array.shape) for key, array in arrays.items()}
        assert (GOLDEN / f"{name}.npz").stat().st_size < 100_000


@pytest.mark.oracle
@pytest.mark.slow
def test_the_libraries_still_say_so(tmp_path):
    """The script gives the same files again. ORACLE_PYTHON: an interpreter with the libraries, if not this one."""
    python = os.environ.get("ORACLE_PYTHON", sys.executable)
    probe = subprocess.run(
        [python, "-c", "import torch, transformers, st_moe_pytorch, PEER_pytorch"], capture_output=True, text=True
    )
    if probe.returncode:
        pytest.skip(f"{python}: {probe.stderr.strip().splitlines()[-1]}")
    subprocess.run([python, FOLDER / "make_golden.py", "--output", tmp_path], check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in GOLDEN.iterdir())
    for name in [*SETTINGS, PEER_FILE]:
        (old, meta), (new, new_meta) = load(name), load(name, folder=tmp_path)
        assert {**new_meta, "versions": meta["versions"]} == meta
        if "ids" in old:
            np.testing.assert_array_equal(new.pop("ids"), old.pop("ids"))
        errors = {key: error(new[key], old[key]) for key in old if np.any(old[key])}
        assert set(errors) | {"bias"} >= set(old)
        assert max(errors.values()) < TOLERANCE[meta["dtype"]], (name, errors)
