"""What every evaluation shows in a terminal: how far it has come, and what it found."""

import sys
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


def progress_bar() -> Progress:
    """A bar with the time left, on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    return Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True))


def print_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *remarks: str, names: int = 2
) -> None:
    """Prints a table on stdout, and below it what a reader must know.

    Args:
        title: stands above the table.
        header: the names of its columns.
        rows: a cell for each column.
        remarks: a paragraph each.
        names: so many columns, from the first on, hold words and are aligned left; the others hold numbers.
    """
    # Without a terminal rich would fold the table into 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)
    grid = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for i, name in enumerate(header):
        grid.add_column(name, justify="left" if i < names else "right", overflow="fold")
    for row in rows:
        grid.add_row(*row)
    console.print(grid)
    for remark in remarks:
        console.print(remark)


def plural(count: int, what: str) -> str:
    """`2 documents`, but `1 document`."""
    return f"{count:,} {what}{'s' * (count != 1)}"
