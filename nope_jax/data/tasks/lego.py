"""Follow a chain of assignments (Zhang et al. 2022, arXiv 2206.04301).

If t = - q, q = -1. Then, what is the value of t? The answer is +1.
"""

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

    def clause(self, i: int) -> str:
        """The assignment to variable i."""
        return f"{self.names[i]} = {self.sign(i) + ' ' + self.names[i - 1] if i else VALUES[self.values[0]]}"

    def sign(self, i: int) -> str:
        """The sign with which variable i follows from the one before."""
        return "+" if self.values[i] == self.values[i - 1] else "-"


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
        names = rng.sample(ascii_lowercase, length)
        order = rng.sample(range(length), length)
        return Chain(names, rng.choices((False, True), k=length), order, rng.randrange((length + 1) // 2, length))

    def write(self, instance: Chain) -> tuple[str, str]:
        clauses = ", ".join([instance.clause(i) for i in instance.order])
        query = instance.names[instance.query]
        return (
            f"If {clauses}. Then, what is the value of {query}? ",
            f"The answer is {VALUES[instance.values[instance.query]]}.",
        )

    def steps(self, instance: Chain) -> tuple[Step, ...]:
        steps, clauses = [], [instance.clause(i) for i in range(len(instance.names))]
        for i in range(instance.query + 1):
            sign = instance.sign(i)
            before = f"{sign} {instance.names[i - 1]} = {sign} {VALUES[instance.values[i - 1]]}" if i else ""
            remaining = ", ".join([clauses[j] for j in instance.order if j > i])
            steps.append(Step(instance.names[i], before, VALUES[instance.values[i]], None, remaining))
        return tuple(steps)
