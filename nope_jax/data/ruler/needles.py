"""Needles in a haystack: the values of keys, among filler, other keys with their values, or the user's own text."""

import bisect
import dataclasses
import functools
import itertools
import json
import random
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from nope_jax.data.ruler.task import FILLER, SHORT, Example, RulerTask, first_fitting, largest, read_text
from nope_jax.data.ruler.words import wonderwords
from nope_jax.data.tokenizers import Tokenizer

Kind = Literal["words", "numbers", "uuids"]

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{haystack}\n"
    "What is the special magic {kind} for {keys} mentioned in the provided text? "
    "The special magic {kind} for {keys} mentioned in the provided text is"
)
"""The prompt that asks for one value, which is called by the singular of its kind."""
SEVERAL = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{haystack}\n"
    "What are all the special magic {kind} for {keys} mentioned in the provided text? "
    "The special magic {kind} for {keys} mentioned in the provided text are"
)
DEPTHS = np.linspace(0, 100, 40).round().astype(int).tolist()
"""Depths of needles in a text, in percent of its sentences."""
SENTENCE_END = re.compile(r"(?:(?<=[.?!])|(?<=[.?!][\"')\]”’])) +")
"""What is between two sentences."""


@dataclasses.dataclass(frozen=True)
class Needles(RulerTask):
    """The haystack is as long as fits: lines of filler, needles with keys of their own, or words of a text.

    Text is repeated where it is too short, and needles lie between its sentences. RULER finds these with a model of
    NLTK, a download; here they end with a point, a question mark or an exclamation mark, so that needles may lie a few
    sentences elsewhere in a text with abbreviations.
    """

    haystack: Literal["filler", "needles", "text"]
    keys: Kind
    values: Kind
    num_keys: int = 1
    num_values: int = 1
    """Values of each key."""
    num_queries: int = 1
    """Keys asked for."""
    words: Sequence[str] = dataclasses.field(default=(), repr=False)
    """Those of the text."""
    digest: str = ""
    """Of the text."""
    room = 128

    @property
    def file(self) -> Literal["haystack"] | None:
        return "haystack" if self.haystack == "text" else None

    def read(self, path: Path) -> "Needles":
        if self.file is None:
            super().read(path)  # which refuses
        text, digest = read_text(path)
        if path.suffix == ".json":  # as RULER stores the essays that it downloads
            try:
                text = "".join(json.loads(text)["text"])  # a text, or a list of them
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path} must be a text, or a JSON object with a field text") from None
        if not text.strip():
            raise ValueError(f"{path} has no words")
        return dataclasses.replace(self, words=tuple(re.sub(r"\s+", " ", text).split(" ")), digest=digest)

    def examples(self, tokenizer: Tokenizer, length: int, count: int, seed: int = 42) -> Iterator[Example]:
        rng = random.Random(seed)

        def draw(size: int) -> Example:
            keys, values, needles = [], [], []
            for _ in range(self.num_keys):
                keys.append(_draw(self.keys, rng))
                values.append([_draw(self.values, rng) for _ in range(self.num_values)])
                needles += [self._needle(keys[-1], value) for value in values[-1]]
            random.Random(seed).shuffle(needles)
            haystack = self._haystack(size, needles, rng)
            asked = rng.sample(range(self.num_keys), self.num_queries)
            *first, last = (keys[i] for i in asked)
            named = f"{', '.join(first)}, and {last}" if first else last
            answers = [value for i in asked for value in values[i]]
            prompt, kind = (SEVERAL, self.values) if len(answers) > 1 else (ONE, self.values.removesuffix("s"))
            return Example(prompt.format(kind=kind, haystack=haystack, keys=named), answers)

        def tokens(example: Example) -> int:
            return len(tokenizer.encode(example.prompt)) + self.room

        step = 500 if self.haystack == "text" else 5 if length < SHORT else 25
        per_unit = (tokens(draw(step)) - self.room) / step
        most = max(int(length / per_unit * 3), 2 * step)
        size = largest(lambda size: tokens(draw(size)) <= length, step, most)
        for _ in range(count):
            found = first_fitting(draw, tokens, size, step, length)
            if not isinstance(found, Example):
                raise self.too_short(length, found)
            yield found

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.values, key=key, value=value)

    def _haystack(self, size: int, needles: list[str], rng: random.Random) -> str:
        """So many lines or words with the needles in them."""
        if self.haystack == "text":
            text = " ".join(itertools.islice(itertools.cycle(self.words), size))
            sentences = SENTENCE_END.split(text.strip())
            ends = sorted(int(len(sentences) * (depth / 100)) for depth in rng.sample(DEPTHS, len(needles)))
            parts = [" ".join(sentences[start:end]) for start, end in itertools.pairwise([0, *ends, len(sentences)])]
            return " ".join([*itertools.chain.from_iterable(zip(parts, needles, strict=False)), parts[-1]])
        if self.haystack == "filler":
            lines = [FILLER] * size
        else:
            lines = [self._needle(_draw(self.keys, rng), _draw(self.values, rng)) for _ in range(size)]
        for line, needle in zip(sorted(rng.sample(range(size), len(needles)), reverse=True), needles, strict=True):
            lines.insert(line, needle)
        return "\n".join(lines)


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
