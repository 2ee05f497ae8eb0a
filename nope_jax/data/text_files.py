"""The documents of `text:PATH_OR_GLOB`: files, or sections between separators.

All files are read once to find out where documents start, which ones are duplicates, and which files are not text. From
then on a document is identified by a digest of its text, not by the path or time of its file.
"""

import bz2
import contextlib
import functools
import glob
import gzip
import hashlib
import itertools
import json
import lzma
import os
import stat
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from nope_jax.data.documents import Documents, Split
from nope_jax.data.splits import VALIDATION_SHARE, name_hash

PIECE = 2**20
"""Bytes read at a time."""

HEAD = 2**13
"""A file with a NUL among its first HEAD bytes is binary."""

KEPT = 2**30
"""Total file size, in bytes, from which the result of a scan is cached under data.dir."""

COMPRESSIONS: dict[bytes, Callable[[BinaryIO], Any]] = {
    b"\x1f\x8b\x08": lambda file: gzip.GzipFile(fileobj=file, mode="rb"),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
}
"""Readers of compressed files, by the first bytes of the file."""

SPAN = np.dtype([("file", "i4"), ("start", "i8"), ("stop", "i8"), ("digest", "u8")])
"""The location of a document: byte range in a decompressed file."""


def text_documents(
    pattern: str, split: Split, *, separator: str | None = None, any_bytes: bool = False, data_dir: Path
) -> Documents:
    """Find the documents of one split of the files that match a path or glob.

    Args:
        pattern: A file, a glob, or a folder, which stands for all files under it that are not hidden.
        split: Which split to return.
        separator: Separates the documents of a file; None: each file is one document.
        any_bytes: Whether to read a single file even if it is binary.
        data_dir: Where scans of large inputs are cached.

    Raises:
        ValueError: no file matches, none is text, or one cannot be decompressed.
    """
    files, odd = _find_files(pattern)
    named = Path(pattern).expanduser().is_file()
    stats = tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files.values())
    try:
        spans, binary = _scan(stats, separator, any_bytes and named, data_dir / "tokens")
    except ValueError as error:
        raise ValueError(f"data.source text:{pattern}: {error}") from error
    paths, names = list(files.values()), list(files)
    if not len(spans):
        reason = f"{paths[binary[0]]} is binary" if binary else "it is empty"
        raise ValueError(f"data.source text:{pattern} has no text: {reason}")

    chosen = np.sort(np.unique(spans["digest"], return_index=True)[1])
    documents, repeated = spans[chosen], np.setdiff1d(np.arange(len(spans)), chosen)
    left_out = {
        "files that cannot be read (a broken link, or no regular file)": odd,
        "binary files (a NUL byte near the start)": [paths[i] for i in binary],
        "documents with the text of another": [paths[i] for i in spans["file"][repeated]],
    }
    notes = tuple(
        f"data.source text:{pattern}: {len(where):,} {what} left out, {where[0]} the first"
        for what, where in left_out.items()
        if where
    )
    if len(documents) == 1:
        documents = _share(documents, paths, split)
    else:
        if separator is None:
            hashes = np.array([name_hash(names[i]) for i in documents["file"]])
        else:
            hashes = documents["digest"] / 2**64
        tenth = int((hashes < VALIDATION_SHARE).sum())
        validation = np.zeros(len(documents), bool)
        validation[np.argsort(hashes, kind="stable")[: min(max(tenth, 1), len(documents) - 1)]] = True
        documents = documents[validation == (split == "validation")]
    lengths = documents["stop"] - documents["start"]
    return Documents(
        len(documents),
        int(lengths.sum()),
        functools.partial(_read, documents, paths),
        lambda index: str(paths[documents["file"][index]]),
        [split, hashlib.sha256(documents["digest"].tobytes() + lengths.tobytes()).hexdigest()],
        notes,
    )


# Finding files


def _find_files(pattern: str) -> tuple[dict[str, Path], list[Path]]:
    """Return the matching regular files by name, each once and in order, and the other matches.

    A name is the path relative to the folder, or to the part of the glob before its first wildcard, with links
    resolved. (A file outside it is named by the first path that leads to it.)
    """
    path = Path(pattern).expanduser()
    if path.is_dir():
        root, found = path, _expand(Path(glob.escape(str(path)), "**"))
    elif os.path.lexists(path):
        root, found = path.parent, iter([path])
    else:
        fixed = next((i for i, part in enumerate(path.parts) if glob.has_magic(part)), len(path.parts))
        root, found = Path(*path.parts[:fixed]), _expand(path)
    real_root = Path(os.path.realpath(root))
    names: dict[Path, Path] = {}
    odd = []
    for file in sorted(set(found)):
        try:
            mode = file.stat().st_mode
        except PermissionError:
            raise
        except OSError:
            mode = 0  # a broken link
        if stat.S_ISREG(mode):
            real = Path(os.path.realpath(file))
            inside = real.is_relative_to(real_root)
            names.setdefault(real, real.relative_to(real_root) if inside else file.relative_to(root))
        elif not stat.S_ISDIR(mode):
            odd.append(file)
    if not names:
        what = f"is no regular file: {odd[0]}" if odd else "matches no file"
        raise ValueError(f"data.source text:{pattern} {what}")
    return {name.as_posix(): real for real, name in sorted(names.items(), key=lambda item: item[1])}, odd


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


# Reading them


class _Found(NamedTuple):
    """The result of a scan."""

    spans: np.ndarray
    """SPAN of each document, in the order of the files."""
    binary: tuple[int, ...]
    """Indices of the files that are not text."""


@functools.lru_cache(maxsize=8)
def _scan(stats: tuple[tuple[str, int, int], ...], separator: str | None, any_bytes: bool, folder: Path) -> _Found:
    """Scan files, given as (path, size, time); the result of a large scan is cached in `folder`."""
    key = hashlib.sha256(json.dumps([stats, separator, any_bytes]).encode()).hexdigest()[:32]
    kept, total = folder / f"{key}.spans.npz", sum(size for _, size, _ in stats)
    if kept.exists():
        with np.load(kept) as arrays:
            return _Found(arrays["spans"], tuple(arrays["binary"].tolist()))
    binary: list[int] = []

    def watched(pieces: Iterator[bytes], file: BinaryIO, done: int) -> Iterator[bytes]:
        for piece in pieces:
            bar.update(done + file.tell() - bar.n)
            yield piece

    def spans() -> Iterator[tuple[int, int, int, int]]:
        done = 0
        for number, (path, size, _) in enumerate(stats):
            with open(path, "rb") as file:
                pieces = watched(_pieces(_decompressed(file, path), path), file, done)
                first = next(pieces, b"")
                if b"\0" in first[:HEAD] and not any_bytes:
                    binary.append(number)
                else:
                    for start, stop, digest in _cut(itertools.chain([first], pieces), separator):
                        yield number, start, stop, digest
            done += size

    with tqdm(desc="Reading", total=total, unit="B", unit_scale=True, disable=None, delay=1, leave=False) as bar:
        found = _Found(np.fromiter(spans(), SPAN), tuple(binary))
    if total > KEPT:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{key}.{uuid.uuid4().hex}.unfinished"
        with unfinished.open("wb") as file:
            np.savez(file, spans=found.spans, binary=np.array(found.binary, np.int64))
        unfinished.replace(kept)
    return found


def _cut(pieces: Iterable[bytes], separator: str | None) -> Iterator[tuple[int, int, int]]:
    """Yield start, stop and digest of each document of a file. Blank sections between separators are skipped."""
    between = separator.encode() if separator else b""
    start = position = 0
    digest, blank, held = hashlib.blake2b(digest_size=8), bool(between), b""
    for piece in pieces:
        *texts, last = (held + piece).split(between) if between else [held + piece]
        for text in texts:
            digest.update(text)
            stop = position + len(text)
            if not blank or (text and not text.isspace()):
                yield start, stop, int.from_bytes(digest.digest(), "big")
            start = position = stop + len(between)
            digest, blank = hashlib.blake2b(digest_size=8), True
        kept = max(0, len(last) - len(between) + 1) if between else len(last)
        text, held = last[:kept], last[kept:]  # hold back a possible beginning of a separator
        digest.update(text)
        blank = blank and (not text or text.isspace())
        position += len(text)
    digest.update(held)
    if not blank or (held and not held.isspace()):
        yield start, position + len(held), int.from_bytes(digest.digest(), "big")


def _share(document: np.ndarray, paths: list[Path], split: Split) -> np.ndarray:
    """The part of a single document that belongs to a split, cut between two UTF-8 characters."""
    (start,), (stop,) = document["start"], document["stop"]
    cut = start + round(int(stop - start) * (1 - VALIDATION_SHARE))
    path = paths[document["file"][0]]
    with path.open("rb") as file:
        text = _decompressed(file, path)
        text.seek(max(start, cut - 3))
        around = text.read(min(stop, cut + 1) - max(start, cut - 3))
    while start < cut < stop and around and around[-1] & 0xC0 == 0x80:
        cut, around = cut - 1, around[:-1]
    share = document.copy()
    share["start" if split == "validation" else "stop"] = cut
    return share


def _read(documents: np.ndarray, paths: list[Path], indices: Iterable[int]) -> Iterator[Iterable[bytes]]:
    with contextlib.ExitStack() as stack:
        opened, text = None, None
        for index in indices:
            number, start, stop, _ = documents[index].tolist()
            if number != opened:
                stack.close()
                opened, text = number, _decompressed(stack.enter_context(paths[number].open("rb")), paths[number])
            yield _pieces(text, paths[number], start, stop)


def _decompressed(file: BinaryIO, path: str | Path) -> Any:
    """A seekable reader of the file's text, decompressed if necessary."""
    head = file.read(6)
    file.seek(0)
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        raise ValueError(f"{path} is compressed with Zstandard, which is not supported: decompress it first (zstd -d)")
    return next((opened(file) for magic, opened in COMPRESSIONS.items() if head.startswith(magic)), file)


def _pieces(text: Any, path: str | Path, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Yield the text of a file between two offsets."""
    position = start
    try:
        text.seek(start)
        while piece := text.read(PIECE if stop is None else min(PIECE, stop - position)):
            yield piece
            position += len(piece)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path} cannot be decompressed, it is truncated or broken: {error}") from error
    if stop is not None and position < stop:
        raise ValueError(f"{path} has changed since it was first read")
