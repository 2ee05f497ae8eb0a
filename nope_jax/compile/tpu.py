"""TPU slices as compilation targets without TPUs: their chips, and time estimates of compiled programs.

The TPU compiler (package libtpu, in the extra "tpu") needs no TPU. Nothing is executed, so times are estimates:

- computing: the compiler's cycle estimate of each operation, including memory traffic, times the trip counts of the
  loops around it, at the chip's clock. Operations without an estimate (scalars, some copies) count as zero. The
  compiler has none for Pallas kernels; they say their FLOPs and bytes, and take the longer of the two, the FLOPs at
  `KERNEL_EFFICIENCY`.
- communicating: the bytes of each collective divided by the bandwidth of the links of its chips along the slice
  dimensions that its groups span. Latency is ignored.
"""

import difflib
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from nope_jax.attention.blocks import BLOCK_SIZE
from nope_jax.compile.collectives import Collective
from nope_jax.compile.program import called_computations, loop_turns, parse_program
from nope_jax.training.flops import CHIPS, Chip

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
SLICES = {
    "v4": (*_CUBES, "8x8x12", "8x8x16", "8x16x16"),
    "v5e": _FLAT,
    "v5p": (*_CUBES, "8x8x16", "8x16x16", "16x16x16", "16x16x24"),
    "v6e": _FLAT,
}
"""Slices of each generation, in chips per dimension (cloud.google.com/tpu/docs, read in 2026)."""

FLOPS_PER_CYCLE = {"v4": 2**18, "v5e": 2**17, "v5p": 2**18, "v6e": 2**19}
"""Bfloat16 matrix FLOPs per chip and cycle. The published peak divided by these gives the clock: 1.05, 1.50, 1.75 and
1.75 GHz. By the compiler's cycles, a product of two 8192 x 8192 matrices reaches 70 % (v6e) to 93 % of the peak."""

KERNEL_EFFICIENCY = 0.5
"""Fraction of the peak at which the products of a Pallas kernel are assumed to run. It has not been measured."""

UNKNOWN_CYCLES = 2**63 - 1
"""The compiler writes this value, or a larger one (-1 as an unsigned number), if it has no estimate."""


def slice_devices(name: str) -> list[jax.Device]:
    """Return the chips of a slice, given a name such as v5e:16x16. They are valid only as compilation targets.

    Raises:
        ValueError: the slice does not exist, or libtpu is not installed.
    """
    generation, _, shape = name.partition(":")
    if shape not in SLICES.get(generation, ()):
        known = {kind: [f"{kind}:{shape}" for shape in shapes] for kind, shapes in SLICES.items()}
        nearest = known.get(generation) or difflib.get_close_matches(
            name, itertools.chain(*known.values()), n=6, cutoff=0
        )
        raise ValueError(f"--compile_for must be a slice of TPUs, not {name!r}: such as {', '.join(nearest)}")
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise ValueError("--compile_for needs the TPU compiler, which is not installed: pip install '.[tpu]'")
    # Without these, the compiler searches the network for TPUs, logs it, and blocks other processes from loading it.
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    for variable, value in {**quiet, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")  # local accelerators are not needed, may be busy and start slowly
    jax.config.update("jax_enable_compilation_cache", False)  # programs for absent chips cannot be read back
    options: dict[str, Any] = {"wrap": (*_wraps(name), False, False)[:3]}
    if shape == "1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)  # older compilers assume four chips per host
    if generation in ("v4", "v5p"):
        options["chip_config_name"] = "megacore"  # the two cores of a chip form one device
    return topologies.get_topology_desc(name, platform="tpu", **options).devices


def _wraps(name: str) -> tuple[bool, ...]:
    """Whether each dimension of a slice is a ring: all in slices of whole cubes, those of 16 chips in flat slices."""
    sizes = [int(size) for size in name.partition(":")[2].split("x")]
    if len(sizes) == 3:
        return (all(size % 4 == 0 for size in sizes),) * 3
    return tuple(size == 16 for size in sizes)


def chip_of_slice(name: str) -> Chip:
    """The published specifications of the chips of a slice."""
    return CHIPS[_generation(name)]


def computing(text: str, name: str, length: int) -> float:
    """Estimate the computation time of a compiled program on each chip of a slice, in seconds.

    Args:
        text: The compiled program.
        name: Name of the slice.
        length: Length of a chip's part of a sequence, in tokens.
    """
    generation = _generation(name)
    return cycles(text, -(-length // BLOCK_SIZE), generation) / _clock(generation)


def communicating(found: Sequence[Collective], mesh: Mesh, name: str) -> float:
    """Estimate the time of collectives on each chip of a slice, executed one after the other, in seconds."""
    bandwidth = chip_of_slice(name).interconnect_bandwidth
    return sum(
        collective.sent * (collective.times or 1) / (bandwidth * share)
        for collective, share in zip(found, link_shares(found, mesh, name), strict=True)
    )


def link_shares(found: Sequence[Collective], mesh: Mesh, slice_name: str) -> list[float]:
    """The maximum fraction of its links over which a chip can send each collective."""
    wraps, chips = _wraps(slice_name), mesh.devices.reshape(-1)
    permutes = {c.groups: c.mesh_axes(mesh.shape) for c in found if c.kind == "collective-permute"}

    def links(collective: Collective) -> int:
        if collective.kind == "collective-permute":  # one link, or two with an opposite permute
            return min(2, list(permutes.values()).count(permutes[collective.groups]))
        where = np.array([chips[index].coords for index in max(collective.groups, key=len)])
        # A ring sends in both directions; on a line, the chips at the ends must receive everything over one link.
        return sum(2 if wraps[axis] else 1 for axis in range(len(wraps)) if len(set(where[:, axis])) > 1)

    return [max(1, links(collective)) / (2 * len(wraps)) for collective in found]


def cycles(text: str, blocks: int, generation: str) -> float:
    """The TPU compiler's estimate of the cycles of a program, and ours of its kernels.

    Args:
        text: The compiled program.
        blocks: Number of key blocks in a sequence. The loop over the blocks of a diagonal, inside the loop over
            diagonals, is the only one whose trip count is not in the text; that of the average diagonal is used.
        generation: Generation of the TPU.
    """
    computations, entry = parse_program(text)

    def within(name: str, around: float) -> float:
        total = 0.0
        for line in computations[name].values():
            expected = re.search(r'"estimated_cycles":"(\d+)"', line)
            total += int(expected[1]) if expected and int(expected[1]) < UNKNOWN_CYCLES else 0
            total += kernel_cycles(line, generation)
            if " fusion(" in line:
                continue  # its cycles include those of its computation
            turns = loop_turns(line, computations, name)
            if turns is not None and math.isnan(turns):
                turns = _blocks_of_a_diagonal(around, blocks)
            for callee in called_computations(line):
                total += (turns or 1) * within(callee, turns or around)
        return total

    return within(entry, 1)


def kernel_cycles(line: str, generation: str) -> float:
    """The cycles of a Pallas kernel, from the cost that it states; 0 for any other instruction."""
    cost = re.search(r'"cost_estimate":\{"flops":"(\d+)","transcendentals":"\d+","bytes_accessed":"(\d+)"', line)
    if cost is None:
        return 0
    flops, moved = map(int, cost.groups())
    computing = flops / (KERNEL_EFFICIENCY * FLOPS_PER_CYCLE[generation])
    return max(computing, moved / CHIPS[generation].memory_bandwidth * _clock(generation))


def _blocks_of_a_diagonal(diagonals: float, blocks: int) -> float:
    """The average number of computed blocks per diagonal."""
    if diagonals >= blocks:  # all diagonals are visited, including fully masked ones, whose blocks are skipped
        return blocks * (blocks + 1) / 2 / diagonals
    return blocks - (diagonals + 1) / 2  # below the main diagonal, each has one block less than the one before


def _clock(generation: str) -> float:
    """Cycles per second."""
    return CHIPS[generation].flops / FLOPS_PER_CYCLE[generation]


def _generation(name: str) -> str:
    return name.partition(":")[0]
