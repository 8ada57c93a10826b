"""Times of a training step of one PEER layer, with gradients by rows, with dense ones, and as one would first write it.

    python benchmarks/peer.py [--json FILE] [--cases pool,scaling] [--rounds 5] [--plot FILE.png]

A step is forward, backward, clipping by the global norm and Adam's update. `pool`: a million experts; the ways take
turns on one state in one process. `scaling`: steps of layers whose pool grows while a token retrieves as much, and
of dense feed-forward layers that grow, with the memory that the compiler plans beside parameters and optimizer
state. Rows have case, backend, ms, and for `pool` the bytes that the arithmetic needs, over the time, beside a plain
copy's. `kernels`: the retrieval alone in bfloat16, forward and with its gradient in factors, by the kernel `triton`
and in plain JAX (`blocks`), beside a copy; on an NVIDIA GPU, elsewhere "not measured".
"""

import argparse
import dataclasses
import functools
import gc
import json
import pathlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from moe_jax.config import OptimizerConfig  # noqa: E402
from moe_jax.layers.ffn import FeedForward  # noqa: E402
from moe_jax.layers.peer import PEER  # noqa: E402
from moe_jax.ops.retrieval import BACKENDS, retrieve, row_sink  # noqa: E402
from moe_jax.ops.row_gradient import RowGradient, join_rows, squared_norm  # noqa: E402
from moe_jax.study import timing  # noqa: E402
from moe_jax.train.row_update import RowAdamState, init_rows, update_rows  # noqa: E402

RATE = 1e-3
OPTIMIZER = OptimizerConfig()
ADAM = optax.scale_by_adam(OPTIMIZER.b1, OPTIMIZER.b2, OPTIMIZER.epsilon)


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a layer: N experts, T tokens, width D, H heads of K."""

    name: str
    experts: int
    tokens: int
    width: int
    heads: int
    top_k: int
    key_width: int = 128

    @property
    def retrieved(self) -> int:
        """H K."""
        return self.heads * self.top_k

    def layer(self) -> PEER:
        """The layer, without normalisation of the queries."""
        return PEER(self.experts, self.heads, self.top_k, self.key_width, query_norm="none")


POOL = Case("pool", 1024**2, 2048, 256, 8, 16)
TINY = Case("tiny", 16**2, 32, 8, 2, 4, 8)
SCALING = [dataclasses.replace(POOL, name=f"n{side}", experts=side**2) for side in (64, 128, 256, 512, 1024)]
WIDTHS = (1024, 2048, 4096, 8192, 16384)
KERNELS = Case("kernels", 1024**2, 4096, 1024, 8, 16)
GROUPS = ("pool", "scaling", "tiny", "kernels")


def naive_layer(case: Case, params: dict, x: jax.Array) -> jax.Array:
    """The paper's algorithm 1 in a few lines: all K*K pairs, two gathers of [T, H*K, D], differentiated by JAX."""
    router, table = params["router"], params["experts"]
    halves = (x @ router["kernel"]).reshape(len(x), case.heads, 2, -1)
    scores = jnp.einsum("thpd,pnd->pthn", halves, router["keys"])
    (best_1, i), (best_2, j) = (jax.lax.top_k(s, case.top_k) for s in scores)
    sums = (best_1[..., :, None] + best_2[..., None, :]).reshape(*best_1.shape[:2], -1)
    best, winners = jax.lax.top_k(sums, case.top_k)
    ids = (i[..., :, None] * scores.shape[-1] + j[..., None, :]).reshape(sums.shape)
    ids = jnp.take_along_axis(ids, winners, axis=-1).reshape(len(x), -1)
    gates = jax.nn.softmax(best, axis=-1).reshape(len(x), -1)
    u, v = jnp.take(table[:, 0], ids, axis=0), jnp.take(table[:, 1], ids, axis=0)
    hidden = jax.nn.gelu(jnp.einsum("td,trd->tr", x, u), approximate=False)
    return jnp.einsum("tr,trd->td", hidden * gates, v)


def make_state(case: Case, x: jax.Array) -> dict:
    """Parameters, Adam's moments of all of them, and the counters of both forms."""

    @jax.jit
    def init(key):
        params = nn.unbox(case.layer().init(key, x)["params"])
        table = params.pop("experts")
        return {"dense": params, "adam": ADAM.init(params), "table": table, "rows": init_rows(OPTIMIZER, table)}

    return init(jax.random.key(0))


def make_step(case: Case, backend: str):
    """The jitted step (state, x, d_y) -> (state, y), which donates the state."""
    if backend not in ("naive", "dense", "rows"):
        raise ValueError(backend)

    def apply(params, table, sink, x):
        if backend == "naive":
            return naive_layer(case, params | {"experts": table}, x), None
        variables = {"params": params | {"experts": table}}
        y, aux = case.layer().apply(variables | ({"row_sinks": {"experts": sink}} if backend == "rows" else {}), x, train=True)
        return y, aux.row_ids.get("experts")

    def step(state, x, d_y):
        table, rows = state["table"], state["rows"]
        sink = row_sink(case.tokens, case.retrieved, 2, case.width)
        wanted = (0, 2) if backend == "rows" else (0, 1)
        loss = lambda *args: (lambda y, ids: (jnp.sum(y * d_y), (y, ids)))(*apply(*args))
        (d_dense, d_table), (y, ids) = jax.grad(loss, wanted, has_aux=True)(state["dense"], table, sink, x)
        if backend == "rows":
            d_table = join_rows(RowGradient(ids, *d_table), case.experts)
            squares = squared_norm(d_table, case.experts)
        else:
            squares = jnp.sum(jnp.square(d_table))
        factor = 1 / jnp.maximum(1, jnp.sqrt(squares + optax.tree.norm(d_dense, squared=True)))
        updates, adam = ADAM.update(jax.tree.map(lambda g: factor * g, d_dense), state["adam"])
        dense = jax.tree.map(lambda p, u: p - RATE * u, state["dense"], updates)
        if backend == "rows":
            table, rows = update_rows(OPTIMIZER, "", table, rows, d_table, jnp.float32(RATE), factor)
        else:
            of_table = optax.ScaleByAdamState(jnp.max(rows.count), rows.mu, rows.nu)
            update, of_table = ADAM.update(factor * d_table, of_table)
            table, rows = table - RATE * update, RowAdamState(of_table.mu, of_table.nu, rows.count + 1)
        return {"dense": dense, "adam": adam, "table": table, "rows": rows}, y

    return jax.jit(step, donate_argnums=0)


def dense_step(width: int, x: jax.Array):
    """(state, the jitted step) of a feed-forward layer of this hidden width."""
    layer = FeedForward(width, "gelu")
    params = nn.unbox(jax.jit(layer.init)(jax.random.key(0), x)["params"])

    def step(state, x, d_y):
        loss = lambda params: (lambda y: (jnp.sum(y * d_y), y))(layer.apply({"params": params}, x))
        gradient, y = jax.grad(loss, has_aux=True)(state["params"])
        updates, adam = ADAM.update(gradient, state["adam"])
        return {"params": jax.tree.map(lambda p, u: p - RATE * u, state["params"], updates), "adam": adam}, y

    return {"params": params, "adam": ADAM.init(params)}, jax.jit(step, donate_argnums=0)


def make_inputs(case: Case) -> tuple[jax.Array, jax.Array]:
    """x and the gradient of y, [T, D]."""
    return tuple(jax.random.normal(jax.random.key(1), (2, case.tokens, case.width)))


def torch_step(case: Case):
    """A step of PEER-pytorch with torch's Adam on the CPU; None where one of them is missing."""
    try:
        import torch
        from PEER_pytorch import PEER as TorchPEER
    except ImportError:
        return None
    layer = TorchPEER(
        dim=case.width,
        heads=case.heads,
        num_experts=case.experts,
        num_experts_per_head=case.top_k,
        dim_key=case.key_width // 2,
        product_key_topk=case.top_k,
        non_competing_scores=False,
        pre_rmsnorm=False,
    )
    optimizer = torch.optim.Adam(layer.parameters(), RATE)
    x, d_y = torch.randn(2, 1, case.tokens, case.width)

    def run():
        optimizer.zero_grad()
        layer(x).backward(d_y)
        optimizer.step()

    return run


def bytes_needed(case: Case, ids: jax.Array) -> int:
    """Bytes of rows that a step must move: two fetches, then each touched row with its moments, read and written."""
    row, touched = 2 * case.width * 4, len(jnp.unique(ids))
    return 2 * case.tokens * case.retrieved * row + 6 * touched * row


def row_of(case: Case, name: str, moved: int, times: dict, errors: dict) -> dict:
    """The row of one way that was timed, or could not be, and moves so many bytes."""
    ms = timing.median(times[name]) if times.get(name) else None
    row = {"case": case.name, "backend": name, "ms": ms, "gb": moved / 1e9, "gb_per_s": ms and moved / ms / 1e6}
    return row | {"runs": len(times.get(name, ()))} | ({"error": errors[name]} if name in errors else {})


def measure_pool(case: Case, rounds: int, progress: bool = True) -> list[dict]:
    """Rows of the ways to take a step, which take turns on one state, and of a copy."""
    x, d_y = make_inputs(case)
    state = make_state(case, x)
    held = {"state": state}
    params = state["dense"] | {"experts": state["table"]}
    sink = {"experts": row_sink(case.tokens, case.retrieved, 2, case.width)}
    ids = jax.jit(lambda p: case.layer().apply({"params": p, "row_sinks": sink}, x)[1].row_ids["experts"])(params)
    needed = bytes_needed(case, ids)
    del params, state

    def run(step):
        held["state"], y = step(held["state"], x, d_y)
        return held["state"]["table"], y

    functions = {name: functools.partial(run, make_step(case, name)) for name in ("rows", "dense", "naive")}
    block = jnp.ones(max(min(needed // 8, 2**28), 1), jnp.float32)
    copy = jax.jit(lambda a: -a, donate_argnums=0)  # in place: fresh memory would be timed too
    held["block"] = block

    def run_copy():
        held["block"] = copy(held["block"])
        return held["block"]

    functions["copy"] = run_copy
    times, errors = timing.interleaved(functions, rounds, case.name, progress, min(rounds, 5), settle=True)
    held.clear()
    gc.collect()
    other = torch_step(case)
    if other is not None:
        torch_times, torch_errors = timing.interleaved({"pytorch": other}, max(rounds // 2, 1), "pytorch", progress)
        times, errors = times | torch_times, errors | torch_errors
    rows = []
    for name in ("rows", "dense", "naive", "pytorch", "copy"):
        moved = 2 * block.size * 4 if name == "copy" else needed
        rows.append(row_of(case, name, moved, times, errors))
    return rows


def measure_scaling(cases: list[Case], widths: tuple[int, ...], rounds: int, progress: bool = True) -> list[dict]:
    """Rows of layers alone, one after the other: their states would not lie in memory together."""
    rows, (x, d_y) = [], make_inputs(cases[0])
    for kind, size in [("peer", case) for case in cases] + [("dense", width) for width in widths]:
        if kind == "peer":
            state, step, name = make_state(size, x), make_step(size, "rows"), size.name
        else:
            (state, step), name = dense_step(size, x), f"f{size}"
        compiled = step.lower(state, x, d_y).compile()
        state_bytes = sum(a.nbytes for a in jax.tree.leaves(state))
        held = {"state": state}
        del state

        def run(held=held, compiled=compiled):
            held["state"], y = compiled(held["state"], x, d_y)
            return y

        times, _ = timing.interleaved({name: run}, rounds, name, progress, minimum=rounds)
        rows.append(
            {
                "case": name,
                "backend": kind,
                "ms": timing.median(times[name]),
                "state_bytes": state_bytes,
                "parameters": size.experts * 2 * size.width if kind == "peer" else 2 * x.shape[1] * size,
                "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
                "runs": len(times[name]),
            }
        )
        held.clear()
        gc.collect()
    return rows


def measure_kernels(case: Case, rounds: int, progress: bool = True, on_gpu: bool | None = None) -> list[dict]:
    """Rows of `retrieve` alone, with ids drawn evenly from all experts.

    Bytes: a row of 2 D values for every pair, twice with the gradient.
    """
    fetched = case.tokens * case.retrieved * 2 * case.width * 2
    moved = {"forward": fetched, "gradient": 2 * fetched}
    times, errors, names = {}, {}, [f"{part} {backend}" for part in moved for backend in ("triton", "blocks")]
    block_size = max(fetched // 4, 1)
    if jax.default_backend() == "gpu" if on_gpu is None else on_gpu:
        keys = jax.random.split(jax.random.key(2), 4)
        table = jax.random.normal(keys[0], (case.experts, 2, case.width), jnp.bfloat16)
        ids = jax.random.randint(keys[1], (case.tokens, case.retrieved), 0, case.experts)
        gates = jax.random.uniform(keys[2], ids.shape)
        x = jax.random.normal(keys[3], (case.tokens, case.width), jnp.bfloat16)
        sink = row_sink(case.tokens, case.retrieved, 2, case.width, jnp.bfloat16)
        functions = {}
        for backend in ("triton", "blocks"):
            run = functools.partial(retrieve, passes=BACKENDS[backend])
            loss = lambda x, gates, sink, ids, table, run=run: jnp.sum(run(x, ids, gates, table, sink).astype(jnp.float32) ** 2)
            functions[f"forward {backend}"] = functools.partial(jax.jit(run), x, ids, gates, table)
            functions[f"gradient {backend}"] = functools.partial(jax.jit(jax.grad(loss, (0, 1, 2))), x, gates, sink, ids, table)
        block = jnp.ones(block_size, jnp.bfloat16)
        functions["copy"] = functools.partial(jax.jit(lambda a: -a), block)
        times, errors = timing.interleaved(functions, rounds, case.name, progress)
    rows = []
    for name in (*names, "copy"):
        size = moved.get(name.split()[0], 2 * block_size * 2)
        rows.append(row_of(case, name, size, times, errors))
    return rows


def plot(rows: list[dict], path: str) -> None:
    """Step time and temporary memory against parameters, of the layers of `scaling`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    labels = {"peer": "PEER, 128 of N experts", "dense": "dense feed-forward"}
    for axis, (key, unit, title) in zip(
        axes, (("ms", 1, "time of a training step, ms"), ("temporary_bytes", 1e6, "memory beside the state, MB"))
    ):
        for backend, marker in (("peer", "o"), ("dense", "s")):
            points = [
                (row["parameters"] / 1e6, row[key] / unit) for row in rows if row["backend"] == backend and "parameters" in row
            ]
            axis.plot(*zip(*points), marker=marker, label=labels[backend])
        axis.set(xscale="log", yscale="log", xlabel="parameters, millions", title=title)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def print_rows(rows: list[dict]) -> None:
    """A table on stdout."""
    for row in rows:
        ms = "not measured" if row["ms"] is None else f"{row['ms']:.4g} ms"
        if "gb" in row:
            rate = "" if row["ms"] is None else f"{row['gb']:8.3g} GB {row['gb_per_s']:8.3g} GB/s"
            print(f"{row['case']:10}{row['backend']:16}{ms:>16}{rate}{row.get('error', '')}")
        else:
            memory = f"{row['temporary_bytes'] / 1e6:10.4g} MB beside {row['state_bytes'] / 1e6:.4g} MB"
            print(f"{row['case']:10}{row['backend']:10}{ms:>16}{memory}")


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write machine, versions, date and rows here")
    parser.add_argument("--cases", default="pool", help=f"comma-separated, of {', '.join(GROUPS)}")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each way")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the rows of scaling")
    options = parser.parse_args(argv)
    names = options.cases.split(",")
    for name in names:
        if name not in GROUPS:
            parser.error(f"--cases={options.cases}: no case {name!r}; use some of {', '.join(GROUPS)}")
    if options.rounds < 1:
        parser.error(f"--rounds={options.rounds}: at least 1; raise it")
    if options.plot and "scaling" not in names:
        parser.error(f"--plot={options.plot}: needs --cases=scaling")
    result = {"benchmark": "peer", "environment": timing.environment(), "cases": {}, "rows": []}
    for name in names:
        cases = {"pool": [POOL], "tiny": [TINY], "scaling": SCALING, "kernels": [KERNELS]}[name]
        result["cases"] |= {case.name: dataclasses.asdict(case) for case in cases}
        if name == "scaling":
            result["rows"] += measure_scaling(cases, WIDTHS, options.rounds)
        elif name == "kernels":
            result["rows"] += measure_kernels(cases[0], options.rounds)
        else:
            result["rows"] += measure_pool(cases[0], options.rounds)
    result["environment"]["load_after"] = timing.load()
    print_rows(result["rows"])
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        plot(result["rows"], options.plot)


if __name__ == "__main__":
    main()
