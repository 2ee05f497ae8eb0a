"""`parquet:PATH_OR_GLOB`: Parquet files, whose column `data.text_field` holds the documents."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from nope_jax.config import DataConfig
from nope_jax.data.formats import files
from nope_jax.data.formats.format import LEFT_OUT, Format, Found, TextDigest, Unit, any_of
from nope_jax.data.splits import Part

ROWS = 64
"""Rows decoded at a time."""


@dataclasses.dataclass(frozen=True)
class Parquet(Format):
    """Parquet files. A document is a row; those of a row group are decoded from its first on."""

    columns: tuple[str, ...] = ("text",)
    """The names of the column with the texts, of which a file's first is taken."""

    usage: ClassVar[str] = "PATH_OR_GLOB"

    @classmethod
    def open(cls, name: str, part: Part, config: DataConfig, source: str) -> "Parquet":
        part.refuse_name(source)
        units, notes = files.find_units(name, source, (".parquet",))
        return cls(source, units, (config.text_field,), notes, config.text_fields)

    def find(self, unit: Unit, advance: Callable[[int], Any]) -> Iterator[Found]:
        with self._opened(unit.path) as file:
            row = 0
            for group in range(file.num_row_groups):
                for text in self._texts(file, group):
                    yield found(row, text)
                    row += 1
                advance(unit.size // file.num_row_groups)

    def read(self, unit: Unit, spans: Iterable[tuple[int, int]]) -> Iterator[Iterable[bytes]]:
        with self._opened(unit.path) as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            ends = np.cumsum(sizes)
            texts: Iterator[bytes | None] = iter(())
            at = end = 0
            for row, _ in spans:
                if not at <= row < end:
                    group = int(np.searchsorted(ends, row, side="right"))
                    if group == len(ends):
                        raise ValueError(f"{unit.path} has changed since it was first read")
                    texts, at, end = self._texts(file, group), int(ends[group]) - sizes[group], int(ends[group])
                yield files.in_pieces(next(itertools.islice(texts, row - at, None)) or b"")
                at = row + 1

    def locate(self, unit: Unit, start: int) -> str:
        return f"row {start + 1} of {unit.path}"

    @contextlib.contextmanager
    def _opened(self, path: str) -> Iterator[parquet.ParquetFile]:
        try:
            with parquet.ParquetFile(path, buffer_size=files.PIECE, pre_buffer=False) as file:
                find_column(file.schema_arrow, self.columns, path)
                yield file
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValueError(f"{path} is no Parquet file, or truncated or broken: {error}") from error

    def _texts(self, file: parquet.ParquetFile, group: int) -> Iterator[bytes | None]:
        column = find_column(file.schema_arrow, self.columns, "the file")
        for batch in file.iter_batches(ROWS, row_groups=[group], columns=[column], use_threads=False):
            yield from texts_of(batch.column(0))


def find_column(schema: pa.Schema, columns: Sequence[str], where: str) -> str:
    """The first of these columns that a table has, which must be of strings."""
    column = next((name for name in columns if schema.names.count(name) == 1), None)
    if column is None:
        have = ", ".join(schema.names)
        raise ValueError(f"{where} has no column {any_of(columns)} (data.text_field), only {have}")
    kind = schema.field(column).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)):
        raise ValueError(f"{where}: its column {column!r} (data.text_field) must hold strings, not {kind}")
    return column


def texts_of(column: pa.Array | pa.ChunkedArray) -> list[bytes | None]:
    """The UTF-8 texts of a column of strings."""
    column = column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column
    return column.cast(pa.large_binary()).to_pylist()


def found(row: int, text: bytes | None) -> Found:
    """A row as a document."""
    text = text or b""
    blank = not text or text.isspace()
    return row, row + 1, LEFT_OUT if blank else len(text), TextDigest(text).value()
