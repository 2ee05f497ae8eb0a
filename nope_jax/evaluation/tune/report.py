"""Output of eval.py tune: the rows of tune.csv, the table, the figure and the section of the report.

Shapes: L layers, N query heads. Losses in nats per token.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from nope_jax.evaluation.common import plots
from nope_jax.evaluation.common.plots import COLOURS, INK, MARKERS, QUIET
from nope_jax.evaluation.common.report import Section, Table
from nope_jax.evaluation.common.uncertainty import Estimate, plus_minus
from nope_jax.evaluation.tune.state import Tuning

COLUMNS = (
    "run method train_length length documents loss_before best_factor loss_at_best_factor loss_after "
    "loss_before_stderr loss_at_best_factor_stderr loss_after_stderr gain gain_stderr"
)
"""Columns of tune.csv, one row per length, losses in nats per token; values that were not computed are empty.

`gain` is `loss_before` minus `loss_after`, positive if the new run is better. A column `..._stderr` is the standard
error of the column it names, over documents (`nope_jax.evaluation.common.uncertainty`); that of the gain is paired by
document. It is empty for a single document."""


def wang_fit(stretch: float) -> float:
    """The factor fitted by Wang et al. 2024 (arXiv 2404.12224) for `stretch` times the training length."""
    return 1 + 0.397 * math.log(stretch)


# Table


def csv_rows(tuning: Tuning) -> Iterator[tuple]:
    """The rows of tune.csv."""
    for o in tuning.lengths:
        estimates = [o.estimate(when) for when in ("before", str(o.factor), "after")]
        gain = o.gain()
        errors = [float(e.stderr) if e else None for e in estimates]
        what = (_name(tuning), tuning.method, tuning.train_length, o.length, o.documents)
        losses = (o.loss_before, o.factor, o.loss_at_factor, o.loss_after)
        yield (*what, *losses, *errors, *((float(gain.value), float(gain.stderr)) if gain else (None, None)))


def header(tuning: Tuning) -> list[str]:
    searched = ["best factor", "Wang's fit", "with the best"] if _tried(tuning) else []
    return ["length", "documents", "before", *searched, "new run", "gain"]


def _tried(tuning: Tuning) -> bool:
    """Whether factors for all heads were tried, which are those of Wang's fit."""
    return tuning.method != "ssmax" and any(outcome.tried for outcome in tuning.lengths)


def rows(tuning: Tuning) -> list[list[str]]:
    """Table cells under `header`, one row per length."""

    def written(value: float | None, digits: int = 4, estimate: Estimate | None = None) -> str:
        if value is None:
            return "-"
        return plus_minus(f"{value:.{digits}f}", float(estimate.stderr) if estimate else math.nan, 3)

    cells = []
    for outcome in tuning.lengths:
        before = written(outcome.loss_before, 4, outcome.estimate("before"))
        row = [f"{outcome.length:,}", str(outcome.documents), before]
        if _tried(tuning):
            stretch = outcome.length / tuning.train_length
            fit = wang_fit(stretch) if stretch >= 1 else None
            at_factor = written(outcome.loss_at_factor, 4, outcome.estimate(str(outcome.factor)))
            row += [written(outcome.factor, 2), written(fit, 2), at_factor]
        gain, after = outcome.gain(), written(outcome.loss_after, 4, outcome.estimate("after"))
        cells.append([*row, after, plus_minus(f"{gain.value:+.4f}", float(gain.stderr), 3) if gain else "-"])
    return cells


def notes(tuning: Tuning) -> list[str]:
    """Notes below the table."""
    searched = tuning.learned is not None or any(outcome.tried for outcome in tuning.lengths)
    said = [
        f"Mean loss over all tokens of documents from the training split of {tuning.data}, read from their starts. ±: "
        "standard error over documents"
        + ("" if all(outcome.documents > 1 for outcome in tuning.lengths) else " (none for a single document)")
        + ". Gain: before minus the new run, with its error paired by document"
        + ("; the factors were found on that split, so on others the gain may be smaller." if searched else ".")
    ]
    if not searched and tuning.encoding is not None:
        said.append(
            f"Nothing was searched for: the method follows from the lengths. The new run has {tuning.encoding}."
        )
    if tuning.method == "uniform" and tuning.factor is not None:
        said.append(
            f"The new run has the factor of the longest length, {tuning.factor:.2f}. Wang's fit is 1 + 0.397 ln s at s "
            "times the training length (arXiv 2404.12224)."
        )
    for outcome in tuning.lengths:
        if outcome.at_edge:
            least, most = min(outcome.tried), max(outcome.tried)
            said.append(
                f"At {outcome.length:,} tokens the best factor, {outcome.factor:.2f}, is at the edge of those tried, "
                f"{least:.2f} to {most:.2f}; a better one may lie beyond."
            )
    if tuning.learned is not None:
        factors, updates, steps = np.array(tuning.learned.factors), tuning.learned.updates, tuning.settings["steps"]
        after = f" after {updates} of {steps} updates" if updates < steps else ""
        said.append(
            f"Factors started at {tuning.start:.3f} and now range from {factors.min():.3f} to {factors.max():.3f}, "
            f"{factors.mean():.3f} on average{after}."
        )
        said += [
            f"At {outcome.length:,} tokens a factor for each head is no better than one for all, {outcome.factor:.2f}."
            for outcome in tuning.lengths
            if _tried(tuning) and outcome.loss_at_factor is not None and outcome.loss_after is not None
            if outcome.loss_after >= outcome.loss_at_factor
        ]
    if tuning.method == "ssmax":
        said.append("The factors are s in s ln n; the focus constraint does not apply to them.")
    return said


def _name(tuning: Tuning) -> str:
    return Path(tuning.source).resolve().name


# Picture


def draw(tuning: Tuning, updates: Sequence[dict[str, Any]]) -> Figure:
    """Draws the losses over factors, the learned factors, or the losses before and after, depending on the method.

    Args:
        tuning: the results so far.
        updates: the lines of tune.jsonl.
    """
    figure = plots.new_figure(9.5, 4)
    if tuning.learned is not None:
        left, right = figure.subplots(1, 2)
        _draw_factors(figure, left, tuning.method, np.array(tuning.learned.factors))
        _draw_updates(right, updates)
    elif any(outcome.tried for outcome in tuning.lengths):
        left, right = figure.subplots(1, 2)
        _draw_search(left, tuning)
        _draw_best(right, tuning)
    else:
        figure.set_size_inches(6, 4)
        _draw_losses(figure.subplots(), tuning)
    figure.suptitle(f"{_name(tuning)}, trained at {tuning.train_length:,}: {tuning.method}", fontsize=11, color=INK)
    return figure


def _draw_search(axes: Axes, tuning: Tuning) -> None:
    """Draws the loss against the factor, one line per length."""
    for i, outcome in enumerate(tuning.lengths):
        tried = [(factor, loss) for factor, loss in sorted(outcome.tried.items()) if math.isfinite(loss)]
        if tried:
            colour = COLOURS[i % len(COLOURS)]
            axes.plot(*zip(*tried, strict=True), ".-", color=colour, linewidth=1.4, label=f"{outcome.length:,} tokens")
        if outcome.factor is not None and outcome.loss_at_factor is not None:
            axes.plot(outcome.factor, outcome.loss_at_factor, "o", color=colour, markersize=9, markeredgecolor=INK)
            _draw_error(axes, outcome.factor, outcome.loss_at_factor, outcome.gain(str(outcome.factor)), colour)
    _finish(axes, "Factor of the attention logits", "Loss (nats per token); circles: minimum,\nbars: error of the gain")


def _draw_best(axes: Axes, tuning: Tuning) -> None:
    """Draws the best factor against length / training length, with Wang's fit."""
    found = [(o.length / tuning.train_length, o.factor) for o in tuning.lengths if o.factor is not None]
    last = max(2.0, *(o.length / tuning.train_length for o in tuning.lengths))
    fitted = np.geomspace(1, last, 64)
    axes.plot(fitted, [wang_fit(s) for s in fitted], "--", color=QUIET, label="Wang et al. 2024: 1 + 0.397 ln s")
    if found:
        axes.plot(*zip(*found, strict=True), "o-", color=COLOURS[0], markersize=7, label="best")
    _mark(axes, [o.length / tuning.train_length for o in tuning.lengths])
    _finish(axes, "s: length / training length (log scale)", "Best factor")


def _draw_factors(figure: Figure, axes: Axes, method: str, factors: Float[np.ndarray, "L N"]) -> None:
    """Draws a map of layers (down) by heads (across)."""
    image = plots.draw_map(axes, factors, factors.min(), factors.max(), "")
    figure.colorbar(image, ax=axes, label="s in s ln n" if method == "ssmax" else "Factor")
    for axis in axes.xaxis, axes.yaxis:
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("Head")
    axes.set_ylabel("Layer")


def _draw_updates(axes: Axes, updates: Sequence[dict[str, Any]]) -> None:
    """Draws the loss of each update on its windows."""
    for i, length in enumerate(sorted({line["length"] for line in updates})):
        points = [(line["step"], line["loss"]) for line in updates if line["length"] == length]
        (line,) = axes.plot(*zip(*points, strict=True), linewidth=1, markersize=3, label=f"{length:,} tokens")
        line.set(marker=MARKERS[i % len(MARKERS)], color=COLOURS[i % len(COLOURS)])
    _finish(axes, "Update", "Loss on its windows (nats per token)")


def _draw_losses(axes: Axes, tuning: Tuning) -> None:
    """Draws the losses before and after, by length."""
    for name, style in {"before": "s--", "after": "o-"}.items():
        losses = [getattr(outcome, f"loss_{name}") for outcome in tuning.lengths]
        points = [(o.length, loss) for o, loss in zip(tuning.lengths, losses, strict=True) if loss is not None]
        if points:
            colour = QUIET if name == "before" else COLOURS[0]
            axes.plot(*zip(*points, strict=True), style, color=colour, markersize=6, label=name)
    for outcome in tuning.lengths:
        if outcome.loss_after is not None:
            _draw_error(axes, outcome.length, outcome.loss_after, outcome.gain(), COLOURS[0])
    axes.axvline(tuning.train_length, color=INK, linewidth=1, linestyle=(0, (2, 2)))
    _mark(axes, [outcome.length for outcome in tuning.lengths])
    _finish(
        axes, "Length (tokens, log scale); dotted: training length", "Loss (nats per token);\nbars: error of the gain"
    )


def _draw_error(axes: Axes, x: float, y: float, estimate: Estimate | None, colour: str) -> None:
    """Draws an error bar of one standard error on either side."""
    if estimate is not None and math.isfinite(estimate.stderr):
        axes.vlines(x, y - estimate.stderr, y + estimate.stderr, color=colour, linewidth=1.4)


def _mark(axes: Axes, values: Sequence[float]) -> None:
    """Makes the x axis logarithmic, with ticks at these values."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{value:,}" if isinstance(value, int) else f"{value:.3g}" for value in values])
    axes.xaxis.set_minor_formatter(NullFormatter())


def _finish(axes: Axes, x_label: str, y_label: str) -> None:
    plots.finish(axes, x_label, y_label)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


# Report

_SAY = {
    "uniform": "One factor for all attention logits, chosen for the lowest loss (Wang et al. 2024).",
    "head": "A factor of the attention logits per layer and head, learned with all else frozen (Wang et al. 2024).",
    "log-n": "Attention logits times max(1, log n) for a query that sees n keys; the base of the logarithm is the "
    "training length.",
    "ssmax": "Attention logits times s ln n for a query that sees n keys, with s learned per layer and head "
    "(Nakanishi 2025).",
    "linear": "RoPE with all angles divided by one factor (position interpolation).",
    "ntk": "RoPE with a larger base (NTK-aware scaling).",
    "dynamic": "RoPE with a base that grows with the sequence length (dynamic NTK scaling).",
    "yarn": "RoPE with its low-frequency pairs interpolated (YaRN).",
}


def section(out: Path, tuning: Tuning) -> Section:
    """The section of the report; `out` holds its files."""
    return Section(
        f"{out.resolve().name}: {_name(tuning)} tuned by {tuning.method}",
        _SAY[tuning.method],
        Table(
            f"Loss of {_name(tuning)} in nats per token, tuned by {tuning.method}",
            header(tuning),
            rows(tuning),
            names=0,
        ),
        notes(tuning),
        figures={"tune.png": f"Results of tuning by {tuning.method}"},
        files={
            "tune.csv": "one row per length; losses in nats per token.",
            "tune.json": "all factors tried or learned.",
        },
    )
