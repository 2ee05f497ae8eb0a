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

from nope_jax.evaluation.curves import Curve, Sums
from nope_jax.evaluation.protocol import protocol_name
from nope_jax.evaluation.run import Run
from nope_jax.evaluation.spreading import spreading
from nope_jax.evaluation.uncertainty import number
from nope_jax.evaluation.view import View

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
    "bits_per_byte_stderr",
    "perplexity_stderr",
    "entropy_stderr",
)
"""Of curves.csv: one row per run, measured length and position bucket; losses and entropies in nats, sizes in bytes.

Means are over the tokens (or bytes) of a bucket; `entropy` is one over layers and heads as well. A column `..._stderr`
is the standard error of another, clustered by document (`nope_jax.evaluation.uncertainty`); that of the perplexity is
perplexity times `nll_stderr`. Two runs read the same documents: the error of their difference is in differences.csv,
and is not to be made from these. What is not known is empty: a standard error of one document, bits per byte where a
bucket holds no text, and what is not a number."""

DIFFERENCE_COLUMNS = (
    "run",
    "reference",
    "length",
    "position_start",
    "position_end",
    "difference",
    "difference_stderr",
    "unit",
    "documents",
    "protocol",
)
"""Of differences.csv: one row per pair of runs and length that both were measured at.

`difference` is the loss of `run` less that of `reference`, in `unit`: below 0 where `run` is better. Its standard error
is that of differences document by document, which both have read. Positions are those of the table: the second half of
a length, or all with a stride."""

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

    def cells(values: Sequence[np.ndarray], bucket: int) -> list[str]:
        return [number(float(value[bucket])) for value in values]

    with replace_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for run in runs:
            for length, curve in sorted(run.curves.items()):
                nll, entropy, bits_per_byte = curve.nll, curve.entropy, curve.bits_per_byte
                means = (nll.value, nll.stderr, nll.exp().value, entropy.value)
                rest = (bits_per_byte.value, bits_per_byte.stderr, nll.exp().stderr, entropy.stderr)
                tokens, text_bytes = curve.tokens.sum(0), curve.text_bytes.sum(0)
                for i, (start, end) in enumerate(itertools.pairwise(curve.edges)):
                    what = (run.name, run.encoding, run.train_length, length, start, end, tokens[i])
                    read = (curve.documents, protocol_name(stride), text_bytes[i] or "")
                    writer.writerow((*what, *cells(means, i), *read, *cells(rest, i)))


def write_differences(path: Path, runs: Sequence[Run], view: View) -> None:
    """Writes the rows of DIFFERENCE_COLUMNS."""
    with replace_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(DIFFERENCE_COLUMNS)
        for reference, run in itertools.combinations(runs, 2):
            for length in sorted(run.curves.keys() & reference.curves.keys()):
                difference = view.difference(run.curves[length], reference.curves[length])
                numbers = (number(float(difference.value)), number(float(difference.stderr)))
                what = (run.name, reference.name, length, *view.span(length))
                writer.writerow((*what, *numbers, view.loss_unit, int(difference.documents), view.protocol))


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
