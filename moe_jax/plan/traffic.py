"""What a compiled program moves between HBM and the cores, and its largest arrays."""

from collections.abc import Iterator

from moe_jax.plan.collectives import COLLECTIVES
from moe_jax.plan.hlo import Array, Instruction, Program, scope_of
from moe_jax.plan.products import retrieval_estimate

_FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "replica-id",
    "iota",
    "opt-barrier",
    "call-start",
    "async-start",
)

# Inside a fusion: results that were operands, and parts of collectives that run beside it.
_HANDED_ON = ("tuple", *COLLECTIVES)

# Which operand is written into the first one, in its place.
_UPDATED_BY = {"dynamic-update-slice": 1, "scatter": 2}


def hbm_bytes(program: Program) -> float:
    """Bytes that one call moves between HBM and a core: operands and results of everything that is not fused away.

    A slice counts as what it reads, an update in place as what it writes, and arrays on the core as nothing. The padding
    of tiles is left out, and a kernel counts each operand once; one that retrieves rows of a table says itself what it moves.
    """
    total = 0.0
    for times, name, instruction in program.running(fused=False):
        total += times * _traffic(program, program.computations[name], instruction)
    return total


def _traffic(program: Program, instructions, instruction: Instruction) -> float:
    kind = instruction.opcode
    if kind in _FREE or kind.endswith(("-done", "-update")) or "AllocateBuffer" in instruction.attributes:
        return 0.0
    if estimate := retrieval_estimate(instruction):
        return estimate["bytes_accessed"]
    if kind in ("dynamic-slice", "slice", "gather"):
        return 2.0 * sum(a.hbm_bytes for a in instruction.results)
    operands = [instructions[name].results for name in instruction.operands if name in instructions]
    if kind == "dynamic-update-slice":
        return 2.0 * sum(a.hbm_bytes for a in operands[1])
    if kind == "scatter":  # it may add: rows are read, found and written
        return 3.0 * sum(a.hbm_bytes for a in operands[2]) + sum(a.hbm_bytes for a in operands[1])
    if kind.endswith("-start"):
        return float(sum(a.hbm_bytes for a in instruction.results))  # source and destination are both results
    read = [float(sum(a.hbm_bytes for a in arrays)) for arrays in operands]
    written = [float(a.hbm_bytes) for a in instruction.results]
    if kind == "fusion":
        body = program.computations.get(instruction.attribute(r"calls=%?([\w.\-]+)"), {})
        _cut_to_slices(body, read, written)
    return sum(read) + sum(written)


def _cut_to_slices(body: dict[str, Instruction], read: list[float], written: list[float]) -> None:
    """Lowers what a fusion reads of operands it only slices, and writes of results it only updates."""
    users: dict[str, list[Instruction]] = {}
    for instruction in body.values():
        for name in instruction.operands:
            users.setdefault(name, []).append(instruction)

    def uses(name: str) -> Iterator[tuple[str, Instruction]]:
        for user in users.get(name, ()):
            if user.opcode == "bitcast":
                yield from uses(user.name)
            else:
                yield name, user

    for instruction in body.values():
        if instruction.opcode != "parameter" or int(instruction.literal) >= len(read):
            continue
        amounts = []
        for name, user in uses(instruction.name):
            first = bool(user.operands) and user.operands[0] == name
            if first and user.opcode in ("dynamic-slice", "slice", "gather"):
                amounts.append(float(user.bytes))
            elif (first and user.opcode == "dynamic-update-slice") or user.opcode in _HANDED_ON:
                amounts.append(0.0)
            elif first and user.opcode == "scatter" and user.operands[2] in body:
                amounts.append(float(body[user.operands[2]].bytes))  # it may add
            else:
                break
        else:
            index = int(instruction.literal)
            read[index] = min(read[index], sum(amounts))

    def source(instruction: Instruction) -> Instruction:
        while instruction.opcode == "bitcast" and instruction.operands[0] in body:
            instruction = body[instruction.operands[0]]
        return instruction

    root = next((i for i in body.values() if i.root), None)
    if root is None:
        return
    roots = [body[n] for n in root.operands if n in body] if root.opcode == "tuple" else [root]
    for i, instruction in enumerate(map(source, roots[: len(written)])):
        update = _UPDATED_BY.get(instruction.opcode)
        if update and instruction.operands[update] in body:
            written[i] = min(written[i], float(body[instruction.operands[update]].bytes))
        elif instruction.opcode == "parameter" or instruction.opcode in COLLECTIVES:
            written[i] = 0.0


def largest_buffers(program: Program, count: int = 5) -> list[tuple[str, str]]:
    """(array, scope) of the largest different arrays that the program makes outside of fusions."""
    found: dict[str, tuple[int, str]] = {}
    for _, _, instruction in program.running(fused=False):
        if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
            continue
        for array in instruction.results:
            found.setdefault(str(array), (array.bytes, scope_of(instruction.path)))
    ordered = sorted(found.items(), key=lambda item: -item[1][0])[:count]
    return [(name, scope) for name, (_, scope) in ordered]


def arrays(program: Program) -> set[Array]:
    """Every array that the program holds outside of fusions."""
    return {a._replace(on_core=False) for _, _, i in program.running(fused=False) for a in i.results}
