"""Paths: on a disk or, for a run, in a bucket of Google Cloud Storage; atomic writes, and sizes in words.

pathlib drops a slash of gs://bucket/run and would silently create a local folder `gs:`. Every path that a user can give
therefore goes through this module before pathlib.
"""

import importlib.util
import os
import re
from pathlib import Path
from typing import TypeAlias

from etils import epath

Location: TypeAlias = Path | epath.Path
"""A path on a disk or in a bucket. Do not call absolute() or resolve() on the latter: they return a local path."""

_URL = re.compile(r"(?!hf:|gguf:)[A-Za-z][A-Za-z0-9+.-]+:/")


def is_published(path: str | os.PathLike[str]) -> bool:
    """Whether this names a published model, hf:... or gguf:... (`nope_jax.interop`), and not a path."""
    return os.fspath(path).startswith(("hf:", "gguf:"))


def check_location(path: str, name: str) -> None:
    """Refuse URLs other than gs://BUCKET/FOLDER, and URLs that lost a slash, as the folder of a run."""
    if _URL.match(path) and not re.match("gs://[^/]", path):
        raise ValueError(f"{name} must be a path on a disk or gs://BUCKET/FOLDER, not {path}")


def location(path: str | os.PathLike[str], name: str = "workdir") -> Location:
    """Return the folder of a run.

    Args:
        path: A path on a disk, or gs://BUCKET/FOLDER as a string; a pathlib.Path of a URL is refused.
        name: The argument that gave it, for error messages.

    Raises:
        ValueError: as `check_location`, or the package that reads buckets is missing.
    """
    text = os.fspath(path)
    check_location(text, name)
    if not _URL.match(text):
        return Path(path)
    if importlib.util.find_spec("gcsfs") is None:
        raise ValueError(f"{name} {text} needs a package that is not installed: pip install gcsfs")
    return epath.Path(text)


def check_reachable(folder: Location, name: str = "workdir") -> None:
    """Access a bucket once, so that network or credential problems are reported before any computation.

    Raises:
        ValueError: it does not respond.
    """
    try:
        folder.exists()
    except Exception as error:  # the network, the credentials and three libraries raise various exceptions
        raise ValueError(
            f"{name} {folder} cannot be reached: {type(error).__name__}: {str(error).partition('.')[0][:200]} "
            "(without credentials: gcloud auth application-default login)"
        ) from error


def on_disk(path: str, name: str) -> str:
    """Return the path if it can be on a disk.

    Raises:
        ValueError: it is a URL.
    """
    if _URL.match(path):
        raise ValueError(f"{name} must be on a disk, not {path}; only the folder of a run may be in a bucket, gs://...")
    return path


def resolved(folder: Location) -> Location:
    """Return the absolute path of a folder; a bucket's is one already."""
    return folder.resolve() if isinstance(folder, Path) else folder


def write_whole(path: Location, content: bytes) -> None:
    """Write a file atomically: if the program is stopped, the old or the new content remains.

    Raises:
        OSError: with the file name, which the error of a full disk lacks.
    """
    unfinished = path.with_suffix(f"{path.suffix}.tmp")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or f"cannot be written ({error})", str(path)) from error


def size_of_bytes(count: int) -> str:
    """Format bytes: 0.98 GB."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6)):
        if count >= 0.9 * 10**power:
            return f"{count / 10**power:.3g} {unit}"
    return f"{count / 1000:.3g} kB"
