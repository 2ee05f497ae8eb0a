"""`tfds:NAME`: a dataset of TensorFlow Datasets, stored as ArrayRecord under data.dir, such as `python_stdlib`."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from nope_jax.config import DataConfig
from nope_jax.data.documents import Documents
from nope_jax.data.formats.format import TextDigest
from nope_jax.data.splits import VALIDATION_SHARE, Part

TEXT_FEATURES = ("text", "book_text")
"""What `data.text_field` text means here; PG-19 has the second."""


def open_dataset(name: str, data_dir: Path, source: str) -> tfds.core.DatasetBuilder:
    """Find a prepared dataset.

    Raises:
        ValueError: there is none in data.dir, or several, or it is not stored as ArrayRecord.
    """
    folder = data_dir / name.replace(":", "/")
    found = sorted(file.parent for file in folder.glob("**/dataset_info.json"))
    found = [path for path in found if not path.name.startswith("incomplete.")]
    if len(found) != 1:
        others = [str(path.relative_to(data_dir)) for path in found]
        says = f"is one of several, {', '.join(others)}: name one" if found else f"does not lie in data.dir {data_dir}"
        raise ValueError(f"{source} {says}")
    builder = tfds.builder_from_directory(found[0])
    if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(f"{source} is not stored as ArrayRecord; prepare it with file_format='array_record'")
    return builder


def dataset_documents(builder: tfds.core.DatasetBuilder, part: Part, config: DataConfig, source: str) -> Documents:
    """The documents of one split of a prepared dataset, in its order.

    Raises:
        ValueError: it has no such split, or no such feature.
    """
    info = builder.info
    features: Any = info.features
    names = [*itertools.chain(*(TEXT_FEATURES if n == TEXT_FEATURES[0] else (n,) for n in config.text_fields))]
    feature = next((name for name in names if name in features), None)
    if feature is None:
        raise ValueError(f"{source} has no feature {' or '.join(names)}, only {', '.join(features)}")
    reads = _slice(info, part, source)
    records = builder.as_data_source(reads)

    def texts(indices: Iterable[int]) -> Iterator[list[bytes]]:
        try:
            for index in indices:
                yield [records[index][feature]]
        except RuntimeError as error:  # what array_record raises for a file that it cannot open
            raise OSError(f"the text of {info.full_name} cannot be read in data.dir ({error})") from error

    def digests() -> np.ndarray:
        every = tqdm(
            texts(range(len(records))), desc="Comparing", total=len(records), disable=None, delay=1, leave=False
        )
        return np.fromiter((TextDigest(text).value() for (text,) in every), np.uint64, len(records))

    whole = info.splits[reads.partition("[")[0]]  # TFDS has no size for a part of a split
    return Documents(
        len(records),
        whole.num_bytes * len(records) // max(1, whole.num_examples),
        texts,
        lambda index: f"document {index} of the split {reads} of {info.full_name}",
        digests,
        [info.full_name, feature, reads, len(records), whole.num_bytes, whole.shard_lengths],
    )


def _slice(info: tfds.core.DatasetInfo, part: Part, source: str) -> str:
    """What TFDS calls the documents of a part."""
    train, validation = part.choose(info.splits, source)
    if validation is not None:
        return train if part.split == "train" else validation
    if part.share is None:
        percent = f"{1 - VALIDATION_SHARE:.0%}"
        return f"{train}[:{percent}]" if part.split == "train" else f"{train}[{percent}:]"
    count = info.splits[train].num_examples
    first = min(max(1, round(count * (1 - part.share))), count - 1)
    return f"{train}[:{first}]" if part.split == "train" else f"{train}[{first}:]"
