"""Reading a compiled program (`compiled.as_text()`): what runs, and how often in one call.

XLA's own analysis counts the body of a loop once; here everything is multiplied by the trips of the loops around it.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

# The scopes that the model's code names, the innermost of which labels an instruction.
SCOPES = ("exchange", "route", "sort", "combine", "experts", "attention", "cross_entropy", "update")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_NAME = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_ARRAY = re.compile(r"(pred|[a-z]+\d+\w*)\[([\d,<=]*)\](\{[^}]*\})?")
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLS = re.compile(r"(calls|to_apply|body|condition|true_computation|false_computation|async_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count["\']?:\s*\{["\']?n["\']?:\s*["\']?(\d+)')
# Instructions whose `to_apply` is a program and not the formula of a reduction.
_CALLERS = ("fusion", "call", "call-start", "async-start", "custom-call", "conditional")


class Array(NamedTuple):
    """One array of a result: dtype such as "bf16", shape, and whether it lies in the chip's on-core memory, not in HBM."""

    dtype: str
    shape: tuple[int, ...]
    on_core: bool = False

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes without the padding of tiles."""
        bits = 8 if self.dtype == "pred" else int(re.search(r"\d+", self.dtype)[0])
        return self.size * bits // 8

    @property
    def hbm_bytes(self) -> int:
        """`bytes`, or 0 on the core."""
        return 0 if self.on_core else self.bytes

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class Instruction(NamedTuple):
    """One line: results, names of the operands, everything after them, and the path of the code it comes from."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    path: str
    root: bool
    literal: str

    def attribute(self, pattern: str, default: str = "") -> str:
        """First group of a regular expression in the attributes."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else default

    @property
    def bytes(self) -> int:
        """Bytes of all results."""
        return sum(array.bytes for array in self.results)


class Program(NamedTuple):
    """A parsed module.

    computations: {name: {name of an instruction: Instruction}}. entry: the one that runs. times: how often each runs in one
    call; 0: only as a formula, or never. unknown: loops whose trips the text does not say; they count once.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str
    times: dict[str, float]
    fused: frozenset[str]
    unknown: tuple[str, ...]

    def running(self, fused: bool = True) -> Iterator[tuple[float, str, Instruction]]:
        """(times, computation, instruction) of all that runs; without `fused` only what stands alone."""
        for name, instructions in self.computations.items():
            if self.times.get(name) and (fused or name not in self.fused):
                for instruction in instructions.values():
                    yield self.times[name], name, instruction


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"no closing parenthesis: {text[start : start + 80]}")


def parse_arrays(text: str) -> tuple[Array, ...]:
    """All arrays of a shape such as `(f32[2,3]{1,0}, s32[])`."""
    return tuple(
        Array(kind, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n), "S(" in layout)
        for kind, dims, layout in _ARRAY.findall(text)
    )


def _parse_line(line: str) -> Instruction | None:
    match = _NAME.match(line)
    if not match:
        return None
    start = match.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    opcode = _OPCODE.match(line, end)
    close = _closing(line, opcode.end() - 1)
    inside, rest = line[opcode.end() : close], line[close + 1 :]
    path = re.search(r'op_name="([^"]*)"', rest)
    # Kernels carry their whole code in the attributes.
    rest = rest if len(rest) < 20000 else rest[:4000]
    return Instruction(
        match[2],
        opcode[1],
        parse_arrays(line[start:end]),
        tuple(_OPERAND.findall(inside)),
        rest,
        path[1] if path else "",
        bool(match[1]),
        inside,
    )


def parse(text: str) -> Program:
    """Reads `compiled.as_text()`.

    Raises:
      ValueError: it has no entry computation.
    """
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        if current is None or not line.startswith(" "):
            if header := _HEADER.match(line):
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif instruction := _parse_line(line):
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("no ENTRY computation in the compiled text")
    times, fused, unknown = {}, set(), []

    def walk(name: str, count: float, in_fusion: bool):
        times[name] = times.get(name, 0.0) + count
        if in_fusion:
            fused.add(name)
        for instruction in computations.get(name, {}).values():
            called = dict(_CALLS.findall(instruction.attributes))
            if instruction.opcode == "while":
                trips = _trip_count(computations, name, instruction, called["condition"], called["body"])
                if trips is None:
                    unknown.append(instruction.path or instruction.name)
                walk(called["body"], count * (1 if trips is None else trips), in_fusion)
            elif instruction.opcode in _CALLERS:
                names = [n for role, n in called.items() if role != "condition"]
                for group in _BRANCHES.findall(instruction.attributes):
                    names += _OPERAND.findall(group)
                for callee in names:
                    walk(callee, count, in_fusion or instruction.opcode == "fusion")

    walk(entry, 1.0, False)
    return Program(computations, entry, times, frozenset(fused), tuple(unknown))


def _trip_count(computations, parent: str, loop: Instruction, condition: str, loop_body: str) -> int | None:
    """How often a loop's body runs: from what XLA wrote down, else from `counter < constant`; None: it depends on data."""
    if match := _TRIPS.search(loop.attributes):
        return int(match[1])
    body = computations.get(condition, {})
    constants = {name: int(i.literal) for name, i in body.items() if _is_integer_constant(i)}
    root = next((i for i in body.values() if i.root), None)
    if root is None or root.opcode not in ("compare", "fusion"):
        return None
    bounds = [constants[name] for name in root.operands if name in constants]
    counters = [body[name] for name in root.operands if name in body and name not in constants]
    direction = root.attribute(r"direction=(\w+)", "LT")
    if len(bounds) != 1 or len(counters) != 1 or direction not in ("LT", "LE", "NE"):
        return None
    index = counters[0].attribute(r"index=(\d+)")
    start, step = _loop_start(computations[parent], loop, index), _loop_step(computations[loop_body], index)
    return max(-(-(bounds[0] + (direction == "LE") - start) // step), 0)


def _loop_start(instructions, loop: Instruction, index: str) -> int:
    """First value of a counter; 0 where it cannot be followed, as JAX and XLA count."""
    carried = instructions.get(loop.operands[0])
    if index and carried is not None and carried.opcode == "tuple":
        first = instructions.get(carried.operands[int(index)])
        if first is not None and _is_integer_constant(first):
            return int(first.literal)
    return 0


def _loop_step(body, index: str) -> int:
    """What a body adds to its counter: more than 1 where XLA has unrolled it; 1 where it cannot be followed."""
    root = next((i for i in body.values() if i.root), None)
    if not index or root is None or root.opcode != "tuple":
        return 1
    last = body.get(root.operands[int(index)])
    while last is not None and last.opcode in ("copy", "bitcast"):
        last = body.get(last.operands[0])
    if last is None or last.opcode != "add":
        return 1
    steps = [body[name] for name in last.operands if name in body]
    return next((int(i.literal) for i in steps if _is_integer_constant(i) and int(i.literal) > 0), 1)


def _is_integer_constant(instruction: Instruction) -> bool:
    return (
        instruction.opcode == "constant"
        and len(instruction.results) == 1
        and not instruction.results[0].shape
        and re.fullmatch(r"-?\d+", instruction.literal) is not None
    )


def scope_of(path: str) -> str:
    """The innermost known scope of an instruction's path, and whether it belongs to the backward pass."""
    parts = re.split(r"[/()]+", path)
    scope = next((part for part in reversed(parts) if part in SCOPES), "other")
    return scope + (" backward" if "transpose(" in path else "")
