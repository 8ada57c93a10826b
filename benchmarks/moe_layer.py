"""Times of one routed layer beside a dense feed-forward layer of equal FLOPs, and beside other ways to run it.

    python benchmarks/moe_layer.py [--json FILE] [--cases e8,e16] [--rounds 15]

All layers of a case run in turns in one process; a row has the median. FLOPs are those of the active experts'
products (router, sorting and what a layer wastes excluded), three times the forward ones with the backward pass.
The backward pass gives the gradients of all weights and of x.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Iterable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from moe_jax.config import MoEConfig  # noqa: E402
from moe_jax.config.routers import AdaptiveConfig  # noqa: E402
from moe_jax.dispatch.capacity import slots_ffn  # noqa: E402
from moe_jax.layers.ffn import FeedForward  # noqa: E402
from moe_jax.layers.moe import MoE  # noqa: E402
from moe_jax.ops.activations import is_gated  # noqa: E402
from moe_jax.ops.counting import slots_per_expert  # noqa: E402
from moe_jax.ops.expert_ffn import expert_ffn  # noqa: E402
from moe_jax.ops.grouped_matmul import resolve_backend  # noqa: E402
from moe_jax.routing import ROUTERS  # noqa: E402
from moe_jax.routing.adaptive import gap_of_two_best  # noqa: E402
from moe_jax.routing.contract import Sizes, score  # noqa: E402
from moe_jax.study import timing  # noqa: E402
from moe_jax.types import RouterInputs  # noqa: E402

CAPACITY_FACTOR = 1.25
BALANCE_WEIGHT = 0.01
VOCABULARY = 4096  # of the token ids that a hash routes by
PASSES = ("forward", "forward+backward")
LAYERS = ("dense", "equal_groups", "dropless", "capacity")
SORTED = ("grouped_matmul", "torch_grouped_mm")  # the products alone, over rows that lie sorted


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a layer, and what runs in it. `router`: "top_k" of softmax, "switch", "hash" of random token ids, or "adaptive".
    `second`: with that the share of the tokens that take a second expert."""

    name: str
    tokens: int
    width: int
    expert_width: int
    experts: int
    top_k: int
    backends: tuple[str, ...]
    dtype: str = "float32"
    second: float = 1.0
    activation: str = "gelu_tanh"
    router: str = "top_k"

    @property
    def assignments(self) -> int:
        """Pairs of a token and an expert."""
        return self.tokens * self.top_k if self.router != "adaptive" else self.tokens + self.seconds

    @property
    def seconds(self) -> int:
        """Tokens with a second expert by the router `adaptive`."""
        return round(self.second * self.tokens)

    def flops(self, kind: str) -> float:
        """Of the active experts' products in a pass."""
        products = 3 if is_gated(self.activation) else 2
        return 2.0 * products * self.assignments * self.width * self.expert_width * (3 if kind == PASSES[1] else 1)

    @property
    def dense_shape(self) -> tuple:
        """What a dense layer of as many FLOPs is made of: cases with the same one share its times."""
        hidden = round(self.expert_width * self.assignments / self.tokens)
        return self.tokens, self.width, hidden, self.activation, self.dtype


OTHERS = ("ragged_dot", "one_hot")
# The cases of a group take turns with each other too. (platform kind, cases); "any": runs everywhere.
GROUPS: dict[str, tuple[str, tuple[Case, ...]]] = {
    "e8": ("cpu", (Case("e8", 4096, 256, 1024, 8, 1, LAYERS + OTHERS),)),
    "e16": ("cpu", (Case("e16", 4096, 256, 1024, 16, 1, LAYERS + OTHERS),)),
    # ragged_dot does the work of all 64 experts for every row on a CPU, and takes gigabytes for it.
    "e64": ("cpu", (Case("e64", 4096, 256, 1024, 64, 1, (*LAYERS, "one_hot")),)),
    "small": (
        "cpu",
        (
            Case("small_hash", 2048, 128, 512, 8, 1, LAYERS[:3], activation="swiglu", router="hash"),
            Case("small_switch", 2048, 128, 512, 8, 1, LAYERS[:3], activation="swiglu", router="switch"),
            Case("small_top2", 2048, 128, 256, 16, 2, LAYERS[:3], activation="swiglu"),
        ),
    ),
    "second": (
        "cpu",
        (
            Case("second_all", 8192, 512, 2048, 16, 2, ("dense", "dropless")),
            *(
                Case(f"second_{percent}", 8192, 512, 2048, 16, 2, ("dropless",), router="adaptive", second=percent / 100)
                for percent in (10, 25, 50)
            ),
        ),
    ),
    "wide": ("gpu", (Case("wide", 16384, 4096, 14336, 8, 2, LAYERS + OTHERS + SORTED, "bfloat16"),)),
    "fine": ("gpu", (Case("fine", 16384, 2048, 1024, 64, 8, LAYERS + OTHERS + SORTED, "bfloat16"),)),
    "tiny": ("test", (Case("tiny", 64, 8, 16, 4, 2, LAYERS + OTHERS + SORTED, router="adaptive", second=0.25),)),
    "ceiling": ("any", ()),
}

# (params, x [T, D]) -> (y [T, D], a scalar loss)
Apply = Callable[[dict, jax.Array], tuple[jax.Array, jax.Array]]


@functools.cache
def adaptive(case: Case) -> nn.Module:
    """The router `adaptive`, whose threshold is where the share `second` of the case's tokens take two experts."""
    build, sizes = ROUTERS["adaptive"].build, Sizes(case.experts, case.top_k)
    routed, _, x = random_inputs(case)
    layer = MoE(case.experts, case.expert_width, case.top_k, build(sizes, AdaptiveConfig()), case.activation)
    params = nn.meta.unbox(jax.jit(functools.partial(layer.init, inputs=router_inputs(case)))(routed, x)["params"])
    logits = score(x, params["router"]["kernel"], RouterInputs()).logits
    pair = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), 2)[0]
    gaps = np.sort(jax.device_get(gap_of_two_best(pair, "raw")))
    threshold = float(gaps[case.seconds - 1] + gaps[case.seconds]) / 2
    return build(sizes, AdaptiveConfig(threshold=threshold))


def make_layer(case: Case, **options) -> MoE:
    """The routed layer of a case."""
    if case.router == "adaptive":
        router = adaptive(case)
    else:
        build, sizes = ROUTERS[case.router].build, Sizes(case.experts, case.top_k, vocab_size=VOCABULARY)
        router = build(sizes, getattr(MoEConfig().routers, case.router))
    return MoE(case.experts, case.expert_width, case.top_k, router, case.activation, **options)


def router_inputs(case: Case) -> RouterInputs:
    """Random token ids, in training."""
    return RouterInputs(token_ids=jax.random.randint(jax.random.key(1), (case.tokens,), 0, VOCABULARY), train=True)


def one_hot_layer(case: Case, params: dict, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Capacity by one-hot tensors [T, E, C] (GShard, arXiv:2006.16668), as most layers of einsums do it."""
    experts = case.experts
    choice, losses, _ = make_layer(case).router.apply({"params": params["router"]}, x, RouterInputs())
    capacity = slots_per_expert(CAPACITY_FACTOR, x.shape[0], case.top_k, experts)
    chosen = jax.nn.one_hot(choice.expert_ids, experts, dtype=jnp.int32)  # [T, K, E]; E, no expert: zeros
    position = jnp.cumsum(chosen.reshape(-1, experts), axis=0).reshape(chosen.shape) * chosen - 1
    combine = jnp.zeros((x.shape[0], experts, capacity), x.dtype)
    for k in range(case.top_k):
        slot = jax.nn.one_hot(position[:, k], capacity, dtype=x.dtype)  # [T, E, C]; beyond C: zeros
        combine += choice.gates[:, k, None, None].astype(x.dtype) * slot
    rows = jnp.einsum("TEC,TD->ECD", (combine > 0).astype(x.dtype), x)
    rows = slots_ffn(rows, params["experts"], activation=case.activation)
    return jnp.einsum("TEC,ECD->TD", combine, rows), losses["balance"]


def group_sizes(case: Case) -> np.ndarray:
    """int32 [E] rows of each expert, near even, for the products alone."""
    rng = np.random.default_rng(0)
    return rng.multinomial(case.assignments, np.full(case.experts, 1 / case.experts)).astype(np.int32)


def random_inputs(case: Case) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Keys of the parameters of the routed layer and of the dense layer, and x [T, D]."""
    routed, dense, data = jax.random.split(jax.random.key(0), 3)
    return routed, dense, jax.random.normal(data, (case.tokens, case.width), case.dtype)


def make_inputs(case: Case) -> tuple[dict, dict, jax.Array]:
    """(parameters of the routed layer, of the dense layer, x [T, D]); experts and dense in the case's dtype."""
    routed, dense, x = random_inputs(case)
    params = nn.meta.unbox(jax.jit(functools.partial(make_layer(case).init, inputs=router_inputs(case)))(routed, x)["params"])
    cast = functools.partial(jax.tree.map, lambda w: w.astype(case.dtype))
    params = {"router": params.get("router", {}), "experts": cast(params["experts"])}
    init = jax.jit(dense_layer(case).init)
    return params, cast(nn.meta.unbox(init(dense, x)["params"])), x


def dense_layer(case: Case) -> FeedForward:
    """One feed-forward layer with as many FLOPs as the active experts."""
    _, _, hidden, activation, dtype = case.dense_shape
    return FeedForward(hidden, activation, dtype=jnp.dtype(dtype))


def make_apply(case: Case, backend: str) -> Apply:
    """The layer `backend` of a case as a function of its parameters and x."""

    def routed(options):
        layer, inputs = make_layer(case, **options), router_inputs(case)
        state = layer.init(jax.random.key(0), jnp.zeros((case.tokens, case.width), case.dtype), inputs).get("router_state", {})

        def apply(params, x):
            y, aux = layer.apply({"params": params, "router_state": state}, x, inputs)
            return y, aux.losses.get("balance", jnp.zeros(()))

        return apply

    def equal_groups(params, x):
        """Rows cut into E equal groups as they lie: the products without routing or moving."""
        capacity = -(-case.assignments // case.experts)
        rows = jnp.resize(x, (case.experts, capacity, case.width))
        y = slots_ffn(rows, params["experts"], activation=case.activation)
        return y, jnp.zeros(())

    def grouped(params, x):
        rows = jnp.resize(x, (case.assignments, case.width))
        sizes = jnp.asarray(group_sizes(case))
        return expert_ffn(rows, params["experts"], sizes, activation=case.activation), jnp.zeros(())

    return {
        "dense": lambda params, x: (dense_layer(case).apply({"params": params}, x), jnp.zeros(())),
        "equal_groups": equal_groups,
        "dropless": routed({}),
        "capacity": routed({"capacity_factor": CAPACITY_FACTOR}),
        "ragged_dot": routed({"backend": "ragged_dot"}),
        "one_hot": functools.partial(one_hot_layer, case),
        "grouped_matmul": grouped,
    }[backend]


def make_pass(apply: Apply, kind: str):
    """The jitted pass: y, with "forward+backward" also the gradients of params and x."""

    def forward(params, x):
        return apply(params, x)

    def both(params, x):
        (y, loss), pull = jax.vjp(apply, params, x)
        # y is returned too: else its last product would be left out.
        return y, pull((jnp.ones_like(y), jnp.full_like(loss, BALANCE_WEIGHT)))

    return jax.jit(forward if kind == PASSES[0] else both)


def torch_pass(case: Case, kind: str) -> Callable[[], None] | None:
    """torch's grouped product over sorted rows on the GPU; None where torch, its GPU or the product are missing."""
    try:
        import torch
    except ImportError:
        return None
    product = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if not torch.cuda.is_available() or product is None:
        return None
    train = kind == PASSES[1]
    shapes = (
        (case.assignments, case.width),
        (case.experts, case.width, case.expert_width),
        (case.experts, case.expert_width, case.width),
    )

    @functools.cache
    def tensors():  # in the first run, where running out of memory is caught
        make = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
        ends = torch.tensor(np.cumsum(group_sizes(case)), dtype=torch.int32, device="cuda")
        return ends, *(make(shape).mul_(shape[-2] ** -0.5).requires_grad_(train) for shape in shapes)

    def run():
        ends, x, w_in, w_out = tensors()
        h = torch.nn.functional.gelu(product(x, w_in, offs=ends), approximate="tanh")
        y = product(h, w_out, offs=ends)
        if train:
            torch.autograd.grad(y, (x, w_in, w_out), torch.ones_like(y))
        torch.cuda.synchronize()

    return run


def measure(cases: Iterable[Case], rounds: int, progress: bool = True) -> list[dict]:
    """Rows of cases that take turns, both passes: case, backend, ms, ratio_to_dense, tflops and more.

    A backend that cannot run here has a row with ms None and, where it failed, the error.
    """
    cases, rows = list(cases), []
    inputs = {case.name: make_inputs(case) for case in cases}
    for kind in PASSES:
        functions = {}
        for case in cases:
            params, dense, x = inputs[case.name]
            for backend in case.backends:
                if backend == "torch_grouped_mm":
                    function = torch_pass(case, kind)
                else:
                    run = make_pass(make_apply(case, backend), kind)
                    function = functools.partial(run, dense if backend == "dense" else params, x)
                if function is not None:
                    functions[case.name, backend] = function
        label = f"{'+'.join(case.name for case in cases)} {kind}"
        times, errors = timing.interleaved(functions, rounds, label, progress)
        for case in cases:
            alike = [other.name for other in cases if other.dense_shape == case.dense_shape]
            base = [ms for name in alike for ms in times.get((name, "dense"), ())]
            for backend in case.backends:
                key = case.name, backend
                own = base if backend == "dense" else times.get(key)
                rows.append(make_row(case, backend, kind, own, base, errors.get(key)))
    return rows


def make_row(case, backend, kind, times, dense, error) -> dict:
    """One row of the results from the times of its runs and of the dense layer's; None: not measured."""
    ms, dense_ms = (timing.median(t) if t else None for t in (times, dense))
    flops = case.flops(kind)
    row = {
        "case": f"{case.name}/{kind}",
        "backend": backend,
        "ms": ms,
        "ratio_to_dense": ms and dense_ms and ms / dense_ms,
        "tflops": ms and flops / ms / 1e9,
        "gflop": flops / 1e9,
        "runs": len(times or ()),
    }
    if backend in ("dropless", "grouped_matmul"):
        row["kernel"] = resolve_backend()
    return row | ({"error": error} if error else {})


def measure_ceiling(rounds: int, progress: bool = True) -> list[dict]:
    """The rate of one large dense product: [N, N] by [N, N], N = 2048 in float32 on a CPU, else 8192 in bfloat16."""
    n, dtype = (2048, "float32") if jax.default_backend() == "cpu" else (8192, "bfloat16")
    a = jax.random.normal(jax.random.key(0), (n, n), dtype)
    product = jax.jit(jnp.dot)
    times, _ = timing.interleaved({"matmul": lambda: product(a, a)}, rounds, f"ceiling {n}", progress)
    ms, flops = timing.median(times["matmul"]), 2.0 * n**3
    row = {"case": f"ceiling_{n}_{dtype}", "backend": "matmul", "ms": ms, "ratio_to_dense": None}
    return [row | {"tflops": flops / ms / 1e9, "gflop": flops / 1e9, "runs": len(times["matmul"])}]


def print_rows(rows: list[dict]) -> None:
    """A table on stdout."""
    print(f"{'case':32}{'backend':18}{'GFLOP':>10}{'ms':>12}{'/ dense':>10}{'GFLOP/s':>12}{'runs':>6}")
    for row in rows:
        head = f"{row['case']:32}{row['backend']:18}{row['gflop']:10.4g}"
        if row["ms"] is None:
            print(f"{head}  not measured{': ' + row['error'] if 'error' in row else ''}")
            continue
        ratio = f"{row['ratio_to_dense']:10.2f}" if row["ratio_to_dense"] else f"{'':10}"
        print(f"{head}{row['ms']:12.4g}{ratio}{1e3 * row['tflops']:12.4g}{row['runs']:6}")


def default_groups(platform: str) -> list[str]:
    """Groups that are run without --cases."""
    kind = "cpu" if platform == "cpu" else "gpu"
    return [name for name, (where, _) in GROUPS.items() if where in (kind, "any")]


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write machine, versions, date and rows here")
    parser.add_argument("--cases", default="", help=f"comma-separated, of {', '.join(GROUPS)}; default: the platform's")
    parser.add_argument("--rounds", type=int, default=15, help="runs of each layer; slow ones run less often")
    options = parser.parse_args(argv)
    names = options.cases.split(",") if options.cases else default_groups(jax.default_backend())
    for name in names:
        if name not in GROUPS:
            parser.error(f"--cases={options.cases}: no case {name!r}; use some of {', '.join(GROUPS)}")
    if options.rounds < 1:
        parser.error(f"--rounds={options.rounds}: at least 1; raise it")
    if options.json and not pathlib.Path(options.json).absolute().parent.is_dir():
        parser.error(f"--json={options.json}: no such folder; make it first")

    packages = ("torch",) if jax.default_backend() == "gpu" else ()
    environment = timing.environment((*timing.PACKAGES, *packages))
    result = {"benchmark": "moe_layer", "environment": environment, "cases": {}, "rows": []}
    for name in names:
        cases = GROUPS[name][1]
        result["cases"] |= {case.name: dataclasses.asdict(case) for case in cases}
        result["rows"] += measure(cases, options.rounds) if cases else measure_ceiling(options.rounds)
    environment["load_after"] = timing.load()
    print_rows(result["rows"])
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
