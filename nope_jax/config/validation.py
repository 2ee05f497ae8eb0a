"""Validation of configs, of single fields and of combinations, with the error messages."""

import dataclasses
import difflib
import operator
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nope_jax.config.choices import CHOICES
from nope_jax.encodings import ENCODINGS, SCHEDULES, Encoding, resolve
from nope_jax.paths import check_location, on_disk

if TYPE_CHECKING:
    from nope_jax.config.schema import Config, DataConfig

_AT_LEAST = {
    1: """model.vocab_size model.num_layers model.num_heads model.num_kv_heads model.head_dim model.model_dim
        model.mlp_dim model.train_length data.context_length data.batch_size optimizer.accumulation train.steps
        train.log_every train.checkpoint_every train.keep train.keep_every train.eval_every train.eval_batches
        eval.documents eval.batch_size
        eval.stride""",
    0: """data.seed optimizer.warmup_steps optimizer.weight_decay optimizer.z_loss train.seed train.max_skipped
        train.keep_best train.profile_steps eval.seed""",
}
_FILES = "text", "jsonl", "parquet", "hf"
"""Sources that are files."""
_ROWS = "jsonl", "parquet", "hf", "tfds"
"""Sources whose documents are a field of their rows."""
_OF_KINDS: dict[str, tuple[tuple[str, ...], Any]] = {
    "document_separator": (("text",), None),
    "text_field": (_ROWS, "text"),
    "lengths": (("task",), None),
    "scratchpad": (("task",), "none"),
}
"""Fields of data that only some kinds of sources have, and their defaults, with which any source is read."""
_POSITIVE = """model.norm_eps model.attention_scale model.attention_softcap model.embedding_scale model.residual_scale
    model.logits_scale model.logits_softcap optimizer.learning_rate optimizer.clip_norm optimizer.eps
    optimizer.decay_rate"""


def check(config: "Config", hints: Mapping[str, Any]) -> None:
    """Refuse invalid values, as far as they can be detected without building anything.

    Args:
        config: Config of a run.
        hints: The type of every field by its dotted name.

    Raises:
        ValueError: a value is invalid; the message names the field and what it should be.
    """
    values = {name: operator.attrgetter(name)(config) for name in hints}
    for name, value in values.items():
        if not _matches(value, hints[name]):
            raise ValueError(f"{name} must be {wanted(hints[name])}, not {value!r}")
    for least, names in _AT_LEAST.items():
        for name in names.split():
            if values[name] is not None and not values[name] >= least:
                raise ValueError(f"{name} must be at least {least}, not {values[name]}")
    for name in _POSITIVE.split():
        if values[name] is not None and not values[name] > 0:
            raise ValueError(f"{name} must be greater than 0, not {values[name]}")
    for name in "optimizer.b1", "optimizer.b2", "optimizer.momentum", "train.ema":
        if values[name] is not None and not 0 <= values[name] < 1:
            raise ValueError(f"{name} must be at least 0 and less than 1, not {values[name]}")
    for choice, table in CHOICES.items():
        chosen = values[f"optimizer.{choice}"]
        for field in sorted(set().union(*table.values()) - table[chosen].keys()):
            if values[f"optimizer.{field}"] is not None:
                have = ", ".join(name for name in table if field in table[name])
                raise ValueError(f"optimizer.{field} is a setting of optimizer.{choice} {have}, not of {chosen}")
    floor, share = values["optimizer.floor"], values["optimizer.decay_share"]
    if floor is not None and not 0 <= floor <= 1:
        raise ValueError(f"optimizer.floor must be from 0 to 1, a fraction of the peak, not {floor}")
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"optimizer.decay_share must be greater than 0 and at most 1, not {share}")

    if config.train.profile_steps > config.train.steps:
        raise ValueError(
            f"train.profile_steps must be at most train.steps {config.train.steps}, not {config.train.profile_steps}"
        )
    train = config.train
    if train.keep_every is not None and train.keep_every % train.checkpoint_every:
        raise ValueError(
            f"train.keep_every must be a multiple of train.checkpoint_every {train.checkpoint_every}, not "
            f"{train.keep_every}"
        )
    if train.keep_best and train.eval_every % train.checkpoint_every and train.checkpoint_every % train.eval_every:
        raise ValueError(
            f"train.keep_best needs the validation loss of checkpoints: train.eval_every {train.eval_every} must be a "
            f"multiple of train.checkpoint_every {train.checkpoint_every}, or divide it"
        )
    if train.init_step != "newest" and train.init_from is None:
        raise ValueError(f"train.init_step {train.init_step} needs train.init_from, the run that has this checkpoint")
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
    if len(set(model.biases)) < len(model.biases):
        raise ValueError(f"model.biases must name each kind of bias once, not {' '.join(model.biases)}")
    if model.block == "parallel_shared_norm" and model.norm_place == "post":
        raise ValueError("model.norm_place must be pre or sandwich with model.block parallel_shared_norm, not post")
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
    _check_sources(data)
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


def _check_sources(data: "DataConfig") -> None:
    named = [("data.source", name) for name in data.sources]
    if data.validation_source is not None:
        named.append(("data.validation_source", data.validation_source))
    for field, name in named:
        kind, _, path = name.partition(":")
        on_disk(path if kind in _FILES else "", field)
    on_disk(data.dir or "", "data.dir")
    on_disk(data.tokenizer, "data.tokenizer")
    if not data.sources or len(set(data.sources)) < len(data.sources):
        raise ValueError(f"data.source must name one source, or several different ones, not {data.source!r}")
    weights = data.weights
    if weights is not None:
        given = " ".join(map(str, weights))
        if isinstance(data.source, str) or len(weights) != len(data.source):
            raise ValueError(
                f"data.weights must be one for each of several sources, of which data.source has {len(data.sources)}, "
                f"not {given}"
            )
        if not all(weight > 0 for weight in weights) or not abs(sum(weights) - 1) < 1e-6:
            raise ValueError(f"data.weights must be positive and sum to 1, not to {sum(weights):.6g}: {given}")
    if isinstance(data.split, float | int) and not 0 < data.split < 1:
        raise ValueError(f"data.split must be a share between 0 and 1 or the name of a split, not {data.split}")
    if isinstance(data.split, float | int) and data.validation_source is not None:
        raise ValueError(
            f"data.split {data.split} is a share of data.source, which is trained on as a whole if there is a "
            f"data.validation_source, {data.validation_source}: leave out one of the two"
        )
    if data.document_separator == "":
        raise ValueError("data.document_separator must be the string between the documents of a text: source, or None")
    if not data.text_fields:
        raise ValueError("data.text_field must name a field, or several")
    for name, default in of_other_sources(data).items():
        if getattr(data, name) != default:
            kinds = ", ".join(f"{kind}:" for kind in _OF_KINDS[name][0])
            raise ValueError(
                f"data.{name} {getattr(data, name)!r} is for sources {kinds}, not for data.source "
                f"{' '.join(data.sources)}"
            )
    if data.lengths is not None and not (len(data.lengths) == 2 and 0 < data.lengths[0] <= data.lengths[1]):
        raise ValueError(
            "data.lengths must be the shortest and the longest length of a task, or None, not "
            f"{' '.join(map(str, data.lengths))}"
        )


def of_other_sources(data: "DataConfig") -> dict[str, Any]:
    """The fields that its sources do not have, because they are of other kinds, and their defaults."""
    kinds = {name.partition(":")[0] for name in (*data.sources, data.validation_source or "")}
    return {name: default for name, (those, default) in _OF_KINDS.items() if not kinds & {*those}}


def _matches(value: Any, hint: Any) -> bool:
    """Whether a value has an annotated type. An integer also counts as a float; a bool counts as neither."""
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
    """Describe a type in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if Encoding in arguments:
        return "a name, an Encoding, or a tuple of them"
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple:
        return f"{wanted(arguments[0])} or several"
    if arguments:
        of_several = {argument.__args__[0] for argument in arguments if typing.get_origin(argument) is tuple}
        return " or ".join(wanted(argument) for argument in arguments if argument not in of_several)
    words = {int: "an integer", float: "a number", str: "a string", bool: "True or False", Path: "a path"}
    return words.get(hint, "None")


def unknown(name: str, known: Iterable[str]) -> ValueError:
    """Return the error for a field that does not exist, with the closest known name as a suggestion."""
    known, bare = list(known), name.removeprefix("--")
    near = difflib.get_close_matches(name, known, n=1)
    if bare in ENCODINGS.keys() | SCHEDULES.keys() and "--model.encoding" in known:
        near = [f"--model.encoding {bare}"]
    return ValueError(f"unknown field {name}" + (f": did you mean {near[0]}?" if near else ""))
