"""Files of numbers, written atomically: if the program is stopped, each file is either the old or the new one.

Of several processes, the first alone reads and writes them.
"""

import contextlib
import csv
import dataclasses
import math
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from nope_jax.distributed import from_process_0


def writes() -> bool:
    """Whether this process writes files and prints: the first does."""
    return jax.process_index() == 0


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path next to `path`, and moves it to `path` if the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class Csv(NamedTuple):
    """Column names and rows of a .csv file."""

    columns: str
    """Separated by spaces."""
    rows: Iterable[Sequence[Any]]
    """Floats are written with six significant digits; None and NaN leave a cell empty."""


def write_numbers(out: Path, files: Mapping[str, Csv | Mapping[str, Any]]) -> None:
    """Writes the .csv and .npz files of an evaluation to `out`, by name."""
    for name, content in files.items():
        with replace_file(out / name) as temporary:
            if isinstance(content, Csv):
                with temporary.open("w", newline="") as text:
                    writer = csv.writer(text)
                    writer.writerow(content.columns.split())
                    writer.writerows(map(_cell, row) for row in content.rows)
            else:
                with temporary.open("wb") as binary:
                    np.savez(binary, **content)


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value


_Stored = TypeVar("_Stored")


def store(path: Path, value: Any, identity: str) -> None:
    """Stores a dataclass of arrays and numbers with its identity: what it was computed from."""
    if not writes():
        return
    path.parent.mkdir(exist_ok=True)
    with replace_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, identity=np.array(identity), **vars(value))


def stored(path: Path, cls: type[_Stored], identity: str) -> _Stored | None:
    """Loads what `store` wrote; None if the file is missing or unreadable, or its identity differs.

    All processes must call this; they get what the first one finds.
    """
    return from_process_0(lambda: _read(path, cls, identity))


def _read(path: Path, cls: type[_Stored], identity: str) -> _Stored | None:
    try:
        with np.load(path) as arrays:
            if str(arrays["identity"]) != identity:
                return None
            values = {field.name: arrays[field.name] for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
            return cls(**{name: value if value.ndim else value.item() for name, value in values.items()})
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None
