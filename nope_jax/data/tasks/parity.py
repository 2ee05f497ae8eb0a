"""Say whether the number of ones in a sequence of bits is even.

Is the number of 1's even in the sequence [ 0, 1, 1 ] ? The answer is Yes.
"""

import random

from nope_jax.data.tasks.scratchpad import Step
from nope_jax.data.tasks.task import Task


class Parity(Task):
    """Parity; the length is the number of bits. Short lengths have few instances: of two bits, there are four."""

    name = "parity"
    train_lengths = range(1, 9)
    test_lengths = range(9, 17)
    vocabulary = (
        "Is the number of 1's even in the sequence [ 0, 1, 1 ] ? The answer is Yes. No. Thinking step by step:  "
        "in 1 comp 0 ** par = 1 ** 0 out 1 [ par: 0 ] re [ 0, 1 ]  # re [  ]  # . Thus,  The"
    )

    def draw(self, rng: random.Random, length: int) -> list[int]:
        return rng.choices((0, 1), k=length)

    def write(self, instance: list[int]) -> tuple[str, str]:
        source = f"Is the number of 1's even in the sequence [ {', '.join(map(str, instance))} ] ? "
        return source, f"The answer is {'No' if sum(instance) % 2 else 'Yes'}."

    def steps(self, instance: list[int]) -> tuple[Step, ...]:
        steps, parity, bits = [], 0, ", ".join(map(str, instance))
        for i, bit in enumerate(instance, 1):
            computation, parity = f"{bit} ** par = {bit} ** {parity}", bit ^ parity
            remaining = f"[ {bits[3 * i :]} ]"  # a bit has three characters there
            steps.append(Step(str(bit), computation, str(parity), f"par: {parity}", remaining))
        return tuple(steps)
