"""The version of the format of a workdir, which its config.json and every checkpoint carry.

    1  until November 2026, without a version. Fields and encodings may have former names
       (`nope_jax.encodings.former_names`); checkpoints consist of `params`, `opt_state` and, later, `skips`.
    2  config.json and the metadata of checkpoints say `format` and `nope_jax`, the version that wrote them. Checkpoints
       may have `ema`.

All of them are read. A change that this code could not tell from what is there already needs the next number.
"""

from collections.abc import Mapping
from typing import Any

VERSION = "0.1.0"
"""The version of nope_jax, as in pyproject.toml."""
FORMAT = 2


def stamp() -> dict[str, Any]:
    """What is written beside the contents of config.json and of a checkpoint."""
    return {"format": FORMAT, "nope_jax": VERSION}


def check_format(found: Mapping[str, Any], what: object) -> None:
    """Check that something with this stamp can be read; what has none is of format 1.

    Raises:
        ValueError: it is of a later format; the message says which version wrote it.
    """
    written = found.get("format", 1)
    if not isinstance(written, int) or written < 1:
        raise ValueError(f"{what}: format must be a number from 1 to {FORMAT}, not {written!r}")
    if written > FORMAT:
        writer = found.get("nope_jax", "of an unknown version")
        raise ValueError(
            f"{what} was written by nope_jax {writer} in format {written}; this is nope_jax {VERSION}, which reads "
            f"formats 1 to {FORMAT}: use nope_jax {writer} or later"
        )
