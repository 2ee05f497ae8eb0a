"""The common style of the figures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage

from nope_jax.evaluation.common.files import replace_file

# The colours of Okabe and Ito (2008), without yellow, which is hard to see on white. Colours, dashes and markers repeat
# with different periods, so that runs differ in black and white, and the eighth run differs from the first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
DASHES = ("-", (0, (6, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
INK, QUIET = "#222222", "#707070"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure; width and height in inches."""
    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(path: Path, figure: Figure) -> None:
    with replace_file(path) as temporary:
        figure.savefig(temporary, format="png", facecolor="white")


def panels(figure: Figure | SubFigure, count: int, across: int, **keywords: Any) -> list[Axes]:
    """Creates `count` axes, `across` of them per row."""
    axes = figure.subplots(-(-count // across), across, squeeze=False, **keywords)
    for empty in axes.flat[count:]:
        empty.set_visible(False)
    return list(axes.flat[:count])


def draw_map(
    axes: Axes, values: np.ndarray, low: float, high: float, title: str, labels: Mapping[tuple[int, int], str] = {}
) -> AxesImage:
    """Draws a matrix, rows down and columns across, with optional cell labels; non-finite cells stay empty."""
    image = axes.imshow(values, vmin=low, vmax=high, cmap="viridis", aspect="auto", interpolation="nearest")
    for (row, column), label in labels.items():
        ink = "white" if values[row, column] < low + 0.6 * (high - low) else INK
        axes.text(column, row, label, ha="center", va="center", color=ink, fontsize=7)
    axes.set_title(title, fontsize=9, color=INK)
    axes.tick_params(which="both", length=0, colors=QUIET, labelsize=8)
    axes.spines[:].set_visible(False)
    return image


def line_style(index: int) -> dict[str, Any]:
    """Colour, dashes and marker of the `index`-th run or length."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def finish(axes: Axes, x_label: str = "", y_label: str = "") -> None:
    """Labels the axes and applies the common style: a grid, and no top and right spines."""
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e4e4", linewidth=0.7)


def note(figure: Figure, text: str) -> None:
    """Writes a note below a figure."""
    figure.supxlabel(text, fontsize=8, color=QUIET)
