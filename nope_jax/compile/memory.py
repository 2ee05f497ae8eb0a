"""The memory that a compiled program needs on each chip, and the error if it does not fit."""

import math
import re
from typing import Any, NamedTuple

import jax

from nope_jax.compile.machine import Machine
from nope_jax.training.state import TrainState

GIB = 2**30


class Memory(NamedTuple):
    """The memory that a program needs on each chip, in bytes."""

    parameters: int
    optimizer: int
    temporaries: int
    """Activations, gradients and everything else that is live only within a step."""
    other: int
    """The batch, and the program itself."""

    @property
    def total(self) -> int:
        return sum(self)


class DoesNotFitError(ValueError):
    """A program needs more memory than a chip has.

    Args:
        message: One line that names the program and its memory.
        needed: Total bytes needed; None if the compiler does not report them.
        available: Bytes of memory of a chip.
        kept: The part of `needed` that holds parameters and optimizer state.
    """

    def __init__(self, message: str, needed: float | None = None, available: float = 0, kept: float = 0):
        super().__init__(message)
        self.needed, self.available, self.kept = needed, available, kept


def kept_memory(abstract: TrainState) -> Memory:
    """The memory of a run's training state on each chip, which stays allocated between steps."""
    parameters, state = _bytes(abstract.params), _bytes(abstract)
    return Memory(parameters, state - parameters, 0, 0)


def compiled(
    what: str, lowered: jax.stages.Lowered, kept: Memory, machine: Machine
) -> tuple[jax.stages.Compiled, Memory]:
    """Compile a program for a machine, given the memory of its training state; return it and all its memory.

    Raises:
        DoesNotFitError: the program needs more memory than a chip has; the message is one line and states how much.
    """
    what = f"{what} does not fit a chip of {machine.name}"
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise _refused(what, str(error), kept) from error
    memory = memory_of(program, kept)
    if memory.total > machine.memory:
        raise _shortage(what, memory.total, machine.memory, kept)
    return program, memory


def _refused(what: str, message: str, kept: Memory) -> DoesNotFitError:
    """Build the error from the numbers in the compiler's out-of-memory message."""
    numbers = re.findall(r"\b(\d+(?:\.\d+)?)([KMGT])i?B?\b", message)[:2]
    if len(numbers) < 2:
        return DoesNotFitError(f"{what}: {message.splitlines()[0]} ({_of_state(kept)})")
    needed, available = (float(number) * 1024 ** (1 + "KMGT".index(unit)) for number, unit in numbers)
    return _shortage(what, needed, available, kept)


def _shortage(what: str, needed: float, available: float, kept: Memory) -> DoesNotFitError:
    return DoesNotFitError(
        f"{what}: it needs {gib(needed)} GiB of the {gib(available)} GiB there are ({_of_state(kept)}, "
        "the rest for activations and gradients)",
        needed,
        available,
        kept.total,
    )


def _of_state(kept: Memory) -> str:
    return f"parameters {gib(kept.parameters)} GiB, optimizer {gib(kept.optimizer)} GiB"


def memory_of(program: jax.stages.Compiled, kept: Memory) -> Memory:
    """The memory of a compiled program, given that of its training state."""
    stats = program.memory_analysis()
    assert stats is not None
    given = stats.argument_size_in_bytes
    # Not the total size of temporaries: some reuse the memory of arguments that are no longer needed.
    temporaries = stats.peak_memory_in_bytes - given
    return kept._replace(temporaries=temporaries, other=given - kept.total + stats.generated_code_size_in_bytes)


def gib(size: float) -> str:
    """Format bytes in GiB."""
    return f"{size / GIB:.2f}" if size >= GIB / 10 else f"{size / GIB:.2g}"


def _bytes(tree: Any) -> int:
    """Bytes that each chip holds of a tree of abstract arrays."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
