"""The registry of evaluations, read by the command line, the report and the documentation.

To add an evaluation:

1. Write a module with a function `plan(options: Options)` that validates the options and returns an `Evaluation`
   (`nope_jax.evaluation.common.evaluation`): its `runs`; `measure()`, which yields after each new result; and
   `numbers()`, `figures()` and `sections()`, which return the output.
2. Add an entry to EVALUATIONS, and a dataclass for its settings if it has any.

These two steps provide `eval.py NAME` with `--help`, a progress bar, tables, files, figures and a part of the report.
If the evaluation fails or is interrupted, the results so far are written. This module imports nothing large, so that
bad arguments are rejected at once; that is why the settings of an evaluation are here and not next to its code.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nope_jax.config import EvalConfig, MeshConfig, Step
from nope_jax.distributed import ProcessSpec
from nope_jax.paths import Location


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """Settings of eval.py tune (defaults: Wang et al. 2024, arXiv 2404.12224, appendix)."""

    documents: int = 16
    """Number of training documents per length on which factors are evaluated."""
    steps: int = 200
    """Number of updates of the learned factors (head, ssmax)."""
    warmup_steps: int = 20
    batch_size: int = 8
    learning_rate: float = 0.1
    start: Literal["uniform", "one"] = "uniform"
    """Initial value of learned factors: the best uniform factor, or 1."""
    focus: bool = True
    """Whether to keep every factor at 1 or above (head)."""
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class PasskeyConfig:
    """Settings of eval.py passkey (Wang et al. 2024, arXiv 2404.12224)."""

    depths: int = 10
    keys: int = 10
    """Number of keys per depth and length."""
    batch_size: int = 8
    seed: int = 0


RulerTaskName = Literal[
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "qa_1",
    "qa_2",
]


@dataclasses.dataclass(frozen=True)
class RulerConfig:
    """Settings of eval.py ruler (Hsieh et al. 2024, arXiv 2404.06654)."""

    tasks: tuple[RulerTaskName, ...] | None = None
    """RULER's names of the tasks. None: those that need no file, and those whose files are given."""
    haystack: Path | None = None
    """A text to hide needles in (niah_single_2, niah_single_3, niah_multikey_1, niah_multivalue, niah_multiquery)."""
    questions: tuple[Path, ...] = ()
    """Questions in the JSON format of SQuAD (qa_1) or HotpotQA (qa_2): one file, or one of each."""
    examples: int = 100
    """Number of examples per task and length; RULER has 500, of which fewer are the first."""
    batch_size: int = 8
    seed: int = 42
    """RULER's is 42."""


@dataclasses.dataclass(frozen=True)
class LongbenchConfig:
    """Settings of eval.py longbench (Bai et al. 2023, arXiv 2308.14508)."""

    path: Path | None = None
    """Folder with datasets of LongBench, NAME.jsonl, and, if there, dataset2prompt.json and dataset2maxlen.json."""
    datasets: tuple[str, ...] | None = None
    """Names of datasets. None: the English ones and those of code in the folder."""
    examples: int | None = None
    """The first so many examples of each dataset. None: all."""
    batch_size: int = 4


@dataclasses.dataclass(frozen=True)
class LongpplConfig:
    """Settings of eval.py longppl (Fang et al. 2024, arXiv 2410.23771)."""

    judge: str | None = None
    """The run that decides which tokens need the long context, or hf:... or gguf:...; None: each run by itself."""
    short: int = 4096
    """Tokens of the short context."""
    step: int = 1024
    """Consecutive tokens whose short contexts begin at the same token."""
    gain: float = 2.0
    """A key token gains more than this many nats from the long context (the paper's alpha)."""
    loss: float = 2.0
    """A key token has less than this many nats of loss given the long context (the paper's -beta)."""


@dataclasses.dataclass(frozen=True)
class SimilarityConfig:
    """Settings of eval.py similarity."""

    length: int | None = None
    """Tokens per document. None: the shorter training length of the two runs."""
    documents: int = 16
    """Number of documents; on a task, number of examples of each length."""


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """Settings of eval.py probe."""

    documents: int = 32
    """Number of documents: half to train the probe, half to test it."""
    ridge: float = 1e-3
    """Ridge penalty: weight of the squared norm of the probe, relative to the variance of the hidden states."""


@dataclasses.dataclass(frozen=True)
class TasksConfig:
    """Settings of eval.py tasks (Kazemnejad et al. 2023, arXiv 2305.19466)."""

    task: str | None = None
    """The task to ask, as in data.source after task:. None: the task that each run was trained on."""
    examples: int = 100
    """Number of held-out examples drawn for each length."""
    batch_size: int = 32
    seed: int = 0


class Entry(NamedTuple):
    """Registry entry of an evaluation."""

    description: str
    module: str
    """Module that defines `plan`."""
    settings: Any = None
    """An instance of its settings dataclass, with the defaults; each field is an option, `--NAME.FIELD`."""
    lengths: tuple[Any, str] | None = (tuple[int, ...], "The lengths to evaluate at, in tokens.")
    """Type and help text of `--lengths`, which is optional if the type includes None; None: no such option."""
    takes_eval: tuple[str, ...] = ()
    """The eval.* fields that it uses."""
    methods: tuple[str, ...] = ()
    """Choices of `--method`; empty: no such option."""
    out: str = "Directory for the report."
    """Help text of `--out`."""


EVALUATIONS = {
    "curves": Entry(
        "Measures perplexity and attention entropy by position.",
        "nope_jax.evaluation.perplexity",
        takes_eval=tuple(field.name for field in dataclasses.fields(EvalConfig)),
    ),
    "tune": Entry(
        "Finds logit factors or a RoPE scaling that extend the context of a run, and writes the tuned run.",
        "nope_jax.evaluation.tune",
        TuneConfig(),
        methods=("uniform", "head", "log-n", "ssmax", "linear", "ntk", "dynamic", "yarn"),
        out="Workdir of the tuned run.",
    ),
    "passkey": Entry(
        "Measures how often a model retrieves a number hidden in filler text.",
        "nope_jax.evaluation.passkey",
        PasskeyConfig(),
        takes_eval=("dtype",),
    ),
    "tasks": Entry(
        "Measures exact match on the tasks that runs were trained on, within and past the lengths of training.",
        "nope_jax.evaluation.tasks",
        TasksConfig(),
        lengths=(tuple[int, ...] | None, "Lengths of the examples, as the task counts; those of the paper by default."),
        takes_eval=("dtype",),
    ),
    "ruler": Entry(
        "Measures retrieval, tracing and counting over long contexts by tasks of RULER.",
        "nope_jax.evaluation.ruler",
        RulerConfig(),
        takes_eval=("dtype",),
    ),
    "longbench": Entry(
        "Measures answers to real tasks over long texts, from a folder in the format of LongBench.",
        "nope_jax.evaluation.longbench",
        LongbenchConfig(),
        lengths=(
            tuple[int, ...],
            "The most tokens of a prompt and its answer; longer prompts are cut in the middle.",
        ),
        takes_eval=("dtype",),
    ),
    "longppl": Entry(
        "Measures perplexity over the tokens that need a long context (LongPPL).",
        "nope_jax.evaluation.longppl",
        LongpplConfig(),
        takes_eval=("documents", "seed", "batch_size", "dtype"),
    ),
    "similarity": Entry(
        "Compares the attention of two runs; on a task, that of a run with any number of others, by length.",
        "nope_jax.evaluation.similarity",
        SimilarityConfig(),
        lengths=None,
        takes_eval=("seed", "dtype"),
    ),
    "probe": Entry(
        "Measures how well a linear probe decodes positions from the hidden states of each layer.",
        "nope_jax.evaluation.probe",
        ProbeConfig(),
        takes_eval=("batch_size", "seed", "dtype"),
    ),
}
"""Evaluations by name, in the order of the report. Without a name, eval.py runs the first."""


class Options(NamedTuple):
    """The parsed command line of eval.py, without the name of the evaluation."""

    workdirs: tuple[Location, ...]
    """Or hf:... or gguf:... for published models."""
    lengths: tuple[int, ...]
    """Ascending, without duplicates; empty if not given."""
    out: Path
    overrides: dict[str, Any]
    """The given data.* and eval.* fields, by dotted name; `override` applies them to the config of each run."""
    settings: Any = None
    """An instance of the evaluation's settings dataclass."""
    method: str | None = None
    """One of `Entry.methods`."""
    step: Step = "newest"
    """The checkpoint of the runs to evaluate."""
    command: str = ""
    """The command as typed, for the report."""
    mesh: MeshConfig | None = None
    """The mesh.* fields, if any is given."""
    process: ProcessSpec = ProcessSpec()
    """This process's place among those that evaluate together."""
