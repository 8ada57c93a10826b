"""Writes tables of the README from results: of benchmarks, or of a study.

    python benchmarks/table.py [FILE.json ...]                           default: benchmarks/results/*.json
    python benchmarks/table.py --study DIR/study.json --name routers

The text between two marker comments is replaced: those of the performance section, or of the study with that name,
<!-- study routers: written by benchmarks/table.py --> and <!-- end of study routers -->. What no file of a benchmark
has is "not measured".
"""

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Iterable

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from moe_jax.study.summary import table, tables  # noqa: E402
from moe_jax.study.timing import PLATFORMS, conditions  # noqa: E402

BEGIN, END = "<!-- performance: written by benchmarks/table.py -->", "<!-- end of performance -->"
MISSING = "not measured"
BACKENDS = {
    "dense": "dense FFN of equal FLOPs",
    "equal_groups": "equal groups, one batched einsum, no routing",
    "dropless": "**dropless**",
    "capacity": "**capacity**, factor 1.25",
    "ragged_dot": "dropless by `ragged_dot`",
    "one_hot": "one-hot einsums, factor 1.25",
    "grouped_matmul": "`grouped_matmul` alone, rows sorted",
    "torch_grouped_mm": "torch's grouped product alone, rows sorted",
}
SECOND = ("second_all", "second_10", "second_25", "second_50")


def render(results: list[dict]) -> str:
    """The section of all results: a part per file, and the platforms that have none."""
    parts = [RENDERERS[result["benchmark"]](result) for result in results]
    measured = {result["environment"]["platform"] for result in results}
    missing = [name for platform, name in PLATFORMS.items() if platform not in measured]
    if missing:
        parts.append(f"{', '.join(missing)}: {MISSING}.")
    return "\n\n".join(parts)


def moe_layer(result: dict) -> str:
    """Tables of `benchmarks/moe_layer.py`: milliseconds, and in brackets the ratio to the dense layer."""
    rows = {(row["case"], row["backend"]): row for row in result["rows"]}
    passes = list(dict.fromkeys(case.partition("/")[2] for case, _ in rows if "/" in case))
    parts = [f"{conditions(result['environment'])}. Milliseconds (ratio to dense), medians of interleaved runs."]
    shown = {name: case for name, case in result["cases"].items() if name not in SECOND}
    by_activation = {}
    for name, case in shown.items():
        by_activation.setdefault(case.get("activation"), {})[name] = case
    parts += [columns(kind, cases, rows) for cases in by_activation.values() for kind in passes]
    notes = [second(rows, passes, result["cases"])] if SECOND[0] in result["cases"] else []
    notes += [ceiling(row) for row in result["rows"] if row["case"].startswith("ceiling")]
    return "\n\n".join(parts + [" ".join(notes)] if notes else parts)


def columns(kind: str, cases: dict, rows: dict) -> str:
    """The table of one pass, a column for each case."""
    names = {name: f"{name}/{kind}" for name in cases}
    used = [b for b in BACKENDS if any((column, b) in rows for column in names.values())]
    same = sizes(next(iter(cases.values())), cases.values())

    def title(case):
        router = case.get("router", "top_k")
        return ", ".join([f"E={case['experts']}", *[router] * (router != "top_k"), *[sizes(case)] * (not same)])

    body = [[BACKENDS[b], *(cell(rows.get((column, b))) for column in names.values())] for b in used]
    return table([f"{kind}, {same}" if same else kind, *map(title, cases.values())], body)


def sizes(case: dict | None, others: Iterable[dict] = ()) -> str:
    """'K=1, T=4096 D=256 F=1024, float32' of a case; empty if there is none or `others` have other sizes."""
    if case is None:
        return ""
    text = "K={top_k}, T={tokens} D={width} F={expert_width}, {dtype}".format(**case)
    text += ", swiglu" if case.get("activation") == "swiglu" else ""
    return text if all(sizes(other) == text for other in others) else ""


def cell(row: dict | None) -> str:
    """'12.3 (1.20)', or that it was not measured."""
    if row is None or row["ms"] is None:
        return MISSING
    return f"{number(row['ms'])} ({row['ratio_to_dense']:.2f})"


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def second(rows: dict, passes: list[str], cases: dict) -> str:
    """How the time follows the rows: a second expert for some of the tokens, by the router's choice, against one for all."""
    full, *parts = ({kind: rows.get((f"{name}/{kind}", "dropless")) for kind in passes} for name in SECOND)
    texts = []
    for name, part in zip(SECOND[1:], parts, strict=True):
        measured = [kind for kind in passes if full[kind] and part[kind] and full[kind]["ms"] and part[kind]["ms"]]
        times = {kind: f"{kind} {part[kind]['ms'] / full[kind]['ms']:.2f}" for kind in measured}
        work = [part[kind]["gflop"] / full[kind]["gflop"] for kind in measured]
        share = f"{name.removeprefix('second_')} % of the tokens"
        of_work = f" ({work[0]:.3g} of the FLOPs)" if work else ""
        texts.append(f"for {share}{of_work} {', '.join(times.get(kind, f'{kind} {MISSING}') for kind in passes)}")
    case = cases[SECOND[0]]
    return (
        "A second expert by the router `adaptive`, of the time of top-2: "
        f"{'; '.join(texts)} (dropless, E={case['experts']}, {sizes(case)})."
    )


def ceiling(row: dict) -> str:
    """The rate of one large dense product."""
    size, dtype = row["case"].split("_")[1:]
    rate = f"{number(1e3 * row['tflops'])} GFLOP/s" if row["tflops"] < 1 else f"{number(row['tflops'])} TFLOP/s"
    return f"One dense product of {size} x {size} in {dtype}: {rate}."


PEER_WAYS = {
    "rows": "**gradients by rows**",
    "dense": "the layer with a dense gradient of the pool",
    "naive": "two gathers and einsums, differentiated by JAX",
    "pytorch": "PEER-pytorch with torch's Adam",
    "copy": "a plain copy",
}


def peer(result: dict) -> str:
    """Of `benchmarks/peer.py`: tables of the cases pool and kernels, and how time and memory grow in `scaling`."""
    cases, rows = result["cases"], result["rows"]
    parts = [f"{conditions(result['environment'])}. GB/s: of the bytes of rows that must be moved."]
    if "pool" in cases:
        parts.append(ways("a training step of one PEER layer", cases["pool"], "naive", rows))
    if "kernels" in cases:
        parts.append(ways("the retrieval alone in bfloat16", cases["kernels"], "forward blocks", rows))
    for kind, size in (("peer", "N"), ("dense", "F")):
        of_kind = [row for row in rows if row["backend"] == kind and "state_bytes" in row]
        if of_kind:
            first, last = of_kind[0], of_kind[-1]
            width = next(iter(cases.values()))["width"]
            names = [row["parameters"] // (2 * width) for row in (first, last)]
            memory = [row["temporary_bytes"] / 1e6 for row in (first, last)]
            parts.append(
                f"{'PEER' if kind == 'peer' else 'A dense layer'} from {size}={names[0]:,} to {names[1]:,}: "
                f"{number(first['ms'])} to {number(last['ms'])} ms, {number(memory[0])} to {number(memory[1])} MB "
                "beside parameters and optimizer state."
            )
    return "\n\n".join(parts)


def ways(title: str, case: dict, baseline: str, rows: list[dict]) -> str:
    """The table of a case of `benchmarks/peer.py`."""
    shape = "N={experts:,} T={tokens} D={width} H={heads} K={top_k}".format(**case)
    rows = [row for row in rows if row["case"] == case["name"]]
    base = next((row["ms"] for row in rows if row["backend"] == baseline), None)
    body = []
    for row in rows:
        name, ms = PEER_WAYS.get(row["backend"], f"`{row['backend']}`"), row["ms"]
        rate = MISSING if ms is None else number(row["gb_per_s"])
        ratio = "" if None in (ms, base) or row["backend"] == "copy" else f"{base / ms:.2f}"
        body.append([name, MISSING if ms is None else number(ms), ratio, rate])
    return table([f"{title}, {shape}", "ms", f"{baseline} / this", "GB/s"], body)


GENERATE_WAYS = {
    "routed": "**routed**",
    "dense": "**dense**",
    "transformers routed": "transformers, Mixtral",
    "transformers dense": "transformers, Llama",
}


def generation(result: dict) -> str:
    """Of `benchmarks/generate.py`: a table of tokens a second for each case, and in brackets the ratio to transformers."""
    parts = [f"{conditions(result['environment'])}. Tokens a second (ratio to transformers), medians of interleaved calls."]
    for name, case in result["cases"].items():
        rows = {(row["backend"], row["batch"]): row["tokens_per_second"] for row in result["rows"] if row["case"] == name}
        batches = list(dict.fromkeys(batch for _, batch in rows))
        size = "L={layers} D={width} F={ffn_width} V={vocab}, routed: E={experts} K={top_k} in every block".format(**case)
        title = f"greedy, {case['tokens']} tokens after {case['prompt']}, {size}"
        body = []
        for way, label in GENERATE_WAYS.items():
            cells = []
            for batch in batches:
                rate, other = rows.get((way, batch)), rows.get((f"transformers {way}", batch))
                ratio = f" ({rate / other:.2f})" if rate and other else ""
                cells.append(MISSING if rate is None else f"{rate:,.0f}{ratio}")
            body.append([label, *cells])
        parts.append(table([title, *(f"batch {batch}" for batch in batches)], body))
    return "\n\n".join(parts)


RENDERERS = {"moe_layer": moe_layer, "peer": peer, "generate": generation}


def replace_section(text: str, section: str, begin: str = BEGIN, end: str = END) -> str:
    """`text` with `section` between the markers.

    Raises:
      ValueError: not exactly one pair of markers.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"not one pair of the lines {begin!r} and {end!r}; put them where the tables belong")
    pattern = f"{re.escape(begin)}.*{re.escape(end)}"
    return re.sub(pattern, lambda _: f"{begin}\n\n{section}\n\n{end}", text, flags=re.DOTALL)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE.json", help="what benchmarks wrote with --json")
    parser.add_argument("--readme", default=str(ROOT / "README.md"), help="the file to rewrite")
    parser.add_argument("--study", metavar="study.json", help="what moe_jax.study wrote")
    parser.add_argument("--name", default="", help="of the study, in its markers")
    options = parser.parse_args(argv)
    if bool(options.study) != bool(options.name) or options.study and options.files:
        parser.error("--study and --name go together, without other files")
    if options.study:
        begin = f"<!-- study {options.name}: written by benchmarks/table.py -->"
        end = f"<!-- end of study {options.name} -->"
        section = tables(read(options.study, ("study",), parser))
    else:
        files = options.files or sorted(map(str, (ROOT / "benchmarks" / "results").glob("*.json")))
        begin, end, section = BEGIN, END, render([read(file, tuple(RENDERERS), parser) for file in files])
    readme = pathlib.Path(options.readme)
    try:
        readme.write_text(replace_section(readme.read_text(), section, begin, end))
    except (OSError, ValueError) as error:
        parser.error(f"--readme={readme}: {error}")


def read(file: str, kinds: tuple[str, ...], parser: argparse.ArgumentParser) -> dict:
    """A result of one of these kinds; else the command ends with a line that says what is wrong."""
    try:
        result = json.loads(pathlib.Path(file).read_text())
        kind = result["benchmark"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"{file}: {type(error).__name__} {error}; name a file that a benchmark or a study wrote")
    if kind not in kinds:
        parser.error(f"{file}: no table for benchmark={kind!r}; use {' or '.join(kinds)}")
    return result


if __name__ == "__main__":
    main()
