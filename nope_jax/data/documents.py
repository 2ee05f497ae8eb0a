"""The documents of a split, whatever source they come from."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

Split = Literal["train", "validation"]


class Documents(NamedTuple):
    """The documents of one split, not read yet."""

    size: int
    num_bytes: int
    """Of them all, about."""
    read: Callable[[Iterable[int]], Iterator[Iterable[bytes]]]
    """The text of some documents, one after another, each in pieces; cheapest in order."""
    name: Callable[[int], str]
    fingerprint: Any
    """What changes when the documents do, as JSON."""
    notes: tuple[str, ...] = ()
    """What the user is to know of them: a line each."""
