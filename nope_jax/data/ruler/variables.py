"""Variable tracking: which variables have a value, through a chain of assignments hidden in filler."""

import dataclasses
import itertools
import random
import string
from collections.abc import Iterator

import numpy as np

from nope_jax.data.ruler.task import FILLER, SHORT, Example, RulerTask, first_fitting, largest
from nope_jax.data.tokenizers import Tokenizer

HOPS = 4
"""Assignments of a variable to the next, after that of the value to the first."""
PROMPT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{haystack}\n"
    "Question: Find all variables that are assigned the value {value} in the text above. "
    "Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
    "value {value}, they are: "
)
DEMONSTRATION = 500
"""Tokens that the worked example before each prompt may have."""
PLACEHOLDER = "12345"
"""The value in the worked example, until each prompt draws its own."""


@dataclasses.dataclass(frozen=True)
class Variables(RulerTask):
    """One chain; a worked example with shorter names comes first, with names and a value redrawn for each prompt.

    Where the smallest worked example has more tokens than RULER allows it, as in bytes, RULER's code does not end; here
    it stays the smallest.
    """

    room = 30

    def examples(self, tokenizer: Tokenizer, length: int, count: int, seed: int = 42) -> Iterator[Example]:
        rng, values = random.Random(seed), np.random.RandomState(seed)

        def demonstration(lines: int) -> Example:
            return _draw(lines, 3, PLACEHOLDER, rng)

        def draw(lines: int) -> Example:
            return _draw(lines, 5, None, rng, values)

        def tokens(example: Example) -> int:
            return len(tokenizer.encode(example.prompt))

        def size(draw, step: int, most: int, besides: int) -> int:
            per_line = tokens(draw(step)) / step
            bound = max(int(most / per_line * 3), 2 * step)
            return largest(lambda lines: tokens(draw(lines)) + besides <= most, step, bound)

        lines = size(demonstration, 5, DEMONSTRATION, 0)
        shown = first_fitting(demonstration, tokens, lines, 5, DEMONSTRATION)
        if not isinstance(shown, Example):
            shown = demonstration(5)
        text = f"{shown.prompt} {' '.join(shown.answers)}\n"

        def drawn(lines: int) -> Example:
            example = draw(lines)
            return example._replace(prompt=f"{_redrawn(text, rng, values)}\n{example.prompt}")

        step = 5 if length < SHORT else 10
        lines = size(draw, step, length, len(tokenizer.encode(text)) + self.room)
        for _ in range(count):
            found = first_fitting(drawn, lambda example: tokens(example) + self.room, lines, step, length)
            if not isinstance(found, Example):
                raise self.too_short(length, found)
            yield found


def _draw(
    lines: int, letters: int, value: str | None, rng: random.Random, values: np.random.RandomState | None = None
) -> Example:
    """A chain in so many lines of filler; a value is drawn from `values` if none is given."""
    names = [_name(letters, rng) for _ in range(HOPS + 1)]
    while len(set(names)) < HOPS + 1:
        names.append(_name(letters, rng))
    names = names[: HOPS + 1]
    if value is None:
        assert values is not None
        value = str(values.randint(10000, 99999))
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {after} = VAR {before} " for before, after in itertools.pairwise(names)]
    haystack = [FILLER] * lines
    for i, position in enumerate(sorted(rng.sample(range(lines), len(chain)))):
        haystack.insert(position + i, chain[i])
    text = "\n".join(haystack).replace(". \n", ".\n")
    return Example(PROMPT.format(haystack=text, value=value, count=HOPS + 1), names)


def _name(letters: int, rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_uppercase, k=letters))


def _redrawn(text: str, rng: random.Random, values: np.random.RandomState) -> str:
    """A worked example with other names and another value."""
    for name in text.split()[-HOPS - 1 :]:
        text = text.replace(name, _name(len(name), rng))
    return text.replace(PLACEHOLDER, str(values.randint(10000, 99999)))
