"""Add digits modulo 10.

Compute: 3 + 8 + 6 .[SEP] The answer is 7 .
"""

import random

from nope_jax.data.tasks.digits import DIGITS, spaced
from nope_jax.data.tasks.scratchpad import Step
from nope_jax.data.tasks.task import Task


class Summation(Task):
    """Summation modulo 10 of digits from 1 to 9; the length is their number."""

    name = "summation"
    train_lengths = range(1, 9)
    test_lengths = range(9, 17)
    vocabulary = (
        f"Compute: {DIGITS} + {DIGITS} .[SEP] The answer is {DIGITS} . Thinking step by step:  in 3 comp 3 + sum = "
        "3 + 8 = out 1 1 [ sum: 1 1 = 1 ] re 6  # . Thus,  The"
    )

    def draw(self, rng: random.Random, length: int) -> list[int]:
        return rng.choices(range(1, 10), k=length)

    def write(self, instance: list[int]) -> tuple[str, str]:
        return f"Compute: {' + '.join(map(str, instance))} .[SEP] ", f"The answer is {sum(instance) % 10} ."

    def steps(self, instance: list[int]) -> tuple[Step, ...]:
        steps, total, digits = [], 0, " + ".join(map(str, instance))
        for i, digit in enumerate(instance, 1):
            output = spaced(digit + total)
            computation, total = f"{digit} + sum = {digit} + {total} =", (digit + total) % 10
            remaining = digits[4 * i :]  # a digit has four characters there
            steps.append(Step(str(digit), computation, output, f"sum: {output} = {total}", remaining))
        return tuple(steps)
