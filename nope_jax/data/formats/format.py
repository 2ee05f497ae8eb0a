"""What a format is: how the documents in its files are found, once, and read again, on demand."""

import abc
import dataclasses
import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float

from nope_jax.config import DataConfig
from nope_jax.data.documents import Split
from nope_jax.data.splits import Part

SPAN = np.dtype([("unit", "i4"), ("start", "i8"), ("stop", "i8"), ("size", "i8"), ("digest", "u8")])
"""A document: which unit it is in, where the format finds it there, the bytes of its text and their `TextDigest`."""

Found = tuple[int, int, int, int]
"""The start, stop, size and digest of a document. A size of LEFT_OUT: no document, but counted in a note."""
LEFT_OUT = -1


class Unit(NamedTuple):
    """A file, or whatever else a format reads from start to end."""

    path: str
    size: int
    """In bytes, for the progress bar."""
    version: int | str
    """Changes when the content does."""
    name: str = ""
    """Its path relative to the folder or glob that was asked for."""
    split: Split | None = None
    """The split of its documents. None: that is decided for each document."""


@dataclasses.dataclass(frozen=True)
class Format(abc.ABC):
    """The files of one source in one format. A subclass defines `open`, `find`, `read` and `locate`.

    Raise a ValueError that names the file, and the row where there is one, for content that cannot be read.
    """

    source: str
    """The source as errors name it, such as `data.source text:books`."""
    units: tuple[Unit, ...]
    settings: tuple[Any, ...] = ()
    """JSON values on which it depends what is found."""
    notes: tuple[str, ...] = ()
    """Messages for the user, one line each."""

    usage: ClassVar[str]
    """What follows the colon in `data.source`, such as PATH_OR_GLOB."""
    left_out: ClassVar[str] = "rows without text (blank or null)"
    """What the documents of size LEFT_OUT are."""

    @classmethod
    @abc.abstractmethod
    def open(cls, name: str, part: Part, config: DataConfig, source: str) -> "Format":
        """Find the units of a source.

        Args:
            name: What follows the colon in `data.source`.
            part: Which documents are asked for; formats without named splits call `part.refuse_name`.
            config: The settings of the data.
            source: As errors name it.

        Raises:
            ValueError: there are none.
        """

    @abc.abstractmethod
    def find(self, unit: Unit, advance: Callable[[int], Any]) -> Iterator[Found]:
        """Yield the documents of a unit, in the order in which `read` is fastest.

        Args:
            unit: One of the units.
            advance: To be called with the number of bytes read since the last call.
        """

    @abc.abstractmethod
    def read(self, unit: Unit, spans: Iterable[tuple[int, int]]) -> Iterator[Iterable[bytes]]:
        """Yield the texts of documents of a unit, given by start and stop, each in pieces; advance by documents."""

    @abc.abstractmethod
    def locate(self, unit: Unit, start: int) -> str:
        """Say where a document is, for messages."""

    def hashes(self, documents: np.ndarray) -> Float[np.ndarray, "documents"]:
        """Numbers in [0, 1) that decide the split of documents: those with the smallest are validation."""
        return documents["digest"] / 2**64

    def cut(self, document: np.ndarray, split: Split, share: float) -> np.ndarray:
        """Return the part of the only document that belongs to a split."""
        raise ValueError(
            f"{self.source} has a single document, of which nothing can be held out: name another corpus as "
            "data.validation_source"
        )

    def none_found(self, left_out: np.ndarray) -> str:
        """Say why there are no documents, given the spans that were left out."""
        return (
            f"{self.locate(self.units[left_out['unit'][0]], left_out['start'][0])} is blank"
            if len(left_out)
            else (f"{self.units[0].path} is empty")
        )


def any_of(names: Iterable[str]) -> str:
    """Names of which one is wanted, for errors."""
    return " or ".join(map(repr, names))


class TextDigest:
    """A digest of 64 bits, by which documents with the same text are recognized."""

    def __init__(self, text: bytes = b""):
        self._digest = hashlib.blake2b(text, digest_size=8)

    def update(self, text: bytes) -> None:
        self._digest.update(text)

    def value(self) -> int:
        return int.from_bytes(self._digest.digest(), "big")


class CountedFile(io.FileIO):
    """A file that says how many bytes were read from it, whoever buffers or decompresses them."""

    def __init__(self, path: str, advance: Callable[[int], Any]):
        super().__init__(path)
        self._advance = advance

    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(buffer)
        self._advance(count or 0)
        return count
