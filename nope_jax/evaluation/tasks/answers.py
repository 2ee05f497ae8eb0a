"""The answers of a model to examples of a task, by greedy decoding, and their grades."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Integer

from nope_jax.data.tasks import Example, Grade, Task, encode, grade, scratchpad
from nope_jax.data.tokenizers import Tokenizer
from nope_jax.models import Decoder, generate


class Question(NamedTuple):
    """An example as a model is asked it."""

    example: Example
    prompt: Integer[np.ndarray, "tokens"]
    """The source, after a bos if there is one."""
    answer: int
    """Number of tokens of the target, with its scratchpad."""

    @property
    def positions(self) -> int:
        """Number of tokens that a model reads to write the target and the separator after it."""
        return len(self.prompt) + self.answer


@dataclasses.dataclass(frozen=True)
class Answers:
    """The grades of a model's answers to questions of one length."""

    right: Bool[np.ndarray, "questions"]
    scratchpad: Bool[np.ndarray, "questions"]
    """Whether all steps are right; as `right` if there are none."""


def ask(
    task: Task, tokenizer: Tokenizer, name: str, length: int, *, format: str, bos: int | None, seed: int, count: int
) -> list[Question]:
    """Write `count` examples of the test split as questions; those drawn twice are asked once.

    Args:
        task: the task.
        tokenizer: the tokenizer of the model.
        name: its name, for errors.
        length: length of the examples.
        format: format of their scratchpads.
        bos: token before the prompt.
        seed: seed of the examples.
        count: number of examples drawn.

    Raises:
        ValueError: the task has no such examples or no scratchpad, or the tokenizer cannot write its text.
    """
    drawn = (task.example(seed, index, length, split="test", scratchpad=format != "none") for index in range(count))
    questions = []
    for example in {example.source: example for example in drawn}.values():
        if format != "none" and not example.scratchpad:
            raise ValueError(f"data.scratchpad {format}: task:{task.name} has no scratchpad")
        target = scratchpad.write(example.scratchpad, format) + example.target
        tokens, start = encode(tokenizer, example.source, target)
        if tokenizer.decode(tokens) != example.source + target:
            raise ValueError(f"data.tokenizer {name} cannot write the text of task:{task.name}: {example.source!r}")
        prompt = tokens[:start] if bos is None else np.insert(tokens[:start], 0, bos)
        questions.append(Question(example, prompt, len(tokens) - start))
    return questions


def digest(questions: Sequence[Question]) -> str:
    """Identifies questions and right answers."""
    return hashlib.sha256(repr([(q.example, q.prompt.tolist(), q.answer) for q in questions]).encode()).hexdigest()


def measure(
    model: Decoder,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    format: str = "none",
    bos: int | None = None,
    batch_size: int = 32,
    advance: Callable[[int], object] = lambda questions: None,
) -> Answers:
    """Ask a model: it writes until its separator, or for one token more than the longest right answer.

    Args:
        model: a decoder that has the positions of each question.
        tokenizer: its tokenizer.
        questions: questions by `ask`.
        format: format of the scratchpads.
        bos: as for `ask`.
        batch_size: number of questions answered at a time.
        advance: called with the number of questions just answered, to report progress.
    """
    grades: list[Grade] = [Grade(answer=False, scratchpad=False)] * len(questions)
    for rows in _batches(questions, batch_size, model.max_length):
        padded = np.resize(rows, batch_size)  # the last batch is padded with its own rows
        lengths = np.array([len(questions[row].prompt) for row in padded])
        prompts = np.zeros((batch_size, lengths.max()), np.int32)
        for prompt, row in zip(prompts, padded, strict=True):
            prompt[: len(questions[row].prompt)] = questions[row].prompt
        new = 1 + max(questions[row].answer for row in rows)
        stop = [tokenizer.separator]
        texts = np.asarray(generate(model, prompts, new, stop_tokens=stop, prompt_lengths=lengths))
        for row, text in zip(rows, texts, strict=False):
            prompt = questions[row].prompt
            grades[row] = _grade(tokenizer, questions[row], text[: len(prompt) + new], format, bos)
        advance(len(rows))
    return Answers(*np.array(grades, bool).reshape(-1, 2).T)


def _grade(
    tokenizer: Tokenizer, question: Question, text: Integer[np.ndarray, "tokens"], format: str, bos: int | None
) -> Grade:
    """Grade a prompt with its continuation. Text that does not end, or has no characters, is wrong."""
    start, example = len(question.prompt), question.example
    (ends,) = np.nonzero(text[start:] == tokenizer.separator)
    tokens = text[bos is not None : start + ends[0]] if ends.size else text
    if not ends.size or tokens.max() >= tokenizer.vocab_size:
        return Grade(answer=False, scratchpad=False)
    written = tokenizer.decode(tokens)
    if not written.startswith(example.source):
        return Grade(answer=False, scratchpad=False)
    return grade(written.removeprefix(example.source), example.target, example.scratchpad, format)


def _batches(questions: Sequence[Question], batch_size: int, max_length: int | None) -> Iterator[list[int]]:
    """Groups of questions, by length, of which the longest prompt and the longest answer fit into `max_length`."""
    batch: list[int] = []
    prompt = answer = 0
    for row in sorted(range(len(questions)), key=lambda row: len(questions[row].prompt)):
        prompt, answer = max(prompt, len(questions[row].prompt)), max(answer, questions[row].answer)
        if len(batch) == batch_size or (batch and max_length is not None and prompt + answer > max_length):
            yield batch
            batch, prompt, answer = [], len(questions[row].prompt), questions[row].answer
        batch.append(row)
    if batch:
        yield batch
