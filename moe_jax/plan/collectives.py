"""What a compiled program sends between devices."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moe_jax.plan.hlo import Array, Instruction, Program, scope_of

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


class Collective(NamedTuple):
    """Collectives of one kind, axis and place: calls and bytes in one step, per device.

    axes: the mesh axes it runs over, such as "fsdp" or "data+fsdp"; "?" if they are none of the mesh's. payload: bytes of
    the larger of operand and result. sent: bytes that a device puts on its links with a ring over the group. largest: the
    largest array among them.
    """

    kind: str
    axes: str
    scope: str
    largest: str
    count: float
    payload: float
    sent: float


def collectives(program: Program, mesh_shape: dict[str, int]) -> list[Collective]:
    """All collectives of one call, summed by kind, mesh axes and scope; the most bytes on the links first.

    Args:
      program: parsed.
      mesh_shape: {axis: size}, in the order of the mesh.
    """
    found: dict[tuple, list[float]] = {}
    largest: dict[tuple, Array] = {}
    for times, computation, instruction in _once(program):
        kind = instruction.opcode.removesuffix("-start")
        instructions = program.computations[computation]
        operands = sum(instructions[name].bytes for name in instruction.operands if name in instructions)
        started = instruction.opcode.endswith("-start")
        # A start's results are its operands again, the real results, and scalars to wait on.
        results = sum(a.bytes for a in instruction.results if a.shape or not started) - operands * started
        payload = max(operands, results)
        axes, size = _axes(kind, instruction.attributes, mesh_shape)
        if size == 1:
            continue
        sent = payload * (size - 1) / size
        sent = {"all-reduce": 2 * sent, "collective-permute": payload}.get(kind, sent)
        key = kind, axes, scope_of(instruction.path)
        entry = found.setdefault(key, [0.0, 0.0, 0.0])
        for i, value in enumerate((1.0, payload, sent)):
            entry[i] += times * value
        largest[key] = max([*instruction.results, largest.get(key, Array("u8", ()))], key=lambda a: a.bytes)
    rows = [Collective(*key, str(largest[key]), *values) for key, values in found.items()]
    return sorted(rows, key=lambda row: (-row.sent, row.kind, row.scope))


def _once(program: Program) -> Iterator[tuple[float, str, Instruction]]:
    """Every collective with its times and computation.

    A TPU's compiler may spread one over several fusions, to run beside their work: each has it with the same channel, and it
    runs as often as the rarest.
    """
    spread: dict[str, tuple[float, str, Instruction]] = {}
    for times, computation, instruction in program.running():
        if instruction.opcode.removesuffix("-start") not in COLLECTIVES:
            continue
        channel = instruction.attribute(r"channel_id=(\d+)")
        if not channel or computation not in program.fused:
            yield times, computation, instruction
        elif channel not in spread or times < spread[channel][0]:
            spread[channel] = times, computation, instruction
    yield from spread.values()


def _axes(kind: str, attributes: str, mesh_shape: dict[str, int]) -> tuple[str, int]:
    """The mesh axes of a collective, as text, and the size of its group."""
    devices = math.prod(mesh_shape.values())
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes)
        moves = [tuple(map(int, p)) for p in re.findall(r"\{(\d+),(\d+)\}", pairs[1] if pairs else "")]
        moves = [(a, b) for a, b in moves if a != b]
        if not moves:
            return "", 1
        place = np.stack(np.unravel_index(np.array(moves), tuple(mesh_shape.values())), -1)
        changed = (place[:, 0] != place[:, 1]).any(axis=0)
        return "+".join(n for n, c in zip(mesh_shape, changed) if c), 2
    groups = replica_groups(attributes, devices)
    if groups is None:
        return "?", devices
    wanted = {frozenset(group) for group in groups.tolist()}
    size = groups.shape[1]
    ids = np.arange(devices).reshape(tuple(mesh_shape.values()))
    for subset in range(2 ** len(mesh_shape)):
        chosen = [i for i in range(len(mesh_shape)) if subset >> i & 1]
        if math.prod(ids.shape[i] for i in chosen) != size or any(ids.shape[i] == 1 for i in chosen):
            continue
        lines = np.moveaxis(ids, chosen, range(-len(chosen), 0)).reshape(-1, size) if chosen else ids.reshape(-1, 1)
        if {frozenset(line) for line in lines.tolist()} == wanted:
            return "+".join(name for i, name in enumerate(mesh_shape) if i in chosen), size
    return "?", size


def replica_groups(attributes: str, devices: int) -> np.ndarray | None:
    """Device numbers [groups, size] of a collective, from any of XLA's three notations; None: not understood."""
    if match := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes):
        groups = [[int(n) for n in g.split(",") if n] for g in re.findall(r"\{([\d,]*)\}", match[1])]
        groups = groups or [list(range(devices))]
        return np.array(groups) if len({len(g) for g in groups}) == 1 else None
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, dims = ([int(n) for n in match[i].split(",")] for i in (1, 2))
        ids = np.arange(math.prod(dims)).reshape(dims)
        if match[3]:
            ids = ids.transpose([int(n) for n in match[3].split(",")])
        return ids.reshape(shape)
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*(?:\([\d,]*\))?)\))? \{([^}]*)\}", attributes)
    if mesh is None:
        return None
    axes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh[1])}
    chosen = re.findall(r"'([^']*)'", mesh[3])
    ids = np.arange(math.prod(axes.values()))
    if order := re.fullmatch(r"\[([\d,]*)\](?:T\(([\d,]*)\))?", mesh[2] or ""):
        ids = ids.reshape([int(n) for n in order[1].split(",")])
        ids = ids.transpose([int(n) for n in order[2].split(",")]) if order[2] else ids
    elif mesh[2]:
        ids = np.array([int(n) for n in re.findall(r"\d+", mesh[2])])
    places = [list(axes).index(name) for name in chosen]
    size = math.prod(axes[name] for name in chosen)
    ids = ids.reshape(tuple(axes.values()))
    return np.moveaxis(ids, places, range(-len(places), 0)).reshape(-1, size)
