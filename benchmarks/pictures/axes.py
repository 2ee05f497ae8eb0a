"""The axes of a picture, and what is drawn on them."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from nope_jax.evaluation.common.plots import COLOURS, INK, QUIET

STYLES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.5, 1.5)))
CMAP = "cividis"  # even to all eyes
PALE = "#d8d8d8"


def plot(figure: Figure, title: str, x: str = "", y: str = "", **settings) -> Axes:
    """Creates the single axes of a picture."""
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=8, color=INK, loc="left", pad=4)
    axes.set_xlabel(x, fontsize=8, color=INK, labelpad=1)
    axes.set_ylabel(y, fontsize=8, color=INK, labelpad=1)
    axes.tick_params(labelsize=7, color=QUIET, length=2, pad=1.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.set(**settings)
    return axes


def lines(axes: Axes, x, rows, labels=None, **settings) -> None:
    """Draws one line per row, with its label at its end in the same colour."""
    for i, row in enumerate(rows):
        axes.plot(x, row, color=COLOURS[i], linestyle=STYLES[i % 4], linewidth=1.3, **settings)
        if labels:
            note(axes, labels[i], (x[-1], row[-1]), COLOURS[i])


def note(axes: Axes, text: str, at, colour=INK, offset=(3, 0), **settings) -> None:
    settings = {"fontsize": 7, "va": "center", "ha": "left"} | settings
    axes.annotate(text, at, offset, textcoords="offset points", color=colour, annotation_clip=False, **settings)


def trained(axes: Axes, length: float) -> None:
    """Marks the training length."""
    axes.axvline(length, color=QUIET, linewidth=0.8, linestyle=(0, (2, 2)))
    note(axes, "L", (length, 1), QUIET, (2, -1), xycoords=("data", "axes fraction"), va="top")


def heat(axes: Axes, rows, cmap: str = CMAP, **settings) -> None:
    """Draws an array [y, x] as a heat map; NaN stays white."""
    axes.imshow(rows, aspect="auto", origin="lower", interpolation="nearest", cmap=cmap, **settings)
    axes.spines[["top", "right"]].set_visible(True)
    axes.spines[:].set_color(QUIET)


def log_positions(axes: Axes, last: int) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlim(left=16, right=last)
    axes.xaxis.set_minor_locator(NullLocator())
    ticks = [2**k for k in range(5, 20, 2) if 2**k <= last]
    axes.set_xticks(ticks, [f"{t:,}" if t < 1024 else f"{t // 1024}K" for t in ticks])
