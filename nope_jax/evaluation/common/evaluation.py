"""What an evaluation is, and the one driver of all: plan, measure, keep, show."""

import contextlib
import importlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from matplotlib.figure import Figure

from nope_jax.evaluation.common import report
from nope_jax.evaluation.common.console import Bar, print_sections, progress_bar
from nope_jax.evaluation.common.files import Csv, write_numbers
from nope_jax.evaluation.common.plots import save
from nope_jax.evaluation.common.report import Section
from nope_jax.evaluation.common.runs import Run
from nope_jax.evaluation.registry import EVALUATIONS, Options
from nope_jax.locks import held


class Evaluation:
    """An evaluation that is under way: what it measures, and what it has to show of what it has measured so far.

    The function `plan(options)` of its module makes one, and refuses all that can be found out to be wrong before
    anything large is loaded or computed.
    """

    runs: Sequence[Run[Any]]
    """What it is about."""
    remark: str | None = None
    """What is printed last; None: where the report is."""
    writes_run: ClassVar[bool] = False
    """Whether --out becomes a workdir, which one process at a time may write."""

    @property
    def measured(self) -> list[Run[Any]]:
        """The runs of which there are results."""
        return [run for run in self.runs if run.results]

    def measure(self, out: Path, bar: Bar) -> Iterator[None]:
        """Measures, and yields whenever there is more than before that is worth keeping.

        Args:
            out: the directory of the report, where it may keep what it needs to go on when started again.
            bar: to be told the `total`, of any unit, what is being done and how far it has come.
        """
        raise NotImplementedError

    def numbers(self) -> Mapping[str, Csv | Mapping[str, Any]]:
        """The files of numbers, by name: columns and rows of a .csv, or arrays of a .npz."""
        return {}

    def figures(self) -> Iterable[tuple[str, Figure]]:
        """The pictures, each with the name of its .png."""
        return ()

    def sections(self) -> Sequence[Section]:
        """What is shown in the terminal and the report."""
        return ()

    def finish(self, out: Path) -> None:
        """Does what must come last, when all has been measured and written."""


def evaluate(name: str, options: Options) -> None:
    """What `eval.py NAME` does: measures, writes files, figures and a part of the report, and prints the tables.

    What has been measured is written even if the rest fails or is interrupted.

    Args:
        name: one of EVALUATIONS.
        options: of the command line.

    Raises:
        ValueError: what cannot be evaluated.
        OSError: `options.out` cannot be written.
    """
    plan = importlib.import_module(EVALUATIONS[name].module).plan
    evaluation: Evaluation = plan(options._replace(lengths=tuple(sorted(set(options.lengths)))))
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    with held(out) if evaluation.writes_run else contextlib.nullcontext():
        measured = False
        try:
            with progress_bar() as bar:
                tempfile.TemporaryFile(dir=out).close()
                for _ in evaluation.measure(out, bar):
                    measured = True
                    write_numbers(out, evaluation.numbers())
        finally:
            if measured:
                _show(name, evaluation, options)
        evaluation.finish(out)


def _show(name: str, evaluation: Evaluation, options: Options) -> None:
    """Writes and prints all there is."""
    out = options.out
    write_numbers(out, evaluation.numbers())
    for file, figure in evaluation.figures():
        save(out / file, figure)
    sections = evaluation.sections()
    report.add_sections(out, name, sections, options.command, [run.workdir for run in evaluation.runs])
    print_sections(sections, evaluation.remark or f"Written to {out}: see report.html there.")
