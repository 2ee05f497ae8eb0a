"""Checks whether a run may resume from its workdir: it must train the same function on the same data."""

import dataclasses
import json
import operator
import sys
from collections.abc import Mapping

import jax

from nope_jax import config as configs
from nope_jax.config import HINTS, Config, DataConfig
from nope_jax.data import Corpus, Mixture
from nope_jax.data.tokenizers import tokenizer_digest
from nope_jax.distributed import said_by_all
from nope_jax.paths import Location, write_whole

_SAME_CONTENT = frozenset(
    {
        "data.source",
        "data.validation_source",
        "data.split",
        "data.text_field",
        "data.tokenizer",
        "data.document_separator",
        "data.separator_token",
    }
)
"""Fields that say where the data are, which `DataDigests` identify by their content."""

MAY_CHANGE = _SAME_CONTENT | frozenset(
    {
        "model.attention",
        "model.remat",
        "data.dir",
        "optimizer.accumulation",
        "train.steps",
        "train.log_every",
        "train.checkpoint_every",
        "train.keep",
        "train.keep_every",
        "train.keep_best",
        "train.eval_every",
        "train.eval_batches",
        "train.on_bad_step",
        "train.spike_factor",
        "train.max_skipped",
        "train.tensorboard",
        "train.wandb",
        "train.profile_steps",
        *(name for name in HINTS if name.startswith(("mesh.", "eval."))),
    }
)
"""Fields that may change when a run is resumed.

Most set how a step is computed (mesh, microbatches, rematerialization, attention implementation), which affects the
result only by rounding, or what is measured, written and shown, which does not affect it. The location of the data may
change because `DataDigests` identify their content. Two fields change the training itself, on purpose: with another
`train.steps` the rest of the run follows the schedule of the new length, and the handling of bad steps may change so
that a run stopped by one can continue past it. `model.dtype` is not included, because it changes more than rounding,
and neither is `train.init_from`, which has already taken effect and records where the run comes from."""

DataDigests = dict[str, str]
"""The data of a run by content: digests of the tokenizer and of the tokens of each split."""


def digest_data(config: DataConfig, corpora: Mapping[str, Corpus | Mixture]) -> DataDigests:
    """Compute the digests of the data that this process reads.

    Raises:
        ValueError: the processes of the run read different data; all of them raise it.
    """
    ours = {"tokenizer": tokenizer_digest(config.tokenizer, config.separator_token)}
    ours |= {split: corpus.digest() for split, corpus in corpora.items()}
    first, *others = map(json.loads, said_by_all(json.dumps(ours)))
    for process, theirs in enumerate(others, 1):
        if theirs != first:
            raise ValueError(
                f"process {process} does not read the data that process 0 reads: {_difference(theirs, first, config)}"
            )
    return ours


def check_goes_on(config: Config, data: DataDigests, workdir: Location) -> None:
    """Check that a run may resume from a workdir.

    Raises:
        ValueError: a config field that must not change has changed, or the code of the encoding, or the data.
    """
    then = load_digests(workdir)
    may_change = MAY_CHANGE
    if then is None:  # saved by an earlier version: only the names identify the data
        may_change -= _SAME_CONTENT
        if jax.process_index() == 0:
            print(f"{workdir} does not say what its data were: from now on they are today's", file=sys.stderr)
    configs.refuse_changed_code(config, workdir)
    before = configs.load(workdir)
    # A default is the same as its value written out; if it follows another field, that one is what differs.
    both = [
        dataclasses.replace(whole, model=whole.model.with_defaults(), optimizer=whole.optimizer.with_defaults())
        for whole in (before, config)
    ]
    differences = []
    for name in (name for name in HINTS if name not in may_change):
        value = operator.attrgetter(name)
        was, is_now = map(value, both)
        if was != is_now and value(before) != value(config):
            differences.append(f"{name} was {was!r}, not {is_now!r}")
    if differences:
        raise ValueError(
            f"{workdir} holds a run with a different config: {'; '.join(differences)}; choose another workdir"
        )
    if then is not None and then != data:
        raise ValueError(
            f"{workdir} holds a run on other data: {_difference(data, then, config.data)}; choose another workdir"
        )


def save_digests(data: DataDigests, workdir: Location) -> None:
    """Write `data.json` into a workdir."""
    write_whole(workdir / "data.json", (json.dumps(data, indent=2) + "\n").encode())


def load_digests(workdir: Location) -> DataDigests | None:
    """Read the `data.json` of a workdir; None if there is none.

    Raises:
        ValueError: it cannot be read.
    """
    path = workdir / "data.json"
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: it must be an object of digests")
    return values


def _difference(ours: DataDigests, theirs: DataDigests, config: DataConfig) -> str:
    """Describe the difference; with another tokenizer, the tokens necessarily differ too."""
    if ours["tokenizer"] != theirs.get("tokenizer"):
        return f"data.tokenizer {config.tokenizer} is another tokenizer"
    splits = [name for name in ours if ours[name] != theirs.get(name)]
    return f"the {' and '.join(splits)} documents of data.source {' '.join(config.sources)} are others"
