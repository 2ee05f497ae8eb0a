"""Needle in a haystack: the value of one key, among filler or other keys with their values."""

import bisect
import dataclasses
import functools
import itertools
import random
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from nope_jax.data.ruler.task import FILLER, SHORT, Example, RulerTask, first_fitting, largest
from nope_jax.data.ruler.words import wonderwords
from nope_jax.data.tokenizers import Tokenizer

Kind = Literal["words", "numbers", "uuids"]

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
PROMPT = (
    "A special magic {one} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{one} afterwards.\n{haystack}\n"
    "What is the special magic {one} for {key} mentioned in the provided text? "
    "The special magic {one} for {key} mentioned in the provided text is"
)


@dataclasses.dataclass(frozen=True)
class Needles(RulerTask):
    """The haystack has as many lines as fit: filler, or needles with keys of their own."""

    haystack: Literal["filler", "needles"]
    keys: Kind
    values: Kind
    room = 128

    def examples(self, tokenizer: Tokenizer, length: int, count: int, seed: int = 42) -> Iterator[Example]:
        rng = random.Random(seed)

        def draw(lines: int) -> Example:
            key, value = _draw(self.keys, rng), _draw(self.values, rng)
            if self.haystack == "filler":
                haystack = [FILLER] * lines
            else:
                haystack = [self._needle(_draw(self.keys, rng), _draw(self.values, rng)) for _ in range(lines)]
            haystack.insert(rng.sample(range(lines), 1)[0], self._needle(key, value))
            rng.sample(range(1), 1)  # RULER's choice of the one key to ask for
            one = self.values.removesuffix("s")
            return Example(PROMPT.format(one=one, haystack="\n".join(haystack), key=key), [value])

        def tokens(example: Example) -> int:
            return len(tokenizer.encode(example.prompt)) + self.room

        step = 5 if length < SHORT else 25
        per_line = (tokens(draw(step)) - self.room) / step
        most = max(int(length / per_line * 3), 2 * step)
        size = largest(lambda lines: tokens(draw(lines)) <= length, step, most)
        for _ in range(count):
            found = first_fitting(draw, tokens, size, step, length)
            if not isinstance(found, Example):
                raise self.too_short(length, found)
            yield found

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.values, key=key, value=value)


def _draw(kind: Kind, rng: random.Random) -> str:
    if kind == "numbers":
        return str(rng.randint(10**6, 10**7 - 1))
    if kind == "words":
        return rng.choice(_pairs())
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


@functools.cache
def _pairs() -> "Pairs":
    return Pairs(wonderwords("adjective"), wonderwords("noun"))


class Pairs(Sequence[str]):
    """Every adjective with every noun, as in "able-apple", in the order of the alphabet: millions, made when read."""

    def __init__(self, adjectives: Iterable[str], nouns: Iterable[str]):
        self._nouns = sorted(set(nouns))
        stems: dict[str, set[str]] = {}
        for adjective in adjectives:
            stems.setdefault(adjective.partition("-")[0], set()).add(adjective)
        # Pairs of "old" and "old-fashioned" mix in the alphabet; those of different stems do not.
        self._blocks: list[str | list[str]] = []
        for _, group in sorted(stems.items(), key=lambda item: f"{item[0]}-"):
            if len(group) == 1:
                self._blocks.append(min(group))
            else:
                self._blocks.append(sorted({f"{adjective}-{noun}" for adjective in group for noun in self._nouns}))
        sizes = [len(self._nouns) if isinstance(block, str) else len(block) for block in self._blocks]
        self._starts = [0, *itertools.accumulate(sizes)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        i = bisect.bisect_right(self._starts, index) - 1
        block, index = self._blocks[i], index - self._starts[i]
        return f"{block}-{self._nouns[index]}" if isinstance(block, str) else block[index]
