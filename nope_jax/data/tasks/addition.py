"""Add two numbers, column by column.

Compute 5 3 7 2 + 1 9 ? The answer is 5 3 9 1.
"""

import random

from nope_jax.data.tasks.digits import DIGITS, spaced
from nope_jax.data.tasks.scratchpad import Step
from nope_jax.data.tasks.task import Task


class Addition(Task):
    """Addition; the length is the number of digits of the longer number."""

    name = "addition"
    train_lengths = range(1, 9)
    test_lengths = range(9, 17)
    vocabulary = (
        f"Compute {DIGITS} + {DIGITS} ? The answer is {DIGITS}. Thinking step by step:  in 7, 6 comp 7 + 6 + carry = "
        "10 11 12 13 14 15 16 17 18 19 out 3 [ carry: 1 ] re 5 + 1  # . Thus,  The 0, 1, 2, 3, 4, 5, 8, 9,"
    )

    def weight(self, length: int) -> float:
        return 2 * length - 1  # the paper has as many examples of every pair of numbers of digits

    def draw(self, rng: random.Random, length: int) -> tuple[int, int]:
        sizes = [length, rng.randint(1, length)]
        if rng.random() * (2 * length - 1) >= length:  # of these pairs, length have the longer number first
            sizes = [rng.randint(1, length - 1), length]
        first, second = (rng.randrange(10 ** (size - 1) if size > 1 else 0, 10**size) for size in sizes)
        return first, second

    def write(self, instance: tuple[int, int]) -> tuple[str, str]:
        first, second = instance
        return f"Compute {spaced(first)} + {spaced(second)} ? ", f"The answer is {spaced(first + second)}."

    def steps(self, instance: tuple[int, int]) -> tuple[Step, ...]:
        first, second = instance
        texts = spaced(first), spaced(second)
        columns = len(str(max(first, second)))
        steps, carry = [], 0
        for column in range(1, columns + 1):
            (first, a), (second, b) = divmod(first, 10), divmod(second, 10)
            left, right = [text[: -2 * column] or "0" for text in texts]  # without a digit and a space for each column
            steps.append(_step(a, b, carry, f"{left} + {right}" if column < columns else " + "))
            carry = (a + b + carry) // 10
        if carry:
            steps.append(_step(0, 0, carry, " + "))
        return tuple(steps)


def _step(a: int, b: int, carry: int, remaining: str) -> Step:
    total = a + b + carry
    computation = f"{a} + {b} + carry = {a + b} + {carry} = {total}"
    return Step(f"{a}, {b}", computation, str(total % 10), f"carry: {total // 10}", remaining)
