"""How the figures of all evaluations look."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage

from nope_jax.evaluation.common.files import replace_file

# The colours of Okabe and Ito (2008), without the yellow that vanishes on white. Dashes and markers repeat at another
# pace, so that runs differ in print as well, and the eighth is not the first again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
DASHES = ("-", (0, (6, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
INK, QUIET = "#222222", "#707070"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches."""
    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(path: Path, figure: Figure) -> None:
    with replace_file(path) as temporary:
        figure.savefig(temporary, format="png", facecolor="white")


def panels(figure: Figure | SubFigure, count: int, across: int, **keywords: Any) -> list[Axes]:
    """So many axes, `across` of them beside each other."""
    axes = figure.subplots(-(-count // across), across, squeeze=False, **keywords)
    for empty in axes.flat[count:]:
        empty.set_visible(False)
    return list(axes.flat[:count])


def draw_map(
    axes: Axes, values: np.ndarray, low: float, high: float, title: str, labels: Mapping[tuple[int, int], str] = {}
) -> AxesImage:
    """Draws a matrix, rows down and columns across, some cells with a label; what is not finite is left out."""
    image = axes.imshow(values, vmin=low, vmax=high, cmap="viridis", aspect="auto", interpolation="nearest")
    for (row, column), label in labels.items():
        ink = "white" if values[row, column] < low + 0.6 * (high - low) else INK
        axes.text(column, row, label, ha="center", va="center", color=ink, fontsize=7)
    axes.set_title(title, fontsize=9, color=INK)
    axes.tick_params(which="both", length=0, colors=QUIET, labelsize=8)
    axes.spines[:].set_visible(False)
    return image


def line_style(index: int) -> dict[str, Any]:
    """Colour, dashes and marker of the run, or the length, that comes `index`-th."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def finish(axes: Axes, x_label: str = "", y_label: str = "") -> None:
    """Names the axes, and gives them what all have: a grid and no frame."""
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e4e4", linewidth=0.7)


def note(figure: Figure, text: str) -> None:
    """Writes what a reader must know below a figure."""
    figure.supxlabel(text, fontsize=8, color=QUIET)
