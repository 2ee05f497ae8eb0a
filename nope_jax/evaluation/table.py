"""The table that answers at a glance: how good inside the training length, how far past it, and up to where."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax

from nope_jax.evaluation import console
from nope_jax.evaluation.curves import Curve
from nope_jax.evaluation.run import Run
from nope_jax.evaluation.spreading import CRITERION, spreading
from nope_jax.evaluation.uncertainty import Estimate, plus_minus
from nope_jax.evaluation.view import View

MULTIPLES = (2, 4, 8, 16)
TOLERANCE = 0.1
FIRST_HEADS = 3
"""So many heads are named on stdout, those that spread out first."""


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


def header(view: View) -> tuple[str, ...]:
    """The names of the columns."""
    inside = "bits/byte in-window" if view.bits_per_byte else "in-window"
    return ("run", "encoding", "trained at", inside, *(f"{k}x" for k in MULTIPLES), "within 10 % up to")


def in_window(run: Run, view: View, documents: int | None = None) -> Estimate | None:
    """Perplexity, or bits per byte, inside the training length: of the shortest length that covers it; None if none."""
    length = min((n for n in run.curves if n >= run.train_length), default=None)
    if length is None:
        return None
    span = view.span(run.train_length if view.stride is None else length)
    return view.score(run.curves[length].between(*span, documents))[0]


def at_multiple(run: Run, multiple: int, view: View) -> Estimate | None:
    """Perplexity, or bits per byte, at `multiple` times the training length; None where that was not measured."""
    length = multiple * run.train_length
    if length not in run.curves:
        return None
    return view.score(run.curves[length].between(*view.span(length)))[0]


def extent(run: Run, view: View) -> Extent | None:
    """Finds the furthest position up to which perplexity, or bits per byte, stays within 10 % of its in-window value.

    From the start of documents, what it is at position p is that over the octave [p/2, p) of the longest measured
    length, checked at every bucket edge from L on. With a sliding window, the positions checked are the measured
    lengths. Checks and in-window value are taken over the documents of the longest one. None where none covers L.
    """
    longest = run.longest
    reference = in_window(run, view, longest.documents) if longest else None
    if longest is None or reference is None:
        return None
    curves = {int(p): longest for p in longest.edges} if view.stride is None else run.curves
    checks = [p for p in sorted(curves) if p >= run.train_length]

    def holds(position: int) -> bool:
        read = curves[position].between(*view.span(position), longest.documents)
        return bool(view.score(read).value[0] <= (1 + TOLERANCE) * reference.value)

    *_, furthest = [None, *itertools.takewhile(holds, checks)]
    return Extent(furthest, checks[0], checks[-1])


def rows(runs: Sequence[Run], view: View) -> list[tuple[str, ...]]:
    """One row of cells per run, under the header."""
    return [
        (
            run.name,
            run.encoding,
            str(run.train_length),
            _number(in_window(run, view), view),
            *(
                "cannot"
                if multiple * run.train_length in run.refused
                else _number(at_multiple(run, multiple, view), view)
                for multiple in MULTIPLES
            ),
            _extent_cell(run, view),
        )
        for run in runs
    ]


def difference_header(runs: Sequence[Run]) -> tuple[str, ...]:
    lengths = sorted({length for run in runs for length in run.curves})
    return ("run", "encoding", *(f"{length:,}" for length in lengths))


def difference_rows(runs: Sequence[Run], view: View) -> list[tuple[str, ...]]:
    """What the loss of every run but the first is above that of the first at each length, under `difference_header`."""
    first, *others = runs
    lengths = sorted({length for run in runs for length in run.curves})

    def cell(run: Run, length: int) -> str:
        if length not in run.curves or length not in first.curves:
            return "-"
        difference = view.difference(run.curves[length], first.curves[length])
        return plus_minus(f"{difference.value:+.3f}", float(difference.stderr), 3)

    return [(run.name, run.encoding, *(cell(run, length) for length in lengths)) for run in others]


def difference_title(runs: Sequence[Run], view: View) -> str:
    return f"Loss less that of {runs[0].name}, {view.loss_unit}"


def difference_note(runs: Sequence[Run], view: View) -> str:
    where = "over positions n/2 to n of windows of n tokens" if view.stride is None else "over all tokens"
    return (
        f"At each length n, {where}; below 0: better than {runs[0].name}. ±: standard error of the difference, paired "
        "by document, since both have read the same; a difference of less than two of them may be chance in the choice "
        "of documents. How much other seeds of training would change it does not say. All pairs are in differences.csv."
    )


def notes(runs: Sequence[Run], view: View) -> list[str]:
    """What a reader of the table must know: its definitions, and which lengths a run could not take."""
    refusals = [
        f"{run.name} cannot read {', '.join(f'{n:,}' for n in run.refused)} tokens: its {run.encoding} encoding has "
        f"{run.max_length:,} positions."
        for run in runs
        if run.refused
    ]
    score = view.score_name.lower()
    if view.stride is None:
        definitions = [
            f"{view.score_name} at k x the training length L: over positions kL/2 to kL of windows of kL tokens; "
            "in-window: over L/2 to L of the shortest length that covers them.",
            f"Within 10 % up to: the furthest position p such that there and at every bucket edge from L on, {score} "
            "over positions p/2 to p of the longest length is at most 1.1 times its documents' in-window value.",
            "What documents hold changes with position as well: compare runs at one position. With --eval.stride every "
            "length scores the same tokens.",
        ]
    else:
        definitions = [
            f"{view.score_name} at k x the training length L: over all tokens, read in windows of kL; in-window: in "
            "windows of the shortest length that covers L.",
            "Within 10 % up to: the longest length such that there and at every shorter one from L on, "
            f"{score} is at most 1.1 times its documents' in-window value.",
        ]
    uncertainty = "±: standard error over documents, each weighing as much as it has been scored (a ratio estimator)."
    if any(curve.documents == 1 for run in runs for curve in run.curves.values()):
        uncertainty += " One document has none."
    return [*refusals, *definitions, uncertainty]


def memory_header(runs: Sequence[Run]) -> tuple[str, ...]:
    lengths = sorted({length for run in runs for length in run.curves})
    return ("run", "encoding", *(f"{length:,}" for length in lengths))


def memory_rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """For each run and length, what the step takes and what had been taken at most, under `memory_header`."""
    lengths = sorted({length for run in runs for length in run.curves})
    return [
        (run.name, run.encoding, *(_memory_cell(run.curves[n]) if n in run.curves else "-" for n in lengths))
        for run in runs
    ]


def memory_note() -> str:
    whose = "this process" if jax.default_backend() == "cpu" else "the fullest device"
    return (
        "Memory per length in MB (10^6 bytes), step / peak. Step: what one batch takes on each device, as compiled: "
        f"weights, tokens, results and temporaries. Peak: the most that {whose} had taken when the length was done, "
        "which never falls, so that loading, compiling, shorter lengths and earlier runs are in it."
    )


def spreading_remark(run: Run) -> str | None:
    """Which heads of a run spread out first; None where no length past its training length was measured."""
    heads = spreading(run)
    if not heads:
        return None
    spread = [head for head in heads if head.position is not None]
    if not spread:
        return f"{run.name}: none of its {len(heads)} heads spreads out."
    first = "; ".join(
        f"layer {head.layer} head {head.head} from {head.position:,} ({head.share_in_window:.0%} of the ceiling in "
        f"the window, {head.share_at_end:.0%} at the end)"
        for head in spread[:FIRST_HEADS]
    )
    return f"{run.name}: {len(spread)} of its {len(heads)} heads spread out, first {first}."


def print_table(runs: Sequence[Run], view: View, *remarks: str) -> None:
    """Prints the table, what it means, which heads spread out first, and the memory taken; then `remarks`."""
    title = f"{view.score_name} by position, protocol: {view.protocol}"
    spreads = [remark for remark in map(spreading_remark, runs) if remark is not None]
    definition = [CRITERION] if spreads else []
    console.print_table(title, header(view), rows(runs, view), *notes(runs, view), *definition, *spreads)
    if len(runs) > 1:
        differences = difference_header(runs), difference_rows(runs, view), difference_note(runs, view)
        console.print_table(difference_title(runs, view), *differences)
    title = "Memory in MB: step / peak"
    console.print_table(title, memory_header(runs), memory_rows(runs), memory_note(), *remarks)


def _number(score: Estimate | None, view: View) -> str:
    if score is None:
        return "-"
    value, stderr = float(score.value), float(score.stderr)
    if not math.isfinite(value) or value >= 1e6:
        return f"{value:.1e}"
    digits = 3 if view.bits_per_byte else 2 if value < 100 else 0
    return plus_minus(f"{value:,.{digits}f}", stderr, digits)


def _memory_cell(curve: Curve) -> str:
    step = f"{curve.step_bytes / 1e6:,.1f}" if curve.step_bytes else "-"
    return f"{step} / {curve.peak_bytes / 1e6:,.0f}"


def _extent_cell(run: Run, view: View) -> str:
    furthest = extent(run, view)
    if furthest is None:
        return "-"
    all_it_has = run.max_length is not None and furthest.position == run.max_length
    return f"{run.max_length} (all it has)" if all_it_has else str(furthest)
