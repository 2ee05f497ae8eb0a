"""Follow a chain of assignments (Zhang et al. 2022, arXiv 2206.04301).

If t = - q, q = -1. Then, what is the value of t? The answer is +1.
"""

import itertools
import random
from string import ascii_lowercase
from typing import NamedTuple

from nope_jax.data.tasks.scratchpad import Step
from nope_jax.data.tasks.task import Task

VALUES = {True: "+1", False: "-1"}


class Chain(NamedTuple):
    """Variables and their values, in the order in which they follow from each other."""

    names: list[str]
    values: list[bool]
    order: list[int]
    """The clauses as they are written."""
    query: int

    def signs(self) -> list[str]:
        """The sign with which each variable but the first follows from the one before."""
        return ["+" if now == before else "-" for before, now in itertools.pairwise(self.values)]

    def clauses(self) -> list[str]:
        """The assignment to each variable."""
        following = zip(self.names[1:], self.signs(), self.names, strict=False)
        return [f"{self.names[0]} = {VALUES[self.values[0]]}"] + [
            f"{name} = {s} {before}" for name, s, before in following
        ]


class Lego(Task):
    """LEGO; the length is the number of clauses, which are in random order, as in the original task.

    The variable asked for is in the second half of the chain. Steps have no variables part.
    """

    name = "lego"
    train_lengths = range(2, 9)
    test_lengths = range(9, 17)
    lengths = range(2, 27)
    vocabulary = (
        f"If {' '.join(ascii_lowercase)} = + -1, + +1. Then, what is the value of t? The answer is +1. -1. "
        f"{'? '.join(ascii_lowercase)}. {', '.join(ascii_lowercase)}, Thinking step by step:  "
        "in a comp - b = + +1 out -1 re a = - b  # comp  out re  # . Thus,  The"
    )

    def draw(self, rng: random.Random, length: int) -> Chain:
        names = [ascii_lowercase[i] for i in _shuffled(rng, 26)[:length]]
        order = _shuffled(rng, length)
        return Chain(names, rng.choices((False, True), k=length), order, rng.randrange((length + 1) // 2, length))

    def write(self, instance: Chain) -> tuple[str, str]:
        clauses = instance.clauses()
        written = ", ".join([clauses[i] for i in instance.order])
        query = instance.names[instance.query]
        return (
            f"If {written}. Then, what is the value of {query}? ",
            f"The answer is {VALUES[instance.values[instance.query]]}.",
        )

    def steps(self, instance: Chain) -> tuple[Step, ...]:
        names, clauses, signs = instance.names, instance.clauses(), ["", *instance.signs()]
        values = [VALUES[value] for value in instance.values]
        steps, remaining = [], [clauses[i] for i in instance.order]
        for i in range(instance.query + 1):
            computation = f"{signs[i]} {names[i - 1]} = {signs[i]} {values[i - 1]}" if i else ""
            remaining.remove(clauses[i])
            steps.append(Step(names[i], computation, values[i], None, ", ".join(remaining)))
        return tuple(steps)


def _shuffled(rng: random.Random, size: int) -> list[int]:
    # Twice as fast as rng.shuffle.
    return sorted(range(size), key=[rng.random() for _ in range(size)].__getitem__)
