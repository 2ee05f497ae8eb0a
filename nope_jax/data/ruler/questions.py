"""Questions about documents among other documents, in the formats of SQuAD and HotpotQA."""

import dataclasses
import functools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nope_jax.data.ruler.task import Example, RulerTask, first_fitting, largest, read_text, score
from nope_jax.data.tokenizers import Tokenizer

Format = Literal["SQuAD", "HotpotQA"]

PROMPT = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{documents}\n\n"
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "Question: {question} Answer:"
)
STEP = 10
"""Documents of the smallest prompt, and by which it shrinks."""


class Question(NamedTuple):
    text: str
    answers: Sequence[str]
    """Any of them is right."""
    documents: Sequence[int]
    """The documents that it is about."""
    near: Sequence[int] = ()
    """Those of the same article, which are taken before others."""


@dataclasses.dataclass(frozen=True)
class Questions(RulerTask):
    """As many documents as fit, in random order; all of them, repeated, if there are too few.

    A score is 1 if any of the answers occurs in the continuation (RULER's string_match_part).
    """

    format: Format
    asked: Sequence[Question] = dataclasses.field(default=(), repr=False)
    documents: Sequence[str] = dataclasses.field(default=(), repr=False)
    digest: str = ""
    """Of the file."""
    room = 32

    @property
    def file(self) -> Literal["questions"]:
        return "questions"

    @property
    def available(self) -> int:
        return len(self.asked)

    def read(self, path: Path) -> "Questions":
        text, digest = read_text(path)
        read = _read_squad if self.format == "SQuAD" else _read_hotpotqa
        try:
            asked, documents = read(json.loads(text))
        except (ValueError, KeyError, TypeError) as error:
            lacks = f", it lacks {error}" if isinstance(error, KeyError) else ""
            raise ValueError(f"{path} must be questions in the JSON format of {self.format}{lacks}") from None
        if not asked:
            raise ValueError(f"{path} has no question with an answer")
        return dataclasses.replace(self, asked=asked, documents=documents, digest=digest)

    def score(self, continuation: str, answers: Sequence[str]) -> float:
        return max(score(continuation, [answer]) for answer in answers)

    def examples(self, tokenizer: Tokenizer, length: int, count: int, seed: int = 42) -> Iterator[Example]:
        rng = random.Random(seed)
        if count > self.available:
            raise ValueError(f"RULER's {self.name} has {self.available} questions here, fewer than {count}")

        def draw(question: Question, size: int) -> Example:
            texts = self._among(question, size, rng)
            random.Random(seed).shuffle(texts)
            shown = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(texts, 1))
            return Example(PROMPT.format(documents=shown, question=question.text), question.answers)

        def tokens(example: Example) -> int:
            return len(tokenizer.encode(example.prompt)) + self.room

        first = self.asked[0]
        per_document = (tokens(draw(first, STEP)) - self.room) / STEP
        most = max(int(length / per_document * 3), 2 * STEP)
        size = largest(lambda size: tokens(draw(first, size)) <= length, STEP, most)
        for question in self.asked[:count]:
            found = first_fitting(functools.partial(draw, question), tokens, size, STEP, length)
            if not isinstance(found, Example):
                raise self.too_short(length, found)
            yield found

    def _among(self, question: Question, size: int, rng: random.Random) -> list[str]:
        """The documents of a question and others, `size` in all if it has no more of its own."""
        if size >= len(self.documents):
            return (list(self.documents) * -(-size // len(self.documents)))[:size]
        own, near = [*question.documents], [*question.near]
        more = max(size - len(own), 0)
        if more > len(near):
            taken = {*own, *near}
            others = [i for i in range(len(self.documents)) if i not in taken]
            chosen = near + rng.sample(others, min(more - len(near), len(others)))
        else:
            chosen = rng.sample(near, more)
        return [self.documents[i] for i in own + chosen]


def format_of(path: Path) -> Format:
    """The format of a file of questions: SQuAD's is a JSON object, HotpotQA's a list.

    Raises:
        ValueError: it is neither.
        OSError: it cannot be read.
    """
    opens = read_text(path)[0].lstrip()[:1]
    if opens not in ("{", "["):
        raise ValueError(f"{path} must be questions in the JSON format of SQuAD or of HotpotQA")
    return "SQuAD" if opens == "{" else "HotpotQA"


def _read_squad(data: Any) -> tuple[list[Question], list[str]]:
    articles = [list(article["paragraphs"]) for article in data["data"]]
    documents, number = _numbered(paragraph["context"] for article in articles for paragraph in article)
    asked = []
    for article in articles:
        of_article = [number[paragraph["context"]] for paragraph in article]
        for paragraph, own in zip(article, of_article, strict=True):
            near = [i for i in of_article if i != own]
            for each in paragraph["qas"]:
                answers = [str(answer["text"]) for answer in each["answers"]]
                if answers and not each.get("is_impossible", False):
                    asked.append(Question(str(each["question"]), answers, [own], near))
    return asked, documents


def _read_hotpotqa(data: Any) -> tuple[list[Question], list[str]]:
    contexts = [[f"{title}\n{''.join(sentences)}" for title, sentences in each["context"]] for each in data]
    documents, number = _numbered(text for context in contexts for text in context)
    asked = [
        Question(str(each["question"]), [str(each["answer"])], [number[text] for text in context])
        for each, context in zip(data, contexts, strict=True)
    ]
    return asked, documents


def _numbered(texts: Iterator[str]) -> tuple[list[str], Mapping[str, int]]:
    documents = sorted(set(texts))
    return documents, {text: i for i, text in enumerate(documents)}
