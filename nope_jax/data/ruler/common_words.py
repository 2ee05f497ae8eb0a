"""Common words extraction: the ten words of a numbered list that it repeats most often."""

import dataclasses
import random
from collections.abc import Iterator

from nope_jax.data.ruler.task import SHORT, Example, RulerTask, first_fitting, largest
from nope_jax.data.ruler.words import wonderwords
from nope_jax.data.tokenizers import Tokenizer

COMMON = 10
"""Number of words asked for."""
PROMPT = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{words}\n"
    "Question: What are the 10 most common words in the above list? "
    "Answer: The top 10 words that appear most often in the list are:"
)
SAMPLE = 4096
"""Words of the list from whose length RULER estimates how many fit."""


@dataclasses.dataclass(frozen=True)
class CommonWords(RulerTask):
    """As many words as fit, common ones 30 times and others 3 times (below 4,096 tokens 6 times and once).

    A worked example of 40 words, 10 and 3 times (20 words, 3 times and once), comes first. RULER samples from a second
    list of words if the first, wonderwords, is too small; that list is not here.
    """

    room = 120

    def examples(self, tokenizer: Tokenizer, length: int, count: int, seed: int = 42) -> Iterator[Example]:
        rng = random.Random(seed)
        words = sorted({*wonderwords("noun"), *wonderwords("adjective"), *wonderwords("verb")})
        random.Random(seed).shuffle(words)
        shown, asked = ((20, 3, 1), (6, 1)) if length < SHORT else ((40, 10, 3), (30, 3))

        def numbered(size: int, repeats: int, others_repeat: int) -> tuple[str, list[str]]:
            if size > len(words):
                raise ValueError(
                    f"length {length} is too long for RULER's {self.name} here: it takes lists of up to {size} words, "
                    f"and wonderwords has {len(words)}"
                )
            drawn = rng.sample(words, size)
            listed = drawn[:COMMON] * repeats + drawn[COMMON:] * others_repeat
            random.Random(seed).shuffle(listed)
            return _enumerated(listed), drawn[:COMMON]

        def draw(size: int) -> Example:
            text, common = numbered(*shown)
            first = f"{PROMPT.format(words=text)} {_enumerated(common)}"
            text, common = numbered(size, *asked)
            return Example(f"{first}\n{PROMPT.format(words=text)}", common)

        def tokens(example: Example) -> int:
            return len(tokenizer.encode(example.prompt)) + self.room

        per_word = (tokens(draw(SAMPLE)) - self.room) / SAMPLE
        most = max(int(length // per_word) * 2, 2 * COMMON)
        size = largest(lambda size: tokens(draw(size)) <= length, COMMON, most)
        for _ in range(count):
            found = first_fitting(draw, tokens, size, COMMON, length)
            if not isinstance(found, Example):
                raise self.too_short(length, found)
            yield found


def _enumerated(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))
