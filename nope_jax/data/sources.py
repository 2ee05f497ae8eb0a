"""The sources that `data.source` and `data.validation_source` can name, and which documents of them a run reads."""

import dataclasses
import difflib
import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np

from nope_jax.config import DataConfig
from nope_jax.data.documents import Documents, Split
from nope_jax.data.formats import FORMATS
from nope_jax.data.formats.scan import scanned_documents
from nope_jax.data.splits import part_of
from nope_jax.data.tasks import TASKS
from nope_jax.paths import on_disk

SPLITS: tuple[Split, ...] = get_args(Split)


class Source(NamedTuple):
    """A source, and the field that names it."""

    field: str
    name: str

    def __str__(self) -> str:
        return f"{self.field} {self.name}"


def members(config: DataConfig, split: Split) -> list[DataConfig]:
    """The configs, of one source each, of the corpora that make up a split."""
    several = [dataclasses.replace(config, source=name, weights=None) for name in config.sources]
    return several[:1] if split == "validation" and config.validation_source is not None else several


def source_of(config: DataConfig, split: Split) -> Source:
    """The source of a split of a config that has a single one."""
    if split == "validation" and config.validation_source is not None:
        return Source("data.validation_source", config.validation_source)
    (name,) = config.sources
    return Source("data.source", name)


def describe(config: DataConfig, split: Split) -> str:
    """The sources of a split, for messages."""
    return " ".join(source_of(member, split).name for member in members(config, split))


def is_task(config: DataConfig, split: Split) -> bool:
    """Whether the source of a split is a task, which has no documents until they are generated."""
    return source_of(config, split).name.startswith("task:")


def find_documents(config: DataConfig, split: Split, workers: int = 1) -> Documents:
    """Find the documents of one split of a single source that has documents.

    Raises:
        ValueError: as `load_corpus`.
    """
    documents = _find_documents(config, split, workers)
    if not documents.size:
        raise ValueError(f"{source_of(config, split)} has no documents in its {split} split")
    return documents


def _find_documents(config: DataConfig, split: Split, workers: int) -> Documents:
    source, part, folder = source_of(config, split), part_of(config, split), data_dir(config)
    kind, _, name = source.name.partition(":")
    if kind in FORMATS and name:
        format = FORMATS[kind].open(name, part, config, str(source))
        return scanned_documents(format, part, folder / "tokens", workers)
    if source.name == "python_stdlib" or (kind == "tfds" and name):
        # Late, because TFDS takes a quarter of a second to import.
        from nope_jax.data import python_stdlib
        from nope_jax.data.formats import tfds

        builder = tfds.open_dataset(name, folder, str(source)) if name else python_stdlib.prepare(folder)
        return tfds.dataset_documents(builder, part, config, str(source))
    usages = [f"{kind}:{format.usage}" for kind, format in FORMATS.items()]
    near = difflib.get_close_matches(source.name, ["python_stdlib", *(f"task:{name}" for name in TASKS)], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(
        f"{source.field} must be python_stdlib, {', '.join(usages)}, tfds:NAME or task:NAME, not {source.name!r}{hint}"
    )


def check_apart(config: DataConfig, workers: int = 1) -> None:
    """Check that no document of the validation split is trained on, where sources are combined.

    Within a single source this follows from how it is divided. The result is kept under `data.dir`.

    Raises:
        ValueError: a text is in both; the message names it.
    """
    if config.validation_source is None and len(config.sources) == 1:
        return
    sides = {split: [c for c in members(config, split) if not is_task(c, split)] for split in SPLITS}
    for training in sides["train"]:
        trained = find_documents(training, "train", workers)
        for held_out in sides["validation"]:
            if held_out.validation_source is None and held_out.source == training.source:
                continue
            validation = find_documents(held_out, "validation", workers)
            pair = hashlib.sha256(json.dumps([trained.fingerprint, validation.fingerprint]).encode()).hexdigest()[:32]
            checked = data_dir(config) / "tokens" / f"{pair}.apart"
            if checked.exists():
                continue
            held, read = validation.digests(), trained.digests()
            shared = np.flatnonzero(np.isin(held, read))
            if len(shared):
                same = int(np.argmax(read == held[shared[0]]))
                raise ValueError(
                    f"{source_of(held_out, 'validation')} overlaps {source_of(training, 'train')}: {len(shared):,} of "
                    f"its validation documents are also trained on, {validation.name(int(shared[0]))} the first, which "
                    f"is {trained.name(same)}"
                )
            checked.parent.mkdir(parents=True, exist_ok=True)
            checked.touch()


def data_dir(config: DataConfig) -> Path:
    """Folder of prepared datasets and tokens."""
    folder = config.dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(on_disk(folder, "data.dir")).expanduser().absolute()
