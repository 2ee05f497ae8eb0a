"""The collectives of a compiled program, parsed from its text.

XLA chooses the collectives of a program, and only the compiled text shows them:

    for c in collectives(jax.jit(step).lower(state, batch).compile().as_text()):
        print(c.kind, c.mesh_axes(mesh.shape), c.shapes, c.sent, c.times)
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from nope_jax.compile.program import array_bytes, arrays, called_computations, loop_turns, parse_program

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_TRANSFER = r'_xla_megascale_target="\{([\d,:]+)\}x\{([\d,:]+)\}".*_xla_megascale_transfer_type="(\w+)"'


class Collective(NamedTuple):
    """One collective of a program, as seen by each participating device."""

    kind: str
    """One of KINDS. A fused all-reduce and slice in TPU programs counts as a reduce-scatter.

    In a program for several TPU slices, a transfer between them counts as the collective that it belongs to."""
    shapes: tuple[str, ...]
    """The result arrays on each device, such as "f32[8,32]"."""
    bytes: int
    """Size of the result arrays."""
    groups: tuple[tuple[int, ...], ...]
    """The groups of communicating devices, as indices into the mesh; (source, target) pairs for a permute."""
    times: int | None
    """Number of executions per run of the program. None: in a loop whose trip count is not in the text."""
    loops: int
    """Number of loops around it."""
    source: str
    """Name of the operation that it implements."""

    @property
    def group_size(self) -> int:
        """Number of devices in a group; 2 for a permute."""
        return max(map(len, self.groups))

    @property
    def sent(self) -> int:
        """Bytes that each device sends per execution if its group is a ring, the minimum for large arrays."""
        size = self.group_size
        share = {
            "all-gather": (size - 1) / size,
            "all-reduce": 2 * (size - 1) / size,
            "reduce-scatter": size - 1,
            "all-to-all": (size - 1) / size,
        }
        return round(self.bytes * share.get(self.kind, 1))

    def mesh_axes(self, shape: Mapping[str, int]) -> tuple[str, ...]:
        """The axes of a mesh of this shape along which devices communicate."""
        where = np.stack(np.unravel_index(np.arange(math.prod(shape.values())), tuple(shape.values())), axis=1)
        along = np.any([np.ptp(where[list(group)], axis=0) > 0 for group in self.groups], axis=0)
        return tuple(axis for axis, is_along in zip(shape, along, strict=True) if is_along)


def collectives(text: str) -> list[Collective]:
    """Return the collectives of a compiled program with more than one participating device, in text order.

    Args:
        text: The result of `as_text()` of a compiled function, for CPU, GPU or TPU.

    Raises:
        ValueError: the text is not a compiled program, or lists device groups in an unknown format.
    """
    computations, entry = parse_program(text)
    num_devices = math.prod(int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", text.split("\n")[0]))
    runs: dict[str, tuple[float, int]] = {}

    def run(name: str, times: float, loops: int) -> None:
        before = runs.get(name, (0, loops))
        runs[name] = before[0] + times, min(before[1], loops)
        for line in computations[name].values():
            turns = loop_turns(line, computations, name)
            for callee in called_computations(line):
                run(callee, times * (turns or 1), loops + (turns is not None))

    run(entry, 1, 0)
    found: dict[str, Collective] = {}
    for name in (name for name in computations if name in runs):
        for instruction, line in computations[name].items():
            kind, shapes = _kind_and_shapes(line, computations[name][""])
            groups = _groups(line, num_devices) if kind else ()
            groups = tuple(group for group in groups if len(set(group)) > 1)
            if not groups:
                continue
            times, loops = runs[name]
            source = re.search(r'op_name="([^"]*)"', line)
            collective = Collective(
                kind,
                tuple(f"{dtype}[{sizes}]" for dtype, sizes in shapes),
                sum(array_bytes(*shape) for shape in shapes),
                groups,
                None if math.isnan(times) else round(times),
                loops,
                source[1] if source else "",
            )
            # A TPU may split a collective to overlap it with other work. The pieces share a channel, and the piece
            # executed least often starts it.
            piece = re.search(r"channel_id=\d+(?=.*chain_id=)", line)
            key = piece[0] if piece else instruction
            if key not in found or (collective.times or math.inf) < (found[key].times or math.inf):
                found[key] = collective
    return list(found.values())


def _kind_and_shapes(line: str, header: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the kind of collective of an instruction, "" for none, and the dtypes and sizes of its results."""
    if transfer := re.search(rf" = \((\S+), .*? recv\(.*{_TRANSFER}", line):
        return transfer[4].lower().replace("_", "-"), arrays(transfer[1])
    operation = re.search(rf" = (.*?[)\]}}]) ({'|'.join(KINDS)})(-start)?\(", line)
    if operation is None:
        return "", []
    result, kind, starts = operation.groups()
    if header.startswith("%all-reduce-scatter"):
        return "reduce-scatter", arrays(header.split("->")[-1])
    shapes = arrays(result)
    if starts and kind != "all-reduce":  # operands are listed before results
        shapes = [shape for shape in shapes if shape != ("u32", "")]
        shapes = shapes[len(shapes) // 2 :]
    return kind, shapes


def _groups(line: str, num_devices: int) -> tuple[tuple[int, ...], ...]:
    """Parse the device groups of a collective, in any of XLA's formats."""
    if transfer := re.search(_TRANSFER, line):  # slices from 1, chips of a slice from 0; each chip with its likes
        slices, chips = (_ranges(transfer[n]) for n in (1, 2))
        return tuple(tuple(chip + (n - 1) * num_devices for n in slices) for chip in chips)
    iota = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]+\},?)*)\}", line):
        groups = tuple(tuple(_numbers(group)) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
        return groups or (tuple(range(num_devices)),)
    if counted := re.search(rf"replica_groups=\[([\d,]+)\]<={iota}", line):
        ids = _iota(counted[2], counted[3]).reshape(_numbers(counted[1]))
        return tuple(map(tuple, ids.tolist()))
    if meshed := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}", line):
        axes = {axis: int(size) for axis, size in re.findall(r"([^,]+)=(\d+)", meshed[1])}
        order = re.fullmatch(iota, meshed[2]) if meshed[2] else None
        if order:
            ids = _iota(order[1], order[2])
        else:
            ids = np.array(_numbers(meshed[2])) if meshed[2] else np.arange(math.prod(axes.values()))
        along = meshed[3].split(",")
        if set(along) <= set(axes):
            ids = ids.reshape(tuple(axes.values()))
            last = [list(axes).index(axis) for axis in along]
            ids = np.moveaxis(ids, last, range(-len(last), 0)).reshape(-1, math.prod(axes[axis] for axis in along))
            return tuple(map(tuple, ids.tolist()))
    raise ValueError(f"unknown way of naming devices: {line.strip()[:300]}")


def _ranges(text: str) -> list[int]:
    """Parse numbers and ranges, both ends included, such as 0:3,8."""
    ends = [[int(end) for end in part.split(":")] for part in text.split(",")]
    return [number for first, *last in ends for number in range(first, (last or [first])[0] + 1)]


def _iota(shape: str, order: str | None) -> np.ndarray:
    """The numbers 0, 1, 2, ... in an array of this shape, with its axes transposed to this order."""
    ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
