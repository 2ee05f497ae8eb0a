"""The study of Kazemnejad et al. 2023: tasks x scratchpads x encodings x seeds, trained, asked and ranked.

    make length-study                  # SIZE=small: decoders of 0.2 million parameters, overnight on two cores
    make length-study SIZE=paper       # the paper's decoder of 85 million parameters, for one GPU
    python -m benchmarks.length_study.study --tasks copy addition --encodings nope rope

Runs of one shape train together, then answer. All encodings and seeds of some tasks come before the next tasks, so a
study that is stopped has compared those that it has done; started again it goes on, on another machine too: a model
whose answers are in benchmarks/results/length_study is not trained again. After every group of runs,
docs/length_generalization.md is written from the answers there are.
"""

import argparse
import contextlib
import csv
import dataclasses
import functools
import io
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={os.cpu_count()}")  # before JAX

import numpy as np

from benchmarks.length_study import answers, page
from benchmarks.pages import date, hardware
from nope_jax.checkpoint import load_model
from nope_jax.cli import run
from nope_jax.config import Config, EncodingSpec, TrainConfig, load_file, override
from nope_jax.data import load_corpus, load_tokenizer
from nope_jax.data.tasks import FORMATS, TASKS, Task
from nope_jax.encodings import RoPE
from nope_jax.evaluation.common.evaluation import evaluate
from nope_jax.evaluation.registry import Options, TasksConfig
from nope_jax.evaluation.tasks.answers import ask, measure
from nope_jax.training.flops import model_flops_per_token
from nope_jax.training.together import train_together

ROOT = Path(__file__).parents[2]
ENCODINGS = ("nope", "t5", "alibi", "rope", "sinusoidal", "learned")
SEEDS = range(3)
WARMUP = 0.06
"""Share of the steps, as in the paper."""
LENGTHS = 8
"""Lengths of a task that are asked, at most, of those of training and of those past them."""
MIN_ROWS = 8
"""Packed rows a step, at least, of long examples; otherwise a step has as many tokens as in the config of the size."""


class Part(NamedTuple):
    """Tasks whose models have one shape, and so train together, one encoding after the other."""

    tasks: tuple[str, ...]
    context: int
    """Tokens, which hold their longest example of training."""
    vocab: int = 128
    formats: tuple[str, ...] = ("none",)
    """Of their scratchpads."""

    def cases(self, encodings: Sequence[str]) -> list["Case"]:
        """All models of these tasks."""
        return [Case(self, *case) for case in itertools.product(self.formats, self.tasks, encodings, SEEDS)]


WITHOUT_SCRATCHPAD = (
    Part(("copy", "copy_replaced"), 64),
    Part(("copy_multi", "reverse"), 64),
    Part(("addition", "summation"), 64),
    Part(("scan", "parity"), 64),
    Part(("sort", "lego"), 64),
    Part(("copy_2x", "copy_multi_2x"), 64),
    Part(("reverse_2x", "reverse_mcrv"), 64),
    Part(("polynomial", "sort_integers"), 128),
    Part(("pcfg",), 128, vocab=576),
)
"""From cheap and telling tasks on. Two tasks with three seeds are as much for each of two cores."""
PADS = tuple(format for format in FORMATS if format != "none")
NO_VARIABLES = tuple(format for format in PADS if format != "no_variables")
"""For tasks whose scratchpads have none."""
SCRATCHPADS = (
    Part(("addition",), 384, formats=PADS),
    Part(("parity",), 288, formats=PADS),
    Part(("summation",), 288, formats=PADS),
    Part(("sort",), 256, formats=NO_VARIABLES),
    Part(("lego",), 352, formats=NO_VARIABLES),
    Part(("sort_integers",), 448, formats=NO_VARIABLES),
    Part(("polynomial",), 640, formats=PADS),
)
TASK_NAMES = tuple(task for part in WITHOUT_SCRATCHPAD for task in part.tasks)


@dataclasses.dataclass(frozen=True)
class Size:
    """A size of the study."""

    config: Path
    """The config file of its decoder and recipe, on some task."""
    parts: tuple[Part, ...]
    """In their order."""
    together: int
    """Runs that train together at most."""
    examples: int
    """Questions of each length."""

    def groups(self, tasks: Sequence[str], formats: Sequence[str], encodings: Sequence[str]) -> Iterator[list["Case"]]:
        """What trains together, part by part and encoding by encoding."""
        for part, encoding in itertools.product(self.parts, encodings):
            cases = [case for case in part.cases([encoding]) if case.format in formats and case.task in tasks]
            for first in range(0, len(cases), self.together):
                yield cases[first : first + self.together]


class Case(NamedTuple):
    """One of the models."""

    part: Part
    format: str
    task: str
    encoding: str
    seed: int

    @property
    def name(self) -> str:
        return "-".join((self.task, self.format, self.encoding, str(self.seed)))

    def config(self, base: Config, steps: int | None = None) -> Config:
        """Its config, given that of its size; with other `steps`, the warm-up is the same share of them."""
        context, packed = self.part.context, base.data.document_mask
        tokens = base.data.batch_size * base.data.context_length
        head_dim = base.model.head_dim or base.model.model_dim // base.model.num_heads
        encoding: EncodingSpec = self.encoding
        if encoding == "rope":
            encoding = RoPE(rotary_dim=head_dim // 4, interleaved=True)  # as the paper's
        values = {
            "model.encoding": encoding,
            "model.vocab_size": self.part.vocab,
            "model.train_length": None,
            "data.source": f"task:{self.task}",
            "data.tokenizer": f"task:{self.task}",
            "data.scratchpad": self.format,
            "data.context_length": context,
            "data.batch_size": max(MIN_ROWS, tokens // context) if packed else base.data.batch_size,
            "data.seed": self.seed,
            "train.seed": self.seed,
        }
        if steps is not None:
            values |= {"train.steps": steps, "optimizer.warmup_steps": max(1, round(WARMUP * steps))}
        return override(base, values)


class Study:
    """A study: the workdirs and reports of its runs in one folder, their answers in another."""

    def __init__(self, folder: Path, results: Path, size: Size, steps: int | None = None):
        self._folder, self._results, self._size, self._steps = folder, results, size, steps
        self._base = load_file(size.config)
        self.load = functools.lru_cache(maxsize=64)(load_corpus)  # the encodings of a part read the same data

    def runs(self, cases: Sequence[Case]) -> list[tuple[Config, Path]]:
        """The configs and workdirs of some models."""
        return [(case.config(self._base, self._steps), self._folder / "runs" / case.name) for case in cases]

    def done(self, case: Case) -> bool:
        """Whether a model has answered at every length, on whatever machine, by the config that it has by now."""
        rows = answers.read_of(*self._kept(case))
        lengths = {row.length for row in rows if row.model == (case.encoding, case.seed)}
        return lengths == {*lengths_asked(TASKS[case.task])}

    def take(self, cases: Sequence[Case]) -> None:
        """Train and ask some models, and keep their answers. (Of a workdir of another config, training decides.)"""
        train_together(self.runs(cases), self.load)
        settings = TasksConfig(examples=self._size.examples, batch_size=self._size.examples)
        for (task, _), of_task in itertools.groupby(cases, key=lambda case: (case.task, case.format)):
            asked = {case.name: case for case in of_task}
            first, *_ = asked.values()
            workdirs = tuple(workdir for _, workdir in self.runs([*asked.values()]))
            out = self._folder / "reports" / first.name
            evaluate("tasks", Options(workdirs, lengths_asked(TASKS[task]), out, {}, settings))
            made = {"date": date(), "hardware": hardware()}
            with (out / "tasks.csv").open(newline="") as file:
                rows = [
                    answers.Row.parsed(row | made | {"encoding": asked[row["run"]].encoding})
                    for row in csv.DictReader(file)
                ]
            answers.merge(*self._kept(first), rows)

    def _kept(self, case: Case) -> tuple[Path, Config]:
        """The folder of a model's answers, and the config that belongs there."""
        first = case._replace(encoding="nope", seed=0)
        return self._results / f"{case.task}-{case.format}", first.config(self._base, self._steps)


def lengths_asked(task: Task) -> tuple[int, ...]:
    """At most LENGTHS lengths of training, and as many past them, evenly spread from the first to the last."""
    chosen: list[int] = []
    for lengths in (task.train_lengths, task.test_lengths):
        possible = [length for length in lengths if _has_questions(task, length)]
        places = np.linspace(0, len(possible) - 1, min(LENGTHS, len(possible))).round().astype(int)
        chosen += [possible[place] for place in places]
    return tuple(chosen)


def _has_questions(task: Task, length: int) -> bool:
    """Whether a task has instances of a length that are held out of training."""
    try:
        task.example(0, 0, length, split="test", scratchpad=False)
    except ValueError:
        return False
    return True


def flops(config: Config) -> float:
    """Of the training of a run."""
    return model_flops_per_token(config) * config.data.batch_size * config.data.context_length * config.train.steps


def hours(study: Study, groups: Sequence[Sequence[Case]], examples: int) -> float:
    """How long some groups will take, by a few steps and answers of the first, in proportion to FLOPs and lengths."""
    steps = 12
    few = TrainConfig(steps=steps, log_every=steps // 2, checkpoint_every=steps, eval_every=steps, eval_batches=1)
    with tempfile.TemporaryDirectory() as folder:
        timed = []
        for config, workdir in study.runs(groups[0]):
            train = dataclasses.replace(few, seed=config.train.seed)
            timed.append((dataclasses.replace(config, train=train), Path(folder, workdir.name)))
        with contextlib.redirect_stdout(io.StringIO()):
            train_together(timed, study.load)
        config, workdir = timed[0]
        logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        rate = [line["tokens_per_second"] for line in logged if "tokens_per_second" in line][-1]
        per_flop = 1 / (rate * len(timed) * model_flops_per_token(config))
        per_asked = seconds_asked(workdir, groups[0][0], examples)
    training = sum(flops(config) for cases in groups for config, _ in study.runs(cases))
    asked = sum(_tokens(case) for cases in groups for case in cases) / _tokens(groups[0][0])
    return (per_flop * training + per_asked * asked) / 3600


def _tokens(case: Case) -> int:
    """In proportion to the tokens that a model reads and writes in answering: lengths by context."""
    return len(lengths_asked(TASKS[case.task])) * case.part.context


def seconds_asked(workdir: Path, case: Case, examples: int) -> float:
    """How long a run takes to answer, by the questions of the longest length of its training."""
    config, model, _ = load_model(workdir)
    task, tokenizer = TASKS[case.task], load_tokenizer(config.data.tokenizer)
    length = task.train_lengths[-1]
    questions = ask(
        task, tokenizer, config.data.tokenizer, length, format=case.format, bos=None, seed=0, count=examples
    )
    seconds = 0.0
    for _ in range(2):  # the first time, it compiles
        began = time.perf_counter()
        measure(model, tokenizer, questions, format=case.format, batch_size=examples)
        seconds = time.perf_counter() - began
    return seconds * len(lengths_asked(task))


SIZES = {
    # Most scratchpads need more time than a night has.
    "small": Size(
        ROOT / "benchmarks/length_study/decoder.py",
        (*WITHOUT_SCRATCHPAD, *SCRATCHPADS[:3]),
        together=42,
        examples=20,
    ),
    "paper": Size(ROOT / "configs/t5_base_tasks.py", (*WITHOUT_SCRATCHPAD, *SCRATCHPADS), together=3, examples=100),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains, asks and ranks: tasks x scratchpads x encodings x seeds.")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps", type=_at_least_one, help="Of training, other than those of the size.")
    parser.add_argument("--tasks", nargs="+", choices=TASK_NAMES, default=TASK_NAMES)
    parser.add_argument("--scratchpads", nargs="+", choices=FORMATS, default=tuple(FORMATS))
    parser.add_argument("--encodings", nargs="+", choices=ENCODINGS, default=ENCODINGS)
    parser.add_argument("--out", type=Path, help="Folder of the runs; runs/length_study/SIZE by default.")
    parser.add_argument("--results", type=Path, help="Of the answers; benchmarks/results/length_study/SIZE by default.")
    parser.add_argument("--page", type=Path, default=page.PAGE)
    given = parser.parse_args()
    size = SIZES[given.size]
    name = given.size if given.steps is None else f"{given.size}-{given.steps}"
    results = given.results or answers.RESULTS / name
    study = Study(given.out or Path("runs/length_study", name), results, size, given.steps)
    groups = [cases for cases in size.groups(given.tasks, given.scratchpads, given.encodings) if cases]
    left = [some for cases in groups if (some := [case for case in cases if not study.done(case)])]

    def write_page() -> None:
        every = [(task, format) for part in size.parts for format in part.formats for task in part.tasks]
        command = f"make length-study SIZE={given.size}" + f" STEPS={given.steps}" * (given.steps is not None)
        page.write(given.page, results, command, every, ENCODINGS)

    # What cannot be written is refused before anything is trained.
    results.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=results).close()
    write_page()
    models, of_left = (sum(map(len, some)) for some in (groups, left))
    print(f"{models} models in {len(groups)} groups, of which {len(groups) - len(left)} are done", flush=True)
    if left:
        print(f"{of_left} models take about {hours(study, left, size.examples):.1f} h here", flush=True)
    for i, cases in enumerate(left, 1):
        began = time.monotonic()
        study.take(cases)
        write_page()
        minutes = (time.monotonic() - began) / 60
        print(f"group {i} of {len(left)}, {cases[0].name} ..., took {minutes:.1f} min", flush=True)


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


if __name__ == "__main__":
    sys.exit(run(main))
