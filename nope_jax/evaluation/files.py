"""The files of an evaluation that hold numbers; each is the old one or the new one, whenever the program is stopped."""

import contextlib
import csv
import dataclasses
import itertools
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nope_jax.evaluation.curves import Curve, perplexity
from nope_jax.evaluation.protocol import protocol_name
from nope_jax.evaluation.run import Run

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
)


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
    """Writes one CSV row per run, measured length and position bucket."""
    with replace_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for run in runs:
            for length, curve in sorted(run.curves.items()):
                nll, stderr, tokens = curve.nll, curve.nll_stderr, curve.tokens.sum(0)
                for i, (start, end) in enumerate(itertools.pairwise(curve.edges)):
                    what = (run.name, run.encoding, run.train_length, length, start, end, tokens[i])
                    loss = (f"{nll[i]:.6g}", f"{stderr[i]:.6g}" if curve.documents > 1 else "")
                    rest = (f"{perplexity(nll[i]):.6g}", f"{curve.entropy[i]:.6g}", curve.documents)
                    writer.writerow((*what, *loss, *rest, protocol_name(stride)))


def keep_curve(path: Path, curve: Curve, identity: str) -> None:
    """Writes a curve, and what it is the curve of, for an evaluation that is started again."""
    path.parent.mkdir(exist_ok=True)
    with replace_file(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, identity=np.array(identity), **dataclasses.asdict(curve))


def kept_curve(path: Path, identity: str) -> Curve | None:
    """The curve in a file, if there is one and it is of the same."""
    try:
        with np.load(path) as arrays:
            if str(arrays["identity"]) != identity:
                return None
            return Curve(**{field.name: arrays[field.name] for field in dataclasses.fields(Curve)})
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
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
