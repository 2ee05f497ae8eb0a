"""Tasks whose documents are made from a seed: `data.source` `task:NAME` trains on them, eval.py measures them.

passkey: a number hidden in filler text, to be found again (Mohtashami and Jaggi 2023, arXiv 2305.16300), worded as in
Wang et al. 2024 (arXiv 2404.12224), whose numbers have five digits.
"""

import difflib
from typing import Literal

import numpy as np
from jaxtyping import Int, Integer

from nope_jax.data.tokenizers import Tokenizer

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
    """Prompts that hide a key, in the tokens of one tokenizer, its bos before each if asked for.

    A prompt is the task, filler, the needle, filler and the question. Its length is exact: filler is repeated and then
    cut, on either side of the needle, as Mohtashami and Jaggi do. (Wang et al. repeat it whole, and leave what remains
    of the length unused.)
    """

    def __init__(self, tokenizer: Tokenizer, *, bos: bool = False):
        self._tokenizer = tokenizer
        self._task, self._filler = tokenizer.encode(TASK), tokenizer.encode(FILLER)
        if bos:
            self._task = np.insert(self._task.astype(np.int32), 0, tokenizer.bos)

    def shortest(self, key: int) -> int:
        """Tokens of a prompt without filler, its answer counted."""
        return len(self._task) + sum(map(len, self._needle_and_question(key)))

    def build(self, length: int, depth: float, key: int) -> tuple[Int[np.ndarray, "length"], int]:
        """A prompt and its answer.

        Args:
            length: of both together, in tokens.
            depth: the share of the filler that comes before the needle: 0 puts it right after the task, 1 right before
                the question.
            key: what is hidden, one of KEYS.

        Returns:
            The tokens, and how many of them, at the end, are the answer: what the tokenizer makes of a space and the
            key after the question.

        Raises:
            ValueError: `length` is less than `shortest(key)`, `depth` outside 0 to 1, or `key` not of five digits.
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
        """A prompt with its answer to train on, of `length` tokens, whose needle may come several times.

        A random part of what is left of the length is for filler, a small one more often, and as many further needles
        as fit take the rest. Filler is cut at random between task, needles and question.
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
        """Filler, repeated and cut to so many tokens."""
        return np.resize(self._filler, length)

    def _needle_and_question(self, key: int) -> tuple[Integer[np.ndarray, "_"], Integer[np.ndarray, "_"]]:
        """The tokens of the needle, and of the question with its answer."""
        return self._tokenizer.encode(NEEDLE.format(key=key)), self._tokenizer.encode(f"{QUESTION} {key}")

    def _answer_length(self, question: Integer[np.ndarray, "_"]) -> int:
        # Not every tokenizer cuts between the question and the space: the answer is what the question alone lacks.
        alone = self._tokenizer.encode(QUESTION)
        common = min(len(alone), len(question))
        same = alone[:common] == question[:common]
        return len(question) - (common if same.all() else int(same.argmin()))


def task_documents(
    name: str, split: Literal["train", "validation"], tokenizer: Tokenizer, length: int, seed: int
) -> Integer[np.ndarray, "documents length"]:
    """The documents of a task, all of `length` tokens, so that windows of one token more begin where documents do.

    passkey: task, filler, needle, often further needles with filler between, and last the question with its answer.
    (A prompt alone repeats its key twice in hundreds of tokens, which tells a small model too seldom that it should
    copy.) Every document ends after an answer and no answer comes before the end: the text alone tells where that is,
    so a model need not count tokens for it, which would fail it in longer prompts.

    Args:
        name: passkey.
        split: train draws from `seed`; validation is always the same, whatever it is.
        tokenizer: whose tokens the documents are.
        length: tokens of each document.
        seed: of the training documents.

    Raises:
        ValueError: no such task, or documents too short for it.
    """
    if name != "passkey":
        near = difflib.get_close_matches(name, ["passkey"], n=1)
        hint = f"did you mean {near[0]!r}?" if near else "the one there is is 'passkey'"
        raise ValueError(f"data.source: unknown task {name!r}: {hint}")
    task = Passkey(tokenizer)
    rng = np.random.default_rng((seed, 0) if split == "train" else (0, 1))
    count = DOCUMENTS[split]
    keys = rng.integers(KEYS.start, KEYS.stop, count).tolist()
    shortest = max(map(task.shortest, keys))
    if shortest > length:
        raise ValueError(
            f"data.context_length {length + 1} is too short for data.source task:{name}, which needs at least "
            f"{shortest + 1} tokens of this data.tokenizer"
        )
    documents = np.empty((count, length), np.min_scalar_type(tokenizer.vocab_size - 1))
    for row, key in zip(documents, keys, strict=True):
        row[:] = task.document(length, key, rng)
    return documents
