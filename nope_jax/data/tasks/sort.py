"""Sort symbols by their order in the alphabet, or integers.

Sort the following list [ M, E, F ]. The sorted list is [ E, F, M ].
Sort the following list [ 1 2, 9 0 7, 1 1 ]. The sorted list is [ 1 1, 1 2, 9 0 7 ].
"""

import random
from collections.abc import Sequence

from nope_jax.data.tasks.copy import symbols
from nope_jax.data.tasks.digits import DIGITS, spaced
from nope_jax.data.tasks.scratchpad import Step
from nope_jax.data.tasks.task import Task

COMPUTATION = "The minimum of the unsorted portion"
SENTENCES = (
    "Sort the following list [ 1, 2 ]. The sorted list is [ 1, 2 ]. Thinking step by step:  in comp The minimum of the "
    "unsorted portion out re [  ]  # . Thus,  The"
)


class Sort(Task):
    """Sorting of 50 symbols in the order of `symbols`: digits, then letters. The length is that of the list.

    Steps are those of selection sort, without variables: each swaps the first element of the rest with its minimum.
    """

    name = "sort"
    train_lengths = range(1, 9)
    test_lengths = range(9, 17)
    items: Sequence[str] = tuple(symbols(50))
    """What is sorted, in order."""
    vocabulary = f"{SENTENCES} {' '.join(items)}"

    def draw(self, rng: random.Random, length: int) -> list[int]:
        return rng.choices(range(len(self.items)), k=length)

    def write(self, instance: list[int]) -> tuple[str, str]:
        return (
            f"Sort the following list [ {self._listed(instance)} ]. ",
            f"The sorted list is [ {self._listed(sorted(instance))} ].",
        )

    def steps(self, instance: list[int]) -> tuple[Step, ...]:
        steps, rest = [], list(instance)
        while rest:
            first, least = rest[0], min(rest)
            rest[rest.index(least)] = first
            rest = rest[1:]
            steps.append(Step(self.items[first], COMPUTATION, self.items[least], None, f"[ {self._listed(rest)} ]"))
        return tuple(steps)

    def _listed(self, items: list[int]) -> str:
        return ", ".join([self.items[i] for i in items])


class SortIntegers(Sort):
    """Sorting of integers from 10 to 9,999."""

    name = "sort_integers"
    items = tuple(spaced(number) for number in range(10_000))
    vocabulary = f"{SENTENCES} {DIGITS}"

    def draw(self, rng: random.Random, length: int) -> list[int]:
        return rng.choices(range(10, len(self.items)), k=length)
