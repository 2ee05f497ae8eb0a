"""The command lines of train.py, eval.py, generate.py, prepare.py. Errors are one line on stderr and an exit status."""

import contextlib
import ctypes
import dataclasses
import difflib
import inspect
import io
import itertools
import operator
import os
import platform
import re
import select
import signal
import sys
import traceback
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from nope_jax.compiled import drop_broken, keep_compiled
from nope_jax.config import (
    GROUPS,
    HINTS,
    Config,
    DataConfig,
    EncodingSpec,
    EvalConfig,
    MeshConfig,
    Step,
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
from nope_jax.paths import Location, is_published, location, on_disk

DEBUG = "--debug"
"""The option of every command that shows the traceback of an error that is otherwise one line."""


def run(command: Callable[[], None]) -> int:
    """Run a command and return its exit status; report an expected error as one line on stderr.

    0: success. 1: an unexpected error, or one in the user's own code, with its traceback. 2: invalid input (rejected by
    a check of this package), or a file system error. 4: training diverged. 128 + n: stopped by signal n (130 is
    Ctrl-C). A process of a multi-process run may exit with 3, see `nope_jax.distributed`. With DEBUG among the
    arguments, the line of an error comes after its traceback.
    """
    keep_freed_memory()
    keep_compiled()
    warnings.showwarning = _warn
    debug = DEBUG in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != DEBUG]
    try:
        command()
    except KeyboardInterrupt as stop:
        _say(str(stop) if stop.args else "interrupted")
        return 128 + getattr(stop, "signum", signal.SIGINT)
    except FloatingPointError as error:
        return _fail(str(error), status=DIVERGED, debug=debug)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _stdout_is_closed():
            return 128 + signal.SIGPIPE
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), status=2, debug=debug)
    except ValueError as error:
        if not is_refusal(error):
            raise
        return _fail(str(error), status=2, debug=debug)
    return 0


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    if not drop_broken(str(message)):
        print(f"warning: {message}", file=sys.stderr)


def keep_freed_memory() -> None:
    """Make the C library keep freed memory. Must be called before XLA starts its threads.

    On a CPU, XLA allocates the temporaries of every step again. If the C library returned them to the system each
    time, they would be paged in again, which slows down small steps.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        arena_max, mmap_max, trim_threshold = -8, -4, -1  # as in malloc.h
        mallopt(arena_max, 1)
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def _stdout_is_closed() -> bool:
    """Whether nobody reads stdout any more, as in `| head`; what is left to be printed is then dropped."""
    try:
        stdout = sys.stdout.fileno()
    except OSError:  # not a file
        return False
    poll = select.poll()
    poll.register(stdout, 0)
    closed = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return closed


def _fail(message: str, *, status: int, debug: bool) -> int:
    """Report the error that is being handled as one line, with `debug` after its traceback; return the status."""
    if debug:
        traceback.print_exc()
    _say(f"error: {' '.join(message.split())}")
    return status


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # if the terminal is gone, the exit status still reports the error
        print(line, file=sys.stderr)


_STEP: tuple[Any, str] = (
    Step | None,
    "The checkpoint of a run: its step, newest, or best (the lowest validation loss); newest if not given.",
)


class TrainArguments(NamedTuple):
    """The command line of train.py."""

    config: Config
    workdir: Location
    """Path() if not given; it is optional with compile_for."""
    compile_for: str | None = None
    """The TPU slices or GPUs to compile for instead of training."""
    place: ProcessSpec = ProcessSpec()
    """This process's place among the processes of the run."""


_TRUST_CODE: tuple[Any, str] = (
    bool | None,
    "True: run the code stored in the workdirs even if train.py has not written it on this machine for this user.",
)

_PROCESS: dict[str, tuple[Any, str]] = {
    "coordinator": (
        str | None,
        "HOST:PORT of process 0, for a multi-process run. Detected automatically on Cloud TPU slices and in SLURM, "
        "Open MPI and Kubernetes jobs.",
    ),
    "num_processes": (int | None, "Number of processes in the run; 1 disables the detection of others."),
    "process_id": (int | None, "Index of this process, from 0."),
    "join_timeout": (
        int | None,
        f"Seconds to wait for all processes to join; {ProcessSpec().join_timeout} if not given.",
    ),
    "peer_timeout": (
        int | None,
        f"Seconds after which an unresponsive process counts as dead; {ProcessSpec().peer_timeout} if not given.",
    ),
}


def _process(values: Any) -> ProcessSpec:
    """This process's place by the options of _PROCESS, which must go together."""
    place = ProcessSpec(**{name: value for name in ProcessSpec._fields if (value := getattr(values, name)) is not None})
    place.named()
    return place


def _folders(arguments: Sequence[str], name: str) -> tuple[Location, ...]:
    """The folders of runs that an option names.

    Taken from the raw arguments: tyro has converted them to pathlib.Path, which breaks a bucket URL.
    """
    return tuple(location(word, f"--{name}") for word in _given(arguments)[name])


def parse_train(arguments: Sequence[str]) -> TrainArguments:
    """Parse the command line of train.py: `--config`, `--workdir` or `--compile_for`, and overrides of any field.

    If model.train_length equals data.context_length, it follows an override of the latter; a model.vocab_size of 256,
    that of bytes, follows an override of data.tokenizer.

    Raises:
        ValueError: an argument is invalid; the message is one line.
    """
    given = _given(arguments)
    options: dict[str, tuple[Any, str]] = {
        "config": (Path, "A Python file whose get_config() returns the Config of the run."),
        "workdir": (
            Path | None if "compile_for" in given else Path,
            "Output directory of the run. Starting again with the same workdir resumes the run.",
        ),
        "compile_for": (
            str | None,
            "A TPU slice such as v5e:16x16, two of them (2xv5e:16x16), or the GPUs of one host (h100:8) or of two "
            "(h100:2x8). Instead of training, compile the run for this machine, which need not be there, and report "
            "the memory and time it would take.",
        ),
        **_PROCESS,
        "trust_code": _TRUST_CODE,
    }
    file = given.get("config")
    config = load_file(file[0]) if file else Config()
    groups = {group: getattr(config, group) for group in GROUPS}
    values, overrides = _parse(arguments, options, groups, "Trains a decoder.")
    if "data.context_length" in overrides and config.model.train_length == config.data.context_length:
        overrides = {"model.train_length": None} | overrides
    if "data.tokenizer" in overrides and (config.data.tokenizer, config.model.vocab_size) == ("bytes", 256):
        overrides = {"model.vocab_size": None} | overrides
    place = _process(values)
    (workdir,) = _folders(arguments, "workdir") if "workdir" in given else (Path(),)
    if is_published(workdir):
        raise ValueError(f"--workdir must be a folder; to start from {workdir}, use --train.init_from")
    config = override(config, overrides)
    if values.trust_code:
        for folder in (workdir, config.train.init_from):
            if folder is not None and not is_published(folder) and (location(folder) / "config.json").exists():
                load(folder, trust_code=True)  # this process trusts the code from here on
    return TrainArguments(config, workdir, values.compile_for, place)


def parse_prepare(arguments: Sequence[str]) -> DataConfig:
    """Parse the command line of prepare.py: `--config`, and overrides of any data.* field.

    Raises:
        ValueError: an argument is invalid; the message is one line.
    """
    options = {"config": (Path, "A Python file whose get_config() returns the Config of a run.")}
    file = _given(arguments).get("config")
    config = load_file(file[0]) if file else Config()
    _, overrides = _parse(arguments, options, {"data": config.data}, "Tokenizes the corpus of a run, once.")
    return override(config, overrides).data


def parse_export(arguments: Sequence[str]) -> tuple[Location, Path, str | None, Step]:
    """Parse the command line of `python -m nope_jax.export`; return the model, the folder, the family and the step.

    Raises:
        ValueError: an argument is invalid; the message is one line.
    """
    options: dict[str, tuple[Any, str]] = {
        "workdir": (Path, "The model to write: the workdir of a run, hf:NAME_OR_FOLDER or gguf:FILE."),
        "out": (Path, "The folder to write, new or empty."),
        "family": (str | None, "The model_type to write; the first that can hold the model if not given."),
        "step": _STEP,
        "trust_code": _TRUST_CODE,
    }
    values, _ = _parse(arguments, options, {}, "Writes a model as a folder that transformers loads.")
    (workdir,) = _folders(arguments, "workdir")
    if values.trust_code and not is_published(workdir):
        load(workdir, trust_code=True)  # this process trusts the code from here on
    return workdir, values.out, values.family, _step(values)


def parse_plot(arguments: Sequence[str]) -> tuple[tuple[Path, ...], Path, Literal["step", "tokens"]]:
    """Parse the command line of `python -m nope_jax.plot`; return the workdirs, the figure's path, and its x axis.

    Raises:
        ValueError: an argument is invalid; the message is one line.
    """
    options: dict[str, tuple[Any, str]] = {
        "workdirs": (tuple[Path, ...], "The runs to draw, which may come first, without the name of the option."),
        "out": (Path | None, "The figure to write, losses.png if not given."),
        "x": (Literal["step", "tokens"] | None, "What the horizontal axis shows; steps if not given."),
    }
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--workdirs", *arguments]
    values, _ = _parse(arguments, options, {}, "Draws the training and validation losses of runs by step.")
    return values.workdirs, values.out or Path("losses.png"), values.x or "step"


def parse_generate(arguments: Sequence[str]) -> dict[str, Any]:
    """Parse the command line of generate.py; return the options that were given, those of `GenerateOptions`.

    Raises:
        ValueError: an argument is invalid; the message is one line.
    """
    options: dict[str, tuple[Any, str]] = {
        "workdir": (Path, "The model: the workdir of a run, hf:NAME_OR_FOLDER or gguf:FILE."),
        "prompt": (str, "The text to continue; - reads it from stdin."),
        "step": _STEP,
        "max_new_tokens": (int | None, "Number of tokens to add; 256 if not given, or as many as the encoding has."),
        "temperature": (
            float | None,
            "Sample from softmax(logits / temperature); 0, the default, takes the likeliest.",
        ),
        "top_k": (int | None, "Sample from that many of the most likely tokens."),
        "top_p": (float | None, "Sample from the most likely tokens that together have this probability."),
        "min_p": (float | None, "Sample from tokens at least this many times as likely as the most likely one."),
        "seed": (int | None, "Seed of the samples; 0 if not given."),
        "stop": (tuple[str, ...] | None, "Texts before which the output ends."),
        "dtype": (Literal["float32", "bfloat16"] | None, "Of parameters and computation; bfloat16 halves the memory."),
        "trust_code": _TRUST_CODE,
    }
    description = "Continues a text with a trained model, on one device if no field of mesh is given."
    values, overrides = _parse(arguments, options, {"mesh": MeshConfig()}, description)
    for name, least in (("max_new_tokens", 1), ("seed", 0)):
        number = getattr(values, name)
        if number is not None and number < least:
            raise ValueError(f"--{name} must be at least {least}, not {number}")
    for name in ("top_k", "top_p", "min_p"):
        if getattr(values, name) is not None and not values.temperature:
            raise ValueError(f"--{name} changes nothing without --temperature: its default 0 takes the likeliest token")
    _step(values)
    (workdir,) = _folders(arguments, "workdir")
    if values.trust_code and not is_published(workdir):
        load(workdir, trust_code=True)  # this process trusts the code from here on
    given = {name: value for name in options if (value := getattr(values, name)) is not None}
    given.pop("trust_code", None)
    if overrides:
        given["mesh"] = _mesh(overrides)
    return given | {"workdir": workdir}


def parse_eval(arguments: Sequence[str], name: str = next(iter(EVALUATIONS))) -> Options:
    """Parse the command line of eval.py: `--workdirs`, `--lengths`, `--out`, and any data.*, eval.* or mesh.* field.

    Args:
        arguments: The arguments after eval.py and the name of the evaluation.
        name: One of EVALUATIONS, which may define additional settings, given by their dotted names.

    Raises:
        ValueError: an argument is invalid; the message is one line.
    """
    if name not in EVALUATIONS:
        near = difflib.get_close_matches(name, EVALUATIONS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown evaluation {name!r}: {hint}choose from {', '.join(EVALUATIONS)}")
    evaluation = EVALUATIONS[name]
    options: dict[str, tuple[Any, str]] = {
        "workdirs": (
            tuple[Path, ...],
            "The runs to evaluate: workdirs, or published models as hf:NAME_OR_FOLDER or gguf:FILE.",
        )
    }
    if evaluation.methods:
        options["method"] = (Literal[evaluation.methods], "What to search for.")
    if evaluation.lengths is not None:
        options["lengths"] = evaluation.lengths
    options["out"] = (Path, evaluation.out)
    options["step"] = _STEP
    options |= _PROCESS
    options["trust_code"] = _TRUST_CODE
    groups: dict[str, Any] = {"data": DataConfig(), "eval": EvalConfig(), "mesh": MeshConfig()}
    if evaluation.settings is not None:
        groups[name] = evaluation.settings
    rule = "Fields of data and eval default to those of the run. Without any field of mesh, one is chosen that shards "
    rule += "the parameters over all devices."
    if name == next(iter(EVALUATIONS)):
        rule += f" Other evaluations: eval.py NAME --help, with NAME one of {', '.join(list(EVALUATIONS)[1:])}."
    values, given = _parse(arguments, options, groups, f"{evaluation.description} {rule}")
    overrides = {field: value for field, value in given.items() if field in HINTS}
    for field in overrides:
        if field.startswith("eval.") and field.removeprefix("eval.") not in evaluation.takes_eval:
            goes_by = [f"--{name}.*"] * (evaluation.settings is not None) + ["--data.*"]
            goes_by += [f"--eval.{field}" for field in evaluation.takes_eval]
            raise ValueError(f"--{field} changes nothing about {name}, which goes by {', '.join(goes_by)}")
    mesh = _mesh(overrides)
    shared = {field: value for field, value in overrides.items() if not field.startswith("mesh.")}
    lengths = getattr(values, "lengths", None) or ()
    if min(lengths, default=1) < 1:
        raise ValueError(f"--lengths must be at least 1, not {min(lengths)}")
    for field, value in given.items():
        least = 0 if field.endswith(("seed", "warmup_steps")) else 1
        if field not in HINTS and isinstance(value, int) and not isinstance(value, bool) and value < least:
            raise ValueError(f"--{field} must be at least {least}, not {value}")
        if field not in HINTS and isinstance(value, float) and not value > 0:
            raise ValueError(f"--{field} must be greater than 0, not {value}")
    workdirs = _folders(arguments, "workdirs")
    for workdir in workdirs if values.trust_code else ():
        if not is_published(workdir):
            load(workdir, trust_code=True)  # this process trusts the code from here on
    settings, method = getattr(values, name, None), getattr(values, "method", None)
    return Options(
        workdirs,
        lengths,
        values.out,
        shared,
        settings,
        method,
        _step(values),
        mesh=None if shared == overrides else mesh,
        process=_process(values),
    )


def _mesh(overrides: Mapping[str, Any]) -> MeshConfig:
    """The mesh of a command that does not train; refuses invalid values of any field."""
    if "mesh.rules" in overrides:
        raise ValueError("--mesh.rules is for training; to replicate parameters, use --mesh.data")
    return override(Config(), overrides).mesh


def _step(values: Any) -> Step:
    """The value of `--step`; refuses one that cannot be."""
    if isinstance(values.step, int) and values.step < 0:
        raise ValueError(f"--step must be at least 0, not {values.step}")
    return "newest" if values.step is None else values.step


def _parse(
    arguments: Sequence[str], options: Mapping[str, tuple[Any, str]], groups: Mapping[str, Any], description: str
) -> tuple[Any, dict[str, Any]]:
    """Parse options (name: type and help) and overrides of config groups; return both.

    An option is required unless its type includes None, which is then its default.
    """
    given = _given(arguments)
    hints = {name: hint for name, (hint, _) in options.items()}
    for group, default in groups.items():
        hints |= {f"{group}.{field}": hint for field, hint in typing.get_type_hints(type(default)).items()}
    if "help" not in given and "-h" not in arguments:
        for name, words in given.items():
            if name not in hints:
                raise unknown(f"--{name}", [f"--{known}" for known in hints])
            if name in options and words == [""]:
                raise ValueError(f"--{name} must not be empty")
            if not words or (len(words) > 1 and not takes_several(hints[name])) or (name in options and "" in words):
                raise ValueError(f"--{name} must be {wanted(hints[name])}, not {' '.join(words)!r}")
            for word in words:
                is_path = name in options and Path in (hints[name], *typing.get_args(hints[name]))
                if is_path and name not in ("workdir", "workdirs"):
                    on_disk(word, f"--{name}")
        for name, (hint, _) in options.items():
            if name not in given and not _may_be_none(hint):
                raise ValueError(f"--{name} is missing: it must be {wanted(hints[name])}")
    fields: list[Any] = [
        (name, Annotated[hint, tyro.conf.arg(help=text)], *[dataclasses.field(default=None)] * _may_be_none(hint))
        for name, (hint, text) in options.items()
    ]
    fields += [
        # tyro would look for the same text itself, and before that for the source of the class made here, in vain.
        (name, Annotated[type(default), tyro.conf.arg(help=inspect.getdoc(type(default)))], default)
        for name, default in groups.items()
    ]
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed: Any = tyro.cli(
                dataclasses.make_dataclass("Arguments", fields, kw_only=True),
                description=f"{description} {DEBUG}: show the traceback of any error.",
                args=arguments,
                use_underscores=True,
                config=(tyro.conf.FlagConversionOff,),
                registry=_REGISTRY,
            )
    except SystemExit as exit:
        if not exit.code:
            raise
        # Under a title; tyro draws a box around it if the terminal has the letters for that.
        _, *lines = (line.strip("╰╯│|+ ") for line in complaint.getvalue().splitlines())
        lines = [line if line.strip("─-") else "" for line in lines]
        message = " ".join(itertools.takewhile(bool, itertools.dropwhile(operator.not_, lines)))
        for name, words in given.items():
            if re.search(rf"--{re.escape(name)}\b", message):
                message = f"--{name} must be {wanted(hints[name])}, not {' '.join(words)!r}"
        raise ValueError(message) from None
    return parsed, {name: operator.attrgetter(name)(parsed) for name in given if name not in options and name in hints}


def _may_be_none(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _given(arguments: Iterable[str]) -> dict[str, list[str]]:
    """The options on a command line, each with the words that follow it."""
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
    """Parse one word as a name and several as a tuple of names; only a config file can give an Encoding object."""
    if info.type != EncodingSpec:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME [NAME ...]",
        instance_from_str=lambda words: words[0] if len(words) == 1 else tuple(words),
        is_instance=lambda value: True,
        str_from_instance=lambda spec: [str(part) for part in spec] if isinstance(spec, tuple) else [str(spec)],
    )
