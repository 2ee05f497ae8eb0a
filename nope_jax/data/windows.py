"""The tokens of each window, and the window of each row of training, as functions of their indices only.

T is the context length.
"""

import numpy as np
from jaxtyping import Int

from nope_jax.data.corpora import Corpus


class Windows:
    """Slices of T + 1 tokens from all documents, in an order given by the seed, each followed by the separator.

    Window i starts at token i·T, so every token but the first is predicted in exactly one window (up to T - 1 tokens at
    the end are left out). With a bos, it precedes the T tokens from i·T on, and all of those are predicted.
    """

    def __init__(self, corpus: Corpus, context_length: int, seed: int):
        order = permute(np.arange(len(corpus)), len(corpus), (seed,))
        self.bos = corpus.bos
        self._prefix = np.array([] if corpus.bos is None else [corpus.bos], np.int32)
        self._tokens = corpus.tokens
        self._context_length = context_length
        self._sources = corpus.offsets[order]  # start of each document, in this order, in the tokens
        self._starts = np.concatenate([[0], np.cumsum(np.diff(corpus.offsets)[order])])  # and in their concatenation

    def __len__(self) -> int:
        return int(self._starts[-1] - 1 + len(self._prefix)) // self._context_length

    def __getitem__(self, index: int) -> Int[np.ndarray, "window"]:
        start = index * self._context_length
        stop = start + self._context_length + 1 - len(self._prefix)
        documents = self._documents(start, stop)
        pieces = [
            self._tokens[source + max(start - begin, 0) : source + min(stop, end) - begin]
            for source, begin, end in zip(
                self._sources[documents], self._starts[documents], self._starts[1:][documents], strict=True
            )
        ]
        return np.concatenate([self._prefix, *pieces]).astype(np.int32)

    def segments(self, index: int) -> tuple[Int[np.ndarray, "T"], Int[np.ndarray, "T"]]:
        """Position and segment of each input of a window, for attention within documents only.

        A separator is a target of the document it ends and, as an input, position 0 of the next. The losses of a
        segment are therefore those of the same tokens alone. Segments count from 1; the first may start inside its
        document, but at position 0. With a bos, it is the input at every position 0.
        """
        start = index * self._context_length - len(self._prefix)  # the bos takes the place of the token before
        documents = self._documents(max(start, 0), start + self._context_length)
        separators = self._starts[1:][documents] - 1 - start
        opens = np.zeros(self._context_length, np.int32)
        opens[separators[(separators > 0) & (separators < self._context_length)]] = 1
        positions = np.arange(self._context_length, dtype=np.int32)
        return positions - np.maximum.accumulate(positions * opens), np.cumsum(opens, dtype=np.int32) + 1

    def _documents(self, start: int, stop: int) -> slice:
        """The documents with tokens in [start, stop) of the concatenation."""
        first, last = np.searchsorted(self._starts, [start, stop - 1], side="right") - 1
        return slice(first, last + 1)


def epoch_windows(rows: Int[np.ndarray, "n"], count: int, seed: int) -> Int[np.ndarray, "n"]:
    """The windows of rows, counted from the start of training: each epoch visits all `count` once, in its own order."""
    epochs, indices = np.divmod(rows, count)
    windows = np.empty_like(indices)
    for epoch in np.unique(epochs):
        windows[epochs == epoch] = permute(indices[epochs == epoch], count, (seed, int(epoch)))
    return windows


def permute(indices: Int[np.ndarray, "n"], size: int, key: tuple[int, ...]) -> Int[np.ndarray, "n"]:
    """Map indices by a random permutation of range(size), chosen by the key.

    A Feistel network on the next larger power of four, applied until the result is in range: no table is stored, for
    any number of windows.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    round_keys = np.random.SeedSequence(key[0], spawn_key=key[1:]).generate_state(8, np.uint64)
    images = np.asarray(indices, np.uint64)
    walking = np.ones(len(images), bool)
    while walking.any():
        left, right = images[walking] >> half, images[walking] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        images[walking] = left << half | right
        walking = images >= size
    return images.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    # The finalizer of splitmix64 (Steele et al. 2014): every input bit affects the low bits, which are the ones kept.
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
