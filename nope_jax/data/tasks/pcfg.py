"""PCFG SET: evaluate nested functions on strings (Hupkes et al. 2020, arXiv 1908.08351), by productivity.

    Solve: copy Q10 E4[SEP] Q10 E4

Functions and symbols are those of the grammar. Its probabilities were fitted by the authors to sentences of a
translation corpus, which the grammar does not determine. Here, a function is any of the ten with equal probability, the
functions inside one of two arguments are divided between these evenly at random, and strings have two to five symbols;
outputs of more than 64 symbols are drawn again. To train on the published dataset, give its folder,
`task:pcfg:PATH/pcfgset/productivity`.
"""

import random
from collections.abc import Callable
from string import ascii_uppercase
from typing import Any

from nope_jax.data.tasks.commands import CommandTask

UNARY: dict[str, Callable[[list[str]], list[str]]] = {
    "copy": lambda x: x,
    "reverse": lambda x: x[::-1],
    "shift": lambda x: x[1:] + x[:1],
    "echo": lambda x: x + x[-1:],
    "swap_first_last": lambda x: x[-1:] + x[1:-1] + x[:1] if len(x) > 1 else x,
    "repeat": lambda x: x + x,
}
BINARY: dict[str, Callable[[list[str], list[str]], list[str]]] = {
    "append": lambda x, y: x + y,
    "prepend": lambda x, y: y + x,
    "remove_first": lambda x, y: y,
    "remove_second": lambda x, y: x,
}
FUNCTIONS = [*UNARY, *BINARY]
SYMBOLS = [f"{letter}{number}" for letter in ascii_uppercase for number in range(1, 21)]
STRINGS = range(2, 6)
"""Symbols of a string."""
LONGEST_OUTPUT = 64


class Pcfg(CommandTask):
    """PCFG SET; the length is the number of functions (up to 35 in the published dataset)."""

    name = "pcfg"
    train_lengths = range(1, 9)
    test_lengths = range(9, 17)
    lengths = range(1, 36)
    vocabulary = f"Solve: {' '.join(FUNCTIONS)} {' '.join(SYMBOLS)} , [SEP]Q10[SEP]"

    def measure(self, command: str, output: str) -> int:
        return sum(word in UNARY or word in BINARY for word in command.split())

    def draw(self, rng: random.Random, length: int) -> Any:
        if self._pairs:
            return super().draw(rng, length)
        while True:
            command, output = _draw(rng, length)
            if len(output) <= LONGEST_OUTPUT:
                return command, " ".join(output)


def _draw(rng: random.Random, functions: int) -> tuple[str, list[str]]:
    """Draw a command with this number of functions, and its output."""
    if not functions:
        string = rng.choices(SYMBOLS, k=STRINGS[int(rng.random() * len(STRINGS))])
        return " ".join(string), string
    name = FUNCTIONS[int(rng.random() * len(FUNCTIONS))]
    if name in UNARY:
        command, value = _draw(rng, functions - 1)
        return f"{name} {command}", UNARY[name](value)
    in_first = int(rng.random() * functions)
    (first, x), (second, y) = _draw(rng, in_first), _draw(rng, functions - 1 - in_first)
    return f"{name} {first} , {second}", BINARY[name](x, y)
