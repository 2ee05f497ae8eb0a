"""A trained model under evaluation: its name, what it is, and what was measured of it."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from nope_jax import config as configs
from nope_jax.checkpoint import Checkpointer
from nope_jax.config import Config, EncodingSpec
from nope_jax.data import load_tokenizer
from nope_jax.encodings import ENCODINGS, Wrapper
from nope_jax.evaluation.curves import Curve


@dataclasses.dataclass
class Run:
    """One trained model: what it is, and its curve at each length, filled in as they are measured."""

    name: str
    encoding: str
    train_length: int
    max_length: int | None
    """Positions that its encoding can take; None: any number."""
    lengths: tuple[int, ...]
    """The lengths asked for, ascending."""
    curves: dict[int, Curve] = dataclasses.field(default_factory=dict)
    step: int | None = None
    """Of the checkpoint that was measured."""

    @property
    def possible(self) -> tuple[int, ...]:
        """The lengths that its encoding can take."""
        return tuple(n for n in self.lengths if self.max_length is None or n <= self.max_length)

    @property
    def refused(self) -> tuple[int, ...]:
        """The lengths that its encoding cannot take."""
        return tuple(n for n in self.lengths if n not in self.possible)

    @property
    def longest(self) -> Curve | None:
        """The curve of the longest length measured so far."""
        return self.curves[max(self.curves)] if self.curves else None


def newest_step(workdir: Path, config: Config) -> int:
    """The step that a run was last saved at.

    Raises:
        ValueError: no checkpoint yet, or a tokenizer (which may be overridden) with more tokens than the model.
    """
    with Checkpointer(workdir, read_only=True) as checkpointer:
        step = checkpointer.latest_step
        if step is None:
            raise ValueError(f"{workdir}: no checkpoint yet")
    tokens = load_tokenizer(config.data.tokenizer).vocab_size
    if tokens > config.model.vocab_size:
        raise ValueError(
            f"data.tokenizer {config.data.tokenizer!r} has {tokens} tokens, but {workdir} was trained with "
            f"model.vocab_size {config.model.vocab_size}"
        )
    return step


def result_identity(workdir: Path, config: Config, step: int, *read: Any) -> str:
    """What a result follows from, to tell whether a kept one still holds: checkpoint, model, code, and what is read.

    A checkpoint that has been removed meanwhile is none that is ever found again.

    Args:
        workdir: of the run.
        config: of the run.
        step: that `load_model` returned, or would.
        read: all else that the result follows from, by its repr.
    """
    try:
        saved = (workdir / "checkpoints" / str(step)).stat().st_mtime_ns
    except FileNotFoundError:
        saved = time.time_ns()
    model = (str(workdir.resolve()), step, saved, config.model, configs.code_digest(config), jax.default_backend())
    return repr((*model, *read))


def run_names(workdirs: Sequence[Path]) -> list[str]:
    """Names each run by the end of its path, as long as it takes for every name to differ.

    Raises:
        ValueError: a workdir is given twice.
    """
    paths = [workdir.resolve() for workdir in workdirs]
    for i, path in enumerate(paths):
        if path in paths[:i]:
            raise ValueError(f"--workdirs names {workdirs[i]} twice")
    names = []
    for path in paths:
        ends = ["/".join(path.parts[-depth:]) for depth in range(1, len(path.parts))]
        others = ["/".join(other.parts) for other in paths if other != path]
        names.append(next(end for end in ends if not any(other.endswith(f"/{end}") for other in others)))
    return names


def encoding_name(spec: EncodingSpec) -> str:
    """The name of an encoding; of one with settings of its own, or unknown to the registry, how it would be written.

    Wrappers are named, whatever their settings, before what they wrap: "head_scale:nope".
    """
    if isinstance(spec, str):
        return spec
    if isinstance(spec, tuple | list):
        return "+".join(encoding_name(part) for part in spec)
    if isinstance(spec, Wrapper):
        for name, encoding in ENCODINGS.items():
            if type(spec) is encoding:
                return f"{name}:{encoding_name(spec.encoding)}"
    return next((name for name, encoding in ENCODINGS.items() if spec == encoding()), None) or _written(spec)


def _written(value: Any) -> str:
    """A dataclass with those of its fields that are not what they are when left out."""
    if not dataclasses.is_dataclass(value):
        return repr(value)
    fields = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
    given = [f"{field.name}={_written(own)}" for field, own in fields if own != field.default]
    return f"{type(value).__name__}({', '.join(given)})"
