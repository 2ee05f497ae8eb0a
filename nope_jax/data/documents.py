"""The documents of a split, from any source."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt64

Split = Literal["train", "validation"]


class Documents(NamedTuple):
    """The documents of one split, read on demand."""

    size: int
    num_bytes: int
    """Approximate total size of the text."""
    read: Callable[[Iterable[int]], Iterator[Iterable[bytes]]]
    """Yields the texts of the given documents, each in pieces; fastest in ascending order."""
    name: Callable[[int], str]
    digests: Callable[[], UInt64[np.ndarray, "documents"]]
    """Returns a `TextDigest` of each document; may read all of them."""
    fingerprint: Any
    """JSON value that changes when the documents do."""
    notes: tuple[str, ...] = ()
    """Messages for the user about the documents, one line each."""
