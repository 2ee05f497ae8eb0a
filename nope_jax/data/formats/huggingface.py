"""`hf:NAME_OR_FOLDER`: a dataset that Hugging Face `datasets` loads, with the column `data.text_field`."""

import contextlib
import dataclasses
import functools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from nope_jax.config import DataConfig
from nope_jax.data.documents import Split
from nope_jax.data.formats import files
from nope_jax.data.formats.format import Format, Found, Unit
from nope_jax.data.formats.parquet import ROWS, find_column, found, texts_of
from nope_jax.data.splits import Part


@dataclasses.dataclass(frozen=True)
class HuggingFace(Format):
    """Splits of a dataset in Arrow files, which are memory-mapped. A document is a row."""

    dataset: str = ""
    columns: tuple[str, ...] = ("text",)
    """The names of the column with the texts, of which a split's first is taken."""

    usage: ClassVar[str] = "NAME_OR_FOLDER"

    @classmethod
    def open(cls, name: str, part: Part, config: DataConfig, source: str) -> "HuggingFace":
        splits = _load(name, source)
        train, validation = part.choose(splits, source)
        sides: dict[str, Split | None] = {train: None}
        if part.whole:
            sides = {str(train if part.split == "train" else validation): None}
        elif validation is not None:
            sides = {validation: "validation", train: "train"}  # of texts in both, that of validation is kept
        for split in sides:
            find_column(splits[split].features.arrow_schema, config.text_fields, f"{source}, split {split},")
        units = (
            Unit(split, splits[split].data.nbytes, splits[split]._fingerprint, split, side)
            for split, side in sides.items()
        )
        return cls(source, tuple(units), (name, config.text_field), (), name, config.text_fields)

    def find(self, unit: Unit, advance: Callable[[int], Any]) -> Iterator[Found]:
        rows = self._rows(unit)
        for start in range(0, len(rows), ROWS):
            for row, text in enumerate(self._texts(rows, start), start):
                yield found(row, text)
            advance(unit.size * min(ROWS, len(rows) - start) // len(rows))

    def read(self, unit: Unit, spans: Iterable[tuple[int, int]]) -> Iterator[Iterable[bytes]]:
        rows, first = self._rows(unit), 0
        texts: list[bytes | None] = []
        for row, _ in spans:
            if not first <= row < first + len(texts):
                first, texts = row // ROWS * ROWS, self._texts(rows, row // ROWS * ROWS)
            yield files.in_pieces(texts[row - first] or b"")

    def locate(self, unit: Unit, start: int) -> str:
        return f"row {start + 1} of the split {unit.name} of {self.source}"

    def _rows(self, unit: Unit) -> Any:
        split = _load(self.dataset, self.source)[unit.name]
        column = find_column(split.features.arrow_schema, self.columns, self.source)
        return split.select_columns([column]).with_format("arrow")

    def _texts(self, rows: Any, start: int) -> list[bytes | None]:
        try:
            return texts_of(rows[start : start + ROWS].column(0))
        except OSError as error:
            raise ValueError(f"{self.source} cannot be read: {error}") from error


@functools.lru_cache(maxsize=8)
def _load(name: str, source: str) -> dict[str, Any]:
    """The splits of a dataset, by name; a dataset without splits is one."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise ValueError(f"{source} needs a package that is not installed: pip install datasets") from None
    folder = Path(name).expanduser()
    saved = any((folder / file).is_file() for file in ("state.json", "dataset_dict.json"))
    repository, _, config = (str(folder), "", "") if folder.exists() else name.partition(":")
    if not folder.exists():
        print(f"{source}: loading from the cache or the hub", file=sys.stderr)
    with _quiet(datasets):
        try:
            loaded = datasets.load_from_disk(folder) if saved else datasets.load_dataset(repository, config or None)
        except Exception as error:  # of the hub, the network, the file system and Arrow
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{source} cannot be loaded: {type(error).__name__}: {reason}") from error
    return dict(loaded) if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Leave out warnings that the hub is tried again and, where stderr is no terminal, progress bars."""
    logger = logging.getLogger("huggingface_hub")
    level, bars = logger.level, datasets.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
