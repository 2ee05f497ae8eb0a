"""Passkey: retrieve a number hidden in filler text (Mohtashami and Jaggi 2023, arXiv 2305.16300).

The wording and the five-digit numbers are those of Wang et al. 2024 (arXiv 2404.12224).
"""

import random

import numpy as np
from jaxtyping import Int, Integer

from nope_jax.config import DataConfig
from nope_jax.data.documents import Split
from nope_jax.data.tasks.task import Task, TaskDocuments
from nope_jax.data.tokenizers import ByteTokenizer, Tokenizer

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"

KEYS = range(10_000, 100_000)
DOCUMENTS = {"train": 10_000, "validation": 500}


class Passkey:
    """Prompts that hide a key, in the tokens of one tokenizer, each starting with its bos if asked for.

    A prompt consists of the task, filler, the needle, filler and the question. Its length is exact: filler is repeated
    and then cut on either side of the needle, as by Mohtashami and Jaggi. (Wang et al. repeat whole fillers and leave
    the rest of the length unused.)
    """

    def __init__(self, tokenizer: Tokenizer, *, bos: bool = False):
        self._tokenizer = tokenizer
        self._task, self._filler = tokenizer.encode(TASK), tokenizer.encode(FILLER)
        if bos:
            self._task = np.insert(self._task.astype(np.int32), 0, tokenizer.bos)

    def shortest(self, key: int) -> int:
        """Number of tokens of a prompt without filler, including its answer."""
        return len(self._task) + sum(map(len, self._needle_and_question(key)))

    def build(self, length: int, depth: float, key: int) -> tuple[Int[np.ndarray, "length"], int]:
        """Build a prompt with its answer.

        Args:
            length: Tokens of prompt and answer together.
            depth: Fraction of the filler that precedes the needle: 0 puts the needle right after the task, 1 right
                before the question.
            key: The hidden number, one of KEYS.

        Returns:
            The tokens, and how many at the end are the answer, which is a space and the key, tokenized after the
            question.

        Raises:
            ValueError: `length` is less than `shortest(key)`, `depth` is outside 0 to 1, or `key` is not in KEYS.
        """
        if key not in KEYS:
            raise ValueError(f"key must be from {KEYS[0]} to {KEYS[-1]}, not {key}")
        if not 0 <= depth <= 1:
            raise ValueError(f"depth must be from 0 to 1, not {depth}")
        needle, question = self._needle_and_question(key)
        filler = length - len(self._task) - len(needle) - len(question)
        if filler < 0:
            raise ValueError(f"length {length} is too short for a passkey prompt, which takes {length - filler} tokens")
        before = round(depth * filler)
        parts = [self._task, self.filler(before), needle, self.filler(filler - before), question]
        return np.concatenate(parts).astype(np.int32), self._answer_length(question)

    def document(self, length: int, key: int, rng: np.random.Generator) -> Int[np.ndarray, "length"]:
        """Build a training document of `length` tokens: a prompt with its answer, possibly with several needles.

        A random part of the remaining length is filler, more often a small part, and as many extra needles as fit take
        the rest. Filler is cut at random between task, needles and question.
        """
        needle, question = self._needle_and_question(key)
        room = length - self.shortest(key)
        further = int(room * (1 - rng.random() ** 3)) // len(needle)
        filler = room - further * len(needle)
        cuts = [0, *sorted(rng.integers(filler + 1, size=further + 1).tolist()), filler]
        before, *gaps = map(self.filler, np.diff(cuts).tolist())
        parts = [self._task, before, *(part for gap in gaps for part in (needle, gap)), question]
        return np.concatenate(parts).astype(np.int32)

    def filler(self, length: int) -> Integer[np.ndarray, "length"]:
        """Filler, repeated and cut to `length` tokens."""
        return np.resize(self._filler, length)

    def _needle_and_question(self, key: int) -> tuple[Integer[np.ndarray, "_"], Integer[np.ndarray, "_"]]:
        """The tokens of the needle, and of the question with its answer."""
        return self._tokenizer.encode(NEEDLE.format(key=key)), self._tokenizer.encode(f"{QUESTION} {key}")

    def _answer_length(self, question: Integer[np.ndarray, "_"]) -> int:
        # Some tokenizers do not cut between the question and the space: the answer is what the question alone lacks.
        alone = self._tokenizer.encode(QUESTION)
        common = min(len(alone), len(question))
        same = alone[:common] == question[:common]
        return len(question) - (common if same.all() else int(same.argmin()))


_IN_BYTES = Passkey(ByteTokenizer())


class PasskeyTask(Task):
    """Passkey retrieval as a task: the length of an example is that of its text in bytes, the depth is random.

    A run trains on documents of its own length instead, with every token a target: task, filler, needle, often more
    needles separated by filler, and finally the question with its answer. (A plain prompt repeats its key only twice in
    hundreds of tokens, too rarely for a small model to learn to copy.) Every document ends right after its answer and
    has no answer before, so the end is evident from the text: a model does not need to count tokens for it, which would
    fail in longer prompts.
    """

    name = "passkey"
    lengths = range(_IN_BYTES.shortest(KEYS[0]), 2**24)
    train_lengths = (384,)  # of configs/passkey.py
    test_lengths = (512, 768)
    answer_only = False

    def draw(self, rng: random.Random, length: int) -> bytes:
        tokens, _ = _IN_BYTES.build(length, rng.random(), rng.choice(KEYS))
        return tokens.astype(np.uint8).tobytes()

    def write(self, instance: bytes) -> tuple[str, str]:
        source, question, target = instance.decode().rpartition(QUESTION)
        return source + question, target

    def documents(self, tokenizer: Tokenizer, config: DataConfig, split: Split) -> TaskDocuments:
        """Make documents that fill `data.context_length` with their separator, so that each row starts with one.

        train depends on `data.seed`; validation is the same for every seed.

        Raises:
            ValueError: the documents are too short for the task, or `data.scratchpad` or `data.lengths` is given.
        """
        if config.scratchpad != "none" or config.lengths is not None:
            raise ValueError("data.scratchpad and data.lengths are not for task:passkey, whose length is that of rows")
        task, length = Passkey(tokenizer), config.context_length - 1
        rng = np.random.default_rng((config.seed, 0) if split == "train" else (0, 1))
        count = DOCUMENTS[split]
        keys = rng.integers(KEYS.start, KEYS.stop, count).tolist()
        shortest = max(map(task.shortest, keys))
        if shortest > length:
            raise ValueError(
                f"data.context_length {length + 1} is too short for data.source task:passkey, which needs at least "
                f"{shortest + 1} tokens of this data.tokenizer"
            )
        documents = np.full((count, length + 1), tokenizer.separator, np.min_scalar_type(tokenizer.vocab_size - 1))
        for row, key in zip(documents, keys, strict=True):
            row[:-1] = task.document(length, key, rng)
        return TaskDocuments(documents.reshape(-1), (length + 1) * np.arange(count + 1), None)
