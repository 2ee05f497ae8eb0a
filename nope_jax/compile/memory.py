"""What a compiled program needs of the memory of each chip, and what the compiler says where that is too much."""

import math
import re
from typing import Any, NamedTuple

import jax

from nope_jax.training.state import TrainState

GIB = 2**30


class Memory(NamedTuple):
    """What a program needs of each chip, in bytes."""

    parameters: int
    optimizer: int
    temporaries: int
    """Activations, gradients and whatever else lives within a step."""
    other: int
    """The batch, and the program itself."""

    @property
    def total(self) -> int:
        return sum(self)


class DoesNotFitError(ValueError):
    """A program needs more memory than a chip has.

    Args:
        message: in one line, which program and how much.
        needed: bytes in all; None where the compiler does not say.
        available: bytes that a chip has.
        kept: bytes of parameters and optimizer in what is needed.
    """

    def __init__(self, message: str, needed: float | None = None, available: float = 0, kept: float = 0):
        super().__init__(message)
        self.needed, self.available, self.kept = needed, available, kept


def kept_memory(abstract: TrainState) -> Memory:
    """What the state of a run takes of each chip, between steps too."""
    parameters, state = _bytes(abstract.params), _bytes(abstract)
    return Memory(parameters, state - parameters, 0, 0)


def compiled(what: str, lowered: jax.stages.Lowered, kept: Memory, slice_name: str) -> jax.stages.Compiled:
    """Compiles a program.

    Raises:
        DoesNotFitError: it needs more memory than a chip has; in one line how much.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise _shortage(f"{what} does not fit a chip of {slice_name}", str(error), kept) from error


def _shortage(what: str, message: str, kept: Memory) -> DoesNotFitError:
    """What the compiler says of the memory that it lacks, in numbers."""
    state = f"parameters {gib(kept.parameters)} GiB, optimizer {gib(kept.optimizer)} GiB"
    numbers = re.findall(r"\b(\d+(?:\.\d+)?)([KMGT])i?B?\b", message)[:2]
    if len(numbers) < 2:
        return DoesNotFitError(f"{what}: {message.splitlines()[0]} ({state})")
    needed, available = (float(number) * 1024 ** (1 + "KMGT".index(unit)) for number, unit in numbers)
    needs, has = (f"{number} {unit}iB" for number, unit in numbers)
    rest = "the rest for activations and gradients"
    return DoesNotFitError(
        f"{what}: it needs {needs} of the {has} there are ({state}, {rest})", needed, available, kept.total
    )


def memory_of(program: jax.stages.Compiled, kept: Memory) -> Memory:
    """What a program takes, of which its state is known."""
    stats = program.memory_analysis()
    assert stats is not None
    given = stats.argument_size_in_bytes
    # Not the size of all temporaries: some take the place of what was given, when that has been read.
    temporaries = stats.peak_memory_in_bytes - given
    return kept._replace(temporaries=temporaries, other=given - kept.total + stats.generated_code_size_in_bytes)


def gib(size: int) -> str:
    """Bytes in GiB, as it is shown."""
    return f"{size / GIB:.2f}" if size >= GIB / 10 else f"{size / GIB:.2g}"


def _bytes(tree: Any) -> int:
    """Of a tree of abstract arrays, those that each chip holds."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
