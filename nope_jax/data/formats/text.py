"""`text:PATH_OR_GLOB`: files, one document each, or one per section between two `data.document_separator`."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from nope_jax.config import DataConfig
from nope_jax.data.documents import Split
from nope_jax.data.formats import files
from nope_jax.data.formats.format import LEFT_OUT, Format, Found, TextDigest, Unit
from nope_jax.data.splits import Part, name_hash

HEAD = 2**13
"""A file with a NUL among its first HEAD bytes is binary."""


@dataclasses.dataclass(frozen=True)
class Text(Format):
    """Files of text. A document is a byte range of a decompressed file."""

    separator: str | None = None
    any_bytes: bool = False
    """Whether to read a binary file too."""

    usage: ClassVar[str] = "PATH_OR_GLOB"
    left_out: ClassVar[str] = "binary files (a NUL byte near the start)"

    @classmethod
    def open(cls, name: str, part: Part, config: DataConfig, source: str) -> "Text":
        part.refuse_name(source)
        units, notes = files.find_units(name, source)
        any_bytes = config.tokenizer == "bytes" and files.is_file(name)
        separator = config.document_separator
        return cls(source, units, (separator, any_bytes), notes, separator, any_bytes)

    def find(self, unit: Unit, advance: Callable[[int], Any]) -> Iterator[Found]:
        with files.decompressed(unit.path, advance) as text:
            pieces = _pieces(text, unit.path)
            first = next(pieces, b"")
            if b"\0" in first[:HEAD] and not self.any_bytes:
                yield 0, 0, LEFT_OUT, 0
            else:
                for start, stop, digest in _cut(itertools.chain([first], pieces), self.separator):
                    yield start, stop, stop - start, digest

    def read(self, unit: Unit, spans: Iterable[tuple[int, int]]) -> Iterator[Iterable[bytes]]:
        with files.decompressed(unit.path) as text:
            for start, stop in spans:
                yield _pieces(text, unit.path, start, stop)

    def locate(self, unit: Unit, start: int) -> str:
        return unit.path if self.separator is None else f"{unit.path} at byte {start}"

    def hashes(self, documents: np.ndarray) -> Float[np.ndarray, "documents"]:
        if self.separator is None:
            return np.array([name_hash(self.units[i].name) for i in documents["unit"]])
        return super().hashes(documents)

    def cut(self, document: np.ndarray, split: Split, share: float) -> np.ndarray:
        """Cut between two UTF-8 characters."""
        (start,), (stop,) = document["start"], document["stop"]
        at = start + round(int(stop - start) * (1 - share))
        with files.decompressed(self.units[document["unit"][0]].path) as text:
            text.seek(max(start, at - 3))
            around = text.read(min(stop, at + 1) - max(start, at - 3))
        while start < at < stop and around and around[-1] & 0xC0 == 0x80:
            at, around = at - 1, around[:-1]
        part = document.copy()
        part["start" if split == "validation" else "stop"] = at
        part["size"] = part["stop"] - part["start"]
        return part

    def none_found(self, left_out: np.ndarray) -> str:
        return f"{self.units[left_out['unit'][0]].path} is binary" if len(left_out) else "it is empty"


def _cut(pieces: Iterable[bytes], separator: str | None) -> Iterator[tuple[int, int, int]]:
    """Yield start, stop and digest of each document of a file. Blank sections between separators are skipped."""
    between = separator.encode() if separator else b""
    start = position = 0
    digest, blank, held = TextDigest(), bool(between), b""
    for piece in pieces:
        *texts, last = (held + piece).split(between) if between else [held + piece]
        for text in texts:
            digest.update(text)
            stop = position + len(text)
            if not blank or (text and not text.isspace()):
                yield start, stop, digest.value()
            start = position = stop + len(between)
            digest, blank = TextDigest(), True
        kept = max(0, len(last) - len(between) + 1) if between else len(last)
        text, held = last[:kept], last[kept:]  # hold back a possible beginning of a separator
        digest.update(text)
        blank = blank and (not text or text.isspace())
        position += len(text)
    digest.update(held)
    if not blank or (held and not held.isspace()):
        yield start, position + len(held), digest.value()


def _pieces(text: Any, path: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Yield the text of a file between two offsets."""
    position = start
    with files.reading(path):
        text.seek(start)
        while piece := text.read(files.PIECE if stop is None else min(files.PIECE, stop - position)):
            yield piece
            position += len(piece)
    if stop is not None and position < stop:
        raise ValueError(f"{path} has changed since it was first read")
