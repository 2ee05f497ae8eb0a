"""The command lines of train.py, eval.py and prepare.py; what is wrong is reported in one line and an exit status."""

import contextlib
import ctypes
import dataclasses
import difflib
import io
import itertools
import operator
import platform
import re
import signal
import sys
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from nope_jax.config import (
    GROUPS,
    HINTS,
    Config,
    DataConfig,
    EncodingSpec,
    EvalConfig,
    load,
    load_file,
    override,
    takes_several,
    unknown,
    wanted,
)
from nope_jax.distributed import DIVERGED, ProcessSpec
from nope_jax.errors import is_refusal
from nope_jax.evaluation.registry import EVALUATIONS, Options
from nope_jax.paths import Location, location, on_disk


def run(command: Callable[[], None]) -> int:
    """Runs a command and returns its exit status; what goes wrong is one line on stderr.

    0 done; 1 an error that nobody foresaw, or of the user's own code, with its traceback; 2 bad input (what one of our
    checks refuses), or a file system that refuses; 4 diverged; 128 + n stopped by signal n (130 is Ctrl-C). A process
    of a run of several may end with 3, see `nope_jax.distributed`.
    """
    _keep_freed_memory()
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        command()
    except KeyboardInterrupt as stop:
        _say(str(stop) if stop.args else "interrupted")
        return 128 + getattr(stop, "signum", signal.SIGINT)
    except FloatingPointError as error:
        return _fail(str(error), status=DIVERGED)
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), status=2)
    except ValueError as error:
        if not is_refusal(error):
            raise
        return _fail(str(error), status=2)
    return 0


def _keep_freed_memory() -> None:
    """Has the C library keep what is freed; must come before XLA starts its threads.

    XLA allocates the temporaries of every step anew on a CPU. Given back to the system each time, they fault in
    again page by page, which small steps feel.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        arena_max, mmap_max, trim_threshold = -8, -4, -1  # as in malloc.h
        mallopt(arena_max, 1)
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def _fail(message: str, *, status: int) -> int:
    _say(f"error: {' '.join(message.split())}")
    return status


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # the status says it too, where the terminal is gone
        print(line, file=sys.stderr)


class TrainArguments(NamedTuple):
    """The command line of train.py."""

    config: Config
    workdir: Location
    """Nowhere in particular where it is not given, as it need not be with compile_for."""
    compile_for: str | None = None
    """The slice of TPUs to compile for instead of training."""
    place: ProcessSpec = ProcessSpec()
    """Which of the run's processes this one is."""


_TRUST_CODE: tuple[Any, str] = (
    bool | None,
    "True: run the code that comes with the workdirs, though no train.py of yours on this machine has written it.",
)


def parse_train(arguments: Sequence[str]) -> TrainArguments:
    """The command line of train.py: `--config`, `--workdir` or `--compile_for`, and any field over the config file's.

    A model.train_length that equals data.context_length follows it when that is overridden.

    Raises:
        ValueError: in one line, what is wrong and what would be right.
    """
    given = _given(arguments)
    options: dict[str, tuple[Any, str]] = {
        "config": (Path, "A Python file whose get_config() returns the Config of the run."),
        "workdir": (
            Path | None if "compile_for" in given else Path,
            "Where the run is written; started again on the same one, it continues.",
        ),
        "compile_for": (
            str | None,
            "A slice of TPUs such as v5e:16x16. Nothing is trained: it says what memory and time the run would take "
            "there, from a compilation that needs no TPU.",
        ),
        "coordinator": (
            str | None,
            "HOST:PORT of process 0, for a run of several processes. Cloud TPU slices, SLURM, Open MPI and Kubernetes "
            "jobs need not say it.",
        ),
        "num_processes": (int | None, "How many processes the run has; 1 keeps it from looking for others."),
        "process_id": (int | None, "Which of them this one is, from 0."),
        "join_timeout": (
            int | None,
            f"Seconds to wait until all have come; {ProcessSpec().join_timeout} if not given.",
        ),
        "peer_timeout": (
            int | None,
            f"Seconds after which one that does not answer counts as dead; {ProcessSpec().peer_timeout} if not given.",
        ),
        "trust_code": _TRUST_CODE,
    }
    file = given.get("config")
    config = load_file(file[0]) if file else Config()
    groups = {group: getattr(config, group) for group in GROUPS}
    values, overrides = _parse(arguments, options, groups, "Trains a decoder.")
    if "data.context_length" in overrides and config.model.train_length == config.data.context_length:
        overrides = {"model.train_length": None} | overrides
    place = ProcessSpec(**{name: value for name in ProcessSpec._fields if (value := getattr(values, name)) is not None})
    place.named()
    # From its word: tyro has made a pathlib.Path of it, which is no path any more if it was one of a bucket.
    workdir = location(given["workdir"][0], "--workdir") if "workdir" in given else Path()
    config = override(config, overrides)
    if values.trust_code:
        for folder in (workdir, config.train.init_from):
            if folder is not None and (location(folder) / "config.json").exists():
                load(folder, trust_code=True)  # and from then on this process does
    return TrainArguments(config, workdir, values.compile_for, place)


def parse_prepare(arguments: Sequence[str]) -> DataConfig:
    """The command line of prepare.py: `--config`, and any data.* field over those of the config file.

    Raises:
        ValueError: in one line, what is wrong and what would be right.
    """
    options = {"config": (Path, "A Python file whose get_config() returns the Config of a run.")}
    file = _given(arguments).get("config")
    config = load_file(file[0]) if file else Config()
    _, overrides = _parse(arguments, options, {"data": config.data}, "Tokenises the corpus of a run, once.")
    return override(config, overrides).data


def parse_eval(arguments: Sequence[str], name: str = next(iter(EVALUATIONS))) -> Options:
    """The command line of eval.py: `--workdirs`, `--lengths`, `--out`, and any data.* or eval.* field.

    Args:
        arguments: what follows eval.py and the name of the evaluation.
        name: one of EVALUATIONS, which may take settings of its own, by their dotted names.

    Raises:
        ValueError: in one line, what is wrong and what would be right.
    """
    if name not in EVALUATIONS:
        near = difflib.get_close_matches(name, EVALUATIONS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown evaluation {name!r}: {hint}choose from {', '.join(EVALUATIONS)}")
    evaluation = EVALUATIONS[name]
    options: dict[str, tuple[Any, str]] = {
        "workdirs": (tuple[Path, ...], "The runs to evaluate, each loaded from its own config.json.")
    }
    if evaluation.methods:
        options["method"] = (Literal[evaluation.methods], "What to search for.")
    if evaluation.takes_lengths:
        options["lengths"] = (tuple[int, ...], "The lengths to evaluate at, in tokens.")
    options["out"] = (Path, evaluation.out)
    options["trust_code"] = _TRUST_CODE
    groups: dict[str, Any] = {"data": DataConfig(), "eval": EvalConfig()}
    if evaluation.settings is not None:
        groups[name] = evaluation.settings
    rule = "A field of data or eval that is not given is that of the run."
    values, given = _parse(arguments, options, groups, f"{evaluation.description} {rule}")
    overrides = {field: value for field, value in given.items() if field in HINTS}
    for field in overrides:
        if field.startswith("eval.") and field.removeprefix("eval.") not in evaluation.takes_eval:
            goes_by = [f"--{name}.*"] * (evaluation.settings is not None) + ["--data.*"]
            goes_by += [f"--eval.{field}" for field in evaluation.takes_eval]
            raise ValueError(f"--{field} changes nothing about {name}, which goes by {', '.join(goes_by)}")
    override(Config(), overrides)
    lengths = getattr(values, "lengths", ())
    if min(lengths, default=1) < 1:
        raise ValueError(f"--lengths must be at least 1, not {min(lengths)}")
    for field, value in given.items():
        least = 0 if field.endswith(("seed", "warmup_steps")) else 1
        if field not in HINTS and isinstance(value, int) and not isinstance(value, bool) and value < least:
            raise ValueError(f"--{field} must be at least {least}, not {value}")
        if field not in HINTS and isinstance(value, float) and not value > 0:
            raise ValueError(f"--{field} must be greater than 0, not {value}")
    for workdir in values.workdirs if values.trust_code else ():
        load(workdir, trust_code=True)  # and from then on this process does
    settings = getattr(values, name, None)
    return Options(values.workdirs, lengths, values.out, overrides, settings, getattr(values, "method", None))


def _parse(
    arguments: Sequence[str], options: Mapping[str, tuple[Any, str]], groups: Mapping[str, Any], description: str
) -> tuple[Any, dict[str, Any]]:
    """Parses options (name: type and help) and overrides of groups; returns the options and the overrides.

    An option must be given unless its type has None, which it then is.
    """
    given = _given(arguments)
    hints = {name: hint for name, (hint, _) in options.items()}
    for group, default in groups.items():
        hints |= {f"{group}.{field}": hint for field, hint in typing.get_type_hints(type(default)).items()}
    if "help" not in given and "-h" not in arguments:
        for name, words in given.items():
            if name not in hints:
                raise unknown(f"--{name}", [f"--{known}" for known in hints])
            if not words or (len(words) > 1 and not takes_several(hints[name])):
                raise ValueError(f"--{name} must be {wanted(hints[name])}, not {' '.join(words)!r}")
            for word in words:
                if name in options and name != "workdir":
                    on_disk(word, f"--{name}")
        for name, (hint, _) in options.items():
            if name not in given and not _may_be_none(hint):
                raise ValueError(f"--{name} is missing: it must be {wanted(hints[name])}")
    fields: list[Any] = [
        (name, Annotated[hint, tyro.conf.arg(help=text)], *[dataclasses.field(default=None)] * _may_be_none(hint))
        for name, (hint, text) in options.items()
    ]
    fields += [(group, type(default), default) for group, default in groups.items()]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed: Any = tyro.cli(
                dataclasses.make_dataclass("Arguments", fields, kw_only=True),
                description=description,
                args=arguments,
                use_underscores=True,
                config=(tyro.conf.FlagConversionOff,),
                registry=_REGISTRY,
            )
    except SystemExit as exit:
        if not exit.code:
            raise
        # The box around it is of other characters where the terminal does not take these.
        lines = [line.strip("│| ") for line in complaint.getvalue().splitlines() if line.startswith(("│", "|"))]
        message = " ".join(itertools.takewhile(lambda line: line.strip("─-"), lines))
        for name, words in given.items():
            if re.search(rf"--{re.escape(name)}\b", message):
                message = f"--{name} must be {wanted(hints[name])}, not {' '.join(words)!r}"
        raise ValueError(message) from None
    return parsed, {name: operator.attrgetter(name)(parsed) for name in given if name not in options and name in hints}


def _may_be_none(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _given(arguments: Iterable[str]) -> dict[str, list[str]]:
    """The options that a command line gives, each with the words that follow it."""
    given: dict[str, list[str]] = {}
    words: list[str] = []
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            words = given[name.replace("-", "_")] = [value] if equals else []
        else:
            words.append(argument)
    return given


_REGISTRY = tyro.constructors.ConstructorRegistry()


@_REGISTRY.primitive_rule
def _encoding_rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """One word is a name, several are a tuple of names; an Encoding itself can only come from a config file."""
    if info.type != EncodingSpec:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME [NAME ...]",
        instance_from_str=lambda words: words[0] if len(words) == 1 else tuple(words),
        is_instance=lambda value: True,
        str_from_instance=lambda spec: [str(part) for part in spec] if isinstance(spec, tuple) else [str(spec)],
    )
