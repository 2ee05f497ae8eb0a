"""Rows of whole documents, of which only the answer is a target: how the examples of a task are trained on.

T is the context length.
"""

import numpy as np
from jaxtyping import Bool, Int

from nope_jax.data.corpora import Corpus


class ExampleRows:
    """Documents in rows of T inputs: several in each if they are packed, or else one, padded at its end.

    A document's inputs are its tokens after a bos, if there is one, and its targets the tokens one place further, the
    last of which is the separator. Losses count from its answer on. Packed documents are numbered in `segment_ids`
    from 1 and their positions restart, so each is computed as if it were alone.
    """

    def __init__(self, corpus: Corpus, context_length: int, source: str, *, packed: bool):
        """Raises ValueError, which names the source, if a document is longer than a row."""
        assert corpus.answers is not None
        self._corpus, self._answers = corpus, corpus.answers
        self._context_length = context_length
        self._packed = packed
        lengths = np.diff(corpus.offsets) - (corpus.bos is None)  # inputs of each document
        if lengths.max() > context_length:
            raise ValueError(
                f"data.context_length {context_length} is too short for {source}: its longest example "
                f"takes {lengths.max()} tokens"
            )
        self._firsts = _first_of_rows(lengths, context_length) if packed else np.arange(len(corpus) + 1)

    def __len__(self) -> int:
        return len(self._firsts) - 1

    def __getitem__(
        self, index: int
    ) -> tuple[
        Int[np.ndarray, "T"],
        Int[np.ndarray, "T"],
        Int[np.ndarray, "T"] | None,
        Int[np.ndarray, "T"] | None,
        Bool[np.ndarray, "T"],
    ]:
        """Tokens, targets, positions and segments (None unless packed), and which targets count in the loss."""
        corpus, start = self._corpus, 0
        tokens, targets, positions, segments = (np.zeros(self._context_length, np.int32) for _ in range(4))
        mask = np.zeros(self._context_length, bool)
        for number, document in enumerate(range(self._firsts[index], self._firsts[index + 1]), 1):
            text = corpus.tokens[corpus.offsets[document] : corpus.offsets[document + 1]].astype(np.int32)
            if corpus.bos is not None:
                text = np.insert(text, 0, corpus.bos)
            inputs = len(text) - 1
            stop = start + inputs
            tokens[start:stop], targets[start:stop] = text[:-1], text[1:]
            positions[start:stop], segments[start:stop] = np.arange(inputs), number
            mask[start + self._answers[document] - (corpus.bos is None) : stop] = True
            start = stop
        positions[start:] = np.arange(self._context_length - start)  # padding is a segment of its own, number 0
        return (tokens, targets, positions, segments, mask) if self._packed else (tokens, targets, None, None, mask)


def _first_of_rows(lengths: Int[np.ndarray, "documents"], room: int) -> Int[np.ndarray, "boundaries"]:
    """The first document of each row, and the end of the last, if each row takes documents as long as they fit."""
    ends = np.cumsum(lengths)
    firsts = [0]
    while firsts[-1] < len(lengths):
        before = ends[firsts[-1] - 1] if firsts[-1] else 0
        firsts.append(int(np.searchsorted(ends, before + room, side="right")))
    return np.array(firsts)
