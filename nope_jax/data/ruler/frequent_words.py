"""Frequent words extraction: the three most frequent of the coded words of a text, whose frequencies follow Zipf."""

import dataclasses
import random
import string
from collections.abc import Iterator

import numpy as np
from scipy.special import zeta

from nope_jax.data.ruler.task import Example, RulerTask
from nope_jax.data.tokenizers import Tokenizer

ALPHA = 2.0
"""Exponent of the frequencies: the word of rank k has a share of k^-α / ζ(α). Rank 1 is written "..." as noise."""
LETTERS = 6
PROMPT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {words}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text? "
    "Answer: According to the coded text above, the three most frequently appeared words are:"
)


@dataclasses.dataclass(frozen=True)
class FrequentWords(RulerTask):
    room = 50

    def examples(self, tokenizer: Tokenizer, length: int, count: int, seed: int = 42) -> Iterator[Example]:
        rng = random.Random(seed)
        longest = length - self.room
        size, step = longest // 50, longest // 32  # of the vocabulary

        def vocabulary() -> list[str]:
            drawn = [_word(rng) for _ in range(size)]
            while len(set(drawn)) < size:
                drawn.append(_word(rng))
            drawn = sorted(set(drawn))
            random.Random(seed).shuffle(drawn)
            return ["...", *drawn[1:]]

        def write(words: list[str], total: int) -> Example:
            counts = _counts(total, size)
            text = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
            random.Random(seed).shuffle(text)
            return Example(PROMPT.format(words=" ".join(text)), words[1:4])

        def tokens(example: Example) -> int:
            return len(tokenizer.encode(example.prompt))

        if size < 5:  # of which three are asked for
            raise self.too_short(length)
        words, most = vocabulary(), longest // LETTERS
        while tokens(write(words, most)) < longest:
            most += step
        most -= step
        for _ in range(count):
            words, total = vocabulary(), most
            while total > 0 and tokens(write(words, total)) > longest:
                total -= step
            # Those asked for are told by their number from the next.
            counts = _counts(max(total, 0), size)
            if counts[3] == counts[4]:
                raise self.too_short(length)
            yield write(words, total)


def _counts(total: int, size: int) -> list[int]:
    """How often the words of each rank occur in a text of `total` words, from a vocabulary of `size`."""
    ranks = np.arange(1, size + 1)
    return (total * ranks**-ALPHA / zeta(ALPHA)).astype(int).tolist()


def _word(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=LETTERS))
