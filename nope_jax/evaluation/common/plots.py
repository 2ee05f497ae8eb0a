"""How the figures of all evaluations look."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

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
