"""The validation split: what a dataset says it is, or a share of the documents, a tenth unless `data.split` says."""

import hashlib
from collections.abc import Collection
from typing import NamedTuple

from nope_jax.config import DataConfig
from nope_jax.data.documents import Split

VALIDATION_SHARE = 0.1


def name_hash(name: str) -> float:
    """A hash of a name, uniform in [0, 1)."""
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape")).digest()[:6]) / 2**48


def is_validation(name: str) -> bool:
    return name_hash(name) < VALIDATION_SHARE


class Part(NamedTuple):
    """The documents of a source that make up a split of a run."""

    split: Split
    share: float | None = None
    """The share of the documents held out as validation; None: `data.split` is not a share."""
    named: str | None = None
    """The split of the dataset that is validation; None: `data.split` is not a name."""
    whole: bool = False
    """All documents: validation has a source of its own."""

    def refuse_name(self, source: str) -> None:
        """Refuse the name of a split for a source that has none."""
        if self.named is not None and not (self.whole and self.split == "train"):
            raise ValueError(f"data.split {self.named!r} is the name of a split, but {source} has no named splits")

    def choose(self, splits: Collection[str], source: str) -> tuple[str, str | None]:
        """Choose among the splits of a dataset: the one to train on, and the one that is validation.

        A dataset with a single split trains on it, whatever its name. The validation split is None if it is a share of
        the one to train on, and both are the same if `whole` and the dataset has no other.

        Raises:
            ValueError: there is no split to train on, or none of the given name.
        """
        train = next(iter(splits)) if len(splits) == 1 else "train"
        if train not in splits and not (self.whole and self.split == "validation"):
            raise ValueError(f"{source} has no split train, only {', '.join(splits)}")
        if self.named is not None and not (self.whole and self.split == "train"):
            if self.named not in splits:
                raise ValueError(f"data.split {self.named!r} is no split of {source}, which has {', '.join(splits)}")
            if self.named == train and not self.whole:
                raise ValueError(f"data.split {self.named!r} is the split of {source} that is trained on")
            return train, self.named
        if "validation" in splits and train != "validation" and self.share is None:
            return train, "validation"
        if self.whole and self.split == "validation" and len(splits) > 1:
            raise ValueError(f"{source} has no split validation: name one of {', '.join(splits)} as data.split")
        return train, train if self.whole else None


def part_of(config: DataConfig, split: Split) -> Part:
    """The part of its source that a split of a run consists of."""
    named = config.split if isinstance(config.split, str) else None
    share = None if named is not None else config.split
    return Part(split, share, named, whole=config.validation_source is not None)  # type: ignore[arg-type]
