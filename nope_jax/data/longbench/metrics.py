"""The metrics of LongBench for English and code: scores from 0 to 1 of a continuation against an answer."""

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def f1(continuation: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Harmonic mean of precision and recall of words, normalized as for SQuAD: in lower case, without punctuation and
    articles (Rajpurkar et al. 2016, arXiv 1606.05250)."""
    found, wanted = _words(continuation), _words(answer)
    common = (Counter(found) & Counter(wanted)).total()
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def _words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_NO_PUNCTUATION)).split()


def rouge_l(continuation: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F of ROUGE-L, over sentences and their different words, as the package `rouge` 1.0 computes it for LongBench.

    As in LongBench, 0 where the package fails: without a word, or for sentences of about a thousand words.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        from rouge import Rouge
    except ModuleNotFoundError:
        raise ValueError("LongBench's ROUGE-L needs pip install rouge==1.0.1 (or 'nope_jax[longbench]')") from None
    try:
        return Rouge(metrics=["rouge-l"]).get_scores(continuation, answer)[0]["rouge-l"]["f"]
    except (ValueError, RecursionError):
        return 0.0


def accuracy(continuation: str, answer: str, classes: Sequence[str]) -> float:
    """1 over the number of classes that are named, if the right one is among them.

    A class whose name is a part of the answer's does not count.
    """
    named = [name for name in classes if name in continuation and (name == answer or name not in answer)]
    return 1 / len(named) if answer in named else 0.0


def count(continuation: str, answer: str, classes: Sequence[str] = ()) -> float:
    """The share of the numbers in the continuation that are the answer."""
    numbers = re.findall(r"\d+", continuation)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval(continuation: str, answer: str, classes: Sequence[str] = ()) -> float:
    """The share of the numbers in the continuation that are the paragraph's.

    Raises:
        ValueError: the answer names no paragraph.
    """
    paragraph = re.search(r"Paragraph (\d+)", answer)
    if paragraph is None:
        raise ValueError(f"an answer of LongBench's passage retrieval must be like 'Paragraph 3', not {answer!r}")
    return count(continuation, paragraph[1])


def edit_similarity(continuation: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Similarity of the first line that looks like code (without `, # and //) to the answer, to whole percent.

    That of the package fuzzywuzzy, which LongBench's requirements install: the share of characters in matching blocks
    (difflib's ratio). Where python-Levenshtein is installed too, fuzzywuzzy computes another.
    """
    lines = continuation.lstrip("\n").split("\n")
    line = next((line for line in lines if not re.search("`|#|//", line)), "")
    if not line or not answer:
        return float(line == answer)
    return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100


METRICS: dict[str, Callable[[str, str, Sequence[str]], float]] = {
    "F1": f1,
    "ROUGE-L": rouge_l,
    "accuracy": accuracy,
    "count": count,
    "retrieval": retrieval,
    "edit similarity": edit_similarity,
}
"""The metrics by name: of a continuation, an answer and the names of the classes."""
