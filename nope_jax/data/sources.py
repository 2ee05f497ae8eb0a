"""The sources that `data.source` can name, except tasks."""

import difflib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from nope_jax.config import DataConfig
from nope_jax.data import python_stdlib
from nope_jax.data.documents import Documents, Split
from nope_jax.data.tasks import TASKS
from nope_jax.data.text_files import text_documents
from nope_jax.paths import on_disk

TEXT_FEATURES = ("text", "book_text")
"""Features that may hold the documents of a TFDS dataset; PG-19 has the second."""


def find_documents(config: DataConfig, split: Split) -> Documents:
    """Find the documents of one split of a `data.source` that has documents.

    Raises:
        ValueError: as `load_corpus`.
    """
    documents = _find_documents(config, split)
    if not documents.size:
        raise ValueError(f"data.source {config.source} has no documents in its {split} split")
    return documents


def _find_documents(config: DataConfig, split: Split) -> Documents:
    kind, _, name = config.source.partition(":")
    if kind == "text" and name:
        any_bytes = config.tokenizer == "bytes"
        return text_documents(
            name, split, separator=config.document_separator, any_bytes=any_bytes, data_dir=data_dir(config)
        )
    if config.source == "python_stdlib":
        return _tfds_documents(python_stdlib.prepare(data_dir(config)), split)
    if kind == "tfds" and name:
        return _tfds_documents(_prepared_dataset(name, data_dir(config)), split)
    near = difflib.get_close_matches(config.source, ["python_stdlib", *(f"task:{name}" for name in TASKS)], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(
        f"data.source must be python_stdlib, text:PATH_OR_GLOB, tfds:NAME or task:NAME, not {config.source!r}{hint}"
    )


def data_dir(config: DataConfig) -> Path:
    """Folder of prepared datasets and tokens."""
    folder = config.dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return Path(on_disk(folder, "data.dir")).expanduser().absolute()


def _prepared_dataset(name: str, data_dir: Path) -> tfds.core.DatasetBuilder:
    folder = data_dir / name.replace(":", "/")
    found = sorted(file.parent for file in folder.glob("**/dataset_info.json"))
    found = [path for path in found if not path.name.startswith("incomplete.")]
    if len(found) != 1:
        others = [str(path.relative_to(data_dir)) for path in found]
        says = f"is one of several, {', '.join(others)}: name one" if found else f"does not lie in data.dir {data_dir}"
        raise ValueError(f"data.source tfds:{name} {says}")
    builder = tfds.builder_from_directory(found[0])
    if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(
            f"data.source tfds:{name} is not stored as ArrayRecord; prepare it with file_format='array_record'"
        )
    features: Any = builder.info.features
    if not set(TEXT_FEATURES) & set(features):
        raise ValueError(
            f"data.source tfds:{name} has no feature {' or '.join(TEXT_FEATURES)}, only {', '.join(features)}"
        )
    return builder


def _tfds_documents(builder: tfds.core.DatasetBuilder, split: Split) -> Documents:
    info = builder.info
    part: str = split
    if "validation" not in info.splits:
        part = "train[:90%]" if split == "train" else "train[90%:]"
    if "train" not in info.splits:
        raise ValueError(f"data.source {info.full_name} has no split train, only {', '.join(info.splits)}")
    features: Any = info.features
    feature = next(name for name in TEXT_FEATURES if name in features)
    source = builder.as_data_source(part)

    def texts(indices: Iterable[int]) -> Iterator[list[bytes]]:
        try:
            for index in indices:
                yield [source[index][feature]]
        except RuntimeError as error:  # what array_record raises for a file that it cannot open
            raise OSError(f"the text of {info.full_name} cannot be read in data.dir ({error})") from error

    whole = info.splits[part.partition("[")[0]]  # TFDS has no size for a part of a split
    return Documents(
        len(source),
        whole.num_bytes * len(source) // max(1, whole.num_examples),
        texts,
        lambda index: f"document {index} of {info.full_name}",
        [info.full_name, feature, part, len(source), whole.num_bytes, whole.shard_lengths],
    )
