"""RULER: synthetic tasks that ask more of a long context than retrieval (Hsieh et al. 2024, arXiv 2404.06654).

A model continues each prompt greedily, by as many tokens as RULER has room for or until it ends the document. Its score
is the share of the answers that occur in what it writes; to questions, any of the answers will do.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from nope_jax.data import Tokenizer, load_tokenizer
from nope_jax.data.ruler import RULER, Example, RulerTask, read_tasks
from nope_jax.evaluation.common import continuations, plots
from nope_jax.evaluation.common.console import Bar
from nope_jax.evaluation.common.evaluation import Evaluation
from nope_jax.evaluation.common.files import Csv
from nope_jax.evaluation.common.parts import Part, measure_parts
from nope_jax.evaluation.common.report import Section, Table
from nope_jax.evaluation.common.runs import Run, cannot_read, find_runs, result_identity
from nope_jax.evaluation.common.uncertainty import wilson_interval
from nope_jax.evaluation.registry import Options, RulerConfig
from nope_jax.models import Decoder

COLUMNS = "run encoding train_length task length examples score score_low score_high"
"""Columns of ruler.csv, one row per run, task and length; scores are from 0 to 100, with their 95 % Wilson interval."""
ANSWER_COLUMNS = "run task length example score answers continuation"
"""Columns of ruler_answers.csv, one row per example; answers are separated by spaces, those to questions by " | "."""
EFFECTIVE = 85.6
"""A length is effective if the mean score there is at least that of Llama-2-7B at 4,096 tokens, on RULER's 13 tasks."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a run wrote for the examples of one task at one length."""

    scores: Float[np.ndarray, "examples"]
    """From 0 to 1."""
    continuations: np.ndarray
    """Texts."""
    answers: np.ndarray
    """The answers to each example, as one text."""

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the mean score."""
        return wilson_interval(float(self.scores.sum()), len(self.scores))


Results = dict[str, Scores]
"""The scores of a run at one length, by task."""


def plan(options: Options) -> "Ruler":
    """Plans the tasks of `settings.tasks` for every run at every length (prompt plus answer, in its own tokens).

    Raises:
        ValueError: a run, a task, its file or a tokenizer is invalid, or the shortest length is too short for a task.
        OSError: a file cannot be read.
    """
    settings: RulerConfig = options.settings
    runs: list[Run[Results]] = find_runs(options)
    tasks = find_tasks(settings)
    for run in runs:
        for task in tasks:
            for example in examples(run, task, run.possible[0], 1, settings.seed):
                refuse_lost(run, task, example)
    return Ruler(runs, tasks, settings)


def find_tasks(settings: RulerConfig) -> list[RulerTask]:
    """The tasks to ask, over the user's files where they read one.

    Raises:
        ValueError: a task is named twice or without its file, a file is invalid or holds too few questions.
        OSError: a file cannot be read.
    """
    found = read_tasks(settings.haystack, settings.questions)
    names = tuple(found) if settings.tasks is None else settings.tasks
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--ruler.tasks names {name} twice")
        if name not in found:
            raise ValueError(
                f"--ruler.tasks names {name}, which reads a file: niah_* need --ruler.haystack, qa_1 needs "
                "--ruler.questions in the format of SQuAD, qa_2 in that of HotpotQA"
            )
        if (most := found[name].available) is not None and most < settings.examples:
            raise ValueError(f"--ruler.examples is {settings.examples}, but {name} has {most} questions in its file")
    return [found[name] for name in names]


def examples(run: Run[Results], task: RulerTask, length: int, count: int, seed: int) -> Iterator[Example]:
    """The examples of a task in the tokens of a run.

    Raises:
        ValueError: the task cannot be made at this length; the message names the run and what to change.
    """
    try:
        yield from task.examples(_tokenizer(run), length, count, seed)
    except ValueError as error:
        where = f"{run.name} ({run.config.data.tokenizer})"
        raise ValueError(f"--lengths of {where}: {error}; --ruler.tasks can leave out {task.name}") from error


def _tokenizer(run: Run[Results]) -> Tokenizer:
    return _loaded(run.config.data.tokenizer, run.config.data.separator_token)


_loaded = functools.cache(load_tokenizer)


def refuse_lost(run: Run[Results], task: RulerTask, example: Example) -> None:
    """Rejects a tokenizer in which the answers to an example are lost.

    Raises:
        ValueError: names the tokenizer and an answer.
    """
    tokenizer = _tokenizer(run)
    told = tokenizer.decode(np.asarray(tokenizer.encode(example.prompt + " " + " ".join(example.answers))))
    for answer in example.answers:
        if task.score(told, [answer]) == 0:
            raise ValueError(
                f"data.tokenizer {run.config.data.tokenizer} of {run.name} cannot tell {answer!r}, an answer of "
                f"RULER's {task.name}: it reads its text as {told[-60:]!r}"
            )


@dataclasses.dataclass
class Ruler(Evaluation):
    """RULER's tasks; `Run.results` holds the scores of each task at each length."""

    runs: Sequence[Run[Results]]
    tasks: Sequence[RulerTask]
    settings: RulerConfig

    def measure(self, out: Path, bar: Bar) -> Iterator[None]:
        settings = self.settings
        bar.total(len(self.tasks) * settings.examples * sum(sum(run.possible) for run in self.runs))
        for run in self.runs:
            parts = [self._part(run, bar, *pair) for pair in itertools.product(run.possible, self.tasks)]
            yield from measure_parts(run, "ruler", parts, Scores, settings.batch_size, out, bar)

    def _part(self, run: Run[Results], bar: Bar, length: int, task: RulerTask) -> Part:
        return Part(
            task.name,
            length,
            self.settings.examples * length,
            functools.partial(self._identity, run, task, length),
            lambda model, rows: self._measure(run, model, task, length, rows, bar),
        )

    def _identity(self, run: Run[Results], task: RulerTask, length: int) -> str:
        settings, data = self.settings, run.config.data
        first = "".join(example.prompt for example in examples(run, task, length, 1, settings.seed))
        digest = hashlib.sha256(first.encode()).hexdigest()  # of the words, the tokenizer and the code that makes them
        return result_identity(run, task, data.tokenizer, data.bos, length, settings.examples, settings.seed, digest)

    def _measure(self, run: Run[Results], model: Decoder, task: RulerTask, length: int, rows: int, bar: Bar) -> Scores:
        drawn = list(examples(run, task, length, self.settings.examples, self.settings.seed))
        for example in drawn:
            refuse_lost(run, task, example)
        tokenizer, bos = _tokenizer(run), run.config.data.bos
        texts = continuations.write(
            model,
            tokenizer,
            [continuations.encode(tokenizer, example.prompt, bos=bos) for example in drawn],
            task.room,
            batch_size=rows,
            advance=lambda count: bar.advance(count * length),
        )
        scores = np.array([task.score(text, example.answers) for text, example in zip(texts, drawn, strict=True)])
        between = " | " if task.file == "questions" else " "
        return Scores(scores, np.array(texts), np.array([between.join(example.answers) for example in drawn]))

    def numbers(self) -> Mapping[str, Csv]:
        return {
            "ruler.csv": Csv(COLUMNS, self._csv_rows()),
            "ruler_answers.csv": Csv(ANSWER_COLUMNS, self._answer_rows()),
        }

    def _each(self) -> Iterator[tuple[Run[Results], str, int, Scores]]:
        for run in self.runs:
            for task in self.tasks:
                for length, results in sorted(run.results.items()):
                    if task.name in results:
                        yield run, task.label, length, results[task.name]

    def _csv_rows(self) -> Iterator[tuple]:
        for run, label, length, found in self._each():
            what = (run.name, run.encoding, run.train_length, label, length, len(found.scores))
            yield (*what, *(100 * share for share in (float(found.scores.mean()), *found.interval)))

    def _answer_rows(self) -> Iterator[tuple]:
        for run, label, length, found in self._each():
            for i, row in enumerate(zip(found.scores.tolist(), found.answers, found.continuations, strict=True)):
                yield run.name, label, length, i, *row

    def figures(self) -> Iterator[tuple[str, Figure]]:
        yield "ruler.png", draw(self.measured, self.tasks)

    def sections(self) -> list[Section]:
        header = ["run", "task", "trained at", *(f"{length:,}" for length in self.runs[0].lengths), "effective"]
        section = Section(
            "RULER",
            "Synthetic tasks of retrieval, tracing and counting over the whole context (Hsieh et al. 2024).",
            Table("RULER scores by length", header, rows(self.measured, self.tasks)),
            notes(self.measured, self.tasks, self.settings),
            figures={"ruler.png": "Score of every run and task by length"},
            files={
                "ruler.csv": "one row per run, task and length, with 95 % intervals.",
                "ruler_answers.csv": "what each run wrote for each example, beside the answers.",
            },
        )
        return [section]


def average(run: Run[Results], length: int, tasks: Sequence[RulerTask]) -> float | None:
    """The mean score of all tasks at a length, from 0 to 100; None if some are not measured."""
    results = run.results.get(length, {})
    if any(task.name not in results for task in tasks):
        return None
    return 100 * float(np.mean([results[task.name].scores.mean() for task in tasks]))


def effective_length(run: Run[Results], tasks: Sequence[RulerTask]) -> str:
    """The longest length at which the mean score of all tasks is at least EFFECTIVE."""
    means = {length: average(run, length, tasks) for length in run.possible}
    reached = [length for length, mean in means.items() if mean is not None and mean >= EFFECTIVE]
    if reached:
        return f"{max(reached):,}"
    return "-" if None in means.values() else f"< {min(means):,}"


def draw(runs: Sequence[Run[Results]], tasks: Sequence[RulerTask]) -> Figure:
    """Draws the score of each task by length, a panel per run, with the threshold of the effective length."""
    lengths, across = runs[0].lengths, min(len(runs), 3)
    down = -(-len(runs) // across)
    figure = plots.new_figure(3.4 * across + 1.8, 2.6 * down + 0.4)
    panels = plots.panels(figure, len(runs), across, sharey=True)
    for run, axes in zip(runs, panels, strict=True):
        for i, task in enumerate(tasks):
            shares = {n: results[task.name] for n, results in run.results.items() if task.name in results}
            x = [lengths.index(length) + 0.3 * ((i + 0.5) / len(tasks) - 0.5) for length in shares]
            y = np.array([found.scores.mean() for found in shares.values()])
            ends = np.array([found.interval for found in shares.values()]).reshape(-1, 2).T
            style = {"linewidth": 1.2, "markersize": 4, "capsize": 2, "label": task.label, **plots.line_style(i)}
            axes.errorbar(x, 100 * y, 100 * np.abs(ends - y), **style)
        axes.axhline(EFFECTIVE, color=plots.QUIET, linewidth=1, linestyle=":")
        inside = sum(length <= run.train_length for length in lengths)
        axes.axvline(inside - 0.5, color="#D55E00", linewidth=2)
        plots.finish(axes)
        axes.set_title(f"{run.name} (trained at {run.train_length:,}, orange)", fontsize=9, color=plots.INK)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8)
        axes.set_xlim(-0.5, len(lengths) - 0.5)
        axes.set_ylim(-3, 103)
    panels[0].set_ylabel("Score (bars: 95 % interval)", fontsize=9)
    figure.supxlabel("Length of prompt and answer (tokens)", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside right center")
    return figure


def rows(runs: Sequence[Run[Results]], tasks: Sequence[RulerTask]) -> list[tuple[str, ...]]:
    """Table cells, for each run a row per task and one for their mean: run, task, training length, one column per
    length, and the effective length."""

    def cell(run: Run[Results], name: str, length: int) -> str:
        if name not in run.results.get(length, {}):
            return "cannot" if length in run.refused else "-"
        found = run.results[length][name]
        low, high = found.interval
        return f"{100 * found.scores.mean():.0f} [{100 * low:.0f}, {100 * high:.0f}]"

    def mean(run: Run[Results], length: int) -> str:
        value = average(run, length, tasks)
        return ("cannot" if length in run.refused else "-") if value is None else f"{value:.1f}"

    table = []
    for run in runs:
        trained = f"{run.train_length:,}"
        table += [
            (run.name, task.label, trained, *(cell(run, task.name, n) for n in run.lengths), "") for task in tasks
        ]
        means = (mean(run, length) for length in run.lengths)
        table.append((run.name, f"mean of {len(tasks)}", trained, *means, effective_length(run, tasks)))
    return table


def notes(runs: Sequence[Run[Results]], tasks: Sequence[RulerTask], settings: RulerConfig) -> list[str]:
    """Notes below the table: the lengths that a run does not support, and the definition of the numbers."""
    rooms = ", ".join(f"{task.name} {task.room}" for task in tasks)
    notes = [
        *cannot_read(runs),
        f"Share of the answers, in percent, that occur in what a run writes ({settings.examples} examples per task and "
        "length, greedy decoding, RULER's string_match_all), [95 % Wilson interval]. Prompts are RULER's for base "
        "models: without a chat template, ending with the beginning of the answer. A length includes prompt and room "
        f"for the answer, in tokens of the run's own tokenizer: {rooms}. Shares between 0 and 1 vary less than this "
        "interval allows for.",
    ]
    if own := [task.name for task in tasks if task.file is not None]:
        notes.append(
            f"RULER-style: {', '.join(own)} are made as in RULER, but over the files given here; their scores are not "
            "those of its table. To a question, any of its answers will do (string_match_part)."
        )
    counted = f"the {len(tasks)} asked here, {', '.join(task.name for task in tasks)}"
    lengths = "" if {task.name for task in tasks} == RULER.keys() else ", so the lengths are not those of its table"
    notes.append(
        f"Effective: the longest measured length with a mean of at least {EFFECTIVE}, Llama-2-7B's at 4,096 tokens. "
        f"RULER takes that mean over its 13 tasks, here it is over {counted}{lengths}."
    )
    return notes
