"""A plan as text for a person, or as a dict for JSON."""

from typing import Any

from moe_jax.plan.roofline import GIB
from moe_jax.plan.step import Plan

MIB = 2**20


def mesh_text(mesh: dict[str, int]) -> str:
    """The axes above 1."""
    return " ".join(f"{name}={size}" for name, size in mesh.items() if size > 1) or "one device"


def to_dict(plan: Plan) -> dict[str, Any]:
    """Everything, in bytes, FLOPs and seconds; bytes, FLOPs and counts are a chip's, calls a device's."""
    chip, times = plan.topology.chip, plan.times
    return {
        "topology": plan.topology.name,
        "chips": plan.topology.chips,
        "devices": len(plan.topology.devices),
        "mesh": plan.mesh,
        "parameters": plan.parameters,
        "tokens_per_step": plan.tokens,
        "memory": plan.memory | {"peak": plan.peak, "hbm": chip.hbm},
        "flops": {
            "products": plan.product_flops,
            "kernels": sum(k.flops for k in plan.kernels),
            "program": plan.flops,
            "program_compared": plan.compared_flops,
            "model": plan.model_flops,
            "model_with_recomputation": plan.expected_flops,
        },
        "collectives": [c._asdict() for c in plan.collectives],
        "kernels": [k._asdict() for k in plan.kernels],
        "hbm_bytes": plan.hbm_bytes,
        "retrieved_bytes": plan.retrieved_bytes,
        "link_bytes": plan.link_bytes,
        "peaks": {
            "flops": chip.flops,
            "hbm_bandwidth": chip.hbm_bandwidth,
            "link_bandwidth": chip.link_bandwidth,
            "source": chip.source,
        },
        "roofline": times._asdict()
        | {
            "bound": times.bound,
            "step_overlapped": times.overlapped,
            "step_serial": times.serial,
            "tokens_per_second": plan.tokens / times.overlapped,
            "mfu": plan.model_flops / chip.flops / times.overlapped,
        },
        "unknown_loops": list(plan.unknown_loops),
        "largest_buffers": [{"array": array, "scope": scope} for array, scope in plan.buffers],
        "compile_seconds": plan.seconds,
    }


def to_text(plan: Plan) -> str:
    """The report."""
    blocks = [_head(plan), _memory(plan), _flops(plan), _kernels(plan), _collectives(plan), _roofline(plan)]
    notes = [f"warning: {line}" for line in warnings(plan)]
    return "\n\n".join("\n".join(block) for block in blocks + [notes] if block)


def warnings(plan: Plan) -> list[str]:
    """What a reader should not overlook."""
    lines, ratio = [], plan.compared_flops / plan.expected_flops
    if not 0.95 < ratio < 1.05:
        more = "somewhere it computes what the model does not ask for" if ratio > 1 else "some were not recognised"
        lines.append(f"the program has {ratio:.2f} times the model's FLOPs: {more}")
    if plan.unknown_loops:
        lines.append(f"loops whose trips depend on data, counted once: {', '.join(plan.unknown_loops)}")
    return lines


def _head(plan: Plan) -> list[str]:
    chips = f"{plan.topology.chips} chips"
    if plan.topology.devices_per_chip > 1:
        chips += f" of {plan.topology.devices_per_chip} devices"
    return [
        f"{plan.topology.name}: {chips}, mesh {mesh_text(plan.mesh)}; {plan.parameters:,} parameters, "
        f"{plan.tokens:,} tokens a step; compiled in {plan.seconds:.0f} s"
    ]


def _memory(plan: Plan) -> list[str]:
    hbm = plan.topology.chip.hbm

    def row(name, size, note=""):
        return f"  {name:<34}{size / GIB:>9.2f}  {note}".rstrip()

    return [
        "memory of a chip, GiB",
        row("arguments: state and batch", plan.memory["arguments"]),
        row("temporaries", plan.memory["temporaries"]),
        row("output", plan.memory["output"], f"{plan.memory['aliased'] / GIB:.2f} in the arguments' place"),
        row("program", plan.memory["program"]),
        row("all at once", plan.peak, f"{plan.peak / hbm:.0%} of {hbm / GIB:.0f} GiB"),
    ]


def _flops(plan: Plan) -> list[str]:
    def row(name, flops, note=""):
        return f"  {name:<34}{flops / 1e12:>9.3f}  {note}".rstrip()

    def kind(name):
        return sum(k.flops for k in plan.kernels if k.kind == name)

    return [
        "FLOPs of a chip in a step, TFLOP",
        row("products", plan.product_flops),
        row("grouped-matmul kernels", kind("grouped_matmul"), "with an even load"),
        row("attention kernels", kind("attention"), "of the causal half"),
        *([row("retrieval kernels", kind("retrieval"))] if plan.retrieved_bytes else []),
        row("the program", plan.flops),
        row("- what flash attention repeats", plan.compared_flops),
        row("the model: 3 x forward", plan.model_flops),
        row(
            "+ blocks recomputed by remat",
            plan.expected_flops,
            f"the program has {plan.compared_flops / plan.expected_flops:.3f} of it",
        ),
    ]


def _kernels(plan: Plan) -> list[str]:
    lines = [f"{'kernels of a chip in a step':<45}{'calls':>8}  operands"]
    for kernel in plan.kernels:
        lines.append(f"  {kernel.name:<43}{kernel.count:>8,.0f}  {kernel.operands}".rstrip())
    return lines if plan.kernels else ["kernels: none; XLA's own products only"]


def _collectives(plan: Plan) -> list[str]:
    if not plan.collectives:
        return ["collectives: none"]
    lines = [f"{'collectives in a step':<24}{'axis':<14}{'where':<24}{'calls':>8}{'MiB':>11}{'MiB sent':>11}  largest array"]
    for c in plan.collectives:
        lines.append(
            f"  {c.kind:<22}{c.axes:<14}{c.scope:<24}{c.count:>8,.0f}{c.payload / MIB:>11,.1f}{c.sent / MIB:>11,.1f}"
            f"  {c.largest}"
        )
    return lines


def _roofline(plan: Plan) -> list[str]:
    chip, t = plan.topology.chip, plan.times

    def number(amount):
        return f"{amount:,.0f}" if amount >= 1000 else f"{amount:.4g}"

    def row(name, seconds, amount, peak):
        return f"  {name:<10}{seconds * 1e3:>10.1f}  {amount} / {peak}"

    retrieved = f" ({number(plan.retrieved_bytes / 1e9)} of it by kernels of retrieval)" if plan.retrieved_bytes else ""
    return [
        f"roofline of a step, ms (peaks: {chip.source})",
        row("compute", t.compute, f"{number(plan.flops / 1e12)} TFLOP", f"{chip.flops / 1e12:,.0f} TFLOP/s in bfloat16"),
        row("HBM", t.hbm, f"{number(plan.hbm_bytes / 1e9)} GB", f"{chip.hbm_bandwidth / 1e9:,.0f} GB/s{retrieved}"),
        row("links", t.links, f"{number(plan.link_bytes / 1e9)} GB", f"{chip.link_bandwidth / 1e9:,.0f} GB/s over all links"),
        f"  {'step':<10}{t.overlapped * 1e3:>10.1f}  at least, bound by {t.bound}; {t.serial * 1e3:.1f} if nothing overlaps",
        f"  {plan.tokens / t.overlapped:,.0f} tokens/s at most on {plan.topology.chips} chips, "
        f"{plan.model_flops / chip.flops / t.overlapped:.0%} of the peak (MFU)",
    ]


def ranking(plans: list[Plan], refused: list[tuple[dict[str, int], str]]) -> str:
    """The meshes that fit, the fastest first, then those that do not, each with its reason."""
    lines = [f"{'mesh':<36}{'step, ms':>10}{'serial':>10}{'bound by':>10}{'GiB':>8}{'tokens/s':>14}"]
    for plan in plans:
        t = plan.times
        lines.append(
            f"{mesh_text(plan.mesh):<36}{t.overlapped * 1e3:>10.1f}{t.serial * 1e3:>10.1f}{t.bound:>10}"
            f"{plan.peak / GIB:>8.2f}{plan.tokens / t.overlapped:>14,.0f}"
        )
    return "\n".join(lines + [f"{mesh_text(mesh):<36}{reason}" for mesh, reason in refused])
