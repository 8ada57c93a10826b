"""FLOPs of a compiled program: products of matrices, and the custom kernels, which XLA does not see into."""

import functools
import json
import math
import re
from typing import NamedTuple

import numpy as np

from moe_jax.plan.hlo import Instruction, Program


class Kernel(NamedTuple):
    """Calls of one custom kernel with these operands, in one step.

    kind: "grouped_matmul", "attention", "retrieval" or "other". flops: in all calls, of what the kernel computes.
    useful: without what flash attention computes again in its backward pass. bytes: that all calls move, where the
    kernel itself says it.
    """

    name: str
    kind: str
    operands: str
    count: float
    flops: float
    useful: float
    bytes: float = 0.0


def product_flops(program: Program) -> float:
    """FLOPs in one call of all products of matrices outside of custom kernels; a multiply-add counts twice."""
    return sum(
        times * _product(program.computations[computation], instruction)
        for times, computation, instruction in program.running()
        if instruction.opcode in ("dot", "convolution")
    )


def _product(instructions, instruction: Instruction) -> float:
    out = instruction.results[0]
    lhs, rhs = (instructions[name].results[0] for name in instruction.operands[:2])
    if instruction.opcode == "dot":
        dims = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
        return 2.0 * out.size * math.prod(lhs.shape[int(d)] for d in dims.split(",") if d)
    # A TPU writes products as convolutions, with batch dimensions as space; positions in padding and holes cost nothing.
    left, right, result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    total = 2.0 * out.shape[result.index("b")] * out.shape[result.index("f")] * rhs.shape[right.index("i")]
    space = sorted(label for label in left if label.isdigit())
    window = instruction.attribute(r"window=\{([^}]*)\}")

    def numbers(key: str, default: str) -> list[str]:
        match = re.search(rf"\b{key}=([\w\-]+)", window)
        return match[1].split("x") if match else [default] * len(space)

    sizes, strides, pads = numbers("size", "1"), numbers("stride", "1"), numbers("pad", "0_0")
    holes, steps = numbers("lhs_dilate", "1"), numbers("rhs_dilate", "1")
    for d, label in enumerate(space):
        total *= _valid_positions(
            lhs.shape[left.index(label)],
            out.shape[result.index(label)],
            int(sizes[d]),
            int(strides[d]),
            int(pads[d].split("_")[0]),
            int(holes[d]),
            int(steps[d]),
        )
    return total


@functools.cache
def _valid_positions(length: int, outputs: int, size: int, stride: int, pad: int, hole: int, step: int) -> int:
    """Pairs of an output and a window position that meet an element of the operand."""
    at = np.arange(outputs)[:, None] * stride + np.arange(size)[None, :] * step - pad
    return int(np.sum((at >= 0) & (at % hole == 0) & (at <= (length - 1) * hole)))


def kernels(program: Program, balanced_rows: float = math.inf) -> list[Kernel]:
    """The custom kernels (Pallas, Mosaic) of a TPU program.

    Args:
      program: parsed.
      balanced_rows: assignments of one microbatch that a device gets when the load is even. A grouped matmul whose buffer
        has room for more skips the rest, so no more are counted.
    """
    found: dict[tuple, list[float]] = {}
    for times, computation, instruction in program.running():
        if instruction.opcode != "custom-call" or "tpu_custom_call" not in instruction.attributes:
            continue
        name, estimate = re.sub(r"[.\d]+$", "", instruction.name), retrieval_estimate(instruction)
        arrays = [
            program.computations[computation][operand].results[0] for operand in instruction.operands
        ]  # a kernel's operands are arrays
        if estimate:
            kind, flops, useful = "retrieval", estimate["flops"], estimate["flops"]
        else:
            kind, flops, useful = _kernel_flops(name, arrays, instruction.results, balanced_rows)
        shown = " x ".join(str(a) for a in arrays if len(a.shape) > 1 and a.dtype[0] not in "su")
        entry = found.setdefault((name, kind, shown), [0.0] * 4)
        for i, value in enumerate((1.0, flops, useful, estimate.get("bytes_accessed", 0.0))):
            entry[i] += times * value
    return [Kernel(*key, *values) for key, values in sorted(found.items())]


def retrieval_estimate(instruction: Instruction) -> dict[str, float]:
    """What a kernel of `ops.retrieval.mosaic` says that it computes ("flops") and moves ("bytes_accessed"), which
    depends on what is retrieved, not on the table that it is given; empty for other instructions."""
    if instruction.opcode != "custom-call" or "retrieval" not in instruction.name:
        return {}
    estimate = instruction.attribute(r'"cost_estimate":(\{[^}]*\})', "{}")
    return {name: float(value) for name, value in json.loads(estimate).items()}


def _kernel_flops(name: str, arrays, results, balanced_rows: float) -> tuple[str, float, float]:
    floats = [a for a in arrays if a.dtype.startswith(("f", "bf")) and len(a.shape) > 1]
    if "metadata" not in name and ("ragged" in name or "gmm" in name) and len(floats) > 1:
        groups = next((a for a in (*floats, *results) if len(a.shape) == 3), None)
        if groups is not None:
            d, f = groups.shape[1:]
            rows = next((a for a in floats if len(a.shape) == 2), floats[0])
            m = rows.size // d if d in rows.shape else rows.size // f
            flops = 2.0 * min(m, balanced_rows) * d * f
            return "grouped_matmul", flops, flops
    if ("splash" in name or "flash" in name) and floats:
        query = floats[0].shape
        half = 2.0 * math.prod(query) * query[-2] / 2  # one product of the causal half of S x S
        if "dkv" in name:
            return "attention", 4 * half, 2 * half
        return "attention", (3 if "dq" in name else 2) * half, 2 * half
    return "other", 0.0, 0.0
