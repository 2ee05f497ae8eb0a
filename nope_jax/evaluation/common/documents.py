"""What a model reads when it is judged: which documents, in which windows, and which of their tokens count.

Two protocols, named in every output. From the start (`stride=None`): a document's first tokens, each scored given all
before it. Sliding window (Wang et al. 2024): a window of the evaluated length slid over the whole document by `stride`
tokens, scoring only those that no earlier window scored.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from nope_jax.config import Config
from nope_jax.data import Corpus, load_corpus
from nope_jax.evaluation.common.runs import Run


class Window(NamedTuple):
    document: int
    """Index among the documents read."""
    start: int
    """Its first token in the document."""
    scored_from: int
    """The first position in the window that counts; the ones before it were scored by an earlier window."""


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


def choose_documents(
    document_lengths: np.ndarray,
    lengths: Sequence[int],
    count: int,
    seed: int,
    *,
    split: str = "validation",
    option: str = "--lengths",
) -> dict[int, np.ndarray]:
    """Chooses the documents read at each length, so that like is compared with like.

    In a seeded order, documents that reach more of the lengths come first. Each length takes the first `count` that
    reach it, so the choices are nested, and the same at every length as soon as `count` documents reach the longest.

    Args:
        document_lengths: tokens of each document.
        lengths: the evaluated lengths; to reach one, a document needs one token more, the last one's target.
        count: most documents per length.
        seed: of the order.
        split: what the documents are of, and
        option: what gave the lengths, both for the error.

    Returns:
        For each length, indices into `document_lengths`.

    Raises:
        ValueError: a length that no document reaches.
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

    Under a stride, a document's last window ends at its last token, so that every token after the first is scored
    exactly once.

    Args:
        document_lengths: tokens of each document read, each more than `length`.
        length: inputs per window.
        stride: None for the start of each document only.
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
    """The bytes of text that belong to each token; zeros where it is not made from text, or that is not there."""


Documents = dict[int, list[Document]]
"""For each length, the documents that are read at it."""


def read_documents(runs: Sequence[Run[Any]]) -> list[Documents]:
    """For each run what it reads: the same documents, whatever the tokenizer, those that are long enough in every one.

    Raises:
        ValueError: a corpus that cannot be had, or corpora that are not of the same documents.
    """
    loaded, lengths = [run.config for run in runs], runs[0].lengths
    corpora: dict[tuple, Corpus] = {}
    for config in loaded:
        if (key := corpus_key(config)) not in corpora:
            corpora[key] = load_corpus(config.data, "validation")
    first, *others = corpora.values()
    if any(len(first) != len(other) for other in others):
        sizes = ", ".join(f"{key[0] or 'the default'}: {len(corpus)}" for key, corpus in corpora.items())
        raise ValueError(f"data.dir: the runs find different numbers of validation documents there ({sizes})")
    has_text = all(map(_has_text, corpora.values()))
    if len({config.data.tokenizer for config in loaded}) > 1 and not has_text:
        why = "is made of tokens" if first.byte_lengths is None else "has no text in data.dir, only tokens"
        raise ValueError(
            f"data.source {loaded[0].data.source} {why}, which the runs do not share (data.tokenizer differs); compare "
            "them on text with --data.source"
        )
    token_counts = np.min([corpus.lengths for corpus in corpora.values()], axis=0)
    settings = loaded[0].eval
    chosen = choose_documents(token_counts, lengths, settings.documents, settings.seed)
    # Of a document that is read from its start, no more is kept than is read.
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


def _has_text(corpus: Corpus) -> bool:
    """Whether the bytes of its tokens can be known; of a prepared corpus the tokens alone may have been copied here."""
    if corpus.byte_lengths is None:
        return False
    try:
        corpus.byte_lengths(0)
    except OSError:
        return False
    return True


def corpus_key(config: Config) -> tuple[str | None, str, bool]:
    """What tells the corpora of runs of one source apart."""
    return config.data.dir, config.data.tokenizer, config.data.bos
