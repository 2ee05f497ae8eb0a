"""Figures of perplexity and attention entropy by position, separately and as two panels with a common position axis.

The two-panel figure follows Figure 1 of Wang et al. 2024 (arXiv 2404.12224).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from nope_jax.evaluation.common.plots import INK, QUIET, finish, line_style, new_figure, note
from nope_jax.evaluation.common.runs import Run
from nope_jax.evaluation.perplexity.measure import Curve
from nope_jax.evaluation.perplexity.units import Units

FIRST_POSITION = 16
"""Start of the position axis, for curves at least four times as long; earlier positions are few and noisy."""
POINT_TOKENS = 512
"""Minimum number of tokens behind a drawn point: buckets with fewer are pooled with the next ones."""
UNINFORMED_BITS = 8.0
"""Upper end of the axis in bits per byte: the loss of guessing bytes. That of perplexity is the vocabulary size.

A curve that exceeds the axis is labelled with its highest value."""
DIRECT_LABELS = 10
"""Maximum number of runs whose lines are labelled at their ends; more runs get a legend, and one gives the title."""


class _Line(NamedTuple):
    run: Run[Curve]
    x: np.ndarray
    y: np.ndarray
    colour: str
    style: dict[str, Any]


class _Panel(NamedTuple):
    axes: Axes
    lines: list[_Line]


def draw(runs: Sequence[Run[Curve]], units: Units, *panels: Callable[..., _Panel]) -> Figure:
    """Draws panels (`scores`, `entropy`) with a common position axis, for each run at its longest length."""
    figure = new_figure(7.5, 1.5 + 3 * len(panels))
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    return _finish(figure, [panel(one, runs, units) for panel, one in zip(panels, axes, strict=True)], units)


def scores(axes: Axes, runs: Sequence[Run[Curve]], units: Units) -> _Panel:
    """Draws perplexity, or bits per byte, by position, with its standard error."""
    lines = _lines(runs, lambda curve: units.score(curve).value)
    finite = np.concatenate([line.y[np.isfinite(line.y)] for line in lines])
    if units.bits_per_byte:
        axes.set_ylabel("Bits per byte")
        lowest = finite.min(initial=1e300)
        axes.set_ylim(0.9 * lowest, 1.05 * max(min(finite.max(initial=lowest), UNINFORMED_BITS), 1.2 * lowest))
    else:
        axes.set_ylabel("Perplexity (log scale)")
        axes.set_yscale("log")
        lowest, uninformed = finite.min(initial=1e300), max(run.config.model.num_tokens for run in runs)
        axes.set_ylim(lowest / 1.35, 1.15 * max(min(finite.max(initial=lowest), uninformed), 1.5 * lowest))
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if high < 50 * low else (1.0, 3.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if y >= 10 else f"{y:.2g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    _draw_bands(axes, lines, units.score_band)
    return _Panel(axes, lines)


def entropy(axes: Axes, runs: Sequence[Run[Curve]], units: Units) -> _Panel:
    """Draws the mean attention entropy by position, with its ceiling."""
    axes.set_ylabel(f"Attention entropy\n({units.entropy_unit}, mean over heads)")
    lines = _lines(runs, lambda curve: units.entropy(curve.entropy.value))
    _draw_bands(axes, lines, units.entropy_band)
    first, last = min(line.x[0] for line in lines), max(max(line.run.results) for line in lines)
    ends = np.array([first, last])
    axes.plot(ends, units.entropy(np.log(ends)), color=QUIET, linestyle=(0, (4, 3)), linewidth=1)
    x = first * (last / first) ** 0.75
    top = 1.04 * units.entropy(math.log(last))
    axes.text(
        x,
        units.entropy(math.log(x)) + 0.015 * top,
        f"ceiling: {units.ceiling_name}",
        ha="center",
        color=QUIET,
        fontsize=9,
        rotation=math.degrees(math.atan(units.entropy(1 / x))),
        rotation_mode="anchor",
        transform_rotates_text=True,
    )
    axes.set_ylim(0, top)
    return _Panel(axes, lines)


def _draw_bands(axes: Axes, lines: Sequence[_Line], band: Callable[[Curve], tuple[np.ndarray, np.ndarray]]) -> None:
    """Shades one standard error on either side of each line."""
    for line in lines:
        axes.fill_between(line.x, *band(_drawn(line.run)), color=line.colour, alpha=0.12, linewidth=0)


def _drawn(run: Run[Curve]) -> Curve:
    """The longest curve of a run, in the buckets that the figures show."""
    curve = run.results[max(run.results)]
    first = FIRST_POSITION if curve.length >= 4 * FIRST_POSITION else 0
    return curve.coarser(POINT_TOKENS, first, run.train_length)


def _lines(runs: Sequence[Run[Curve]], values: Callable[[Curve], np.ndarray]) -> list[_Line]:
    lines = []
    for i, run in enumerate(runs):
        if run.results:
            curve = _drawn(run)
            # Position p is drawn at p + 1, the number of tokens read, and a bucket at its middle on the log axis.
            x = np.sqrt((curve.edges[:-1] + 1.0) * curve.edges[1:])
            style = line_style(i)
            lines.append(_Line(run, x, values(curve), style["color"], style))
    return lines


def _finish(figure: Figure, panels: Sequence[_Panel], units: Units) -> Figure:
    """Draws the lines, and adds the position axis, the training lengths, the run names and the protocol."""
    lines = panels[0].lines
    last = max(max(line.run.results) for line in lines)
    trained = sorted({line.run.train_length for line in lines if line.run.train_length <= last})
    for axes, of_panel in panels:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        finish(axes, "", axes.get_ylabel())
        axes.tick_params(which="both", color=QUIET)
        for i, line in enumerate(of_panel):
            where = (0.12 * (i + 0.5) / len(lines), 0.12)
            axes.plot(
                line.x,
                line.y,
                linewidth=1.8,
                markersize=4.5,
                markevery=where,
                label=_name(axes, line),
                **line.style,
            )
        axes.set_xlim(min(line.x[0] for line in lines), last)
        for length in trained:
            axes.axvline(length, color=INK, linewidth=1, linestyle=(0, (2, 2)))
        if trained:
            axes.axvspan(trained[-1], last, color="#f5f5f2", zorder=-1)
    top, bottom = panels[0].axes, panels[-1].axes
    bottom.set_xlabel(f"{units.position_name}, log scale")
    documents = sorted({line.run.results[max(line.run.results)].documents for line in lines})
    counts = " to ".join(str(count) for count in dict.fromkeys((documents[0], documents[-1])))
    remark = " Bands: one standard error over documents." if documents[-1] > 1 else ""
    note(figure, f"Protocol: {units.protocol}. {counts} validation document{'s' * (documents[-1] > 1)}.{remark}")
    for length in trained:
        top.annotate(
            f"trained at {length:,}",
            (length, 1),
            (0, 3),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            color=INK,
            fontsize=9,
        )
    if len(lines) == 1:
        figure.suptitle(_name(top, panels[0].lines[0]), color=_darker(lines[0].colour), fontsize=10, fontweight="bold")
    if len(lines) > DIRECT_LABELS:
        handles, names = top.get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right upper")
    for axes, of_panel in panels:
        if 1 < len(lines) <= DIRECT_LABELS:
            _label_at_ends(figure, axes, [line for line in of_panel if max(line.run.results) == last])
        _mark_ends(axes, [line for line in of_panel if max(line.run.results) < last])
    return figure


def _name(axes: Axes, line: _Line) -> str:
    """Name of the run, with the highest value of the line if it exceeds the axis."""
    peak = float(np.max(line.y, where=np.isfinite(line.y), initial=0))
    if peak <= axes.get_ylim()[1]:
        return line.run.name
    if peak < 100:
        return f"{line.run.name} ↑ {peak:.1f}"
    return f"{line.run.name} ↑ {peak:,.0f}" if peak < 1e5 else f"{line.run.name} ↑ {peak:.0e}"


def _label_at_ends(figure: Figure, axes: Axes, lines: list[_Line]) -> None:
    """Writes each run's name in the right margin, as close to the end of its line as possible without overlap."""
    figure.draw_without_rendering()
    spacing = 13 / 72 * figure.dpi / axes.bbox.height
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = []
    for line in lines:
        height = to_axes.transform((line.x[-1], line.y[-1]))[1] if math.isfinite(line.y[-1]) else 1.0
        ends.append((min(height, 1.0), line))
    ends.sort(key=lambda end: end[0])
    heights = [end for end, _ in ends]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + spacing)
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], 1 - spacing * (len(heights) - 1 - i))
    for height, (end, line) in zip(heights, ends, strict=True):
        axes.annotate(
            _name(axes, line),
            (1, end),
            (1.03, height),
            xycoords="axes fraction",
            va="center",
            color=_darker(line.colour),
            fontsize=10,
            fontweight="bold",
            arrowprops={"arrowstyle": "-", "color": line.colour, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 0},
        )


def _mark_ends(axes: Axes, lines: list[_Line]) -> None:
    """Marks curves that end before the longest one, with the reason written at the bottom, where there is space."""
    for i, line in enumerate(lines):
        reason = f" ends: {line.run.max_length:,} positions" if line.run.refused else " ends"
        axes.plot(line.x[-1], line.y[-1], "X", color=line.colour, markersize=9, markeredgecolor="white", zorder=5)
        axes.annotate(
            line.run.name + reason,
            (line.x[-1], line.y[-1]),
            (line.x[-1], 0.035 + 0.05 * i),
            textcoords=("data", "axes fraction"),
            ha="right",
            va="center",
            color=_darker(line.colour),
            fontsize=9,
            fontweight="bold",
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.8, "linewidth": 0},
            arrowprops={"arrowstyle": "-", "color": line.colour, "linewidth": 0.8, "shrinkB": 4, "relpos": (1, 0.5)},
        )


def _darker(colour: str) -> tuple[float, ...]:
    """A darker colour, for text, which needs more contrast than a line."""
    return tuple(0.75 * channel for channel in to_rgb(colour))
