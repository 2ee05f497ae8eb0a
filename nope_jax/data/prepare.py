"""Tokenizes a corpus into files, once, on all cores and in little memory.

A split is tokenized in parts of about PART bytes of text, which are then joined. A document is always in one part, but
is never held in memory whole. After an interruption, preparation continues with the missing parts. If two processes
prepare the same split, the second waits and finds it done.
"""

import array
import functools
import hashlib
import io
import itertools
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer
from tqdm import tqdm

from nope_jax.config import DataConfig
from nope_jax.data.documents import Documents, Split
from nope_jax.data.sources import SPLITS, check_apart, data_dir, find_documents, is_task, members, source_of
from nope_jax.data.tokenizers import Tokenizer, load_tokenizer, tokenizer_digest
from nope_jax.data.workers import in_processes, locked, replaced
from nope_jax.paths import size_of_bytes

PART = 2**28
"""Bytes of text that one worker tokenizes at a time, rounded to the end of a document."""


def prepare(config: DataConfig, workers: int) -> None:
    """Write the tokens of both splits of a config's data under `data.dir`, for `load_corpus`.

    Args:
        config: Sources, dir and tokenizer are used.
        workers: Number of processes that read and tokenize; with 1, this process does.

    Raises:
        ValueError: as `load_corpus`, or the sources need no preparation.
        OSError: the files cannot be written.
    """
    wanted = [(member, split) for split in SPLITS for member in members(config, split) if not is_task(member, split)]
    if not wanted:
        raise ValueError(f"data.source {config.source} is made at the start of a run: there is nothing to prepare")
    check_apart(config, workers)
    for member, split in wanted:
        prepare_split(member, split, workers)


def prepare_split(config: DataConfig, split: Split, workers: int) -> None:
    """Write the tokens of one split of a single source."""
    tokenizer = load_tokenizer(config.tokenizer, config.separator_token)  # first: a wrong one is said at once
    documents = find_documents(config, split, workers)
    name = f"{source_of(config, split).name}, {split}"
    tokens_file, offsets_file = token_files(config, documents)
    count = min(documents.size, math.ceil(documents.num_bytes / PART) or 1)
    cuts = [documents.size * i // count for i in range(count + 1)]
    ranges = [range(*pair) for pair in itertools.pairwise(cuts)]
    parts = [tokens_file.with_suffix(f".{i:05}-of-{count:05}.tokens") for i in range(count)]

    for note in documents.notes:
        say_once(note)
    tokens_file.parent.mkdir(parents=True, exist_ok=True)
    with locked(tokens_file.with_suffix(".lock")):
        if offsets_file.exists():
            print(f"{name}: prepared in {tokens_file}", file=sys.stderr)
            return
        for left in tokens_file.parent.glob(f"{tokens_file.stem}.*.unfinished"):
            left.unlink(missing_ok=True)
        missing = [i for i, part in enumerate(parts) if not part.with_suffix(".npy").exists()]
        what = f"{name}: {documents.size:,} documents, {size_of_bytes(documents.num_bytes)}"
        print(f"{what}; parts to tokenize: {len(missing)}, processes: {workers}", file=sys.stderr)
        tasks = [_Task(config, split, ranges[i], parts[i], documents.fingerprint) for i in missing]
        share = documents.num_bytes // count
        with tqdm(total=len(missing) * share, unit="B", unit_scale=True, disable=None) as bar:
            undecodable = list(_tokenize_parts(tasks, workers, share, bar.update))
        if indices := sorted(itertools.chain(*undecodable)):
            first = documents.name(indices[0])
            print(
                f"{name}: {len(indices):,} documents are not UTF-8, {first} the first: each invalid byte is read as "
                "U+FFFD",
                file=sys.stderr,
            )
        dtype = token_dtype(tokenizer)
        offsets = _join(parts, tokens_file, dtype.itemsize)
        digest_file = digest_file_of(tokens_file)
        digest_file.unlink(missing_ok=True)
        with tokens_file.open("rb") as tokens:  # read, since a memory map would count as memory in use
            digest = digest_of(iter(lambda: tokens.read(2**20), b""), offsets)
        digest_file.write_text(digest + "\n")
        with replaced(offsets_file) as unfinished, unfinished.open("wb") as file:
            np.save(file, offsets)  # written last: if this file exists, the tokens are complete
        for part in parts:
            part.with_suffix(".npy").unlink()
        print(f"{name}: {offsets[-1]:,} tokens in {tokens_file}", file=sys.stderr)


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The smallest unsigned dtype for the tokenizer's tokens."""
    return np.min_scalar_type(tokenizer.vocab_size - 1)


def token_files(config: DataConfig, documents: Documents) -> tuple[Path, Path]:
    """Paths of the tokens and of the offsets of documents, which exist once they are prepared.

    The names depend on the content of the documents and the tokenizer, not on their paths, so the files can be copied
    to another machine.
    """
    fingerprint = hashlib.sha256(json.dumps(documents.fingerprint).encode())
    file = Path(config.tokenizer).expanduser()
    is_file = config.tokenizer != "bytes" and file.is_file()
    fingerprint.update(file.read_bytes() if is_file else tokenizer_digest(config.tokenizer).encode())
    if config.separator_token is not None:
        fingerprint.update(f" separated by {config.separator_token}".encode())
    tokens_file = data_dir(config) / "tokens" / f"{fingerprint.hexdigest()[:32]}.tokens"
    return tokens_file, tokens_file.with_suffix(".npy")


def digest_file_of(tokens_file: Path) -> Path:
    """Path of the digest of prepared tokens, stored so that a large file need not be read completely at each start."""
    return tokens_file.with_suffix(".sha256")


def digest_of(tokens: Iterable[bytes | memoryview], offsets: Integer[np.ndarray, "boundaries"]) -> str:
    """SHA-256 of the tokens, given in pieces, and document boundaries, independent of file names and locations."""
    content = hashlib.sha256(np.ascontiguousarray(offsets, np.int64).data)
    for piece in tokens:
        content.update(piece)
    return content.hexdigest()


class Tokenized(NamedTuple):
    """The result of writing the tokens of documents."""

    offsets: Integer[np.ndarray, "boundaries"]
    """The start of each document's tokens in the file, and the end of the last."""
    undecodable: list[int]
    """Indices of the documents that are not UTF-8, if the tokenizer reads characters."""


def tokenize(
    documents: Documents,
    indices: range,
    config: DataConfig,
    file: io.BufferedIOBase,
    advance: Callable[[int], Any] = lambda num_bytes: None,
) -> Tokenized:
    """Write the tokens of some documents to a file, each followed by the separator.

    Args:
        documents: Documents of a split.
        indices: Which of them to write.
        config: The tokenizer is used.
        file: File to write to.
        advance: Called with the number of text bytes read since the last call.
    """
    tokenizer = load_tokenizer(config.tokenizer, config.separator_token)
    dtype = token_dtype(tokenizer)
    offsets, undecodable = array.array("q", [0]), []

    def watched(pieces: Iterable[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            yield piece
            advance(len(piece))

    for index, pieces in zip(indices, documents.read(indices), strict=True):
        count = replaced = 0
        for encoded in tokenizer.encode_pieces(watched(pieces)):
            file.write(encoded.tokens.astype(dtype, copy=False).data)
            count += len(encoded.tokens)
            replaced += encoded.undecodable
        file.write(dtype.type(tokenizer.separator).tobytes())
        offsets.append(offsets[-1] + count + 1)
        if replaced:
            undecodable.append(index)
    return Tokenized(np.frombuffer(offsets, np.int64), undecodable)


@functools.cache
def say_once(line: str) -> None:
    """Print a line to stderr, once per process."""
    print(line, file=sys.stderr)


class _Task(NamedTuple):
    """A part to tokenize."""

    config: DataConfig
    split: Split
    indices: range
    file: Path
    fingerprint: Any
    """Fingerprint of the documents, to check those that a worker finds."""


def _tokenize_parts(
    tasks: Sequence[_Task], workers: int, share: int, advance: Callable[[int], Any]
) -> Generator[list[int]]:
    """Yield the non-UTF-8 documents of each finished part; advance by bytes, or by one share per part."""
    if workers == 1 or len(tasks) < 2:
        for task in tasks:
            yield _tokenize_part(task, advance)
        return
    for _, undecodable in in_processes(_tokenize_part, tasks, workers):
        yield undecodable
        advance(share)


def _tokenize_part(task: _Task, advance: Callable[[int], Any] = lambda num_bytes: None) -> list[int]:
    documents = find_documents(task.config, task.split)  # per part, to keep few of its files open at a time
    if documents.fingerprint != task.fingerprint:
        raise ValueError(f"{source_of(task.config, task.split)} has changed during preparation: start again")
    with replaced(task.file) as unfinished, unfinished.open("wb") as file:
        offsets, undecodable = tokenize(documents, task.indices, task.config, file, advance)
    with replaced(task.file.with_suffix(".npy")) as unfinished, unfinished.open("wb") as file:
        np.save(file, offsets)
    return undecodable


def _join(parts: Sequence[Path], tokens_file: Path, itemsize: int) -> np.ndarray:
    """Append all parts to one file, deleting each once appended; return the offsets of all documents.

    The file has a temporary name until it is complete, so readers never see a file that is being written.

    Raises:
        OSError: a file cannot be written, or deleted parts are missing from the file.
    """
    offsets = [np.load(part.with_suffix(".npy"), mmap_mode="r") for part in parts]
    ends = np.cumsum([0, *(part[-1] for part in offsets)])
    joined = sum(not part.exists() for part in parts)  # appended by a process that was killed
    joining = tokens_file.with_suffix(".joining")
    if joined == len(parts) and not joining.exists() and tokens_file.exists():  # killed just before the end
        tokens_file.replace(joining)
    with joining.open("ab") as file:
        if file.tell() < ends[joined] * itemsize:
            raise OSError(f"{joining} lacks what parts held that are gone: remove {tokens_file.stem}.* and try again")
        file.truncate(int(ends[joined]) * itemsize)
        for part in parts[joined:]:
            with part.open("rb") as source:
                shutil.copyfileobj(source, file, 2**20)
            file.flush()
            os.fsync(file.fileno())
            part.unlink()
    joining.replace(tokens_file)
    return np.concatenate([[0], *(part[1:] + start for part, start in zip(offsets, ends, strict=False))])
