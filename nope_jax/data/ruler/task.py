"""What a task of RULER is, and how its text is made as long as fits."""

import abc
import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from nope_jax.data.tokenizers import Tokenizer

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
SHORT = 4096
"""Below this length, RULER makes its tasks easier or sizes them in smaller steps."""
TRIES = 100
"""Texts of the smallest size drawn for an example before its length counts as too short."""


class Example(NamedTuple):
    """A model reads `prompt` and continues it; `RulerTask.score` compares what it writes with `answers`."""

    prompt: str
    answers: Sequence[str]


def score(continuation: str, answers: Sequence[str]) -> float:
    """The share of the answers that occur in a text, in whatever case (RULER's string_match_all, from 0 to 1)."""
    text = continuation.lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)


@dataclasses.dataclass(frozen=True)
class RulerTask(abc.ABC):
    """A task of RULER; a subclass for each script of its code."""

    name: str

    @property
    def file(self) -> Literal["haystack", "questions"] | None:
        """The file that the user has to give, where RULER downloads one; None: it needs none."""
        return None

    @property
    def label(self) -> str:
        """The name in reports: a task over the user's own text is only in RULER's style."""
        return self.name if self.file is None else f"{self.name} (RULER-style)"

    @property
    def available(self) -> int | None:
        """Number of examples that there are; None: unlimited."""
        return None

    def read(self, path: Path) -> "RulerTask":
        """Return this task over the user's own file.

        Raises:
            ValueError: the file has not the format that the task needs.
            OSError: it cannot be read.
        """
        raise ValueError(f"RULER's {self.name} reads no file")

    @property
    @abc.abstractmethod
    def room(self) -> int:
        """Number of tokens for the answer, which count as part of the length."""

    @abc.abstractmethod
    def examples(self, tokenizer: Tokenizer, length: int, count: int, seed: int = 42) -> Iterator[Example]:
        """Makes examples, as long as fits.

        Args:
            tokenizer: Measures the texts, without special tokens.
            length: The largest number of tokens of a prompt and `room` together.
            count: Number of examples.
            seed: RULER's is 42.

        Raises:
            ValueError: the length is too short for the task, or cannot be made.
        """

    def score(self, continuation: str, answers: Sequence[str]) -> float:
        """The score of a continuation, from 0 to 1."""
        return score(continuation, answers)

    def too_short(self, length: int, needs: int | None = None) -> ValueError:
        least = "" if needs is None else f", whose smallest text and its answer take {needs} tokens of this tokenizer"
        return ValueError(f"length {length} is too short for RULER's {self.name}{least}")


def read_text(path: Path) -> tuple[str, str]:
    """The text of a file, and the SHA-256 of its bytes.

    Raises:
        ValueError: it is not in UTF-8.
        OSError: it cannot be read.
    """
    content = Path(path).expanduser().read_bytes()
    try:
        return content.decode(), hashlib.sha256(content).hexdigest()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a text in UTF-8: byte {error.start} is not") from None


def largest(fits: Callable[[int], bool], least: int, most: int) -> int:
    """The largest size found to fit by bisection; `least` if none was."""
    low, found = least, least
    while low <= most:
        middle = (low + most) // 2
        if fits(middle):
            found, low = middle, middle + 1
        else:
            most = middle - 1
    return found


def first_fitting(
    draw: Callable[[int], Example], tokens: Callable[[Example], int], size: int, step: int, most: int
) -> Example | int:
    """Draws an example that fits: smaller by a step each time that one does not, while it is larger than a step.

    Returns:
        The example, or the number of tokens of the shortest if none of the smallest size fits either.
    """
    shortest, tries = sys.maxsize, 0
    while tries < TRIES:
        example = draw(size)
        needs = tokens(example)
        if needs <= most:
            return example
        shortest = min(needs, shortest)
        if size > step:
            size -= step
        else:
            tries += 1
    return shortest
