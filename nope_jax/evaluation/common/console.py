"""Terminal output of the evaluations: the progress bar and the result tables."""

import contextlib
import datetime
import sys
import time
from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from nope_jax.evaluation.common.files import writes
from nope_jax.evaluation.common.report import Section

SAY_EVERY = 30.0
"""Seconds between two lines of progress where there is no terminal for a bar."""


class _Stdout(Console):
    """Stdout. That nobody reads it any more, as in `| head`, is for the command to handle: rich would exit with 1."""

    def on_broken_pipe(self) -> None:
        raise  # what was caught by the caller


class _Stderr(Console):
    """Stderr. Without a reader it is silent, and the evaluation goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Bar:
    """Progress of an evaluation on stderr, with the time left.

    A bar in a terminal; otherwise a line at each new step, which may be one batch of minutes, and now and then between.
    Of several processes, the first shows it.
    """

    def __init__(self, progress: Progress):
        self._progress, self._task = progress, progress.add_task("", total=None)
        self._silent = progress.console.is_terminal or not writes()
        self._step, self._said = "", time.monotonic()

    def total(self, amount: float) -> None:
        """Sets the total amount of work, in any unit."""
        self._progress.update(self._task, total=amount)

    def describe(self, step: str, detail: str = "") -> None:
        """Sets the description of the current step, and of what it is at."""
        self._progress.update(self._task, description=f"{step}, {detail}" if detail else step)
        if step != self._step:
            self._step = step
            self._say()

    def advance(self, amount: float = 1) -> None:
        """Advances the bar by `amount` of work."""
        self._progress.advance(self._task, amount)
        if time.monotonic() - self._said >= SAY_EVERY:
            self._say()

    def _say(self) -> None:
        if self._silent:
            return
        self._said, task = time.monotonic(), self._progress.tasks[0]
        left = "" if task.time_remaining is None else f", {datetime.timedelta(seconds=int(task.time_remaining))} left"
        with contextlib.suppress(OSError):  # as of a pipe without a reader
            print(f"{task.description}: {task.percentage:.0f} %{left}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress_bar() -> Iterator[Bar]:
    """Shows the progress of what is done within."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(
        *columns,
        TextColumn("left"),
        TimeRemainingColumn(),
        console=_Stderr(stderr=True),
        speed_estimate_period=600,  # a batch of long documents takes minutes
        disable=not writes(),
    ) as progress:
        bar = Bar(progress)
        yield bar
        progress.update(bar._task, description="measured", total=1, completed=1)


def print_sections(sections: Sequence[Section], *remarks: str) -> None:
    """Prints the tables of the sections to stdout, each followed by its notes, and then the remarks."""
    # Without a terminal, rich would wrap the table at 80 columns.
    console = _Stdout(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)
    for section in sections:
        if table := section.table:
            grid = Table(title=table.title, title_justify="left", box=SIMPLE_HEAD)
            for i, name in enumerate(table.header):
                grid.add_column(name, justify="left" if i < table.names else "right", overflow="fold")
            for row in table.rows:
                grid.add_row(*row)
            console.print(grid)
        for remark in (*section.notes, *section.spoken):
            console.print(remark)
    for remark in remarks:
        console.print(remark)


def plural(count: int, what: str) -> str:
    """Formats a count with its noun: `2 documents`, `1 document`."""
    return f"{count:,} {what}{'s' * (count != 1)}"
