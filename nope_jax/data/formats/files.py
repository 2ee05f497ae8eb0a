"""Finding the files of a path or glob, and reading them decompressed."""

import bz2
import contextlib
import glob
import gzip
import importlib
import io
import lzma
import os
import stat
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nope_jax.data.formats.format import CountedFile, Unit

try:
    zstd: Any = importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
except ImportError:
    zstd = None

PIECE = 2**20
"""Bytes of content read at a time."""
BUFFER = 2**17
"""Bytes of a file, which may be compressed, read at a time."""


ZSTANDARD = b"\x28\xb5\x2f\xfd"
COMPRESSIONS: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b\x08": lambda file: gzip.GzipFile(fileobj=file, mode="rb"),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
    ZSTANDARD: lambda file: zstd.ZstdFile(file),
}
"""Readers of compressed files, by the first bytes of the file."""
_BROKEN = (EOFError, OSError, zlib.error, lzma.LZMAError, *([zstd.ZstdError] if zstd else []))


def find_units(pattern: str, source: str, suffixes: tuple[str, ...] = ()) -> tuple[tuple[Unit, ...], tuple[str, ...]]:
    """Find the files that match a path or glob, each once and in order.

    The name of a file is its path relative to the folder, or to the part of the glob before its first wildcard, with
    links resolved. (A file outside it is named by the first path that leads to it.)

    Args:
        pattern: A file, a glob, or a folder, which stands for all files under it that are not hidden.
        source: The source as errors name it.
        suffixes: Of a folder, only files whose names end so, before that of a compression; (): all.

    Returns:
        The files, and notes about other matches.

    Raises:
        ValueError: no file matches.
    """
    path = Path(pattern).expanduser()
    if path.is_dir():
        root, found = path, _expand(Path(glob.escape(str(path)), "**"))
        if suffixes:
            found = (file for file in found if _has_suffix(file, suffixes))
    elif os.path.lexists(path):
        root, found = path.parent, iter([path])
    else:
        fixed = next((i for i, part in enumerate(path.parts) if glob.has_magic(part)), len(path.parts))
        root, found = Path(*path.parts[:fixed]), _expand(path)
    real_root = Path(os.path.realpath(root))
    units: dict[Path, Unit] = {}
    odd = []
    for file in sorted(set(found)):
        try:
            state = file.stat()
        except PermissionError:
            raise
        except OSError:  # a broken link
            odd.append(file)
            continue
        if stat.S_ISREG(state.st_mode):
            real = Path(os.path.realpath(file))
            name = real.relative_to(real_root) if real.is_relative_to(real_root) else file.relative_to(root)
            units.setdefault(real, Unit(str(real), state.st_size, state.st_mtime_ns, name.as_posix()))
        elif not stat.S_ISDIR(state.st_mode):
            odd.append(file)
    if not units:
        what = f"is no regular file: {odd[0]}" if odd else "matches no file"
        kind = f" that ends in {' or '.join(suffixes)}" if suffixes and path.is_dir() else ""
        raise ValueError(f"{source} {what}{kind}")
    what = "files that cannot be read (a broken link, or no regular file)"
    notes = (f"{source}: {len(odd):,} {what} left out, {odd[0]} the first",) if odd else ()
    return tuple(sorted(units.values(), key=lambda unit: Path(unit.path))), notes


def is_file(path: str) -> bool:
    return Path(path).expanduser().is_file()


def _has_suffix(file: Path, suffixes: tuple[str, ...]) -> bool:
    return file.suffix in suffixes or (
        file.suffix in (".gz", ".bz2", ".xz", ".zst") and Path(file.stem).suffix in suffixes
    )


def _expand(pattern: Path) -> Iterator[Path]:
    """Expand a glob; ** enters each folder once, even if several links lead to it."""
    if "**" not in pattern.parts:
        yield from map(Path, glob.glob(str(pattern)))
        return
    at = pattern.parts.index("**")
    rest = pattern.parts[at + 1 :] or ("*",)
    for root in glob.glob(str(Path(*pattern.parts[:at]))):
        for folder in _folders(root):
            yield from _expand(Path(glob.escape(folder), *rest))


def _folders(root: str) -> Iterator[str]:
    seen = set()
    for folder, folders, _ in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
        else:
            seen.add(real)
            yield folder


@contextlib.contextmanager
def decompressed(path: str, advance: Callable[[int], Any] = lambda count: None) -> Iterator[Any]:
    """Open a file as a seekable reader of its content, decompressed if necessary.

    Args:
        path: The file.
        advance: Called with the number of bytes of the file, before decompression, that were read since the last call.

    Raises:
        ValueError: it is compressed with Zstandard and the package for it is not installed.
    """
    with io.BufferedReader(CountedFile(path, advance), BUFFER) as file:
        head = file.peek(6)[:6]
        if head.startswith(ZSTANDARD) and zstd is None:
            raise ValueError(f"{path} is compressed with Zstandard, which needs pip install backports.zstd")
        yield next((reader(file) for magic, reader in COMPRESSIONS.items() if head.startswith(magic)), file)


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn what a decompressor raises within the block into a ValueError that names the file."""
    try:
        yield
    except _BROKEN as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path} cannot be decompressed, it is truncated or broken: {error}") from error


def in_pieces(text: bytes) -> Iterator[bytes]:
    """A text in pieces, which a tokenizer reads in less memory."""
    return (text[start : start + PIECE] for start in range(0, len(text), PIECE))
