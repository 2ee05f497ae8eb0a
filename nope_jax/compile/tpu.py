"""Slices of TPUs that are not here: their chips, which can be compiled for, and the time that they take for a program.

The TPU compiler (package libtpu, in the extra "tpu") needs no TPU. Nothing runs, so that times are estimates:

- computing: the cycles that the compiler expects each operation to take, memory traffic included, as often as loops
  turn, at the chip's clock. Operations that it says nothing of (scalars, some copies) count as none.
- communicating: the bytes of each collective over the bandwidth of the links that its chips have along the dimensions
  of the slice that they span. No latency.
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
"""The slices of each generation, in chips along each dimension (cloud.google.com/tpu/docs, read in 2026)."""

FLOPS_PER_CYCLE = {"v4": 2**18, "v5e": 2**17, "v5p": 2**18, "v6e": 2**19}
"""What a chip's units for bfloat16 products do in a cycle. With the published peak this is its clock: 1.05, 1.50, 1.75
and 1.75 GHz. By the compiler's cycles, a product of two 8192 x 8192 matrices takes 70 % (v6e) to 93 % of it."""

UNKNOWN_CYCLES = 2**63 - 1
"""What is written where the compiler has no estimate; or more, -1 as an unsigned number."""


def slice_devices(name: str) -> list[jax.Device]:
    """The chips of a slice, named as v5e:16x16. They can be compiled for, and nothing else.

    Raises:
        ValueError: there is no such slice, or libtpu is not installed.
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
    # Without these the compiler looks for TPUs in the network, says so, and keeps others from loading it meanwhile.
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    for variable, value in {**quiet, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")  # what is here is not needed: it may be busy, and takes time to start
    jax.config.update("jax_enable_compilation_cache", False)  # what is compiled for absent chips cannot be read back
    options: dict[str, Any] = {"wrap": (*_wraps(name), False, False)[:3]}
    if shape == "1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)  # older compilers take every host to have four
    if generation in ("v4", "v5p"):
        options["chip_config_name"] = "megacore"  # both cores of a chip are one device
    return topologies.get_topology_desc(name, platform="tpu", **options).devices


def _wraps(name: str) -> tuple[bool, ...]:
    """Whether each dimension of a slice is a ring: of whole cubes all are, of flat slices those of 16 chips."""
    sizes = [int(size) for size in name.partition(":")[2].split("x")]
    if len(sizes) == 3:
        return (all(size % 4 == 0 for size in sizes),) * 3
    return tuple(size == 16 for size in sizes)


def chip_of_slice(name: str) -> Chip:
    """What is published of each chip of a slice."""
    return CHIPS[_generation(name)]


def computing(text: str, name: str, length: int) -> float:
    """Seconds of each chip of a slice for a compiled program.

    Args:
        text: the compiled program.
        name: of the slice.
        length: of the part of a sequence that a chip has, in tokens.
    """
    return cycles(text, -(-length // BLOCK_SIZE)) * FLOPS_PER_CYCLE[_generation(name)] / chip_of_slice(name).flops


def communicating(found: Sequence[Collective], mesh: Mesh, name: str) -> float:
    """Seconds of each chip of a slice for collectives, one after the other."""
    bandwidth = chip_of_slice(name).interconnect_bandwidth
    return sum(
        collective.sent * (collective.times or 1) / (bandwidth * share)
        for collective, share in zip(found, link_shares(found, mesh, name), strict=True)
    )


def link_shares(found: Sequence[Collective], mesh: Mesh, slice_name: str) -> list[float]:
    """Which share of its links each chip can send a collective over, at best."""
    wraps, chips = _wraps(slice_name), mesh.devices.reshape(-1)
    permutes = {c.groups: c.mesh_axes(mesh.shape) for c in found if c.kind == "collective-permute"}

    def links(collective: Collective) -> int:
        if collective.kind == "collective-permute":  # to one neighbour, beside one that goes the other way if there is
            return min(2, list(permutes.values()).count(permutes[collective.groups]))
        where = np.array([chips[index].coords for index in max(collective.groups, key=len)])
        # A ring sends both ways; on a line the chips at its ends must receive everything over one link.
        return sum(2 if wraps[axis] else 1 for axis in range(len(wraps)) if len(set(where[:, axis])) > 1)

    return [max(1, links(collective)) / (2 * len(wraps)) for collective in found]


def cycles(text: str, blocks: int) -> float:
    """The cycles that the TPU compiler expects a program to take.

    Args:
        text: the compiled program.
        blocks: blocks of keys in a sequence. The loop over the blocks of a diagonal, within the one over diagonals, is
            the only loop whose turns the text does not tell; they are taken to be those of the average diagonal.
    """
    computations, entry = parse_program(text)

    def within(name: str, around: float) -> float:
        total = 0.0
        for line in computations[name].values():
            expected = re.search(r'"estimated_cycles":"(\d+)"', line)
            total += int(expected[1]) if expected and int(expected[1]) < UNKNOWN_CYCLES else 0
            if " fusion(" in line:
                continue  # what it consists of is in its cycles
            turns = loop_turns(line, computations, name)
            if turns is not None and math.isnan(turns):
                turns = _blocks_of_a_diagonal(around, blocks)
            for callee in called_computations(line):
                total += (turns or 1) * within(callee, turns or around)
        return total

    return within(entry, 1)


def _blocks_of_a_diagonal(diagonals: float, blocks: int) -> float:
    """On average over so many diagonals, how many blocks of each are computed."""
    if diagonals >= blocks:  # all of them are visited, also those above the mask, whose blocks are skipped
        return blocks * (blocks + 1) / 2 / diagonals
    return blocks - (diagonals + 1) / 2  # the first below the main diagonal have one block less each


def _generation(name: str) -> str:
    return name.partition(":")[0]
