"""What a task is: examples as a pure function of seed, index and length."""

import abc
import hashlib
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Integer

from nope_jax.config import DataConfig
from nope_jax.data.documents import Split
from nope_jax.data.tasks import scratchpad
from nope_jax.data.tasks.scratchpad import Step
from nope_jax.data.tokenizers import Tokenizer

TaskSplit = Literal["train", "test"]

EXAMPLES = {"train": 100_000, "test": 10_000}
"""Number of examples in the training and the validation set of a run, as in the paper."""
_FROM: dict[Split, TaskSplit] = {"train": "train", "validation": "test"}
"""The split of the examples of a run."""
HELD_OUT, HELD_OUT_BEYOND = 10, 2
"""One instance in this many belongs to the test split, of a length of training and of any other length."""
TRIES = 1000
"""Instances drawn for an example before its split counts as empty."""


class Example(NamedTuple):
    """An example of a task: a model reads `source` and writes `target`. Their concatenation is the paper's text."""

    source: str
    target: str
    scratchpad: tuple[Step, ...] = ()


class TaskDocuments(NamedTuple):
    """The documents of one split of a task, as tokens."""

    tokens: Integer[np.ndarray, "tokens"]
    """All documents in sequence, each followed by the separator."""
    offsets: Integer[np.ndarray, "boundaries"]
    """The start of each document in `tokens`, and the end of the last."""
    answers: Integer[np.ndarray, "documents"] | None
    """Index in each document of the first token that a model has to write; None if it is trained on all tokens."""


class Task(abc.ABC):
    """A task whose examples are drawn at random.

    A subclass defines `name`, `train_lengths`, `test_lengths`, `vocabulary`, `draw` and `write`, and `steps` if it has
    scratchpads. What a length counts (symbols, digits, terms, ...) is up to the task.

    An instance belongs to one split only: a hash of its source holds some out of training, at any length (HELD_OUT).
    """

    name: str
    train_lengths: Sequence[int]
    """The lengths of training in the paper."""
    test_lengths: Sequence[int]
    """The longer lengths on which the paper evaluates."""
    lengths: range = range(1, sys.maxsize)
    """The lengths that the task can make."""
    answer_only: bool = True
    """Whether a run trains on the target alone."""
    vocabulary: str = ""
    """A text with every word of the task, with a space before it if it may have one, and without if it may have none.

    Words are those of `nope_jax.data.tokenizers.words`; the tokenizer `task:NAME` consists of them. "": none."""

    @abc.abstractmethod
    def draw(self, rng: random.Random, length: int) -> Any:
        """Draw an instance: whatever `write` and `steps` need."""

    @abc.abstractmethod
    def write(self, instance: Any) -> tuple[str, str]:
        """Write the source and the target of an instance."""

    def steps(self, instance: Any) -> tuple[Step, ...]:
        """The scratchpad of an instance; () if the task has none."""
        return ()

    def weight(self, length: int) -> float:
        """The relative frequency of a length in training; the same for all unless a subclass says otherwise."""
        return 1.0

    def split(self, source: str, length: int) -> TaskSplit:
        """The split that an instance belongs to."""
        digest = hashlib.blake2b(source.encode(), digest_size=4).digest()
        held_out = HELD_OUT if length in self.train_lengths else HELD_OUT_BEYOND
        return "train" if int.from_bytes(digest) % held_out else "test"

    def example(
        self, seed: int, index: int, length: int, *, split: TaskSplit | None = None, scratchpad: bool = True
    ) -> Example:
        """Return an example, a function of the arguments only.

        Args:
            seed: Seed, at least 0.
            index: Index of the example, from 0.
            length: Length, one of `lengths`.
            split: None: test if the length is one of `test_lengths`, train otherwise.
            scratchpad: False leaves the scratchpad empty, which saves time.

        Raises:
            ValueError: the task cannot make the length, or has no instance of it in this split, or an argument is
                negative.
        """
        self.check_length(length)
        if seed < 0 or index < 0:
            raise ValueError(f"{'seed' if seed < 0 else 'index'} must be at least 0, not {min(seed, index)}")
        if split is None:
            split = "test" if length in self.test_lengths else "train"
        example = self._find(seed, index, length, split, scratchpad)
        if example is None:
            raise ValueError(f"task:{self.name} has no instance of length {length} in its {split} split")
        return example

    def examples(
        self,
        seed: int,
        count: int,
        lengths: Sequence[int] | None = None,
        *,
        split: TaskSplit = "train",
        scratchpad: bool = True,
    ) -> Iterator[Example]:
        """Yield the first `count` examples of a data set whose lengths are drawn by `weight`.

        Args:
            seed: Seed of lengths and examples.
            count: Number of examples.
            lengths: None: `train_lengths`. Lengths without an instance in this split are left out.
            split: Split.
            scratchpad: As in `example`.

        Raises:
            ValueError: the task cannot make one of the lengths, or has no instance of any in this split.
        """
        lengths = self.train_lengths if lengths is None else lengths
        for length in lengths:
            self.check_length(length)
        drawn = [length for length in lengths if self._find(0, 0, length, split, False) is not None]
        if not drawn:
            raise ValueError(f"task:{self.name} has no instance of lengths {_span(lengths)} in its {split} split")
        weights = [self.weight(length) for length in drawn]
        chosen = random.Random(_key(seed, 0, 0, split)).choices(drawn, weights, k=count)
        for index, length in enumerate(chosen):
            yield self.example(seed, index, length, split=split, scratchpad=scratchpad)

    def check_length(self, length: int) -> None:
        """Check that the task can make a length.

        Raises:
            ValueError: it cannot.
        """
        if length not in self.lengths:
            most = f" to {self.lengths[-1]}" if self.lengths.stop < sys.maxsize else " or more"
            raise ValueError(f"task:{self.name} has lengths {self.lengths[0]}{most}, not {length}")

    def documents(self, tokenizer: Tokenizer, config: DataConfig, split: Split) -> TaskDocuments:
        """Make the documents of a run, each a source with its target: EXAMPLES of train depending on `data.seed`.

        The validation split is the same for every seed, held out of training, and of the same lengths.

        Raises:
            ValueError: `data.lengths` or `data.scratchpad` is not possible for the task, or the tokenizer lacks a word.
        """
        lengths = None if config.lengths is None else range(config.lengths[0], config.lengths[1] + 1)
        seed, from_split = (config.seed if split == "train" else 0), _FROM[split]
        with_steps = config.scratchpad != "none"
        separator = np.array([tokenizer.separator])
        pieces: list[np.ndarray] = []
        ends, answers = [0], []
        for example in self.examples(seed, EXAMPLES[from_split], lengths, split=from_split, scratchpad=with_steps):
            if with_steps and not example.scratchpad:
                raise ValueError(f"data.scratchpad {config.scratchpad}: task:{self.name} has no scratchpad")
            target = scratchpad.write(example.scratchpad, config.scratchpad) + example.target
            tokens, answer = encode(tokenizer, example.source, target)
            pieces += [tokens, separator]
            ends.append(ends[-1] + len(tokens) + 1)
            answers.append(answer)
        dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
        return TaskDocuments(np.concatenate(pieces).astype(dtype), np.array(ends), np.array(answers))

    def _find(self, seed: int, index: int, length: int, split: TaskSplit, scratchpad: bool) -> Example | None:
        rng = random.Random(_key(seed, index, length, split))
        for _ in range(TRIES):
            instance = self.draw(rng, length)
            source, target = self.write(instance)
            if self.split(source, length) == split:
                return Example(source, target, self.steps(instance) if scratchpad else ())
        return None


def encode(tokenizer: Tokenizer, source: str, target: str) -> tuple[Integer[np.ndarray, "tokens"], int]:
    """Tokenize a source with its target, and say at which token the target starts.

    A token with characters of both, such as a word with the space before it, belongs to the target.
    """
    tokens, alone = tokenizer.encode(source + target), tokenizer.encode(source)
    common = min(len(alone), len(tokens))
    same = alone[:common] == tokens[:common]
    return tokens, common if same.all() else int(same.argmin())


def _key(seed: int, index: int, length: int, split: TaskSplit) -> int:
    """A different integer for different arguments, as long as index and length are below 2^40."""
    return (((seed << 40 | index) << 40 | length) << 1) + (split == "test")


def _span(lengths: Sequence[int]) -> str:
    return f"{min(lengths)} to {max(lengths)}"
