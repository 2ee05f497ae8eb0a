"""Evaluate a polynomial modulo 10.

Evaluate at x = 2 in - 2 * x ** 2 + 3 * x ** 0 ? The answer is 5.
"""

import random

from nope_jax.data.tasks.digits import DIGITS, spaced
from nope_jax.data.tasks.scratchpad import Step
from nope_jax.data.tasks.task import Task


class Polynomial(Task):
    """Polynomial evaluation: x from -2 to 2, coefficients from -3 to 3, degrees from 0 to 3; the length is the number
    of terms, which may have equal degrees."""

    name = "polynomial"
    train_lengths = range(1, 9)
    test_lengths = range(9, 17)
    vocabulary = (
        f"Evaluate at x = - {DIGITS} in * x ** 1 + ? The answer is {DIGITS}. Thinking step by step:  "
        "in 3 * x ** 2 comp 3 * - 2 ** 2 = 3 * 4 out 1 2 [ sum: 1 + 1 2 = 3 ] re  # . Thus,  The"
    )

    def draw(self, rng: random.Random, length: int) -> tuple[int, list[tuple[int, int]]]:
        coefficients, degrees = rng.choices(range(-3, 4), k=length), rng.choices(range(4), k=length)
        return rng.randint(-2, 2), list(zip(coefficients, degrees, strict=True))

    def write(self, instance: tuple[int, list[tuple[int, int]]]) -> tuple[str, str]:
        x, terms = instance
        value = sum(coefficient * x**degree for coefficient, degree in terms) % 10
        written = " + ".join([_TERMS[term] for term in terms])
        return f"Evaluate at x = {spaced(x)} in {written} ? ", f"The answer is {value}."

    def steps(self, instance: tuple[int, list[tuple[int, int]]]) -> tuple[Step, ...]:
        x, terms = instance
        written = [_TERMS[term] for term in terms]
        steps, total = [], 0
        for i, (coefficient, degree) in enumerate(terms):
            power, output = x**degree, spaced(coefficient * x**degree)
            factor = spaced(coefficient)
            computation = f"{factor} * {spaced(x)} ** {degree} = {factor} * {spaced(power)}"
            before, total = total, (total + coefficient * power) % 10
            variables = f"sum: {before} + {output} = {total}"
            steps.append(Step(written[i], computation, output, variables, " + ".join(written[i + 1 :])))
        return tuple(steps)


_TERMS = {(c, degree): f"{spaced(c)} * x ** {degree}" for c in range(-3, 4) for degree in range(4)}
