"""What a run is: frozen dataclasses, each field written once, saved as JSON beside the run.

A config file is plain Python with a `get_config()` that returns a `Config`. The command line (`nope_jax.cli`) overrides
any field by its dotted name (`--model.encoding alibi`).
"""

import dataclasses
import difflib
import inspect
import json
import operator
import os
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from nope_jax import encodings, own_code
from nope_jax.encodings import ENCODINGS, SCHEDULES, Encoding, former_names, resolve
from nope_jax.errors import is_refusal
from nope_jax.paths import Location, check_location, location, on_disk

EncodingSpec = str | Encoding | tuple[str | Encoding, ...]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder. Everything that decides the shape of its parameters or what it computes."""

    vocab_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None
    """Key/value heads; must divide num_heads. None: as many as num_heads."""
    head_dim: int | None = None
    """None: model_dim / num_heads."""
    model_dim: int = 128
    mlp_dim: int | None = None
    """None: 4 model_dim when plain, 8/3 model_dim rounded up to a multiple of 64 when gated (as many parameters)."""
    mlp: Literal["gated", "plain"] = "gated"
    """gated: SwiGLU (Shazeer 2020); plain: GELU."""
    tie_embeddings: bool = False
    encoding: EncodingSpec = "nope"
    """A name in ENCODINGS, an Encoding, or a tuple of them that repeats over the layers."""
    train_length: int | None = None
    """The length the model is trained at: rows of a learned table, and the yardstick of evaluation.

    None: data.context_length."""
    attention: Literal["reference", "streaming"] | None = None
    """Which implementation of attention; None chooses by length."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What is computed in; parameters, softmax, entropies and losses are float32 always."""
    remat: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""

    @property
    def mlp_size(self) -> int:
        """`mlp_dim`, or what None stands for."""
        gated = self.mlp == "gated"
        return self.mlp_dim or (-(-8 * self.model_dim // (3 * 64)) * 64 if gated else 4 * self.model_dim)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a run reads, and how it is cut into rows."""

    source: str = "python_stdlib"
    """python_stdlib, text:PATH_OR_GLOB, tfds:NAME, or task:passkey."""
    dir: str | None = None
    """Where prepared datasets lie, on a disk. None: $TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    tokenizer: str = "bytes"
    """bytes, or the path of a tokenizer.json or SentencePiece model."""
    document_separator: str | None = None
    """What lies between the documents of a file of text:, literally, as <|endoftext|>. None: each file is one."""
    context_length: int = 128
    """Tokens of a row: the training length."""
    batch_size: int = 32
    """Rows per optimizer step over all devices and hosts."""
    document_mask: bool = False
    """Keep tokens from attending to another document of their window; positions then restart with each document."""
    bos: bool = False
    """Begin every row with the tokenizer's beginning-of-sequence token, or its document separator if it has none.

    It is one of the row's tokens, and never predicted."""
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters are updated, with linear warm-up and cosine decay to a tenth."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of the layers, Adam for the rest, weight decay as in adamw."""
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    """Largest global norm of the gradient."""
    accumulation: int = 1
    """Microbatches per step; must divide the batch of each device."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long a run is, and what it does meanwhile."""

    steps: int = 500
    log_every: int = 10
    """In steps, as those that follow."""
    checkpoint_every: int = 250
    eval_every: int = 250
    """How often the validation loss is measured."""
    eval_batches: int = 4
    """Batches that the validation loss is the mean of."""
    seed: int = 0
    init_from: str | None = None
    """The workdir of a run whose weights training starts from, though its encoding may be another.

    What the encodings have learned comes along where a layer keeps its encoding, and starts anew elsewhere."""
    on_bad_step: Literal["stop", "skip"] = "stop"
    """When loss or gradient norm are not finite: stop the run, or leave parameters and optimizer as they were and go on
    with the next batch."""
    spike_factor: float | None = None
    """With on_bad_step skip: a gradient norm of more than so many times its running average is bad, too."""
    max_skipped: int = 10
    """With on_bad_step skip: more bad steps in a row than this stop the run."""
    tensorboard: bool = False
    """Write the metrics to WORKDIR/tensorboard as well (pip install tensorboardX)."""
    profile_steps: int = 0
    """Write a trace of so many steps, soon after the start, to WORKDIR/profile."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; their product is the number of devices. One may be -1, for what the others leave."""

    data: int = -1
    """Split the rows of a batch; each keeps all parameters. Where another axis is -1, too, this one is 1."""
    fsdp: int = 1
    """Split the rows, and parameters, gradients and optimizer state along model_dim."""
    tensor: int = 1
    """Split heads, feed-forward and vocabulary."""
    sequence: int = 1
    """Split the positions of every row; parameters and the rest as fsdp does."""
    rules: Literal["fsdp", "zero1"] = "fsdp"
    """How parameters lie between steps. fsdp: split, and gathered layer by layer, twice for every microbatch.

    zero1: whole along fsdp and sequence, and gathered once a step, where they fit; only gradients and optimizer state
    are split (Rajbhandari et al. 2020, arXiv 1910.02054)."""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What eval.py curves reads, and how. Other evaluations go by some of it and settings of their own."""

    documents: int = 64
    """At most so many validation documents per length."""
    batch_size: int = 8
    stride: int | None = None
    """None: each document from its start.

    A number: a window of the evaluated length slid by so many tokens, of which only the new ones count."""
    seed: int = 0
    entropy_unit: Literal["nats", "bits"] = "nats"
    """In which eval.py curves shows attention entropy; the files of numbers are in nats always."""


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """How eval.py tune searches (defaults: Wang et al. 2024, arXiv 2404.12224, appendix)."""

    documents: int = 16
    """Training documents per length that a factor is judged by."""
    steps: int = 200
    """Updates of the learned factors (head, ssmax)."""
    warmup_steps: int = 20
    batch_size: int = 8
    learning_rate: float = 0.1
    start: Literal["uniform", "one"] = "uniform"
    """Where learned factors begin: at the best uniform one, or at 1."""
    focus: bool = True
    """Whether every factor is kept at 1 or above (head)."""
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class PasskeyConfig:
    """The grid of eval.py passkey (Wang et al. 2024, arXiv 2404.12224)."""

    depths: int = 10
    keys: int = 10
    """Keys per depth and length."""
    batch_size: int = 8
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class SimilarityConfig:
    """What eval.py similarity reads."""

    length: int | None = None
    """Tokens per document. None: the training length, the shorter one of the two runs."""
    documents: int = 16


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """How eval.py probe reads positions out of hidden states."""

    documents: int = 32
    """Half of them train the probe, half test it."""
    ridge: float = 1e-3
    """Weight of the squared norm of the probe, relative to the variance of the hidden states."""


@dataclasses.dataclass(frozen=True)
class Config:
    """All there is to say of a run: what config.json holds."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    eval: EvalConfig = EvalConfig()

    def __post_init__(self):
        _check(self)
        if self.model.train_length is None:
            model = dataclasses.replace(self.model, train_length=self.data.context_length)
            object.__setattr__(self, "model", model)


GROUPS: dict[str, Any] = {group.name: group.type for group in dataclasses.fields(Config)}
HINTS = {
    f"{group}.{field}": hint for group, cls in GROUPS.items() for field, hint in typing.get_type_hints(cls).items()
}
"""The type of every field, by its dotted name."""


def override(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with other values for some fields, given by their dotted names.

    Raises:
        ValueError: a field that does not exist, or a value that it cannot have.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        if name not in HINTS:
            raise unknown(name, HINTS)
        group, field = name.split(".")
        groups.setdefault(group, {})[field] = value
    return dataclasses.replace(
        config, **{group: dataclasses.replace(getattr(config, group), **fields) for group, fields in groups.items()}
    )


# Validation

_AT_LEAST = {
    1: """model.vocab_size model.num_layers model.num_heads model.num_kv_heads model.head_dim model.model_dim
        model.mlp_dim model.train_length data.context_length data.batch_size optimizer.accumulation train.steps
        train.log_every train.checkpoint_every train.eval_every train.eval_batches eval.documents eval.batch_size
        eval.stride""",
    0: """data.seed optimizer.warmup_steps optimizer.weight_decay train.seed train.max_skipped train.profile_steps
        eval.seed""",
}


def _check(config: Config) -> None:
    """Refuses what can be seen to be wrong without building anything."""
    values = {name: operator.attrgetter(name)(config) for name in HINTS}
    for name, value in values.items():
        if not _matches(value, HINTS[name]):
            raise ValueError(f"{name} must be {wanted(HINTS[name])}, not {value!r}")
    for least, names in _AT_LEAST.items():
        for name in names.split():
            if values[name] is not None and not values[name] >= least:
                raise ValueError(f"{name} must be at least {least}, not {values[name]}")
    for name in "optimizer.learning_rate", "optimizer.clip_norm":
        if not values[name] > 0:
            raise ValueError(f"{name} must be greater than 0, not {values[name]}")
    for name in "optimizer.b1", "optimizer.b2":
        if not 0 <= values[name] < 1:
            raise ValueError(f"{name} must be at least 0 and less than 1, not {values[name]}")

    if config.train.profile_steps > config.train.steps:
        raise ValueError(
            f"train.profile_steps must be at most train.steps {config.train.steps}, not {config.train.profile_steps}"
        )
    factor = values["train.spike_factor"]
    if factor is not None and config.train.on_bad_step != "skip":
        raise ValueError(f"train.spike_factor {factor} needs train.on_bad_step skip, not {config.train.on_bad_step}")
    if factor is not None and not factor > 1:
        raise ValueError(f"train.spike_factor must be greater than 1, not {factor}")

    model, data = config.model, config.data
    if model.num_heads % (model.num_kv_heads or 1):
        raise ValueError(f"model.num_kv_heads {model.num_kv_heads} must divide model.num_heads {model.num_heads}")
    if model.head_dim is None and model.model_dim % model.num_heads:
        raise ValueError(
            f"model.num_heads {model.num_heads} must divide model.model_dim {model.model_dim}, "
            "unless model.head_dim is given"
        )
    if data.batch_size % config.optimizer.accumulation:
        raise ValueError(
            f"optimizer.accumulation {config.optimizer.accumulation} must divide data.batch_size {data.batch_size}"
        )
    mesh = {axis: size for axis, size in dataclasses.asdict(config.mesh).items() if axis != "rules"}
    for axis, size in mesh.items():
        if size < 1 and size != -1:
            raise ValueError(f"mesh.{axis} must be at least 1, or -1 for what the other axes leave, not {size}")
    several = [axis for axis in mesh if mesh[axis] == -1 and axis != "data"]
    if len(several) > 1:
        raise ValueError(f"mesh: at most one axis may be -1, not {', '.join(several)}")
    for name, path in [
        ("data.source", data.source.removeprefix("text:") if data.source.startswith("text:") else ""),
        ("data.dir", data.dir or ""),
        ("data.tokenizer", data.tokenizer),
    ]:
        on_disk(path, name)
    if data.document_separator is not None and not (data.document_separator and data.source.startswith("text:")):
        raise ValueError(
            "data.document_separator must be what lies between the documents of a file of text:, or None, not "
            f"{data.document_separator!r} with data.source {data.source}"
        )
    if config.train.init_from is not None:
        check_location(config.train.init_from, "train.init_from")
    try:
        period = len(resolve(model.encoding))
    except ValueError as error:
        raise ValueError(f"model.encoding: {error}") from error
    if period > model.num_layers:
        raise ValueError(
            f"model.encoding: its period of {period} layers is more than model.num_layers {model.num_layers}"
        )


def _matches(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; an integer is a number too, True and False are neither."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin in (types.UnionType, typing.Union):
        return any(_matches(value, argument) for argument in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(_matches(part, arguments[0]) for part in value)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def takes_several(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple or any(map(takes_several, typing.get_args(hint)))


def wanted(hint: Any) -> str:
    """A type in words."""
    if hint == EncodingSpec:
        return "a name, an Encoding, or a tuple of them"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        return f"{wanted(arguments[0])} or several"
    if arguments:
        return " or ".join(map(wanted, arguments))
    words = {int: "an integer", float: "a number", str: "a string", bool: "True or False", Path: "a path"}
    return words.get(hint, "None")


def unknown(name: str, known: Iterable[str]) -> ValueError:
    """The error of a field that does not exist, which names the one that may be meant."""
    known, bare = list(known), name.removeprefix("--")
    near = difflib.get_close_matches(name, known, n=1)
    if bare in ENCODINGS.keys() | SCHEDULES.keys() and "--model.encoding" in known:
        near = [f"--model.encoding {bare}"]
    return ValueError(f"unknown field {name}" + (f": did you mean {near[0]}?" if near else ""))


# JSON


def save(config: Config, workdir: str | os.PathLike[str]) -> None:
    """Writes `config.json` into a workdir, and the code of a user's own encoding into its folder `code`.

    An Encoding becomes an object of its fields and its "class": a name in ENCODINGS, or what `nope_jax.own_code` says
    of where the class is, and its name. From then on that code is trusted on this machine.

    Raises:
        ValueError: a field of an Encoding is not made of numbers, strings, tuples and dataclasses.
        OSError: the files cannot be written; the config.json before is as it was.
    """
    groups: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for name in HINTS:
        group, field = name.split(".")
        groups[group][field] = _to_json(operator.attrgetter(name)(config), name)
    folder, own = location(workdir), _own_classes(config.model.encoding)
    own_code.keep(folder, own)
    own_code.replace(folder / "config.json", (json.dumps(groups, indent=2) + "\n").encode())
    own_code.trust(own, always=True)


def load(workdir: str | os.PathLike[str], *, trust_code: bool = False) -> Config:
    """Reads the `config.json` of a workdir.

    Args:
        workdir: of the run.
        trust_code: run the code that an encoding of its own needs, though nobody has run it on this machine.

    Raises:
        ValueError: there is none, it is not the config of a run, or it needs code that is not trusted.
    """
    folder = location(workdir)
    path = folder / "config.json"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{workdir} is not the workdir of a run: it has no config.json") from None
    try:
        groups = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    try:
        if not isinstance(groups, dict) or not all(isinstance(fields, dict) for fields in groups.values()):
            raise ValueError("it must be an object of objects, one for each group of fields")
        values = {
            f"{group}.{former_names.from_config(field)}": _from_json(value, folder, trust_code)
            for group, fields in groups.items()
            for field, value in fields.items()
        }
        if "model.encoding" in values:
            values["model.encoding"] = _by_todays_names(values["model.encoding"])
        return override(Config(), values)
    except ValueError as error:
        if not is_refusal(error):  # of the encoding's own code
            raise
        raise ValueError(f"{path}: {error}") from error


def refuse_changed_code(config: Config, workdir: str | os.PathLike[str]) -> None:
    """Refuses to go on with a run whose own encoding has been edited since, but for comments and layout.

    Raises:
        ValueError: it names the file.
    """
    own = _own_classes(config.model.encoding)
    own_code.trust(own, always=False)
    if (change := own_code.changed(location(workdir), own)) is not None:
        now, kept = change
        raise ValueError(
            f"model.encoding: {now} has changed since the run in {workdir} was started with it, see {kept}; undo the "
            "change, or choose another workdir"
        )


def code_digest(config: Config) -> str:
    """Of the code that results of a model follow from: that of its encoding if it is a user's own, and ours."""
    return own_code.digest(_own_classes(config.model.encoding))


def _own_classes(value: Any) -> list[type]:
    """The classes of an encoding, and within it, that are not of this package."""
    if isinstance(value, tuple):
        return [cls for part in value for cls in _own_classes(part)]
    if not dataclasses.is_dataclass(value):
        return []
    own = [] if type(value).__module__.split(".")[0] == "nope_jax" else [type(value)]
    parts = tuple(getattr(value, field.name) for field in dataclasses.fields(value) if field.init)
    return own + _own_classes(parts)


def _by_todays_names(encoding: Any) -> Any:
    """An encoding of a config.json, whose names may be former ones."""
    if isinstance(encoding, tuple):
        return tuple(_by_todays_names(part) for part in encoding)
    return former_names.from_config(encoding) if isinstance(encoding, str) else encoding


def _to_json(value: Any, where: str) -> Any:
    if isinstance(value, tuple):
        return [_to_json(part, where) for part in value]
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return {"class": _class_name(type(value))} | {key: _to_json(part, where) for key, part in fields.items()}
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ValueError(f"{where}: a {type(value).__name__} cannot be saved in config.json: {value!r}")


def _from_json(value: Any, folder: Location, trust_code: bool) -> Any:
    if isinstance(value, list):
        return tuple(_from_json(part, folder, trust_code) for part in value)
    if not isinstance(value, dict):
        return value
    fields = {key: _from_json(part, folder, trust_code) for key, part in value.items()}
    name = fields.pop("class", None)
    cls = _find_class(name, folder, trust_code)
    try:
        inspect.signature(cls).bind(**fields)
    except TypeError as error:
        raise ValueError(f"cannot make the class {name!r}: {error}") from error
    return cls(**fields)


def _class_name(cls: type) -> str:
    for name, encoding in ENCODINGS.items():
        if encoding is cls:
            return name
    public = getattr(encodings, cls.__qualname__, None) is cls
    return f"{encodings.__name__ if public else own_code.where(cls)}:{cls.__qualname__}"


def _find_class(name: Any, folder: Location, trust_code: bool) -> type:
    name = former_names.from_config(str(name))
    if name in ENCODINGS:
        return ENCODINGS[name]
    where, _, qualname = name.rpartition(":")
    if not where:
        raise ValueError(f"cannot make the class {name!r}: there is no such encoding")
    try:
        cls = operator.attrgetter(qualname)(own_code.find(folder, where, trust_code))
    except (ModuleNotFoundError, AttributeError, FileNotFoundError) as error:
        raise ValueError(f"cannot make the class {name!r}: {error}") from error
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ValueError(f"cannot make the class {name!r}: it is not a dataclass")
    return cls


# Config files


def load_file(path: str | os.PathLike[str]) -> Config:
    """What the `get_config()` of a Python file returns. Whatever that file raises is raised as it is.

    Raises:
        ValueError: there is no such file or function, or it returns something else than a Config.
    """
    path = Path(path).absolute()
    if not path.is_file():
        raise ValueError(f"--config must be a Python file; there is no {path}")
    # The module is named by its path, so that a class of it can be traced to the file.
    get_config = getattr(own_code.execute(path, path.read_bytes()), "get_config", None)
    if not callable(get_config):
        raise ValueError(f"--config {path} has no get_config()")
    config = get_config()
    if not isinstance(config, Config):
        raise ValueError(f"--config {path}: get_config() must return a Config, not {type(config).__name__}")
    return config
