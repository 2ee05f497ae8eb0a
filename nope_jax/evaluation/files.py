"""The files of an evaluation that hold numbers; each is the old one or the new one, whenever the program is stopped."""

import contextlib
import csv
import dataclasses
import itertools
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nope_jax.evaluation.curves import Curve, Sums, perplexity
from nope_jax.evaluation.protocol import protocol_name
from nope_jax.evaluation.run import Run
from nope_jax.evaluation.spreading import spreading

COLUMNS = (
    "run",
    "encoding",
    "train_length",
    "length",
    "position_start",
    "position_end",
    "tokens",
    "nll",
    "nll_stderr",
    "perplexity",
    "entropy",
    "documents",
    "protocol",
    "text_bytes",
    "bits_per_byte",
)
"""Of curves.csv: one row per run, measured length and position bucket; losses and entropies in nats, sizes in bytes.

What is not known is empty: a standard error of one document, and bits per byte where a bucket holds no text."""

HEAD_COLUMNS = (
    "run",
    "encoding",
    "train_length",
    "length",
    "rank",
    "layer",
    "head",
    "spreads_from",
    "share_in_window",
    "share_at_end",
    "entropy_in_window",
    "entropy_at_end",
    "documents",
    "protocol",
)
"""Of heads.csv: one row per run and head, the head that spreads out first first; entropies in nats.

`spreads_from` is empty for a head that never does. See `nope_jax.evaluation.spreading`."""


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to, and moves it onto `path` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_curves(path: Path, runs: Sequence[Run], stride: int | None) -> None:
    """Writes the rows of COLUMNS."""
    with replace_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for run in runs:
            for length, curve in sorted(run.curves.items()):
                nll, stderr, tokens = curve.nll, curve.nll_stderr, curve.tokens.sum(0)
                text_bytes, bits_per_byte = curve.text_bytes.sum(0), curve.bits_per_byte
                for i, (start, end) in enumerate(itertools.pairwise(curve.edges)):
                    what = (run.name, run.encoding, run.train_length, length, start, end, tokens[i])
                    loss = (f"{nll[i]:.6g}", f"{stderr[i]:.6g}" if curve.documents > 1 else "")
                    rest = (f"{perplexity(nll[i]):.6g}", f"{curve.entropy[i]:.6g}", curve.documents)
                    text = (text_bytes[i], f"{bits_per_byte[i]:.6g}") if text_bytes[i] else ("", "")
                    writer.writerow((*what, *loss, *rest, protocol_name(stride), *text))


def write_spreading(path: Path, runs: Sequence[Run], stride: int | None) -> None:
    """Writes the rows of HEAD_COLUMNS, of runs whose longest measured length is past their training length."""
    with replace_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEAD_COLUMNS)
        for run in runs:
            if not (curve := run.longest):
                continue
            for rank, head in enumerate(spreading(run), 1):
                what = (run.name, run.encoding, run.train_length, curve.length, rank, head.layer, head.head)
                start = "" if head.position is None else head.position
                values = (head.share_in_window, head.share_at_end, head.entropy_in_window, head.entropy_at_end)
                rest = (curve.documents, protocol_name(stride))
                writer.writerow((*what, start, *(f"{value:.6g}" for value in values), *rest))


_Stored = TypeVar("_Stored", Curve, Sums)


def store(path: Path, value: Curve | Sums, identity: str) -> None:
    """Writes a curve or what there is of one, and what it is the curve of, for an evaluation that is started again."""
    path.parent.mkdir(exist_ok=True)
    with replace_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, identity=np.array(identity), **vars(value))


def stored(path: Path, cls: type[_Stored], identity: str) -> _Stored | None:
    """What is in a file that `store` wrote, if there is one and it is of the same."""
    try:
        with np.load(path) as arrays:
            if str(arrays["identity"]) != identity:
                return None
            values = {field.name: arrays[field.name] for field in dataclasses.fields(cls)}
            return cls(**{name: value if value.ndim else value.item() for name, value in values.items()})
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def write_heads(path: Path, runs: Sequence[Run]) -> None:
    """Writes `<run>/entropy` [L, N, positions] and `<run>/positions` of each run's longest measured length."""
    arrays: dict[str, Any] = {}
    for run in runs:
        if curve := run.longest:
            arrays[f"{run.name}/entropy"] = curve.heads
            arrays[f"{run.name}/positions"] = np.arange(curve.length)
    with replace_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)
