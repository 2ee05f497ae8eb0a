"""The evaluation interface and the driver shared by all evaluations: plan, measure, write, print."""

import abc
import contextlib
import importlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from matplotlib.figure import Figure

from nope_jax.distributed import make_shared
from nope_jax.evaluation.common import report
from nope_jax.evaluation.common.console import Bar, print_sections, progress_bar
from nope_jax.evaluation.common.files import Csv, write_numbers, writes
from nope_jax.evaluation.common.plots import save
from nope_jax.evaluation.common.report import Section
from nope_jax.evaluation.common.runs import Run
from nope_jax.evaluation.registry import EVALUATIONS, Options
from nope_jax.locks import held


class Evaluation(abc.ABC):
    """An evaluation in progress: it measures runs and reports the results so far.

    The `plan(options)` function of its module creates it, and rejects bad input before anything large is loaded or
    computed.
    """

    runs: Sequence[Run[Any]]
    """The runs evaluated."""
    remark: str | None = None
    """The last line printed; None: the location of the report."""
    writes_run: ClassVar[bool] = False
    """Whether --out becomes a workdir, which only one process at a time may write."""

    @property
    def measured(self) -> list[Run[Any]]:
        """The runs that have results."""
        return [run for run in self.runs if run.results]

    @abc.abstractmethod
    def measure(self, out: Path, bar: Bar) -> Iterator[None]:
        """Measures the runs, and yields after each new result worth writing.

        Args:
            out: the report directory, where the evaluation may store state to resume from.
            bar: progress bar to update: `total` (any unit), `describe` and `advance`.
        """

    def numbers(self) -> Mapping[str, Csv | Mapping[str, Any]]:
        """Files of numbers by name: the columns and rows of a .csv, or the arrays of a .npz."""
        return {}

    def figures(self) -> Iterable[tuple[str, Figure]]:
        """The figures, each with the name of its .png."""
        return ()

    def sections(self) -> Sequence[Section]:
        """The sections shown in the terminal and the report."""
        return ()

    def finish(self, out: Path) -> None:
        """Runs last, after all results have been measured and written; of several processes, on the first."""
        return


def evaluate(name: str, options: Options) -> None:
    """Runs `eval.py NAME`: measures, writes files, figures and a part of the report, and prints the tables.

    If the evaluation fails or is interrupted, the results so far are written. Of several processes, all of which call
    this and compute the same numbers, the first writes and prints.

    Args:
        name: one of EVALUATIONS.
        options: the parsed command line.

    Raises:
        ValueError: the options or the runs are invalid.
        OSError: `options.out` cannot be written.
    """
    plan = importlib.import_module(EVALUATIONS[name].module).plan
    evaluation: Evaluation = plan(options._replace(lengths=tuple(sorted(set(options.lengths)))))
    out = options.out
    if evaluation.writes_run:  # all processes write their part of its checkpoint
        make_shared(out, "--out")
    with contextlib.ExitStack() as stack:
        if writes():
            out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=out).close()
            if evaluation.writes_run:
                stack.enter_context(held(out))
        measured = False
        try:
            with progress_bar() as bar:
                for _ in evaluation.measure(out, bar):
                    if writes():
                        measured = True
                        write_numbers(out, evaluation.numbers())
        finally:
            if measured:
                _show(name, evaluation, options)
        if writes():
            evaluation.finish(out)


def _show(name: str, evaluation: Evaluation, options: Options) -> None:
    """Writes and prints all results so far."""
    out = options.out
    write_numbers(out, evaluation.numbers())
    for file, figure in evaluation.figures():
        save(out / file, figure)
    sections = evaluation.sections()
    report.add_sections(out, name, sections, options.command, [run.workdir for run in evaluation.runs])
    print_sections(sections, evaluation.remark or f"Written to {out}: see report.html there.")
