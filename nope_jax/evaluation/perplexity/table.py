"""The numbers of the curves: the rows of the .csv files, and the tables of the terminal and the report.

The tables show how well a run does within the training length and past it, and up to which position it holds.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from nope_jax.evaluation.common.documents import describe_protocol
from nope_jax.evaluation.common.report import CAVEAT, Section, Table
from nope_jax.evaluation.common.runs import Run, cannot_read
from nope_jax.evaluation.common.uncertainty import Estimate, plus_minus
from nope_jax.evaluation.perplexity.measure import Curve
from nope_jax.evaluation.perplexity.units import Units

MULTIPLES = (2, 4, 8, 16)
TOLERANCE = 0.1
IN_NATS = "losses and entropies in nats"
COLUMNS = (
    "run encoding train_length length position_start position_end tokens nll nll_stderr perplexity entropy "
    "documents protocol text_bytes bits_per_byte bits_per_byte_stderr perplexity_stderr entropy_stderr"
)
"""Columns of curves.csv, one row per run, measured length and position bucket; losses and entropies in nats.

Means are over the tokens (or bytes) of a bucket; `entropy` is also averaged over layers and heads. A column
`..._stderr` is the standard error of the column it names, clustered by document
(`nope_jax.evaluation.common.uncertainty`); `perplexity_stderr` is perplexity times `nll_stderr`. Two runs read the same
documents, so the error of their difference cannot be computed from these columns; it is in differences.csv. Unknown
values are empty: the standard error of a single document, bits per byte of a bucket without text, and NaN."""

DIFFERENCE_COLUMNS = (
    "run reference length position_start position_end difference difference_stderr unit documents protocol"
)
"""Columns of differences.csv, one row per pair of runs and length measured for both.

`difference` is the loss of `run` minus that of `reference`, in `unit`; negative if `run` is better. Its standard error
is paired by document. Positions are those of the table: the second half of a length, or all with a stride."""


# Files


def curve_rows(runs: Sequence[Run[Curve]], units: Units) -> Iterator[tuple]:
    """The rows of curves.csv."""
    for run in runs:
        for length, curve in sorted(run.results.items()):
            nll, entropy, bits = curve.nll, curve.entropy, curve.bits_per_byte
            means = (nll.value, nll.stderr, nll.exp().value, entropy.value)
            rest = (bits.value, bits.stderr, nll.exp().stderr, entropy.stderr)
            tokens, text_bytes = curve.tokens.sum(0), curve.text_bytes.sum(0)
            for i, (start, end) in enumerate(itertools.pairwise(curve.edges)):
                what = (run.name, run.encoding, run.train_length, length, start, end, tokens[i])
                read = (curve.documents, units.protocol, text_bytes[i] or None)
                yield (*what, *(mean[i] for mean in means), *read, *(value[i] for value in rest))


def pair_rows(runs: Sequence[Run[Curve]], units: Units) -> Iterator[tuple]:
    """The rows of differences.csv."""
    for reference, run in itertools.combinations(runs, 2):
        for length in sorted(run.results.keys() & reference.results.keys()):
            difference = units.difference(run.results[length], reference.results[length])
            numbers = (float(difference.value), float(difference.stderr), units.loss_unit, int(difference.documents))
            yield (run.name, reference.name, length, *units.span(length), *numbers, units.protocol)


def head_arrays(runs: Sequence[Run[Curve]]) -> dict[str, Any]:
    """`<run>/entropy` [L, N, positions] and `<run>/positions` at the longest measured length of each run."""
    arrays: dict[str, Any] = {}
    for run in runs:
        if curve := run.longest:
            arrays[f"{run.name}/entropy"] = curve.heads
            arrays[f"{run.name}/positions"] = np.arange(curve.length)
    return arrays


# Tables


@dataclasses.dataclass(frozen=True)
class EffectiveLength:
    """The furthest position at which a run still holds, among the positions checked."""

    position: int | None
    """The furthest position at which it holds; None if it holds at none."""
    first: int
    """The first position checked."""
    last: int
    """The last position checked. If it holds there, it may hold further."""

    def __str__(self) -> str:
        if self.position is None:
            return f"< {self.first}"
        return f">= {self.last}" if self.position == self.last else str(self.position)


def section(runs: Sequence[Run[Curve]], units: Units, corpus: str) -> Section:
    """Perplexity, or bits per byte, within and past the training length; `corpus` describes the documents read."""
    score = units.score_name
    panels = f"{score} (above) and mean attention entropy with its ceiling (below) by position, of every run"
    return Section(
        f"{score} and attention entropy by position",
        f"Protocol: {units.protocol}. {describe_protocol(units.stride)}",
        Table(f"{score} by position, protocol: {units.protocol}", header(units), rows(runs, units)),
        [*notes(runs, units), corpus, CAVEAT],
        figures={"curves.png": panels},
        files={"curves.csv": f"one row per run, evaluated length and position bucket; {IN_NATS}."},
    )


def difference_section(runs: Sequence[Run[Curve]], units: Units) -> Section:
    """The loss of every other run minus that of the first."""
    title = f"Loss minus that of {runs[0].name}, {units.loss_unit}"
    return Section(
        title,
        table=Table(title, length_header(runs), difference_rows(runs, units)),
        notes=[difference_note(runs, units)],
        files={"differences.csv": f"one row per pair of runs and length; differences in {units.loss_unit}."},
    )


def cost(runs: Sequence[Run[Curve]]) -> Section:
    """Speed, and step and peak memory, of each run and length."""
    title = "Cost: tokens per second, and memory in MB (step / peak)"
    return Section("Cost", table=Table(title, length_header(runs), cost_rows(runs)), notes=[memory_note()])


def header(units: Units) -> tuple[str, ...]:
    """Column names of the table."""
    inside = "bits/byte in-window" if units.bits_per_byte else "in-window"
    return ("run", "encoding", "trained at", inside, *(f"{k}x" for k in MULTIPLES), "within 10 % up to")


def in_window(run: Run[Curve], units: Units, documents: int | None = None) -> Estimate | None:
    """Perplexity, or bits per byte, within the training length, at the shortest length that covers it; None if none."""
    length = min((n for n in run.results if n >= run.train_length), default=None)
    if length is None:
        return None
    span = units.span(run.train_length if units.stride is None else length)
    return units.score(run.results[length].between(*span, documents))[0]


def at_multiple(run: Run[Curve], multiple: int, units: Units) -> Estimate | None:
    """Perplexity, or bits per byte, at `multiple` times the training length; None if that was not measured."""
    length = multiple * run.train_length
    if length not in run.results:
        return None
    return units.score(run.results[length].between(*units.span(length)))[0]


def effective_length(run: Run[Curve], units: Units) -> EffectiveLength | None:
    """Finds the furthest position up to which perplexity, or bits per byte, stays within 10 % of its in-window value.

    Without a stride, the value at position p is taken over the octave [p/2, p) of the longest measured length, and
    every bucket edge from L on is checked. With a stride, the measured lengths from L on are checked. All values,
    including the in-window one, are over the documents of the longest length. None if no measured length covers L.
    """
    longest = run.longest
    reference = in_window(run, units, longest.documents) if longest else None
    if longest is None or reference is None:
        return None
    curves = {int(p): longest for p in longest.edges} if units.stride is None else run.results
    checks = [p for p in sorted(curves) if p >= run.train_length]

    def holds(position: int) -> bool:
        read = curves[position].between(*units.span(position), longest.documents)
        return bool(units.score(read).value[0] <= (1 + TOLERANCE) * reference.value)

    *_, furthest = [None, *itertools.takewhile(holds, checks)]
    return EffectiveLength(furthest, checks[0], checks[-1])


def rows(runs: Sequence[Run[Curve]], units: Units) -> list[tuple[str, ...]]:
    """Table cells under `header`, one row per run."""
    return [
        (
            run.name,
            run.short_encoding,
            str(run.train_length),
            _number(in_window(run, units), units),
            *(
                "cannot"
                if multiple * run.train_length in run.refused
                else _number(at_multiple(run, multiple, units), units)
                for multiple in MULTIPLES
            ),
            _effective_length_cell(run, units),
        )
        for run in runs
    ]


def measured_lengths(runs: Sequence[Run[Curve]]) -> list[int]:
    return sorted({length for run in runs for length in run.results})


def length_header(runs: Sequence[Run[Curve]]) -> tuple[str, ...]:
    return ("run", "encoding", *(f"{length:,}" for length in measured_lengths(runs)))


def difference_rows(runs: Sequence[Run[Curve]], units: Units) -> list[tuple[str, ...]]:
    """Loss of every other run minus that of the first at each length, under `length_header`."""
    first, *others = runs
    lengths = measured_lengths(runs)

    def cell(run: Run[Curve], length: int) -> str:
        if length not in run.results or length not in first.results:
            return "-"
        difference = units.difference(run.results[length], first.results[length])
        return plus_minus(f"{difference.value:+.3f}", float(difference.stderr), 3)

    return [(run.name, run.short_encoding, *(cell(run, length) for length in lengths)) for run in others]


def difference_note(runs: Sequence[Run[Curve]], units: Units) -> str:
    where = "over positions n/2 to n of windows of n tokens" if units.stride is None else "over all tokens"
    return (
        f"At each length n, {where}; below 0: better than {runs[0].name}. ±: standard error of the difference, paired "
        "by document; a difference of less than two standard errors may be chance in the choice of documents. It does "
        "not include the variation between training seeds. All pairs are in differences.csv."
    )


def notes(runs: Sequence[Run[Curve]], units: Units) -> list[str]:
    """Notes below the table: the lengths that a run does not support, and the definitions of the numbers."""
    score = units.score_name.lower()
    if units.stride is None:
        definitions = [
            f"{units.score_name} at k x the training length L: over positions kL/2 to kL of windows of kL tokens; "
            "in-window: over L/2 to L of the shortest length that covers them.",
            f"Within 10 % up to: the furthest position p such that, at p and at every earlier bucket edge from L on, "
            f"{score} over positions p/2 to p of the longest length is at most 1.1 times the in-window value of its "
            "documents.",
            "The content of documents also changes with position, so compare runs at the same position. With "
            "--eval.stride every length scores the same tokens.",
        ]
    else:
        definitions = [
            f"{units.score_name} at k x the training length L: over all tokens, read in windows of kL; in-window: in "
            "windows of the shortest length that covers L.",
            "Within 10 % up to: the longest length such that, at this and every shorter length from L on, "
            f"{score} is at most 1.1 times the in-window value of the same documents.",
        ]
    uncertainty = "±: standard error over documents, weighted by their scored tokens (a ratio estimator)."
    if any(curve.documents == 1 for run in runs for curve in run.results.values()):
        uncertainty += " One document has none."
    return [*cannot_read(runs), *definitions, uncertainty]


def cost_rows(runs: Sequence[Run[Curve]]) -> list[tuple[str, ...]]:
    """Speed, and step and peak memory, of each run and length, under `length_header`."""
    lengths = measured_lengths(runs)
    return [
        (run.name, run.short_encoding, *(_cost_cell(run.results[n]) if n in run.results else "-" for n in lengths))
        for run in runs
    ]


def memory_note() -> str:
    whose = "this process" if jax.default_backend() == "cpu" else "the fullest device"
    return (
        "Memory per length in MB (10^6 bytes), step / peak. Step: memory of one batch on each device, as compiled: "
        f"weights, tokens, results and temporaries. Peak: the most memory that {whose} had used by the end of the "
        "length; it never falls, so it includes loading, compiling, shorter lengths and earlier runs."
    )


def _number(score: Estimate | None, units: Units) -> str:
    if score is None:
        return "-"
    value, stderr = float(score.value), float(score.stderr)
    if not math.isfinite(value) or value >= 1e6:
        return f"{value:.1e}"
    digits = 3 if units.bits_per_byte else 2 if value < 100 else 0
    return plus_minus(f"{value:,.{digits}f}", stderr, digits)


def _cost_cell(curve: Curve) -> str:
    speed = f"{curve.tokens_read / curve.seconds:,.0f}" if curve.seconds else "-"
    step = f"{curve.step_bytes / 1e6:,.0f}" if curve.step_bytes else "-"
    return f"{speed}, {step} / {curve.peak_bytes / 1e6:,.0f}"


def _effective_length_cell(run: Run[Curve], units: Units) -> str:
    furthest = effective_length(run, units)
    if furthest is None:
        return "-"
    all_it_has = run.max_length is not None and furthest.position == run.max_length
    return f"{run.max_length} (all it has)" if all_it_has else str(furthest)
