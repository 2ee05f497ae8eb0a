"""Whether a run may go on from what is in its workdir: only to train the same function, on the same data."""

import json
import operator
import sys
from collections.abc import Mapping

import jax

from nope_jax import config as configs
from nope_jax.config import HINTS, Config, DataConfig
from nope_jax.data import Corpus
from nope_jax.data.tokenizers import tokenizer_digest
from nope_jax.distributed import said_by_all
from nope_jax.paths import Location, write_whole

MAY_CHANGE = frozenset(
    {
        "model.attention",
        "model.remat",
        "data.source",
        "data.dir",
        "data.tokenizer",
        "data.document_separator",
        "optimizer.accumulation",
        "train.steps",
        "train.log_every",
        "train.checkpoint_every",
        "train.eval_every",
        "train.eval_batches",
        "train.on_bad_step",
        "train.spike_factor",
        "train.max_skipped",
        "train.tensorboard",
        "train.profile_steps",
        *(name for name in HINTS if name.startswith(("mesh.", "eval."))),
    }
)
"""The fields that a run may be started again with differently.

Most say how a step is computed (the mesh, microbatches, recomputation, the implementation of attention), which changes
its result by rounding alone; or what is measured, written and shown beside it, which changes nothing. Where the data
lie may change because `DataDigests` hold what they are. Two change the training itself, and are meant to: with another
`train.steps` the rest of the run follows the cosine of the new length, and what becomes of bad steps may change so that
a run which one of them stopped can go on without it. `model.dtype` changes more than rounding does. `train.init_from`
has had its effect and says where the run comes from."""

DataDigests = dict[str, str]
"""What a run is trained on, by content: digests of the tokenizer, and of the tokens of either split."""


def digest_data(config: DataConfig, corpora: Mapping[str, Corpus]) -> DataDigests:
    """The digests of what this process reads.

    Raises:
        ValueError: the processes of the run do not read the same; all raise it.
    """
    ours = {"tokenizer": tokenizer_digest(config.tokenizer)}
    ours |= {split: corpus.digest() for split, corpus in corpora.items()}
    first, *others = map(json.loads, said_by_all(json.dumps(ours)))
    for process, theirs in enumerate(others, 1):
        if theirs != first:
            raise ValueError(
                f"process {process} does not read the data that process 0 reads: {_difference(theirs, first, config)}"
            )
    return ours


def check_goes_on(config: Config, data: DataDigests, workdir: Location) -> None:
    """Refuses to go on with the run in a workdir as another one.

    Raises:
        ValueError: a field of the config, or the code of its encoding, is not what it was and must be, or the data are
            others.
    """
    then = load_digests(workdir)
    may_change = MAY_CHANGE
    if then is None:  # saved by an earlier version: nothing but the names can tell
        may_change -= {"data.source", "data.tokenizer"}
        if jax.process_index() == 0:
            print(f"{workdir} does not say what its data were: from now on they are today's", file=sys.stderr)
    configs.refuse_changed_code(config, workdir)
    before = configs.load(workdir)
    differences = []
    for name in HINTS:
        was, is_now = (operator.attrgetter(name)(whole) for whole in (before, config))
        if was != is_now and name not in may_change:
            differences.append(f"{name} was {was!r}, not {is_now!r}")
    if differences:
        raise ValueError(f"{workdir} holds a run of another config: {'; '.join(differences)}; choose another workdir")
    if then is not None and then != data:
        raise ValueError(
            f"{workdir} holds a run on other data: {_difference(data, then, config.data)}; choose another workdir"
        )


def save_digests(data: DataDigests, workdir: Location) -> None:
    """Writes `data.json` into a workdir."""
    write_whole(workdir / "data.json", (json.dumps(data, indent=2) + "\n").encode())


def load_digests(workdir: Location) -> DataDigests | None:
    """What is in the `data.json` of a workdir; None if there is none.

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
    """What is not the same, in words; other tokens are no wonder under another tokenizer."""
    if ours["tokenizer"] != theirs.get("tokenizer"):
        return f"data.tokenizer {config.tokenizer} is another tokenizer"
    splits = [name for name in ours if ours[name] != theirs.get(name)]
    return f"the {' and '.join(splits)} documents of data.source {config.source} are others"
