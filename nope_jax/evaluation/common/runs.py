"""The trained runs that an evaluation compares, and their results."""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any, Generic, TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh

from nope_jax import config as configs
from nope_jax.config import Config, DataConfig, EncodingSpec, MeshConfig, Step, of_other_sources
from nope_jax.data import load_tokenizer
from nope_jax.data.tokenizers import tokenizer_digest
from nope_jax.distributed import from_process_0
from nope_jax.encodings import ENCODINGS, Wrapper
from nope_jax.evaluation.common.placement import Placement, place, refuse_mesh
from nope_jax.evaluation.registry import Options
from nope_jax.models import Decoder, abstract_decoder
from nope_jax.paths import Location, resolved
from nope_jax.trained import Trained, find_trained

Result = TypeVar("Result")


@dataclasses.dataclass
class Run(Generic[Result]):
    """One trained model and its results at each length, filled in as they are measured."""

    workdir: Location
    """Or hf:... or gguf:... for a published model."""
    name: str
    """The shortest end of its path that differs from those of the other runs."""
    config: Config
    """Config of the run, with the overrides of the command line."""
    max_length: int | None = None
    """Number of positions that its encoding supports; None: unlimited."""
    lengths: tuple[int, ...] = ()
    """The requested lengths, ascending."""
    results: dict[int, Result] = dataclasses.field(default_factory=dict)
    step: int = 0
    """Step of the evaluated checkpoint."""
    asked: Step = "newest"
    """The checkpoint to evaluate, as `find_trained` takes it."""
    parameters: int = 0
    """Number of its parameters."""
    mesh: MeshConfig | None = None
    """The mesh of the command line; None: chosen for each batch."""

    @functools.cached_property
    def trained(self) -> Trained:
        return find_trained(self.workdir, self.asked)

    @property
    def encoding(self) -> str:
        """Name of its encoding, with all settings."""
        return encoding_name(self.config.model.encoding)

    @property
    def short_encoding(self) -> str:
        """Name of its encoding without settings, for tables."""
        return short_encoding_name(self.config.model.encoding)

    @property
    def train_length(self) -> int:
        assert self.config.model.train_length is not None  # Config fills it in
        return self.config.model.train_length

    def takes(self, length: int) -> bool:
        """Whether its encoding supports `length` positions."""
        return self.max_length is None or length <= self.max_length

    @property
    def possible(self) -> tuple[int, ...]:
        """The requested lengths that its encoding supports."""
        return tuple(filter(self.takes, self.lengths))

    @property
    def refused(self) -> tuple[int, ...]:
        """The requested lengths that its encoding does not support."""
        return tuple(length for length in self.lengths if not self.takes(length))

    @property
    def longest(self) -> Result | None:
        """The result at the longest length measured so far."""
        return self.results[max(self.results)] if self.results else None

    def place(self, rows: int, length: int = 1) -> Placement:
        """Decides where batches of some rows of `length` positions are computed; 1 for decoding."""
        return place([self.config.model], rows, length, self.mesh)

    def load(self, mesh: Mesh | None = None) -> Decoder:
        """Loads the decoder in the dtype of `eval.dtype`, of a run from the checkpoint that was asked for."""
        model, self.step = self.trained.load(mesh, self.config.eval.dtype)
        return model


def find_runs(options: Options, same: Sequence[str] = (), *, at_newest: Collection[Location] = ()) -> list[Run[Any]]:
    """Finds the runs of `--workdirs`, without results yet. Loads nothing large.

    Args:
        options: the parsed command line.
        same: config fields that must agree.
        at_newest: workdirs of which the newest checkpoint is read, whatever `--step` is.

    Raises:
        ValueError: a workdir is given twice, or holds no run or not the checkpoint of `--step`; a tokenizer does not
            fit its run; the runs differ in a field; a run supports none of the lengths; or the mesh of the command line
            does not fit.
    """
    names = run_names(options.workdirs)
    overrides = dict(options.overrides)
    if "data.source" in overrides:  # the run's own settings say what of its own source is read, and how
        overrides = {"data.weights": None, "data.validation_source": None, "data.split": None} | overrides
        named = DataConfig(source=overrides["data.source"], validation_source=overrides["data.validation_source"])
        overrides = {f"data.{name}": default for name, default in of_other_sources(named).items()} | overrides
    runs: list[Run[Any]] = []
    for workdir, name in zip(options.workdirs, names, strict=True):
        step: Step = "newest" if workdir in at_newest else options.step
        config = configs.override(find_trained(workdir, step).config, overrides)
        runs.append(Run(workdir, name, config, lengths=options.lengths, asked=step, mesh=options.mesh))
    refuse_differing(runs, same)
    for run in runs:
        run.step = checkpoint_step(run)
        model = abstract_decoder(run.config.model)
        run.max_length = model.max_length
        run.parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
        if run.lengths and not run.possible:
            raise ValueError(f"--lengths: {run.name} reads none of them, {_limit(run)}")
        refuse_mesh(run.mesh, [run.config.model], run.possible, "--lengths")
    return runs


def refuse_differing(
    runs: Sequence[Run[Any]],
    fields: Sequence[str],
    why: str = "; give --{field} for all of them",
    content: Callable[[Any], Any] = lambda value: value,
) -> None:
    """Rejects runs whose configs differ in fields that must agree.

    Args:
        runs: all runs.
        fields: dotted names of config fields.
        why: end of the message.
        content: maps the value of a field to what must be equal.

    Raises:
        ValueError: names the field and its value in each run.
    """
    for field in fields:
        values = {run.name: operator.attrgetter(field)(run.config) for run in runs}
        if len(set(map(content, values.values()))) > 1:
            listed = ", ".join(f"{name}: {value}" for name, value in values.items())
            raise ValueError(f"{field} differs between the runs ({listed}){why.format(field=field)}")


def refuse_length(runs: Sequence[Run[Any]], length: int, option: str = "--lengths") -> None:
    """Rejects a length that some run does not support.

    Raises:
        ValueError: names the option.
    """
    for run in runs:
        if not run.takes(length):
            raise ValueError(f"{option}: {run.name} cannot read {length} tokens, {_limit(run)}")


def cannot_read(runs: Sequence[Run[Any]]) -> list[str]:
    """One sentence for each run that does not support some of the lengths, naming them."""
    return [
        f"{run.name} cannot read {', '.join(f'{n:,}' for n in run.refused)} tokens: {_limit(run)}."
        for run in runs
        if run.refused
    ]


def _limit(run: Run[Any]) -> str:
    return f"its {run.encoding} encoding has {run.max_length:,} positions"


def checkpoint_step(run: Run[Any]) -> int:
    """The step of the checkpoint of a run that would be read now.

    Raises:
        ValueError: there is no such checkpoint, or the tokenizer (possibly overridden) is not the one of the run.
    """
    step = from_process_0(run.trained.find_step)  # a file system may show the others an older state
    data = run.config.data
    tokens = load_tokenizer(data.tokenizer, data.separator_token).vocab_size
    if tokens > run.config.model.num_tokens:
        raise ValueError(
            f"data.tokenizer {run.config.data.tokenizer!r} has {tokens} tokens, but {run.workdir} was trained with "
            f"model.vocab_size {run.config.model.vocab_size}"
        )
    if run.trained.tokenizer_digest() not in (None, tokenizer_digest(data.tokenizer, data.separator_token)):
        raise ValueError(
            f"data.tokenizer {run.config.data.tokenizer!r} is not the tokenizer that {run.workdir} was trained with"
        )
    return step


def result_identity(run: Run[Any], *read: Any) -> str:
    """Identity of a result, to decide whether a stored one is still valid: checkpoint, model, code, backend and input.

    Args:
        run: its `step` is that of the checkpoint.
        read: everything else that determines the result; its repr is used.
    """
    weights, code, dtype = run.trained.identity(run.step), configs.code_digest(run.config), run.config.eval.dtype
    where, backend = str(resolved(run.workdir)), jax.default_backend()
    return repr((where, weights, run.config.model, dtype, code, backend, *read))


def run_names(workdirs: Sequence[Location]) -> list[str]:
    """Names each run by the shortest end of its path that makes all names differ.

    Raises:
        ValueError: a workdir is given twice.
    """
    paths = [resolved(workdir) for workdir in workdirs]
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
    """The registered name of an encoding; its Python expression if it has other settings or is not registered.

    A wrapper's name, whatever its settings, precedes that of the encoding it wraps: "head_scale:nope".
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


def short_encoding_name(spec: EncodingSpec) -> str:
    """The registered names of an encoding and of its scaling, without their settings: "rope (YaRN)".

    Repeated encodings of a tuple are counted: "3 rope + nope".
    """
    if isinstance(spec, str):
        return spec
    if isinstance(spec, tuple | list):
        parts = [(name, len(list(same))) for name, same in itertools.groupby(map(short_encoding_name, spec))]
        if len(parts) == 1:
            return parts[0][0]
        return " + ".join(name if count == 1 else f"{count} {name}" for name, count in parts)
    name = next((name for name, encoding in ENCODINGS.items() if type(spec) is encoding), type(spec).__name__)
    if isinstance(spec, Wrapper):
        return f"{name}:{short_encoding_name(spec.encoding)}"
    scaling = getattr(spec, "scaling", None)
    return name if scaling is None else f"{name} ({type(scaling).__name__.removesuffix('Scaling')})"


def _written(value: Any) -> str:
    """The Python expression of a dataclass, with the fields that differ from their defaults."""
    if not dataclasses.is_dataclass(value):
        return repr(value)
    fields = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
    given = [f"{field.name}={_written(own)}" for field, own in fields if own != field.default]
    return f"{type(value).__name__}({', '.join(given)})"
