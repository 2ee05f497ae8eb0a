"""The validation split: a tenth of the documents, each chosen by the hash of its own name alone."""

import hashlib

VALIDATION_SHARE = 0.1


def name_hash(name: str) -> float:
    """A hash of a name, uniform in [0, 1)."""
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape")).digest()[:6]) / 2**48


def is_validation(name: str) -> bool:
    return name_hash(name) < VALIDATION_SHARE
