"""The evaluations of eval.py: the one list, which the command line, the report and the documents read.

To add an evaluation:

1. Write a module with a function `plan(options: Options)` that refuses what cannot be had, and returns an `Evaluation`
   (`nope_jax.evaluation.common.evaluation`): the `runs` that it is about; `measure()`, which yields whenever there is
   more to keep; `numbers()`, `figures()` and `sections()`, which say what is written and shown of it.
2. Add an entry to EVALUATIONS, and a dataclass for its settings if it has any.

`eval.py NAME`, its `--help`, progress bar, tables, files, figures and part of the report follow from these two, and so
does that what has been measured is written when the rest fails or is interrupted. This module imports nothing large, so
that bad arguments are refused at once: therefore the settings of an evaluation stand here, not beside its code.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nope_jax.config import EvalConfig


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


class Entry(NamedTuple):
    """What the command line knows of an evaluation."""

    description: str
    module: str
    """Where its `plan` is."""
    settings: Any = None
    """A dataclass of settings of its own, with their defaults; each is an option, `--NAME.FIELD`."""
    takes_lengths: bool = True
    """Whether `--lengths` must be given."""
    takes_eval: tuple[str, ...] = ()
    """The fields of eval.* that it goes by."""
    methods: tuple[str, ...] = ()
    """What `--method` may be; empty: there is no such option."""
    out: str = "Where the report is written."
    """What `--out` is, for --help."""


EVALUATIONS = {
    "curves": Entry(
        "Measures perplexity and attention entropy by position.",
        "nope_jax.evaluation.perplexity",
        takes_eval=tuple(field.name for field in dataclasses.fields(EvalConfig)),
    ),
    "tune": Entry(
        "Finds the factors or the scaling with which a run holds further, and writes a run that has them.",
        "nope_jax.evaluation.tune",
        TuneConfig(),
        methods=("uniform", "head", "log-n", "ssmax", "linear", "ntk", "dynamic", "yarn"),
        out="The workdir of the tuned run.",
    ),
    "passkey": Entry(
        "Measures how often a number hidden in filler text is found again.",
        "nope_jax.evaluation.passkey",
        PasskeyConfig(),
    ),
    "similarity": Entry(
        "Compares the attention of two runs.",
        "nope_jax.evaluation.similarity",
        SimilarityConfig(),
        takes_lengths=False,
        takes_eval=("seed",),
    ),
    "probe": Entry(
        "Reads positions out of the hidden states of each layer.",
        "nope_jax.evaluation.probe",
        ProbeConfig(),
        takes_eval=("batch_size", "seed"),
    ),
}
"""By the word that follows eval.py, in the order of the report; without a word it is the first."""


class Options(NamedTuple):
    """The command line of eval.py, after the name of the evaluation."""

    workdirs: tuple[Path, ...]
    lengths: tuple[int, ...]
    """In tokens, ascending, each once; empty for an evaluation that takes none."""
    out: Path
    overrides: dict[str, Any]
    """The data.* and eval.* fields that were given, by dotted name: `override` puts them on the config of each run."""
    settings: Any = None
    """The evaluation's own settings."""
    method: str | None = None
    """One of its methods."""
    command: str = ""
    """What the user typed, for the report."""
