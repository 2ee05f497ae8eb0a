"""A machine to compile for: chips with fast links among those of a slice, and a slower network between slices.

A slice is a TPU slice, or the GPUs of one host. `tpu.py` and `gpu.py` each describe their machines; what they share is
here: the time of the collectives of a compiled program.
"""

import abc
import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from nope_jax.compile.collectives import Collective
from nope_jax.compiler_flags import set_flags
from nope_jax.training.flops import Chip

KERNEL_EFFICIENCY = 0.5
"""Fraction of the peak at which the products of a Pallas kernel are assumed to run. It has not been measured."""


class Computing(NamedTuple):
    """What the computation of a program takes on each chip, in seconds, by operation."""

    products: float
    """Matrix products, with what is fused into them."""
    kernels: float
    """Attention in a Pallas kernel or in cuDNN."""
    other: float
    """Everything else: norms, activations, copies, the optimizer. Nearly all of it waits for memory."""

    @property
    def total(self) -> float:
        return sum(self)


class Traffic(NamedTuple):
    """The collectives of one kind along the same mesh axes, as seen by each chip during a run of the program."""

    kind: str
    axes: tuple[str, ...]
    between_slices: bool
    times: int
    sent: int
    """Bytes."""
    seconds: float
    """Their estimated time, one after the other."""


@dataclasses.dataclass(frozen=True)
class Machine(abc.ABC):
    """One or more equal slices of chips."""

    name: str
    chip: Chip
    num_slices: int
    slice_shape: tuple[int, ...]
    """Chips per dimension of a slice."""

    slices: ClassVar[str]
    """What its slices are called."""
    network: ClassVar[str]
    """What connects them."""
    compiler: ClassVar[str]
    """The package that compiles for it."""
    computed_from: ClassVar[str]
    """What the time of computation is estimated from."""

    @abc.abstractmethod
    def _devices(self) -> list[jax.Device]:
        """The chips as devices of JAX. Raises a ValueError if their compiler is not installed."""

    @abc.abstractmethod
    def computing(self, text: str, length: int) -> Computing:
        """Estimate the computation time of a compiled program on each chip.

        Args:
            text: The compiled program.
            length: Length of a chip's part of a sequence, in tokens.
        """

    @abc.abstractmethod
    def link_shares(self, found: Sequence[Collective], mesh: Mesh) -> list[float]:
        """The maximum fraction of its links over which a chip can send each collective."""

    @property
    def num_chips(self) -> int:
        return self.num_slices * math.prod(self.slice_shape)

    @property
    def memory(self) -> float:
        """Bytes of a chip that a program can have."""
        return self.chip.memory

    def devices(self) -> list[jax.Device]:
        """Return the chips. They are valid only as compilation targets.

        Raises:
            ValueError: the compiler is not installed.
        """
        jax.config.update("jax_platforms", "cpu")  # local accelerators are not needed, may be busy and start slowly
        jax.config.update("jax_enable_compilation_cache", False)  # programs for absent chips cannot be read back
        set_flags()
        return self._devices()

    def traffic(self, found: Sequence[Collective], mesh: Mesh) -> list[Traffic]:
        """Estimate the time of the collectives of a program, each executed after the other, by kind and mesh axes.

        Within a slice a chip sends over the links that its group can use. Between slices the chips of a group share
        what crosses, each over its own part of the network, while the rest goes over the links. Latency is ignored.
        """
        slice_of = np.array([getattr(device, "slice_index", 0) for device in mesh.devices.flat])
        found_by: dict[tuple[str, tuple[str, ...], bool], Traffic] = {}
        for collective, share in zip(found, self.link_shares(found, mesh), strict=True):
            slices = slice_of[list(max(collective.groups, key=lambda group: len(set(slice_of[list(group)]))))]
            crosses = len(set(slices)) > 1
            bandwidth = [self.chip.interconnect_bandwidth * share]
            if crosses:
                assert self.chip.network_bandwidth is not None
                bandwidth.append(self.chip.network_bandwidth * min(Counter(slices).values()))
            key = collective.kind, collective.mesh_axes(mesh.shape), crosses
            count = collective.times or 1  # in loops of unknown trip count they count once; attention has none
            sent = collective.sent * count
            before = found_by.get(key, Traffic(*key, times=0, sent=0, seconds=0.0))
            found_by[key] = before._replace(
                times=before.times + count, sent=before.sent + sent, seconds=before.seconds + sent / min(bandwidth)
            )
        return list(found_by.values())
