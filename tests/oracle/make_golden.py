"""Writes the golden files of `test_golden.py`: what the routers and layers of other libraries answer.

    pip install torch transformers st-moe-pytorch PEER-pytorch
    python tests/oracle/make_golden.py [--only NAME] --output tests/oracle/golden

One `.npz` a case. Matrices stand as in `moe_jax`: kernel [D, E], w_in and w_gate [E, D, F], w_out [E, F, D].
ids and gates [T, K] are sorted by expert within a token, E with a gate of 0 where there is none. `d_y` is the
cotangent of y, or `d_combine` [T, E] that of the gates where the library's experts are not compared; grad_* are
the gradients of sum(y * d_y), balance_grad_kernel and z_grad_kernel those of the library's losses. `meta` is
JSON: seed, versions, shapes, dtype, and which class of which library, set how.
"""

import argparse
import contextlib
import importlib.metadata
import inspect
import json
import pathlib
import platform

import numpy as np
import torch
from PEER_pytorch import PEER as TorchPEER
from st_moe_pytorch import MoE as StMoE
from torch import nn
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_v3
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as deepseek_v4
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.nllb_moe import modeling_nllb_moe as nllb_moe
from transformers.models.olmoe import modeling_olmoe as olmoe
from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen2_moe
from transformers.models.switch_transformers import modeling_switch_transformers as switch

# No two alike, so that no axis can stand for another.
T, D, F, E, SHARED_F = 48, 10, 12, 8, 14
# Between a choice and the next best, on each side of any threshold: rounding must not decide.
GAP = 1e-4
CASES = {}


def case(seed, dtype=np.float32):
    """Registers a function of (rng, dtype) that returns (arrays, meta) under its name."""

    def register(function):
        CASES[function.__name__] = (function, seed, dtype)
        return function

    return register


# Drawing


def draw(rng, dtype, *shape, scale=None):
    """Normal numbers of standard deviation `scale`; by default a matrix that doubles the size of its input."""
    return (rng.normal(size=shape) * (2 / shape[-2] ** 0.5 if scale is None else scale)).astype(dtype)


def draw_weights(rng, dtype, gated=False, bias=False, shared=False):
    weights = {"kernel": (D, E), "w_in": (E, D, F), "w_out": (E, F, D)}
    weights |= {"w_gate": (E, D, F)} if gated else {}
    if shared:
        weights |= {
            "shared_w_in": (D, SHARED_F),
            "shared_w_gate": (D, SHARED_F),
            "shared_w_out": (SHARED_F, D),
        }
    weights = {name: draw(rng, dtype, *shape) for name, shape in weights.items()}
    if bias:
        weights |= {"b_in": draw(rng, dtype, E, F, scale=0.5), "b_out": draw(rng, dtype, E, D, scale=0.5)}
    return weights


def draw_tokens(rng, dtype):
    """x and the cotangent of y, both [T, D]."""
    return {"x": draw(rng, dtype, T, D, scale=1), "d_y": draw(rng, dtype, T, D, scale=1)}


def softmax(logits):
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


def logits_of(arrays):
    return arrays["x"].astype(np.float64) @ arrays["kernel"]


def check_gap(scores, k):
    """The k best of [T, N] scores are told from each other and from the next by more than rounding."""
    ordered = -np.sort(-scores, axis=1)[:, : k + 1]
    assert np.min(ordered[:, :-1] - ordered[:, 1:]) > GAP, np.min(ordered[:, :-1] - ordered[:, 1:])


# Reading a library


def set_weights(bindings, arrays):
    """Copies our arrays into the library's parameters.

    `bindings`: by our name a function of `of`, which gives a parameter's values or its gradient, to views in our
    layout: one tensor, or a list of one an expert.
    """
    with torch.no_grad():
        for name, view in bindings.items():
            targets = view(lambda parameter: parameter.data)
            targets, values = (targets, arrays[name]) if isinstance(targets, list) else ([targets], [arrays[name]])
            assert len(targets) == len(values)
            for target, value in zip(targets, values):
                assert target.shape == value.shape, (name, target.shape, value.shape)
                target.copy_(torch.from_numpy(value))


def read(views):
    """Copies: a view of a gradient would change with the next one."""
    tensor = torch.stack(views) if isinstance(views, list) else views
    return tensor.detach().numpy().copy()


def gradients(objective, bindings, x):
    """By our name those of a scalar, x included."""
    parameters = []
    for view in bindings.values():
        view(lambda parameter: parameters.append(parameter) or parameter.data)
    for tensor in [x, *parameters]:
        tensor.grad = None
    objective.backward(retain_graph=True)
    of = lambda parameter: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return {"x": read(of(x))} | {name: read(view(of)) for name, view in bindings.items()}


def sorted_choice(ids, gates):
    """(ids int32, gates), by id within each token."""
    order = np.argsort(ids, axis=1, kind="stable")
    return np.take_along_axis(ids, order, 1).astype(np.int32), np.take_along_axis(gates, order, 1)


def choice_of_matrix(combine, k):
    """(ids, gates) of the nonzeros of [T, E], at most k a token."""
    ids = np.where(combine > 0, np.arange(E), E)
    ids, gates = sorted_choice(ids, combine)
    assert np.all(ids[:, k:] == E)
    return ids[:, :k], gates[:, :k]


def finish(arrays, bindings, x, logits, ids, gates, y=None, losses=None):
    """`arrays` with outputs and gradients. ids, gates: tensors [T, K]; y: None compares the gates alone."""
    result = dict(arrays, logits=read(logits))
    result["ids"], result["gates"] = sorted_choice(read(ids), read(gates))
    if y is None:
        chosen = torch.from_numpy(np.take_along_axis(arrays["d_combine"], read(ids), 1))
        objective = torch.sum(gates * chosen)
    else:
        result["y"] = read(y)
        objective = torch.sum(y * torch.from_numpy(arrays["d_y"]))
    result |= {f"grad_{name}": grad for name, grad in gradients(objective, bindings, x).items()}
    for name, loss in (losses or {}).items():
        result[f"loss_{name}"] = read(loss)
        result[f"{name}_grad_kernel"] = gradients(loss, bindings, x)["kernel"]
    return result


def leaf(array):
    return torch.from_numpy(array.copy()).requires_grad_()


# Switch


def _switch(rng, dtype, capacity):
    config = switch.SwitchTransformersConfig(
        d_model=D,
        d_ff=F,
        num_experts=E,
        expert_capacity=capacity,
        router_bias=False,
        router_jitter_noise=0.0,
        dropout_rate=0.0,
        dense_act_fn="relu",
    )
    arrays = draw_tokens(rng, dtype) | draw_weights(rng, dtype)
    check_gap(softmax(logits_of(arrays)), 1)
    block = switch.SwitchTransformersSparseMLP(config).to(torch.from_numpy(arrays["x"]).dtype)
    # The config knows no float64; without it the router would round to float32.
    block.router.dtype = torch.from_numpy(arrays["x"]).dtype
    experts = [block.experts[f"expert_{e}"] for e in range(E)]
    bindings = {
        "kernel": lambda of: of(block.router.classifier.weight).T,
        "w_in": lambda of: [of(expert.wi.weight).T for expert in experts],
        "w_out": lambda of: [of(expert.wo.weight).T for expert in experts],
    }
    set_weights(bindings, arrays)
    x = leaf(arrays["x"])
    mask, gates, logits = block.router(x[None])
    kept, first = mask[0].any(dim=1, keepdim=True), torch.argmax(logits, dim=-1)
    ids, gates = torch.where(kept, first[0, :, None], E), torch.where(kept, gates[0], 0)
    losses = {
        "balance": switch.load_balancing_loss_func(torch.softmax(logits, dim=-1), first),
        "z": switch.router_z_loss_func(logits),
    }
    result = finish(arrays, bindings, x, logits[0], ids, gates, block(x[None])[0], losses)
    meta = {"source": "transformers SwitchTransformersSparseMLP, one row", "capacity": capacity}
    return result, meta


@case(seed=1, dtype=np.float64)
def switch_dropless(rng, dtype):
    """Slots for all."""
    result, meta = _switch(rng, dtype, T)
    assert np.all(result["ids"] < E)
    return result, meta


@case(seed=2, dtype=np.float64)
def switch_capacity(rng, dtype):
    """T/E slots, for earlier tokens first; what is dropped gets y = 0. The losses count before that."""
    result, meta = _switch(rng, dtype, T // E)
    assert T / 10 < np.sum(result["ids"] == E) < T / 2
    return result, meta


# Softmax top-k: Mixtral and its relatives


def gated_bindings(block, shared=None):
    """Of a block whose experts are stacked with the gate's rows above those of the input."""
    bindings = {
        "kernel": lambda of: of(block.gate.weight).T,
        "w_gate": lambda of: of(block.experts.gate_up_proj)[:, :F].mT,
        "w_in": lambda of: of(block.experts.gate_up_proj)[:, F:].mT,
        "w_out": lambda of: of(block.experts.down_proj).mT,
    }
    if shared is not None:
        bindings |= {
            "shared_w_gate": lambda of: of(shared.gate_proj.weight).T,
            "shared_w_in": lambda of: of(shared.up_proj.weight).T,
            "shared_w_out": lambda of: of(shared.down_proj.weight).T,
        }
    return bindings


def _run_gated(block, arrays, bindings, balance=None):
    """A block with `gate(x) -> (logits, gates, ids)`; `balance` of the logits is its loss."""
    block.experts.config._experts_implementation = "eager"
    set_weights(bindings, arrays)
    x = leaf(arrays["x"])
    logits, gates, ids = block.gate(x)
    losses = {} if balance is None else {"balance": balance((logits,))}
    return finish(arrays, bindings, x, logits, ids, gates, block(x[None])[0], losses)


@case(seed=3)
def mixtral_top_2(rng, dtype):
    """Renormalised; its balance loss is K where ours is 1. Of one layer: it pools layers before the product."""
    config = mixtral.MixtralConfig(
        hidden_size=D,
        intermediate_size=F,
        num_local_experts=E,
        num_experts_per_tok=2,
        router_jitter_noise=0.0,
    )
    arrays = draw_tokens(rng, dtype) | draw_weights(rng, dtype, gated=True)
    check_gap(softmax(logits_of(arrays)), 2)
    block = mixtral.MixtralSparseMoeBlock(config)
    balance = lambda logits: mixtral.load_balancing_loss_func(logits, E, 2)
    result = _run_gated(block, arrays, gated_bindings(block), balance)
    return result, {"source": "transformers MixtralSparseMoeBlock", "top_k": 2}


@case(seed=4)
def olmoe_top_3(rng, dtype):
    """Not renormalised; the balance loss as Mixtral's."""
    config = olmoe.OlmoeConfig(hidden_size=D, intermediate_size=F, num_experts=E, num_experts_per_tok=3, norm_topk_prob=False)
    arrays = draw_tokens(rng, dtype) | draw_weights(rng, dtype, gated=True)
    check_gap(softmax(logits_of(arrays)), 3)
    block = olmoe.OlmoeSparseMoeBlock(config)
    balance = lambda logits: olmoe.load_balancing_loss_func(logits, E, 3)
    result = _run_gated(block, arrays, gated_bindings(block), balance)
    return result, {"source": "transformers OlmoeSparseMoeBlock", "top_k": 3}


@case(seed=6)
def qwen2_moe_shared(rng, dtype):
    """Top 2, not renormalised; a shared expert of its own width times a sigmoid of the token."""
    config = qwen2_moe.Qwen2MoeConfig(
        hidden_size=D,
        moe_intermediate_size=F,
        shared_expert_intermediate_size=SHARED_F,
        num_experts=E,
        num_experts_per_tok=2,
        norm_topk_prob=False,
    )
    arrays = draw_tokens(rng, dtype) | draw_weights(rng, dtype, gated=True, shared=True)
    arrays["shared_kernel"] = draw(rng, dtype, D, 1)
    check_gap(softmax(logits_of(arrays)), 2)
    block = qwen2_moe.Qwen2MoeSparseMoeBlock(config)
    bindings = gated_bindings(block, block.shared_expert)
    bindings["shared_kernel"] = lambda of: of(block.shared_expert_gate.weight).T
    balance = lambda logits: qwen2_moe.load_balancing_loss_func(logits, E, 2)
    result = _run_gated(block, arrays, bindings, balance)
    return result, {"source": "transformers Qwen2MoeSparseMoeBlock", "top_k": 2}


@case(seed=7)
def gpt_oss_router(rng, dtype):
    """Softmax over the 3 best logits. Its router's bias is left at 0."""
    config = gpt_oss.GptOssConfig(hidden_size=D, num_local_experts=E, num_experts_per_tok=3)
    arrays = {"x": draw(rng, dtype, T, D, scale=1), "kernel": draw(rng, dtype, D, E)}
    arrays["d_combine"] = draw(rng, dtype, T, E, scale=1)
    check_gap(logits_of(arrays), 3)
    router = gpt_oss.GptOssTopKRouter(config)
    bindings = {"kernel": lambda of: of(router.weight).T}
    set_weights(bindings, arrays)
    x = leaf(arrays["x"])
    logits, gates, ids = router(x)
    result = finish(arrays, bindings, x, logits, ids, gates)
    return result, {"source": "transformers GptOssTopKRouter", "top_k": 3}


# Other scores, selection bias and groups: DeepSeek


def check_groups(ranked, groups, kept, k):
    """The choice [T, K] within the best groups; gaps of both choices, and some tokens that groups change."""
    grouped = ranked.reshape(T, groups, -1)
    value = np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)
    check_gap(value, kept)
    threshold = np.sort(value, axis=1)[:, -kept, None]
    limited = np.where((value >= threshold)[..., None], grouped, -1e9).reshape(T, E)
    check_gap(limited, k)
    best = lambda scores: np.sort(np.argsort(-scores, axis=1)[:, :k], axis=1)
    assert np.mean(np.any(best(limited) != best(ranked), axis=1)) > 0.1
    return best(limited)


def _deepseek_v3(rng, dtype, bias_scale):
    k, groups, kept, scale = 3, 4, 2, 2.5
    config = deepseek_v3.DeepseekV3Config(
        hidden_size=D,
        moe_intermediate_size=F,
        n_routed_experts=E,
        num_experts_per_tok=k,
        n_group=groups,
        topk_group=kept,
        norm_topk_prob=True,
        routed_scaling_factor=scale,
        n_shared_experts=2,
    )
    arrays = draw_tokens(rng, dtype) | draw_weights(rng, dtype, gated=True)
    for name, shape in {
        "shared_w_in": (D, 2 * F),
        "shared_w_gate": (D, 2 * F),
        "shared_w_out": (2 * F, D),
    }.items():
        arrays[name] = draw(rng, dtype, *shape)
    arrays["bias"] = draw(rng, dtype, 1, E, scale=bias_scale)[0]
    scores = 1 / (1 + np.exp(-logits_of(arrays)))
    chosen = check_groups(scores + arrays["bias"], groups, kept, k)
    if bias_scale:
        assert np.any(chosen != check_groups(scores, groups, kept, k))
    block = deepseek_v3.DeepseekV3MoE(config)
    block.gate.e_score_correction_bias.copy_(torch.from_numpy(arrays["bias"]))
    result = _run_gated(block, arrays, gated_bindings(block, block.shared_experts))
    meta = {
        "source": "transformers DeepseekV3MoE",
        "top_k": k,
        "groups": groups,
        "kept_groups": kept,
        "scale": scale,
    }
    return result, meta | {"shared_experts": 2}


@case(seed=8)
def deepseek_v3_no_bias(rng, dtype):
    """Sigmoid scores, the 2 best of 4 groups, gates renormalised and scaled, 2 shared experts as one of width 2F."""
    return _deepseek_v3(rng, dtype, 0.0)


@case(seed=9)
def deepseek_v3_bias(rng, dtype):
    """With a selection bias, such that some chosen experts rank below 0."""
    result, meta = _deepseek_v3(rng, dtype, 0.5)
    scores = 1 / (1 + np.exp(-logits_of(result)))
    assert np.any(np.take_along_axis(scores + result["bias"], result["ids"].astype(int), 1) < 0)
    return result, meta


@case(seed=10)
def deepseek_v4_router(rng, dtype):
    """The square root of softplus as the score, a selection bias, no groups."""
    k, scale = 3, 1.5
    config = deepseek_v4.DeepseekV4Config(
        hidden_size=D,
        n_routed_experts=E,
        num_experts_per_tok=k,
        routed_scaling_factor=scale,
        scoring_func="sqrtsoftplus",
    )
    arrays = {"x": draw(rng, dtype, T, D, scale=1), "kernel": draw(rng, dtype, D, E)}
    arrays |= {"d_combine": draw(rng, dtype, T, E, scale=1), "bias": draw(rng, dtype, 1, E, scale=0.5)[0]}
    scores = np.sqrt(np.log1p(np.exp(logits_of(arrays))))
    check_gap(scores + arrays["bias"], k)
    router = deepseek_v4.DeepseekV4TopKRouter(config)
    router.e_score_correction_bias.copy_(torch.from_numpy(arrays["bias"]))
    bindings = {"kernel": lambda of: of(router.weight).T}
    set_weights(bindings, arrays)
    x = leaf(arrays["x"])
    logits, gates, ids = router(x)
    result = finish(arrays, bindings, x, logits, ids, gates)
    return result, {"source": "transformers DeepseekV4TopKRouter", "top_k": k, "scale": scale}


# GShard top-2


@case(seed=11, dtype=np.float64)
def nllb_top_2_router(rng, dtype):
    """Both experts always. Pairs are normalised first; then 2T/E slots an expert, any first choice before a second."""
    config = nllb_moe.NllbMoeConfig(
        d_model=D,
        num_experts=E,
        expert_capacity=2 * T // E,
        router_bias=False,
        second_expert_policy="all",
        normalize_router_prob_before_dropping=True,
        batch_prioritized_routing=False,
    )
    arrays = {"x": draw(rng, dtype, T, D, scale=1), "kernel": draw(rng, dtype, D, E)}
    arrays["d_combine"] = draw(rng, dtype, T, E, scale=1)
    check_gap(softmax(logits_of(arrays)), 2)
    router = nllb_moe.NllbMoeTop2Router(config).train()
    router.dtype = torch.from_numpy(arrays["x"]).dtype
    bindings = {"kernel": lambda of: of(router.classifier.weight).T}
    router.to(router.dtype)
    set_weights(bindings, arrays)
    x = leaf(arrays["x"])
    _, combine, logits = router(x)
    result = dict(arrays, logits=read(logits))
    result["ids"], result["gates"] = choice_of_matrix(read(combine), 2)
    grads = gradients(torch.sum(combine * torch.from_numpy(arrays["d_combine"])), bindings, x)
    result |= {f"grad_{name}": grad for name, grad in grads.items()}
    assert np.sum(result["ids"] == E) > T / 20
    meta = {"source": "transformers NllbMoeTop2Router", "capacity": router.expert_capacity}
    return result, meta | {"second_expert": "all"}


@contextlib.contextmanager
def uniform_draws(values):
    """All that the library draws for [2, 1, T] numbers is `values` [T]."""
    original = torch.Tensor.uniform_

    def fill(tensor, *bounds):
        assert tensor.shape == (2, 1, T) and bounds == (0.0, 1.0)
        return tensor.copy_(torch.from_numpy(values))

    torch.Tensor.uniform_ = fill
    try:
        yield
    finally:
        torch.Tensor.uniform_ = original


def _st_moe(rng, dtype, draws, train):
    """Experts of two layers with gelu. `straight_through_dispatch_tensor` is off: no equation has its gradient."""
    threshold = 0.2
    arrays = draw_tokens(rng, dtype) | draw_weights(rng, dtype, bias=True) | {"draws": draws.astype(dtype)}
    best = -np.sort(-softmax(logits_of(arrays)), axis=1)
    check_gap(best, 2)
    second = best[:, 1] / (best[:, 0] + best[:, 1])
    assert np.min(np.abs(second - threshold * draws)) > GAP
    assert T / 10 < np.sum(second < threshold * draws) < T / 2
    experts = nn.ModuleList(nn.Sequential(nn.Linear(D, F), nn.GELU(), nn.Linear(F, D)) for _ in range(E))
    moe = StMoE(
        D,
        E,
        threshold_train=threshold,
        threshold_eval=threshold,
        experts=experts,
        capacity_factor_train=float(E),
        straight_through_dispatch_tensor=False,
    )
    moe = moe.to(torch.from_numpy(arrays["x"]).dtype).train(train)
    bindings = {
        "kernel": lambda of: of(moe.gate.to_gates.weight).T,
        "w_in": lambda of: [of(expert[0].weight).T for expert in experts],
        "b_in": lambda of: [of(expert[0].bias) for expert in experts],
        "w_out": lambda of: [of(expert[2].weight).T for expert in experts],
        "b_out": lambda of: [of(expert[2].bias) for expert in experts],
    }
    set_weights(bindings, arrays)
    x = leaf(arrays["x"])
    with uniform_draws(arrays["draws"]):
        dispatch, combine, _, _ = moe.gate(x[None])
        y, _, balance, z = moe(x[None])
    ids, gates = choice_of_matrix(read(combine[0].sum(dim=-1)), 2)
    assert np.array_equal(read(dispatch[0].sum(dim=(0, 2))), np.bincount(ids.reshape(-1), minlength=E)[:E])
    logits = moe.gate.to_gates(x)
    losses = {"balance": balance, "z": z} if train else {}
    result = finish(arrays, bindings, x, logits, torch.from_numpy(ids), torch.from_numpy(gates), y[0], losses)
    # In evaluation more is missing than the policy took: slots were short too.
    assert (np.sum(ids == E) > np.sum(second < threshold * draws)) != train
    return result, {"source": "st-moe-pytorch MoE", "threshold": threshold, "capacity": dispatch.shape[-1]}


@case(seed=12, dtype=np.float64)
def st_moe_threshold(rng, dtype):
    """In evaluation, with draws of 1: the second expert where its gate is above 0.2. int(2 * T / E) slots."""
    result, meta = _st_moe(rng, dtype, np.ones(T), train=False)
    return result, meta | {"second_expert": "threshold"}


@case(seed=13, dtype=np.float64)
def st_moe_random(rng, dtype):
    """In training, where it has losses, with stored draws: the second expert with probability gate / 0.2.

    Slots for all: its balance loss shall count the first choices, but in version 0.1.8 only those that got a slot,
    as the mask that it counts is cut in place. In GShard's algorithm 1 all of them count.
    """
    result, meta = _st_moe(rng, dtype, rng.uniform(size=T), train=True)
    return result, meta | {"second_expert": "random"}


# Retrieval


@case(seed=14, dtype=np.float64)
def peer_own_keys(rng, dtype):
    """3 heads with keys of their own take 4 of 49 experts each; `non_competing_scores` is off, as in the paper."""
    heads, k, n, half = 3, 4, 7, 5
    arrays = draw_tokens(rng, dtype) | {
        "kernel": draw(rng, dtype, D, heads * 2 * half),
        "keys": draw(rng, dtype, heads, 2, n, half, scale=1),
        "experts": draw(rng, dtype, n * n, 2, D, scale=0.5),
    }
    queries = (arrays["x"] @ arrays["kernel"]).reshape(T, heads, 2, half)
    scores = np.einsum("thpd,hpnd->pthn", queries, arrays["keys"])
    check_gap((scores[0][..., :, None] + scores[1][..., None, :]).reshape(T * heads, n * n), k)
    layer = TorchPEER(
        D,
        heads=heads,
        num_experts=n * n,
        num_experts_per_head=k,
        dim_key=half,
        product_key_topk=k,
        non_competing_scores=False,
    ).to(torch.float64)
    bindings = {
        # Its queries lie half by half, ours head by head.
        "kernel": lambda of: of(layer.to_queries[0].weight).T.reshape(D, 2, heads, half).swapaxes(1, 2).reshape(D, -1),
        "keys": lambda of: of(layer.keys).swapaxes(1, 2),
        "experts": lambda of: torch.stack([of(layer.weight_down_embed.weight), of(layer.weight_up_embed.weight)], 1),
    }
    with torch.no_grad():
        query = torch.from_numpy(arrays["kernel"]).reshape(D, heads, 2, half).swapaxes(1, 2).reshape(D, -1).T
        layer.to_queries[0].weight.copy_(query)
        layer.keys.copy_(torch.from_numpy(arrays["keys"]).swapaxes(1, 2))
        layer.weight_down_embed.weight.copy_(torch.from_numpy(arrays["experts"][:, 0]))
        layer.weight_up_embed.weight.copy_(torch.from_numpy(arrays["experts"][:, 1]))
    x = leaf(arrays["x"])
    y = layer(x[None])[0]
    objective = torch.sum(y * torch.from_numpy(arrays["d_y"]))
    grads = {f"grad_{name}": grad for name, grad in gradients(objective, bindings, x).items()}
    return arrays | {"y": read(y)} | grads, {"source": "PEER-pytorch PEER", "heads": heads, "top_k": k}


def make(name):
    """The arrays of one case, `meta` among them."""
    function, seed, dtype = CASES[name]
    torch.manual_seed(seed)
    arrays, meta = function(np.random.default_rng(seed), dtype)
    for key, array in arrays.items():
        assert key == "ids" or array.dtype == dtype, (key, array.dtype)
        assert np.all(np.isfinite(array)), key
    packages = ("numpy", "torch", "transformers", "st-moe-pytorch", "PEER-pytorch")
    versions = {package: importlib.metadata.version(package) for package in packages}
    meta = {
        "name": name,
        "manner": inspect.getdoc(function),
        "seed": seed,
        "dtype": np.dtype(dtype).name,
    } | meta
    meta |= {"shapes": {key: array.shape for key, array in arrays.items()}, "least_gap": GAP}
    meta |= {"versions": {"python": platform.python_version(), **versions}}
    return arrays | {"meta": np.array(json.dumps(meta))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder of the .npz files")
    parser.add_argument("--only", choices=sorted(CASES), help="one case; by default all")
    flags = parser.parse_args()
    flags.output.mkdir(parents=True, exist_ok=True)
    for name in [flags.only] if flags.only else CASES:
        path = flags.output / f"{name}.npz"
        np.savez_compressed(path, **make(name))
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
