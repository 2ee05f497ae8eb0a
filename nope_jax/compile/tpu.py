"""TPU slices as compilation targets without TPUs: their chips, and time estimates of compiled programs.

The TPU compiler (package libtpu, in the extra "tpu") needs no TPU. Nothing is executed, so times are estimates:

- computing: the compiler's cycle estimate of each operation, including memory traffic, times the trip counts of the
  loops around it, at the chip's clock. Operations without an estimate (scalars, some copies) count as zero. The
  compiler has none for Pallas kernels; they say their FLOPs and bytes, and take the longer of the two, the FLOPs at
  `KERNEL_EFFICIENCY`.
- communicating: the bytes of each collective divided by the bandwidth of the links of its chips along the slice
  dimensions that its groups span. Latency is ignored.
"""

import dataclasses
import importlib.util
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
from nope_jax.compile.machine import KERNEL_EFFICIENCY, Computing, Machine
from nope_jax.compile.program import executed, multiplies, parse_program
from nope_jax.training.flops import CHIPS

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

UNKNOWN_CYCLES = 2**63 - 1
"""The compiler writes this value, or a larger one (-1 as an unsigned number), if it has no estimate."""


@dataclasses.dataclass(frozen=True)
class Tpus(Machine):
    """One or more equal slices of a generation of TPUs."""

    generation: str

    slices = "slices"
    network = "data-center network"
    compiler = "libtpu"
    computed_from = "the cycles that the compiler expects"

    def _devices(self) -> list[jax.Device]:
        if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
            raise ValueError(
                f"--compile_for {self.name} needs the TPU compiler, which is not installed: pip install '.[tpu]'"
            )
        # Without these, the compiler searches the network for TPUs, logs it, and keeps other processes from loading it.
        quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
        for variable, value in {**quiet, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
            os.environ.setdefault(variable, value)
        options: dict[str, Any] = {"wrap": (*self.wraps, False, False)[:3]}
        if self.num_slices > 1:
            options["num_slices"] = self.num_slices
        if math.prod(self.slice_shape) == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)  # older compilers assume four chips per host
        if self.generation in ("v4", "v5p"):
            options["chip_config_name"] = "megacore"  # the two cores of a chip form one device
        name = f"{self.generation}:{'x'.join(map(str, self.slice_shape))}"
        return topologies.get_topology_desc(name, platform="tpu", **options).devices

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Whether each dimension of a slice is a ring: all in slices of whole cubes, those of 16 in flat slices."""
        if len(self.slice_shape) == 3:
            return (all(size % 4 == 0 for size in self.slice_shape),) * 3
        return tuple(size == 16 for size in self.slice_shape)

    def computing(self, text: str, length: int) -> Computing:
        found = cycles(text, -(-length // BLOCK_SIZE), self.generation)
        return Computing(*(each / _clock(self.generation) for each in found))

    def link_shares(self, found: Sequence[Collective], mesh: Mesh) -> list[float]:
        chips = mesh.devices.reshape(-1)
        permutes = {c.groups: c.mesh_axes(mesh.shape) for c in found if c.kind == "collective-permute"}

        def links(collective: Collective) -> int:
            if collective.kind == "collective-permute":  # one link, or two with an opposite permute
                return min(2, list(permutes.values()).count(permutes[collective.groups]))
            where = np.array([chips[index].coords for index in max(collective.groups, key=len)])
            # A ring sends in both directions; on a line, the chips at the ends must receive everything over one link.
            return sum(2 if wraps else 1 for axis, wraps in enumerate(self.wraps) if len(set(where[:, axis])) > 1)

        return [max(1, links(collective)) / (2 * len(self.wraps)) for collective in found]


def find_tpus(name: str) -> Tpus | None:
    """Return the machine of a name: v5e:16x16 is a slice, 2xv5e:16x16 two of them. None: there is no such machine."""
    parts = re.fullmatch(r"(?:([1-9]\d*)x)?(\w+):(\w+)", name)
    if parts is None or parts[3] not in SLICES.get(parts[2], ()):
        return None
    chip, num_slices = CHIPS[parts[2]], int(parts[1] or 1)
    if num_slices > 1 and chip.network_bandwidth is None:
        return None
    return Tpus(name, chip, num_slices, tuple(map(int, parts[3].split("x"))), generation=parts[2])


def cycles(text: str, blocks: int, generation: str) -> Computing:
    """The TPU compiler's estimate of the cycles of a program, and ours of its kernels, instead of seconds.

    Args:
        text: The compiled program.
        blocks: Number of key blocks in a sequence.
        generation: Generation of the TPU.
    """
    computations, entry = parse_program(text)
    products = kernels = other = 0.0
    for _, line, times in executed(computations, entry, blocks):
        kernels += times * kernel_cycles(line, generation)
        expected = re.search(r'"estimated_cycles":"(\d+)"', line)
        if expected and int(expected[1]) < UNKNOWN_CYCLES:
            if multiplies(line, computations):
                products += times * int(expected[1])
            else:
                other += times * int(expected[1])
    return Computing(products, kernels, other)


def kernel_cycles(line: str, generation: str) -> float:
    """The cycles of a Pallas kernel, from the cost that it states; 0 for any other instruction."""
    cost = re.search(r'"cost_estimate":\{"flops":"(\d+)","transcendentals":"\d+","bytes_accessed":"(\d+)"', line)
    if cost is None:
        return 0
    flops, moved = map(int, cost.groups())
    computing = flops / (KERNEL_EFFICIENCY * FLOPS_PER_CYCLE[generation])
    return max(computing, moved / CHIPS[generation].memory_bandwidth * _clock(generation))


def _clock(generation: str) -> float:
    """Cycles per second."""
    return CHIPS[generation].flops / FLOPS_PER_CYCLE[generation]


def names() -> list[str]:
    """The names of all slices."""
    return [f"{generation}:{shape}" for generation, shapes in SLICES.items() for shape in shapes]
