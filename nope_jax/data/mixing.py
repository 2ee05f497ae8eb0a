"""Which source each row of a mixture is from, as a function of the row's index only."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


def mix(rows: Int[np.ndarray, "n"], weights: Sequence[float]) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """Return the source of each row, and how many rows before it have the same source.

    After any number of rows, each of two sources has its share of them to half a row, each of three to less than one,
    and each of any number to less than two. For the sources are divided into two groups of about the same weight; the
    first has its share of the rows, rounded, the second the others, and each group is divided in the same way. Rounding
    adds at most a half at each level, and of what the levels above have added, a group has at most two thirds.

    Args:
        rows: Indices of rows, from 0.
        weights: The share of each source, relative to the sum.
    """
    order = np.argsort(-np.asarray(weights, float), kind="stable")
    sources, indices = _divide(np.asarray(rows), np.asarray(weights, float)[order])
    return order[sources], indices


def _divide(rows: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(weights) == 1:
        return np.zeros(len(rows), np.int64), rows
    sums = np.cumsum(weights)
    half = int(np.argmin(np.abs(sums[:-1] - sums[-1] / 2))) + 1
    part = sums[half - 1] / sums[-1]
    before, after = (np.floor((rows + i) * part + 0.5).astype(np.int64) for i in (0, 1))
    first = after > before
    sources, indices = np.empty((2, len(rows)), np.int64)
    sources[first], indices[first] = _divide(before[first], weights[:half])
    sources[~first], indices[~first] = _divide((rows - before)[~first], weights[half:])
    sources[~first] += half
    return sources, indices
