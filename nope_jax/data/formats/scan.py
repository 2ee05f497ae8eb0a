"""Finds the documents of a format: reads every file once, and decides which documents are validation.

From then on, a document is identified by a digest of its text, not by the path or time of its file. For large corpora
the result is kept under data.dir and memory-mapped.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
from tqdm import tqdm

from nope_jax.data.documents import Documents, Split
from nope_jax.data.formats.format import LEFT_OUT, SPAN, Format
from nope_jax.data.splits import VALIDATION_SHARE, Part
from nope_jax.data.workers import in_processes, locked, replaced

KEPT = 2**30
"""Total size, in bytes, from which what was found is kept under data.dir, and files are read in groups of this size."""


class _Split(NamedTuple):
    """What is known about a split."""

    documents: np.ndarray
    """SPAN of each."""
    fingerprint: str
    num_bytes: int
    notes: tuple[str, ...]


def scanned_documents(format: Format, part: Part, folder: Path, workers: int = 1) -> Documents:
    """Find the documents of one split.

    Args:
        format: Where to look.
        part: Which of its documents.
        folder: Where the result of a large scan is kept.
        workers: Number of processes that read; with 1, this process does.

    Raises:
        ValueError: there are none, or something cannot be read.
    """
    share = None if part.whole else part.share or VALIDATION_SHARE
    large = sum(unit.size for unit in format.units) > KEPT
    found = _kept(format, share, folder, workers)[part.split] if large else _divided(format, share)[part.split]
    documents, units = found.documents, format.units

    def read(indices: Iterable[int]) -> Iterator[Iterable[bytes]]:
        spans = (documents[index] for index in indices)
        for unit, group in itertools.groupby(spans, lambda span: span["unit"]):
            yield from format.read(units[unit], ((int(span["start"]), int(span["stop"])) for span in group))

    return Documents(
        len(documents),
        found.num_bytes,
        read,
        lambda index: _place(format, documents[index]),
        lambda: np.ascontiguousarray(documents["digest"]),
        [part.split, found.fingerprint],
        (*format.notes, *found.notes),
    )


@functools.lru_cache(maxsize=8)
def _divided(format: Format, share: float | None) -> dict[Split, _Split]:
    sizes = sum(unit.size for unit in format.units)
    with _bar(sizes) as bar:
        return _divide(format, _scan(format, range(len(format.units)), bar.update), share)


def _kept(format: Format, share: float | None, folder: Path, workers: int) -> dict[Split, _Split]:
    """As `_divided`, from files in `folder` that are written if they are not there."""
    scan = _key(type(format).__name__, format.units, format.settings)
    kept = {split: folder / f"{_key(scan, share)}.{split}.spans.npy" for split in get_args(Split)}
    if not all(map(_is_complete, kept.values())):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f"{scan}.lock"):
            if not all(map(_is_complete, kept.values())):
                _keep(format, share, folder, scan, kept, workers)
    result = {}
    for split, path in kept.items():
        fingerprint, num_bytes, notes = json.loads(path.with_suffix(".json").read_text())
        result[split] = _Split(np.load(path, mmap_mode="r"), fingerprint, num_bytes, tuple(notes))
    return result


def _is_complete(kept: Path) -> bool:
    return kept.with_suffix(".json").exists()


def _keep(format: Format, share: float | None, folder: Path, scan: str, kept: dict[Split, Path], workers: int) -> None:
    for left in folder.glob(f"{scan}.*.unfinished"):
        left.unlink(missing_ok=True)
    groups = _groups(format)
    files = [folder / f"{scan}.{i:05}-of-{len(groups):05}.spans.npy" for i in range(len(groups))]
    tasks = [_Task(format, *pair) for pair in zip(groups, files, strict=True) if not pair[1].exists()]
    with _bar(sum(task.size for task in tasks)) as bar:
        if workers == 1 or len(tasks) < 2:
            for task in tasks:
                _scan_group(task, bar.update)
        else:
            for task, _ in in_processes(_scan_group, tasks, workers):
                bar.update(task.size)
    for split, found in _divide(format, np.concatenate([np.load(file) for file in files]), share).items():
        with replaced(kept[split]) as unfinished, unfinished.open("wb") as file:
            np.save(file, found.documents)
        with replaced(kept[split].with_suffix(".json")) as unfinished:  # written last: the rest is complete
            unfinished.write_text(json.dumps([found.fingerprint, found.num_bytes, found.notes]))
    for path in files:
        path.unlink()


class _Task(NamedTuple):
    """Units to scan, and where the result goes."""

    format: Format
    units: range
    file: Path

    @property
    def size(self) -> int:
        return sum(self.format.units[i].size for i in self.units)


def _groups(format: Format) -> list[range]:
    """Consecutive units of about KEPT bytes."""
    ends = np.cumsum([unit.size for unit in format.units])
    firsts = np.flatnonzero(np.diff((ends - ends[0]) // max(KEPT, 1), prepend=-1))
    return [range(*pair) for pair in itertools.pairwise([*firsts.tolist(), len(ends)])]


def _scan_group(task: _Task, advance: Callable[[int], Any] = lambda num_bytes: None) -> None:
    spans = _scan(task.format, task.units, advance)
    with replaced(task.file) as unfinished, unfinished.open("wb") as file:
        np.save(file, spans)


def _scan(format: Format, units: range, advance: Callable[[int], Any]) -> np.ndarray:
    def spans() -> Iterator[tuple[int, ...]]:
        for number in units:
            for span in format.find(format.units[number], advance):
                yield number, *span

    try:
        return np.fromiter(spans(), SPAN)
    except ValueError as error:
        raise ValueError(f"{format.source}: {error}") from error


def _divide(format: Format, spans: np.ndarray, share: float | None) -> dict[Split, _Split]:
    """Divide documents between the splits, each text once; with `share` None, both have all."""
    left_out, spans = spans[spans["size"] == LEFT_OUT], spans[spans["size"] != LEFT_OUT]
    if not len(spans):
        raise ValueError(f"{format.source} has no text: {format.none_found(left_out)}")
    chosen = np.sort(np.unique(spans["digest"], return_index=True)[1])
    documents, repeated = spans[chosen], np.delete(spans, chosen)
    notes = []
    if len(left_out):
        first = _place(format, left_out[0])
        notes.append(f"{format.source}: {len(left_out):,} {format.left_out} left out, {first} the first")
    if len(repeated):
        first, original = repeated[0], documents[documents["digest"] == repeated["digest"][0]][0]
        notes.append(
            f"{format.source}: {len(repeated):,} documents with the text of another left out, {_place(format, first)} "
            f"the first, which repeats {_place(format, original)}"
        )
    if share is None:
        divided = dict.fromkeys(get_args(Split), documents)
    elif any(unit.split for unit in format.units):
        sides = np.array([unit.split == "validation" for unit in format.units])[documents["unit"]]
        divided = {split: documents[sides == (split == "validation")] for split in get_args(Split)}
    elif len(documents) == 1:
        divided = {split: format.cut(documents, split, share) for split in get_args(Split)}
    else:
        hashes = format.hashes(documents)
        count = min(max(int((hashes < share).sum()), 1), len(documents) - 1)
        validation = np.zeros(len(documents), bool)
        validation[np.argsort(hashes, kind="stable")[:count]] = True
        divided = {split: documents[validation == (split == "validation")] for split in get_args(Split)}
    return {
        split: _Split(
            part,
            hashlib.sha256(part["digest"].tobytes() + part["size"].tobytes()).hexdigest(),
            int(part["size"].sum()),
            tuple(notes),
        )
        for split, part in divided.items()
    }


def _place(format: Format, span: np.void) -> str:
    """Where a document is, for messages."""
    return format.locate(format.units[span["unit"]], int(span["start"]))


def _key(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


def _bar(total: int) -> tqdm:
    return tqdm(desc="Reading", total=total, unit="B", unit_scale=True, disable=None, delay=1, leave=False)
