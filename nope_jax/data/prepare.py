"""The tokens of a corpus, written once and for all, with all cores and little memory.

A split is tokenised in parts of PART bytes of text, which are then joined. What is interrupted goes on with the parts
that are whole; of two processes that prepare the same split, the second waits and finds it done.
"""

import contextlib
import fcntl
import itertools
import math
import multiprocessing
import os
import shutil
import signal
import sys
import uuid
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nope_jax.config import DataConfig
from nope_jax.data.corpora import Split, find_documents, token_dtype, token_files, tokenize
from nope_jax.data.tokenizers import load_tokenizer

PART = 2**28
"""Bytes of text that one worker tokenises at a time."""


def prepare(config: DataConfig, workers: int) -> None:
    """Writes the tokens of both splits of `data.source` under `data.dir`, where `load_corpus` finds them.

    Args:
        config: of which source, dir and tokenizer matter.
        workers: processes that tokenise; 1 does without any but this one.

    Raises:
        ValueError: as `load_corpus`, or nothing is to be prepared for this source.
        OSError: the files cannot be written.
    """
    if config.source.startswith("task:"):
        raise ValueError(f"data.source {config.source} is made at the start of a run: there is nothing to prepare")
    for split in ("train", "validation"):
        _prepare_split(config, split, workers)


def _prepare_split(config: DataConfig, split: Split, workers: int) -> None:
    documents = find_documents(config, split)
    tokens_file, offsets_file = token_files(config, documents)
    count = min(documents.size, math.ceil(documents.num_bytes / PART) or 1)
    cuts = [documents.size * i // count for i in range(count + 1)]
    ranges = [range(*pair) for pair in itertools.pairwise(cuts)]
    parts = [tokens_file.with_suffix(f".{i:05}-of-{count:05}.tokens") for i in range(count)]

    tokens_file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(tokens_file.with_suffix(".lock")):
        if offsets_file.exists():
            print(f"{config.source}, {split}: prepared in {tokens_file}", file=sys.stderr)
            return
        for left in tokens_file.parent.glob(f"{tokens_file.stem}.*.unfinished"):
            left.unlink(missing_ok=True)
        missing = [i for i, part in enumerate(parts) if not part.with_suffix(".npy").exists()]
        what = f"{config.source}, {split}: {documents.size:,} documents, {documents.num_bytes / 1e9:.1f} GB"
        print(f"{what}, in {len(missing)} parts with {workers} processes", file=sys.stderr)
        tasks = [(ranges[i], parts[i]) for i in missing]
        with (
            tqdm(total=len(missing), unit="part", disable=None) as bar,
            contextlib.closing(_tokenize_parts(config, split, tasks, workers)) as finished,
        ):
            for _ in finished:
                bar.update()
        offsets = _join(parts, tokens_file, token_dtype(load_tokenizer(config.tokenizer)).itemsize)
        with _replaced(offsets_file) as unfinished, unfinished.open("wb") as file:
            np.save(file, offsets)  # last: whoever finds them finds the tokens
        for part in parts:
            part.with_suffix(".npy").unlink()
        print(f"{config.source}, {split}: {offsets[-1]:,} tokens in {tokens_file}", file=sys.stderr)


def _tokenize_parts(
    config: DataConfig, split: Split, tasks: Sequence[tuple[range, Path]], workers: int
) -> Generator[None]:
    """Yields whenever one of the parts is whole."""
    if workers == 1 or len(tasks) < 2:
        for indices, part in tasks:
            _tokenize_part(config, split, indices, part)
            yield
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(tasks)), context, initializer=_ignore_interrupts) as pool:
        try:
            for done in as_completed([pool.submit(_tokenize_part, config, split, *task) for task in tasks]):
                done.result()
                yield
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; one line about it is enough


def _tokenize_part(config: DataConfig, split: Split, indices: range, part: Path) -> None:
    documents = find_documents(config, split)  # opened for each part anew, so that few of its files are open at a time
    with _replaced(part) as unfinished, unfinished.open("wb") as file:
        offsets = tokenize(documents, indices, config, file)
    with _replaced(part.with_suffix(".npy")) as unfinished, unfinished.open("wb") as file:
        np.save(file, offsets)


def _join(parts: Sequence[Path], tokens_file: Path, itemsize: int) -> np.ndarray:
    """Appends the tokens of all parts to one file, deleting each that is in it; returns the offsets of all documents.

    The file has another name until it is whole: a run may have tokenised a small split meanwhile and read its own.

    Raises:
        OSError: a file cannot be written, or parts are gone that are not in it.
    """
    offsets = [np.load(part.with_suffix(".npy"), mmap_mode="r") for part in parts]
    ends = np.cumsum([0, *(part[-1] for part in offsets)])
    joined = sum(not part.exists() for part in parts)  # by a process that was killed
    joining = tokens_file.with_suffix(".joining")
    if joined == len(parts) and not joining.exists() and tokens_file.exists():  # killed just before it was done
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


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """Yields a path to write to, moved onto `path` when the block ends without an error.

    No other has that name: a worker may live on for a while when the process that started it is killed.
    """
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.unfinished")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits until no other process is inside."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{path}: another process prepares this; waiting for it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
