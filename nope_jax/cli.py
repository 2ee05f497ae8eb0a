"""The command lines of train.py and eval.py, and how both report what is wrong: one line, and an exit status."""

import contextlib
import ctypes
import dataclasses
import io
import itertools
import operator
import platform
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from nope_jax.config import (
    GROUPS,
    HINTS,
    Config,
    DataConfig,
    EncodingSpec,
    EvalConfig,
    load_file,
    override,
    takes_several,
    unknown,
    wanted,
)


def run(command: Callable[[], None]) -> int:
    """Runs a command and returns its exit status; what goes wrong is one line on stderr.

    0 done; 1 diverged; 2 bad input, or a file system that refuses; 128 + n stopped by signal n (130 is Ctrl-C).
    """
    _keep_freed_memory()
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        command()
    except KeyboardInterrupt as stop:
        print(stop if stop.args else "interrupted", file=sys.stderr)
        return 128 + getattr(stop, "signum", signal.SIGINT)
    except FloatingPointError as error:
        return _fail(str(error), status=1)
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), status=2)
    except ValueError as error:
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
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status


class TrainArguments(NamedTuple):
    config: Config
    workdir: Path


class EvalArguments(NamedTuple):
    workdirs: tuple[Path, ...]
    lengths: tuple[int, ...]
    out: Path
    overrides: dict[str, Any]
    """The data.* and eval.* fields that were given, by dotted name: `override` puts them on the config of each run."""


def parse_train(arguments: Sequence[str]) -> TrainArguments:
    """The command line of train.py: `--config`, `--workdir`, and any field over those of the config file.

    A model.train_length that equals data.context_length follows it when that is overridden.

    Raises:
        ValueError: in one line, what is wrong and what would be right.
    """
    options = {
        "config": (Path, "A Python file whose get_config() returns the Config of the run."),
        "workdir": (Path, "Where the run is written; started again on the same one, it continues."),
    }
    file = _given(arguments).get("config")
    config = load_file(file[0]) if file else Config()
    groups = {group: getattr(config, group) for group in GROUPS}
    values, overrides = _parse(arguments, options, groups, "Trains a decoder.")
    if "data.context_length" in overrides and config.model.train_length == config.data.context_length:
        overrides = {"model.train_length": None} | overrides
    return TrainArguments(override(config, overrides), values.workdir)


def parse_eval(arguments: Sequence[str]) -> EvalArguments:
    """The command line of eval.py: `--workdirs`, `--lengths`, `--out`, and any data.* or eval.* field.

    Raises:
        ValueError: in one line, what is wrong and what would be right.
    """
    options = {
        "workdirs": (tuple[Path, ...], "The runs to evaluate, each loaded from its own config.json."),
        "lengths": (tuple[int, ...], "The lengths to evaluate at, in tokens."),
        "out": (Path, "Where the report is written."),
    }
    groups = {"data": DataConfig(), "eval": EvalConfig()}
    values, overrides = _parse(
        arguments, options, groups, "Evaluates runs. A field of data or eval that is not given is that of the run."
    )
    override(Config(), overrides)
    if min(values.lengths) < 1:
        raise ValueError(f"--lengths must be at least 1, not {min(values.lengths)}")
    return EvalArguments(values.workdirs, values.lengths, values.out, overrides)


def _parse(
    arguments: Sequence[str], options: Mapping[str, tuple[Any, str]], groups: Mapping[str, Any], description: str
) -> tuple[Any, dict[str, Any]]:
    """Parses required options (name: type and help) and overrides of groups; returns the options and the overrides."""
    given = _given(arguments)
    hints = {name: hint for name, (hint, _) in options.items()}
    hints |= {name: hint for name, hint in HINTS.items() if name.split(".")[0] in groups}
    if "help" not in given and "-h" not in arguments:
        for name, words in given.items():
            if name not in hints:
                raise unknown(f"--{name}", [f"--{known}" for known in hints])
            if not words or (len(words) > 1 and not takes_several(hints[name])):
                raise ValueError(f"--{name} must be {wanted(hints[name])}, not {' '.join(words)!r}")
        for name in options:
            if name not in given:
                raise ValueError(f"--{name} is missing: it must be {wanted(hints[name])}")
    fields: list[Any] = [(name, Annotated[hint, tyro.conf.arg(help=text)]) for name, (hint, text) in options.items()]
    fields += [(group, type(default), default) for group, default in groups.items()]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed: Any = tyro.cli(
                dataclasses.make_dataclass("Arguments", fields),
                description=description,
                args=arguments,
                use_underscores=True,
                config=(tyro.conf.FlagConversionOff,),
                registry=_REGISTRY,
            )
    except SystemExit as exit:
        if not exit.code:
            raise
        lines = [line.strip("│ ") for line in complaint.getvalue().splitlines() if line.startswith("│")]
        message = " ".join(itertools.takewhile(lambda line: not line.startswith("─"), lines))
        for name, words in given.items():
            if re.search(rf"--{re.escape(name)}\b", message):
                message = f"--{name} must be {wanted(hints[name])}, not {' '.join(words)!r}"
        raise ValueError(message) from None
    return parsed, {name: operator.attrgetter(name)(parsed) for name in given if name in HINTS}


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
