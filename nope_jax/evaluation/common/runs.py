"""The trained runs that an evaluation is about: what a workdir is, and what was measured of it."""

import dataclasses
import operator
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh

from nope_jax import config as configs
from nope_jax.checkpoint import Checkpointer, load_model
from nope_jax.config import Config, EncodingSpec
from nope_jax.data import load_tokenizer
from nope_jax.encodings import ENCODINGS, Wrapper
from nope_jax.evaluation.registry import Options
from nope_jax.models import Decoder

Result = TypeVar("Result")


@dataclasses.dataclass
class Run(Generic[Result]):
    """One trained model: what it is, and what was measured of it at each length, filled in as it is measured."""

    workdir: Path
    name: str
    """The end of its path, as long as it takes to differ from the others."""
    config: Config
    """Its own, with what the command line overrides."""
    max_length: int | None = None
    """Positions that its encoding can take; None: any number."""
    lengths: tuple[int, ...] = ()
    """The lengths asked for, ascending."""
    results: dict[int, Result] = dataclasses.field(default_factory=dict)
    step: int = 0
    """Of the checkpoint that is measured."""

    @property
    def encoding(self) -> str:
        """The name of its encoding."""
        return encoding_name(self.config.model.encoding)

    @property
    def train_length(self) -> int:
        assert self.config.model.train_length is not None  # Config fills it in
        return self.config.model.train_length

    def takes(self, length: int) -> bool:
        """Whether its encoding can take so many positions."""
        return self.max_length is None or length <= self.max_length

    @property
    def possible(self) -> tuple[int, ...]:
        """The lengths that its encoding can take."""
        return tuple(filter(self.takes, self.lengths))

    @property
    def refused(self) -> tuple[int, ...]:
        """The lengths that its encoding cannot take."""
        return tuple(length for length in self.lengths if not self.takes(length))

    @property
    def longest(self) -> Result | None:
        """What was measured at the longest length so far."""
        return self.results[max(self.results)] if self.results else None

    def load(self, mesh: Mesh | None = None) -> Decoder:
        """Its decoder, from the newest checkpoint that can be read (`nope_jax.checkpoint.load_model`)."""
        _, model, self.step = load_model(self.workdir, mesh)
        return model


def find_runs(options: Options, same: Sequence[str] = ()) -> list[Run[Any]]:
    """The runs of `--workdirs`, with nothing measured yet; loads nothing large.

    Args:
        options: of the command line.
        same: fields of their configs that must agree.

    Raises:
        ValueError: a workdir that is given twice, holds no run, or no checkpoint yet; a tokenizer that is not the
            run's; runs that differ in a field; or a run that can read none of the lengths.
    """
    names = run_names(options.workdirs)
    loaded = [configs.override(configs.load(workdir), options.overrides) for workdir in options.workdirs]
    runs: list[Run[Any]] = [
        Run(*each, lengths=options.lengths) for each in zip(options.workdirs, names, loaded, strict=True)
    ]
    refuse_differing(runs, same)
    for run in runs:
        run.step = newest_step(run)
        run.max_length = _max_length(run.config)
        if run.lengths and not run.possible:
            raise ValueError(f"--lengths: {run.name} reads none of them, {_limit(run)}")
    return runs


def refuse_differing(
    runs: Sequence[Run[Any]],
    fields: Sequence[str],
    why: str = "; give --{field} for all of them",
    content: Callable[[Any], Any] = lambda value: value,
) -> None:
    """Refuses runs that differ where they must agree: only like is compared with like.

    Args:
        runs: all runs.
        fields: of their configs, by dotted name.
        why: ends the message.
        content: of the value of a field, what must be the same.

    Raises:
        ValueError: it names the field, and its value in each run.
    """
    for field in fields:
        values = {run.name: operator.attrgetter(field)(run.config) for run in runs}
        if len(set(map(content, values.values()))) > 1:
            listed = ", ".join(f"{name}: {value}" for name, value in values.items())
            raise ValueError(f"{field} differs between the runs ({listed}){why.format(field=field)}")


def refuse_length(runs: Sequence[Run[Any]], length: int, option: str = "--lengths") -> None:
    """Refuses a length that not every run can read.

    Raises:
        ValueError: it names the option.
    """
    for run in runs:
        if not run.takes(length):
            raise ValueError(f"{option}: {run.name} cannot read {length} tokens, {_limit(run)}")


def cannot_read(runs: Sequence[Run[Any]]) -> list[str]:
    """Which of the lengths a run could not be measured at, a sentence for each that has such lengths."""
    return [
        f"{run.name} cannot read {', '.join(f'{n:,}' for n in run.refused)} tokens: {_limit(run)}."
        for run in runs
        if run.refused
    ]


def _max_length(config: Config) -> int | None:
    return nnx.eval_shape(lambda: Decoder(config.model, rngs=nnx.Rngs(0))).max_length


def _limit(run: Run[Any]) -> str:
    return f"its {run.encoding} encoding has {run.max_length:,} positions"


def newest_step(run: Run[Any]) -> int:
    """The step that a run was last saved at.

    Raises:
        ValueError: no checkpoint yet, or a tokenizer (which may be overridden) with more tokens than the model.
    """
    with Checkpointer(run.workdir, read_only=True) as checkpointer:
        step = checkpointer.latest_step
        if step is None:
            raise ValueError(f"{run.workdir}: no checkpoint yet")
    tokens = load_tokenizer(run.config.data.tokenizer).vocab_size
    if tokens > run.config.model.vocab_size:
        raise ValueError(
            f"data.tokenizer {run.config.data.tokenizer!r} has {tokens} tokens, but {run.workdir} was trained with "
            f"model.vocab_size {run.config.model.vocab_size}"
        )
    return step


def result_identity(run: Run[Any], *read: Any) -> str:
    """What a result follows from, to tell whether a kept one still holds: checkpoint, model, code, and what is read.

    A checkpoint that has been removed meanwhile is none that is ever found again.

    Args:
        run: whose `step` is that of the checkpoint.
        read: all else that the result follows from, by its repr.
    """
    try:
        saved = (run.workdir / "checkpoints" / str(run.step)).stat().st_mtime_ns
    except FileNotFoundError:
        saved = time.time_ns()
    code = configs.code_digest(run.config)
    return repr((str(run.workdir.resolve()), run.step, saved, run.config.model, code, jax.default_backend(), *read))


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
