"""`jsonl:PATH_OR_GLOB`: a JSON object per line, whose field `data.text_field` is a document."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

from nope_jax.config import DataConfig
from nope_jax.data.formats import files
from nope_jax.data.formats.format import LEFT_OUT, Format, Found, TextDigest, Unit, any_of
from nope_jax.data.splits import Part


@dataclasses.dataclass(frozen=True)
class JsonLines(Format):
    """Files of JSON lines. A document is a line: a byte range of a decompressed file."""

    fields: tuple[str, ...] = ("text",)
    """The names of the field with the text, of which a row's first is taken."""

    usage: ClassVar[str] = "PATH_OR_GLOB"

    @classmethod
    def open(cls, name: str, part: Part, config: DataConfig, source: str) -> "JsonLines":
        part.refuse_name(source)
        units, notes = files.find_units(name, source, (".jsonl", ".ndjson", ".json"))
        return cls(source, units, (config.text_field,), notes, config.text_fields)

    def find(self, unit: Unit, advance: Callable[[int], Any]) -> Iterator[Found]:
        start = 0
        with files.decompressed(unit.path, advance) as lines, files.reading(unit.path):
            for row, line in enumerate(lines, 1):
                stop = start + len(line)
                if not line.isspace():
                    text = self._text(line, f"row {row} of {unit.path}")
                    blank = not text or text.isspace()
                    yield start, stop, LEFT_OUT if blank else len(text), TextDigest(text).value()
                start = stop

    def read(self, unit: Unit, spans: Iterable[tuple[int, int]]) -> Iterator[Iterable[bytes]]:
        with files.decompressed(unit.path) as lines, files.reading(unit.path):
            for start, stop in spans:
                lines.seek(start)
                yield files.in_pieces(self._text(lines.read(stop - start), f"the row at byte {start} of {unit.path}"))

    def locate(self, unit: Unit, start: int) -> str:
        with files.decompressed(unit.path) as lines:
            before = 0
            while start:
                piece = lines.read(min(start, files.PIECE))
                before, start = before + piece.count(b"\n"), start - len(piece)
        return f"row {before + 1} of {unit.path}"

    def _text(self, line: bytes, where: str) -> bytes:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise ValueError(f"{where} must be an object with the field {any_of(self.fields)}, not a {kind}")
        field = next((name for name in self.fields if name in row), None)
        if field is None:
            have = ", ".join(row) or "none"
            raise ValueError(f"{where} has no field {any_of(self.fields)} (data.text_field), only {have}")
        text = row[field]
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{where}: its field {field!r} must be a string, not a {type(text).__name__}")
        return (text or "").encode(errors="surrogatepass")
