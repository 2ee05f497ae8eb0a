"""Exact match on the tasks of Kazemnejad et al. 2023 (arXiv 2305.19466), by length, and ranks of encodings.

Every question is an example held out of training. The answer is decoded greedily with the KV cache, and must be the
whole target, followed by the separator. With a scratchpad, the answer after it counts; a malformed one is wrong.
"""

import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nope_jax.data import load_tokenizer
from nope_jax.data.tasks import Task, find_task
from nope_jax.data.tokenizers import Tokenizer
from nope_jax.evaluation.common import plots
from nope_jax.evaluation.common.console import Bar
from nope_jax.evaluation.common.evaluation import Evaluation
from nope_jax.evaluation.common.files import Csv, store, stored
from nope_jax.evaluation.common.plots import QUIET
from nope_jax.evaluation.common.report import Section, Table
from nope_jax.evaluation.common.runs import Run, find_runs, result_identity
from nope_jax.evaluation.common.uncertainty import wilson_interval
from nope_jax.evaluation.registry import Options, TasksConfig
from nope_jax.evaluation.tasks.answers import Answers, Question, ask, digest, measure
from nope_jax.evaluation.tasks.ranks import mean_reciprocal_ranks

COLUMNS = (
    "run encoding task scratchpad seed length distribution examples correct accuracy accuracy_low accuracy_high "
    "correct_scratchpads"
)
"""Columns of tasks.csv, one row per run and length of the task.

`distribution` is `in` for lengths of training and `out` for others; `accuracy_low` and `accuracy_high` are the 95 %
Wilson interval. These and `correct` are empty if the encoding does not support the length. `correct_scratchpads` counts
answers of which every step is right; it is empty without a scratchpad."""
PAPER_RANKS = {"nope": 0.687, "t5": 0.549, "alibi": 0.502, "rope": 0.330, "sinusoidal": 0.215}
"""Mean reciprocal ranks of the paper, of five encodings on 17 splits without scratchpads."""

Cell = tuple[str, str, int]
"""Task, format of the scratchpad and seed: the runs of a cell differ in their encodings."""


@dataclasses.dataclass
class Exam:
    """What a run is asked."""

    task: Task
    source: str
    """Name of the task, with its dataset if it reads one."""
    tokenizer: Tokenizer
    trained: frozenset[int]
    """The lengths of training: of the run, or of the paper if the run was trained on something else."""
    questions: Mapping[int, Sequence[Question]]
    """The questions of each length that the encoding of the run supports."""
    refused: Mapping[int, int]
    """The number of questions of each length that it does not support: all of them count as wrong."""

    @property
    def beyond(self) -> set[int]:
        """The lengths out of distribution."""
        return {*self.questions, *self.refused} - self.trained


def plan(options: Options) -> "TaskAccuracy":
    """Plans the exam of every run: lengths of training and of the test of its task, or `--lengths`.

    Runs of one task with the same tokenizer are asked the same questions.

    Raises:
        ValueError: a run, a length or a tokenizer is invalid, or a run has no task.
    """
    runs = find_runs(options._replace(lengths=()))
    return TaskAccuracy(runs, [_exam(run, options.lengths, options.settings) for run in runs], options.settings)


def _exam(run: Run[Answers], lengths: Sequence[int], settings: TasksConfig) -> Exam:
    data = run.config.data
    trained_on = [name for name in data.sources if name.startswith("task:")]
    if settings.task is None and len(trained_on) != 1:
        names = " ".join(data.sources)
        raise ValueError(f"--tasks.task must name a task, because {run.name} was trained on data.source {names}")
    source = settings.task or trained_on[0].removeprefix("task:")
    task = find_task(source, "data.source" if settings.task is None else "--tasks.task")
    if not task.answer_only:
        raise ValueError(f"task:{source} has no answers of its own: eval.py {source} measures it")
    if settings.task is None and data.lengths is not None:
        trained = frozenset(range(data.lengths[0], data.lengths[1] + 1))
    else:
        trained = frozenset(task.train_lengths)
    possible = {}
    for length in lengths or sorted({*trained, *task.train_lengths, *task.test_lengths}):
        try:
            possible[length] = _questions(
                source,
                data.tokenizer,
                data.separator_token,
                data.bos,
                data.scratchpad,
                length,
                settings.seed,
                settings.examples,
            )
        except _NoInstanceError as error:
            if lengths:
                raise ValueError(f"--lengths: {error}") from None
    longest = {length: max(question.positions for question in asked) for length, asked in possible.items()}
    questions = {length: asked for length, asked in possible.items() if run.takes(longest[length])}
    if not questions:
        raise ValueError(
            f"--lengths: {run.name} can be asked none of them: its {run.encoding} encoding has {run.max_length:,} "
            f"positions, and task:{source} takes {min(longest.values()):,} or more"
        )
    refused = {length: len(asked) for length, asked in possible.items() if length not in questions}
    return Exam(task, source, load_tokenizer(data.tokenizer, data.separator_token), trained, questions, refused)


class _NoInstanceError(Exception):
    """A task has no instance of a length to ask."""


@functools.lru_cache(maxsize=10_000)
def _questions(
    source: str, tokenizer: str, separator: str | None, bos: bool, format: str, length: int, seed: int, count: int
) -> list[Question]:
    """`ask`, once for all runs of a task.

    Raises:
        _NoInstanceError: there is no instance of this length in the test split.
        ValueError: as `ask`.
    """
    task, loaded = find_task(source), load_tokenizer(tokenizer, separator)
    try:
        task.example(seed, 0, length, split="test", scratchpad=False)
    except ValueError as error:
        raise _NoInstanceError(error) from None
    before = loaded.bos if bos else None
    return ask(task, loaded, tokenizer, length, format=format, bos=before, seed=seed, count=count)


@dataclasses.dataclass
class TaskAccuracy(Evaluation):
    """Exact match; `Run.results` holds the answers of each run at each length of its task."""

    runs: Sequence[Run[Answers]]
    exams: Sequence[Exam]
    """The exam of each run."""
    settings: TasksConfig

    def measure(self, out: Path, bar: Bar) -> Iterator[None]:
        bar.total(sum(len(asked) for exam in self.exams for asked in exam.questions.values()))
        for run, exam in zip(self.runs, self.exams, strict=True):
            identities = _take_kept(run, exam, out)
            bar.advance(sum(len(exam.questions[length]) for length in run.results))
            if run.results:
                yield
            missing = [length for length in exam.questions if length not in run.results]
            if not missing:
                continue
            bar.describe(f"{run.name}: loading")
            placement = run.place(self.settings.batch_size)
            newest, model = run.step, run.load(placement.mesh)
            if run.step != newest:  # a run in training has moved on, or its newest checkpoint is unreadable
                identities = _take_kept(run, exam, out)
                missing = [length for length in exam.questions if length not in run.results]
            data = run.config.data
            for length in missing:
                bar.describe(f"{run.name} at {length:,}")
                with jax.set_mesh(placement.mesh):
                    run.results[length] = measure(
                        model,
                        exam.tokenizer,
                        exam.questions[length],
                        format=data.scratchpad,
                        bos=exam.tokenizer.bos if data.bos else None,
                        batch_size=placement.rows,
                        advance=bar.advance,
                    )
                store(_path(out, run, exam, length), run.results[length], identities[length])
                yield

    @property
    def examined(self) -> list[tuple[Run[Answers], Exam]]:
        """The runs that have results, with their exams."""
        return [(run, exam) for run, exam in zip(self.runs, self.exams, strict=True) if run.results]

    def numbers(self) -> Mapping[str, Csv]:
        return {"tasks.csv": Csv(COLUMNS, self._csv_rows())}

    def _csv_rows(self) -> Iterator[tuple]:
        for run, exam in self.examined:
            format = run.config.data.scratchpad
            for length, answers in sorted(run.results.items()):
                count, correct = answers.right.size, int(answers.right.sum())
                where = "in" if length in exam.trained else "out"
                what = (run.name, run.encoding, exam.source, format, run.config.train.seed, length, where)
                shares = (count, correct, correct / count, *wilson_interval(correct, count))
                yield (*what, *shares, None if format == "none" else int(answers.scratchpad.sum()))
            for length, count in exam.refused.items():
                where = "in" if length in exam.trained else "out"
                what = (run.name, run.encoding, exam.source, format, run.config.train.seed, length, where)
                yield (*what, count, *[None] * 5)

    def figures(self) -> Iterator[tuple[str, Figure]]:
        yield "tasks.png", draw(self.examined)

    def sections(self) -> list[Section]:
        header = ["run", "encoding", "task", "in distribution", "out of distribution"]
        section = Section(
            "Answers to the tasks, by length",
            "Greedy decoding; an answer is right if all of it is (Kazemnejad et al. 2023).",
            Table("Right answers to tasks", header, [_row(run, exam) for run, exam in self.examined], names=3),
            _notes(self.examined, self.settings),
            figures={"tasks.png": "Share of right answers by length, one panel per task, trained lengths shaded"},
            files={"tasks.csv": "one row per run and length, with 95 % intervals."},
        )
        ranks = _rank_section(self.examined)
        return [section] if ranks is None else [section, ranks]


def _take_kept(run: Run[Answers], exam: Exam, out: Path) -> dict[int, str]:
    """Loads the answers of `run.step` stored in `out` into `run.results`; returns the identity of each length."""
    run.results.clear()
    data, identities = run.config.data, {}
    for length, questions in exam.questions.items():
        identities[length] = result_identity(run, data.tokenizer, data.scratchpad, digest(questions))
        if (answers := stored(_path(out, run, exam, length), Answers, identities[length])) is not None:
            run.results[length] = answers
    return identities


def _path(out: Path, run: Run[Answers], exam: Exam, length: int) -> Path:
    name = f"tasks-{run.name}-{exam.source}-{length}".replace("/", "-")
    return out / "measured" / f"{name}.npz"


def _total(run: Run[Answers], exam: Exam, lengths: Collection[int]) -> tuple[int, int]:
    """Right answers and questions at some lengths, as far as they are measured."""
    answers = [run.results[length].right for length in lengths if length in run.results]
    refused = sum(exam.refused.get(length, 0) for length in lengths)
    return sum(int(right.sum()) for right in answers), refused + sum(right.size for right in answers)


def _row(run: Run[Answers], exam: Exam) -> tuple[str, ...]:
    def cell(lengths: Collection[int]) -> str:
        correct, count = _total(run, exam, lengths)
        if not count:
            return "-"
        low, high = wilson_interval(correct, count)
        return f"{100 * correct / count:.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    return run.name, run.short_encoding, _named(run, exam), cell(exam.trained), cell(exam.beyond)


def _named(run: Run[Answers], exam: Exam) -> str:
    """The task, with the format of its scratchpad if there is one."""
    format = run.config.data.scratchpad
    return exam.source if format == "none" else f"{exam.source} ({format})"


def _notes(examined: Sequence[tuple[Run[Answers], Exam]], settings: TasksConfig) -> list[str]:
    notes = [
        f"{run.name} cannot be asked {exam.source} of lengths {', '.join(map(str, exam.refused))}: its {run.encoding} "
        f"encoding has {run.max_length:,} positions."
        for run, exam in examined
        if exam.refused
    ]
    missing = sorted({run.name for run, exam in examined if set(exam.questions) - set(run.results)})
    if missing:
        notes.append(f"Not measured at all lengths yet: {', '.join(missing)}.")
    definition = (
        f"Right answers in percent [95 % Wilson interval], over up to {settings.examples} different examples of every "
        "length, none of them trained on. In distribution: lengths of training; out of distribution: all others asked."
    )
    return [*notes, definition]


def _rank_section(examined: Sequence[tuple[Run[Answers], Exam]]) -> Section | None:
    """Ranks, if there are several encodings and one cell that all of them have."""
    scores, ranks, cells = rank(examined)
    if len(scores) < 2 or not ranks:
        return None
    tasks = list(dict.fromkeys((task, format) for own in scores.values() for task, format, _ in own))
    short = {run.encoding: run.short_encoding for run, _ in examined}
    rows = []
    for encoding, own in scores.items():
        by_task = [[score for cell, score in own.items() if cell[:2] == task] for task in tasks]
        shares = [f"{100 * np.mean(found):.1f}" if found else "-" for found in by_task]
        paper = PAPER_RANKS.get(short[encoding])
        rows.append((encoding, f"{ranks[encoding]:.3f}", "" if paper is None else f"{paper:.3f}", *shares))
    names = [task if format == "none" else f"{task} ({format})" for task, format in tasks]
    total = len({cell for own in scores.values() for cell in own})
    note = (
        "Mean over cells (task, scratchpad and seed) of 1/rank among the encodings, by right answers out of "
        f"distribution: {cells} of {total} cells, those that all encodings have. As in the paper, of equal encodings "
        "the one listed first ranks higher. By task: right answers out of distribution, in percent."
    )
    header = ["encoding", "mean reciprocal rank", "in the paper", *names]
    return Section("Ranks of encodings", "", Table("Mean reciprocal ranks", header, rows, names=1), [note])


def rank(
    examined: Sequence[tuple[Run[Answers], Exam]],
) -> tuple[dict[str, dict[Cell, float]], dict[str, float], int]:
    """Right answers out of distribution of each encoding in each cell, mean reciprocal ranks, and their cells.

    Runs of which a length is not measured yet do not count; those of the same encoding in the same cell are averaged.
    """
    found: dict[str, dict[Cell, list[float]]] = {}
    for run, exam in examined:
        correct, count = _total(run, exam, exam.beyond)
        if count and set(run.results) == set(exam.questions):
            cell = (exam.source, run.config.data.scratchpad, run.config.train.seed)
            found.setdefault(run.encoding, {}).setdefault(cell, []).append(correct / count)
    scores = {name: {cell: float(np.mean(own)) for cell, own in cells.items()} for name, cells in found.items()}
    return scores, *mean_reciprocal_ranks(scores)


def draw(examined: Sequence[tuple[Run[Answers], Exam]]) -> Figure:
    """Draws a panel per task: right answers by length, a line per encoding with the mean of its runs and their
    95 % interval, trained lengths shaded."""
    panels: dict[str, list[tuple[Run[Answers], Exam]]] = {}
    for run, exam in examined:
        panels.setdefault(_named(run, exam), []).append((run, exam))
    encodings = list(dict.fromkeys(run.encoding for run, _ in examined))
    across = min(len(panels), 3)
    figure = plots.new_figure(4.2 * across + 1.5, 2.8 * -(-len(panels) // across))
    axes_of_tasks = plots.panels(figure, len(panels), across, sharey=True)
    for (name, shown), axes in zip(panels.items(), axes_of_tasks, strict=True):
        trained = frozenset.intersection(*(exam.trained for _, exam in shown))
        if trained:
            axes.axvspan(min(trained) - 0.5, max(trained) + 0.5, color="#ededed", linewidth=0)
        for index, encoding in enumerate(encodings):
            _draw_encoding(axes, [(run, exam) for run, exam in shown if run.encoding == encoding], index)
        plots.finish(axes, "Length of the task", "Share of right answers")
        axes.set_title(name, fontsize=9)
        axes.set_ylim(-0.03, 1.03)
        axes.tick_params(colors=QUIET, labelsize=8)
    legends = [axes.get_legend_handles_labels() for axes in axes_of_tasks]
    handles = {label: handle for legend in legends for handle, label in zip(*legend, strict=True)}
    figure.legend(handles.values(), handles.keys(), frameon=False, fontsize=8, loc="outside right upper")
    plots.note(figure, "Shaded: lengths of training. Bars: 95 % intervals.")
    return figure


def _draw_encoding(axes: Axes, examined: Sequence[tuple[Run[Answers], Exam]], index: int) -> None:
    lengths = sorted({length for run, _ in examined for length in run.results})
    if not lengths:
        return
    at_lengths = [[_total(run, exam, [length]) for run, exam in examined] for length in lengths]
    totals = [tuple(map(sum, zip(*at_length, strict=True))) for at_length in at_lengths]
    shares = np.array([correct / count for correct, count in totals])
    ends = np.array([wilson_interval(*total) for total in totals]).T
    style = plots.line_style(index) | {"marker": None}
    bars = np.abs(ends - shares)
    axes.errorbar(lengths, shares, bars, linewidth=1.4, elinewidth=0.6, label=examined[0][0].encoding, **style)
