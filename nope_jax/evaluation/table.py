"""The table that answers at a glance: how good inside the training length, how far past it, and up to where."""

import dataclasses
import itertools
import math
import sys
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from nope_jax.evaluation.protocol import protocol_name
from nope_jax.evaluation.run import Run

MULTIPLES = (2, 4, 8, 16)
TOLERANCE = 0.1

HEADER = ("run", "encoding", "trained at", "in-window", *(f"{k}x" for k in MULTIPLES), "within 10 % up to")


@dataclasses.dataclass(frozen=True)
class Extent:
    """How far a run holds."""

    position: int | None
    """The furthest position at which it holds; None: at none of those checked."""
    first: int
    """The first position checked."""
    last: int
    """The last position checked; where it holds to that, it may hold further."""

    def __str__(self) -> str:
        if self.position is None:
            return f"< {self.first}"
        return f">= {self.last}" if self.position == self.last else str(self.position)


def in_window(run: Run, stride: int | None, documents: int | None = None) -> float | None:
    """Perplexity inside the training length L, from the shortest measured length that covers it; None if none does."""
    length = min((n for n in run.curves if n >= run.train_length), default=None)
    if length is None:
        return None
    if stride is None:
        return run.curves[length].perplexity(run.train_length // 2, run.train_length, documents)
    return run.curves[length].perplexity(0, length, documents)


def at_multiple(run: Run, multiple: int, stride: int | None) -> float | None:
    """Perplexity at `multiple` times the training length; None where that length was not measured."""
    length = multiple * run.train_length
    if length not in run.curves:
        return None
    return run.curves[length].perplexity(length // 2 if stride is None else 0, length)


def extent(run: Run, stride: int | None) -> Extent | None:
    """Finds the furthest position up to which perplexity never leaves its in-window value by more than 10 %.

    From the start of documents, the perplexity at position p is that over the octave [p/2, p) of the longest measured
    length, checked at every bucket edge from L on. With a sliding window, the positions checked are the measured
    lengths. Checks and in-window value are taken over the documents of the longest one. None where none covers L.
    """
    longest = run.longest
    reference = in_window(run, stride, longest.documents) if longest else None
    if longest is None or reference is None:
        return None
    if stride is None:
        checks = [(int(p), longest.perplexity(int(p) // 2, int(p))) for p in longest.edges if p >= run.train_length]
    else:
        checks = [
            (length, curve.perplexity(0, length, longest.documents))
            for length, curve in sorted(run.curves.items())
            if length >= run.train_length
        ]
    holding = itertools.takewhile(lambda check: check[1] <= (1 + TOLERANCE) * reference, checks)
    *_, furthest = [None, *(position for position, _ in holding)]
    return Extent(furthest, checks[0][0], checks[-1][0])


def rows(runs: Sequence[Run], stride: int | None) -> list[tuple[str, ...]]:
    """One row of cells per run, under HEADER."""
    return [
        (
            run.name,
            run.encoding,
            str(run.train_length),
            _number(in_window(run, stride)),
            *(
                "cannot" if multiple * run.train_length in run.refused else _number(at_multiple(run, multiple, stride))
                for multiple in MULTIPLES
            ),
            _extent_cell(run, stride),
        )
        for run in runs
    ]


def notes(runs: Sequence[Run], stride: int | None) -> list[str]:
    """What a reader of the table must know: its definitions, and which lengths a run could not take."""
    refusals = [
        f"{run.name} cannot read {', '.join(f'{n:,}' for n in run.refused)} tokens: its {run.encoding} encoding has "
        f"{run.max_length:,} positions."
        for run in runs
        if run.refused
    ]
    if stride is None:
        definitions = [
            "Perplexity at k x the training length L: over positions kL/2 to kL of windows of kL tokens; in-window: "
            "over L/2 to L of the shortest length that covers them.",
            "Within 10 % up to: the furthest position p such that there and at every bucket edge from L on, perplexity "
            "over positions p/2 to p of the longest length is at most 1.1 times its documents' in-window value.",
            "What documents hold changes with position as well: compare runs at one position. With --eval.stride every "
            "length scores the same tokens.",
        ]
    else:
        definitions = [
            "Perplexity at k x the training length L: over all tokens, read in windows of kL; in-window: in windows "
            "of the shortest length that covers L.",
            "Within 10 % up to: the longest length such that there and at every shorter one from L on, perplexity is "
            "at most 1.1 times its documents' in-window value.",
        ]
    return refusals + definitions


def print_table(runs: Sequence[Run], stride: int | None, *remarks: str) -> None:
    """Prints the table, and below it its notes and `remarks`."""
    # Without a terminal rich would fold the table into 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)
    grid = Table(
        title=f"Perplexity by position, protocol: {protocol_name(stride)}", title_justify="left", box=SIMPLE_HEAD
    )
    for i, name in enumerate(HEADER):
        grid.add_column(name, justify="left" if i < 2 else "right", overflow="fold")
    for row in rows(runs, stride):
        grid.add_row(*row)
    console.print(grid)
    for note in (*notes(runs, stride), *remarks):
        console.print(note)


def _number(perplexity: float | None) -> str:
    if perplexity is None:
        return "-"
    if not math.isfinite(perplexity) or perplexity >= 1e6:
        return f"{perplexity:.1e}"
    return f"{perplexity:.2f}" if perplexity < 100 else f"{perplexity:,.0f}"


def _extent_cell(run: Run, stride: int | None) -> str:
    furthest = extent(run, stride)
    if furthest is None:
        return "-"
    all_it_has = run.max_length is not None and furthest.position == run.max_length
    return f"{run.max_length} (all it has)" if all_it_has else str(furthest)
