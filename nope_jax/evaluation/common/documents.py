"""Evaluation protocols: which documents a model reads, in which windows, and which tokens are scored.

There are two protocols; every output names the one used. From the start (`stride=None`): reads the first tokens of a
document and scores each given all tokens before it. Sliding window (Wang et al. 2024): slides a window of the evaluated
length over the whole document by `stride` tokens and scores only the tokens that no earlier window scored.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from nope_jax.config import Config, DataConfig
from nope_jax.data import Corpus, Mixture, describe, load_corpus
from nope_jax.data.corpora import Split
from nope_jax.distributed import said_by_all
from nope_jax.evaluation.common.runs import Run

VALIDATION = "data.source", "data.validation_source", "data.split"
"""Config fields that decide which documents are validation."""


class Window(NamedTuple):
    document: int
    """Index into the documents read."""
    start: int
    """Position of its first token in the document."""
    scored_from: int
    """The first scored position in the window; an earlier window scored the ones before it."""


def protocol_name(stride: int | None) -> str:
    return "from start" if stride is None else f"stride {stride}"


def describe_protocol(stride: int | None) -> str:
    if stride is None:
        return (
            "Each document is read from its start: the token after position p is scored given positions 0 to p, "
            "so position and context grow together."
        )
    return (
        f"A window of the evaluated length slides over each document by {stride} tokens; a token is scored once, by "
        "the first window that reaches it, and its position is the one inside that window."
    )


def load_same_corpus(config: DataConfig, split: Split) -> Corpus | Mixture:
    """`load_corpus` on every process.

    Raises:
        ValueError: as `load_corpus`; or the processes read different documents.
    """
    corpus = load_corpus(config, split)
    if jax.process_count() > 1:
        first, *others = said_by_all(corpus.digest())
        for process, theirs in enumerate(others, 1):
            if theirs != first:
                raise ValueError(
                    f"process {process} does not read the {split} documents of data.source {config.source} that "
                    "process 0 reads"
                )
    return corpus


def choose_documents(
    document_lengths: np.ndarray,
    lengths: Sequence[int],
    count: int,
    seed: int,
    *,
    split: str = "validation",
    option: str = "--lengths",
) -> dict[int, np.ndarray]:
    """Chooses the documents read at each length, as far as possible the same at all lengths.

    Documents are shuffled by `seed` and sorted by how many of the lengths they reach, most first. Each length takes the
    first `count` documents that reach it. The choices are therefore nested, and identical at every length if `count`
    documents reach the longest.

    Args:
        document_lengths: number of tokens of each document.
        lengths: the evaluated lengths; a document reaches a length if it has at least one token more, the last target.
        count: maximum number of documents per length.
        seed: of the shuffle.
        split: the split of the documents, for the error message.
        option: the option that set the lengths, for the error message.

    Returns:
        For each length, indices into `document_lengths`.

    Raises:
        ValueError: no document reaches one of the lengths.
    """
    reaches = {length: document_lengths > length for length in lengths}
    for length in lengths:
        if not reaches[length].any():
            reached = ", ".join(f"{n}: {reached.sum()}" for n, reached in sorted(reaches.items()))
            raise ValueError(
                f"{option}: no {split} document reaches length {length}, which takes {length + 1} tokens; "
                f"documents that reach {reached}; the longest has {document_lengths.max(initial=0)} tokens"
            )
    order = np.random.default_rng(seed).permutation(len(document_lengths))
    reached_lengths = np.sum(list(reaches.values()), axis=0)
    order = order[np.argsort(-reached_lengths[order], kind="stable")]
    return {length: order[reached[order]][:count] for length, reached in reaches.items()}


def plan_windows(document_lengths: Sequence[int], length: int, stride: int | None) -> list[Window]:
    """Lists the windows of `length` inputs to read, document by document.

    With a stride, the last window of a document ends at its last token, so that every token after the first is scored
    exactly once.

    Args:
        document_lengths: number of tokens of each document, more than `length`.
        length: input tokens per window.
        stride: step of the window; None reads only the start of each document.
    """
    windows = []
    for document, tokens in enumerate(document_lengths):
        last = 0 if stride is None else int(tokens) - 1 - length
        scored = 0
        for start in [*range(0, last, stride or 1), last]:
            windows.append(Window(document, start, scored - start))
            scored = start + length
    return windows


class Document(NamedTuple):
    tokens: np.ndarray
    byte_lengths: np.ndarray
    """Number of bytes of text per token; zeros if the text is unavailable or the tokens are not made from text."""


Documents = dict[int, list[Document]]
"""The documents read at each length."""


def read_documents(runs: Sequence[Run[Any]]) -> list[Documents]:
    """Reads the documents of each run: the same ones for every tokenizer, chosen to be long enough under all of them.

    Raises:
        ValueError: a corpus is unavailable, or the corpora do not hold the same documents.
    """
    loaded, lengths = [run.config for run in runs], runs[0].lengths
    corpora: dict[tuple, Corpus | Mixture] = {}
    for config in loaded:
        if (key := corpus_key(config)) not in corpora:
            corpora[key] = load_same_corpus(config.data, "validation")
    first, *others = corpora.values()
    if any(len(first) != len(other) for other in others):
        sizes = ", ".join(f"{key[0] or 'the default'}: {len(corpus)}" for key, corpus in corpora.items())
        raise ValueError(f"data.dir: the runs find different numbers of validation documents there ({sizes})")
    has_text = all(map(_has_text, corpora.values()))
    if len({config.data.tokenizer for config in loaded}) > 1 and not has_text:
        why = "is made of tokens" if first.byte_lengths is None else "has no text in data.dir, only tokens"
        source = describe(loaded[0].data, "validation")
        raise ValueError(
            f"data.source {source} {why}, which the runs do not share (data.tokenizer differs); compare them on text "
            "with --data.source"
        )
    token_counts = np.min([corpus.lengths for corpus in corpora.values()], axis=0)
    settings = loaded[0].eval
    chosen = choose_documents(token_counts, lengths, settings.documents, settings.seed)
    # When documents are read from their start, keep only the tokens that are read.
    end = max(lengths) + 1 if settings.stride is None else None
    read = {}
    for key, corpus in corpora.items():
        documents = {}
        for i in {int(i) for indices in chosen.values() for i in indices}:
            tokens = corpus[i][:end]
            byte_lengths = np.zeros(len(tokens), np.int64)
            if has_text and corpus.byte_lengths:
                byte_lengths = corpus.byte_lengths(i)[:end]
            documents[i] = Document(tokens, byte_lengths)
        read[key] = {length: [documents[int(i)] for i in indices] for length, indices in chosen.items()}
    return [read[corpus_key(config)] for config in loaded]


def _has_text(corpus: Corpus | Mixture) -> bool:
    """Whether the byte lengths of its tokens are available; a prepared corpus may have been copied without its text."""
    if corpus.byte_lengths is None:
        return False
    try:
        corpus.byte_lengths(0)
    except OSError:
        return False
    return True


def corpus_key(config: Config) -> tuple[str | None, str, bool]:
    """Key that distinguishes the corpora of runs with the same source."""
    return config.data.dir, config.data.tokenizer, config.data.bos
