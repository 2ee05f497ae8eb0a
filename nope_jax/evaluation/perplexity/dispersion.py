"""Dispersion: which heads spread out their attention past the training length, and in which order.

Shapes: L layers, N query heads, P position buckets. Entropies are in nats; shares are relative to the ceiling ln(i + 1)
at position i.
"""

import dataclasses
import html
import math
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FixedLocator, MaxNLocator

from nope_jax.evaluation.common import plots
from nope_jax.evaluation.common.report import Section, paragraph, table_of
from nope_jax.evaluation.common.runs import Run
from nope_jax.evaluation.perplexity.measure import Curve
from nope_jax.evaluation.perplexity.units import Units

COLUMNS = (
    "run encoding train_length length rank layer head spreads_from share_in_window share_at_end "
    "entropy_in_window entropy_at_end documents protocol"
)
"""Columns of heads.csv, one row per run and head, in the order in which they spread out; entropies in nats.

`spreads_from` is empty for a head that never spreads out (CRITERION)."""

RISE = 0.05
"""Rise of a head's share of the ceiling above which the head counts as spread out."""

FIRST_HEADS = 3
"""Number of heads named in the terminal, the first to spread out."""
CELL_LABELS = 8
"""Maximum number of heads for which the map labels each cell with its position."""

CRITERION = (
    "A head spreads out from the first position bucket past the training length L in which its entropy, as a share of "
    f"the ceiling ln(position + 1), is more than {RISE} above the highest share of any bucket in L/2 to L; measured at "
    "the longest evaluated length."
)


@dataclasses.dataclass(frozen=True)
class HeadDispersion:
    """Dispersion of one head, within the training length and past it."""

    layer: int
    head: int
    position: int | None
    """Position from which it spreads out; None: it does not, up to the longest evaluated length."""
    share_in_window: float
    """Highest share of any bucket between half the training length and the training length."""
    share_at_end: float
    """Share over the second half of the longest evaluated length."""
    entropy_in_window: float
    """Mean entropy over the second half of the training length, in nats."""
    entropy_at_end: float
    """Mean entropy over the second half of the longest evaluated length, in nats."""


def dispersion(run: Run[Curve]) -> list[HeadDispersion]:
    """The heads of a run, sorted by the position from which they spread out (CRITERION); heads that never do are last.

    Within a bucket, heads are sorted by the rise of their share, largest first. Empty if nothing past the training
    length was measured, or if the training length is 1, where there is nothing to compare.
    """
    curve, train_length = run.longest, run.train_length
    if curve is None or curve.length <= train_length or train_length < 2:
        return []
    shares, starts, ends = _shares(curve.heads, curve.edges), curve.edges[:-1], curve.edges[1:]
    inside = (2 * starts >= train_length) & (ends <= train_length)
    highest = shares[..., inside].max(-1)
    spread = (shares > highest[..., None] + RISE) & (starts >= train_length)
    at_end, entropy_at_end = _half(curve.heads, curve.length)
    _, entropy_in_window = _half(curve.heads, train_length)
    heads = [
        HeadDispersion(
            layer,
            head,
            int(starts[spread[layer, head].argmax()]) if spread[layer, head].any() else None,
            *(float(values[layer, head]) for values in (highest, at_end, entropy_in_window, entropy_at_end)),
        )
        for layer, head in np.ndindex(highest.shape)
    ]
    return sorted(
        heads,
        key=lambda head: (
            np.inf if head.position is None else head.position,
            head.share_in_window - head.share_at_end,
        ),
    )


def _shares(entropy: Float[np.ndarray, "L N T"], edges: Int[np.ndarray, "edges"]) -> Float[np.ndarray, "L N P"]:
    """Entropy divided by its ceiling, each summed over the bucket; 0 at position 0, where both are 0."""
    ceiling = np.log1p(np.arange(entropy.shape[-1]))
    totals = np.add.reduceat(ceiling, edges[:-1])
    return np.add.reduceat(entropy, edges[:-1], axis=-1, dtype=np.float64) / np.where(totals > 0, totals, 1)


def _half(entropy: Float[np.ndarray, "L N T"], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Share and mean entropy of each head over positions length/2 to length."""
    positions = np.arange(length // 2, length)
    mean = entropy[..., positions].mean(-1, dtype=np.float64)
    return mean / np.log1p(positions).mean(), mean


def past_training(runs: Sequence[Run[Curve]]) -> list[Run[Curve]]:
    """The runs measured at a length past their training length."""
    return [run for run in runs if dispersion(run)]


# Output


def head_rows(runs: Sequence[Run[Curve]], units: Units) -> Iterator[tuple]:
    """The rows of heads.csv, for the runs of `past_training`."""
    for run in runs:
        for rank, head in enumerate(dispersion(run), 1):
            assert run.longest is not None
            what = (run.name, run.encoding, run.train_length, run.longest.length, rank, head.layer, head.head)
            values = (head.share_in_window, head.share_at_end, head.entropy_in_window, head.entropy_at_end)
            yield (*what, head.position, *values, run.longest.documents, units.protocol)


def draw(runs: Sequence[Run[Curve]]) -> Figure:
    """Draws where each head spreads out: a map of layers (down) by heads (across) for each run of `past_training`."""
    runs = past_training(runs)
    shapes = [run.results[max(run.results)].heads.shape for run in runs]
    height, width = (max(1.5, min(0.5 * most, max(4, 0.16 * most))) for most in np.max(shapes, axis=0)[:2])
    across = min(len(runs), max(1, int(12 / (width + 0.8))))
    down = -(-len(runs) // across)
    figure = plots.new_figure(across * (width + 0.7) + 1.2, down * (height + 0.5) + 0.6)
    panels = plots.panels(figure, len(runs), across)
    doublings = max(math.log2(max(run.results) / run.train_length) for run in runs)
    images = [_draw_map(axes, run, doublings) for axes, run in zip(panels, runs, strict=True)]
    ticks = range(math.floor(doublings) + 1)
    bar = figure.colorbar(images[0], ax=panels, ticks=ticks, shrink=0.9)
    bar.ax.set_yticklabels([f"{2**tick:,} L" if tick else "L" for tick in ticks], fontsize=8)
    bar.set_label("Spreads out from\n(L: training length)", fontsize=9)
    figure.supylabel("Layer", fontsize=9)
    plots.note(figure, "Head\nHatched: spreads out at no position up to the longest length.")
    return figure


def _draw_map(axes: Axes, run: Run[Curve], doublings: float) -> AxesImage:
    found = dispersion(run)
    position = np.full((1 + max(head.layer for head in found), 1 + max(head.head for head in found)), np.nan)
    for head in found:
        if head.position is not None:
            position[head.layer, head.head] = head.position
    colour = np.log2(position / run.train_length)
    labels = np.ndenumerate(position) if position.shape[1] <= CELL_LABELS else ()
    of_cells = {cell: f"{value:,.0f}" for cell, value in labels if np.isfinite(value)}
    image = plots.draw_map(axes, colour, 0, doublings, f"{run.name}, trained at {run.train_length:,}", of_cells)
    # The cells of heads that never spread out stay empty, so that the hatched background shows.
    axes.patch.set(facecolor="#f2f2f2", edgecolor="#b8b8b8", hatch="//////", linewidth=0)
    for axis, count in zip((axes.yaxis, axes.xaxis), position.shape, strict=True):
        axis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
        axis.set_minor_locator(FixedLocator([i + 0.5 for i in range(count - 1)]))
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)
    return image


def section(runs: Sequence[Run[Curve]], units: Units) -> Section:
    """Where each head spreads out: a map, and a collapsible table of all heads."""
    spoken = [remark(run) for run in past_training(runs)]
    return Section(
        "Which heads spread out first",
        CRITERION,
        spoken=[CRITERION, *spoken] if spoken else [],
        figures={"dispersion.png": "Where each head spreads out, by layer and head, of every run"} if spoken else {},
        html="\n".join(_every_head(run, units) for run in runs),
        files={"heads.csv": "one row per run and head, in the order in which they spread out; entropies in nats."},
    )


def remark(run: Run[Curve], first: int = FIRST_HEADS) -> str:
    """States how many heads of a run spread out, and names the `first` heads to do so."""
    heads = dispersion(run)
    spread = [head for head in heads if head.position is not None]
    if not spread:
        return f"{run.name}: none of its {len(heads)} heads spreads out."
    named = "; ".join(
        f"layer {head.layer} head {head.head} from {head.position:,} ({head.share_in_window:.0%} of the ceiling in "
        f"the window, {head.share_at_end:.0%} at the end)"
        for head in spread[:first]
    )
    return f"{run.name}: {len(spread)} of its {len(heads)} heads spread out{', first ' * bool(named)}{named}."


def _every_head(run: Run[Curve], units: Units) -> str:
    if not dispersion(run):
        return paragraph(f"{run.name}: no length past its training length was measured.", quiet=True)
    unit = units.entropy_unit
    header = ("layer", "head", "spreads out from", "share in window", "share at end")
    rows = []
    for head in dispersion(run):
        where = (str(head.layer), str(head.head), "never" if head.position is None else f"{head.position:,}")
        shares = (f"{share:.1%}" for share in (head.share_in_window, head.share_at_end))
        values = (f"{units.entropy(nats):.2f}" for nats in (head.entropy_in_window, head.entropy_at_end))
        rows.append((*where, *shares, *values))
    every = table_of((*header, f"{unit} in window", f"{unit} at end"), rows)
    return f"<details><summary>{html.escape(remark(run, first=0))}</summary>{every}</details>"


def entropy_section(runs: Sequence[Run[Curve]], units: Units) -> Section:
    """The entropy of every head at the longest length, as a map whose values show on hover."""
    return Section(
        "Every head",
        f"Attention entropy as a share of its ceiling {units.ceiling_name}, over the second half of each run's longest "
        "window: dark (0) is a head that attends to one token, bright (1) one that attends to all equally. Point at a "
        "cell for its values.",
        html=f'<div class="heads">{"".join(_entropy_map(run, units) for run in runs)}</div>',
    )


def _entropy_map(run: Run[Curve], units: Units) -> str:
    """An SVG map of layers (down) by heads (across)."""
    curve = run.results[max(run.results)]
    positions = np.arange(curve.length // 2, curve.length)
    entropy = curve.heads[:, :, positions].mean(-1)
    share = entropy / np.log(positions + 1.0).mean() if curve.length > 1 else np.zeros_like(entropy)
    layers, heads = share.shape
    size = min(28, 560 // heads)
    cells = "".join(
        f'<rect x="{24 + size * head}" y="{14 + size * layer}" width="{size - 1}" height="{size - 1}" rx="2" '
        f'fill="{to_hex(colormaps["viridis"](share[layer, head]))}">'
        f"<title>layer {layer}, head {head}: {units.entropy(entropy[layer, head]):.2f} {units.entropy_unit}, "
        f"{share[layer, head]:.0%}</title></rect>"
        for layer in range(layers)
        for head in range(heads)
    )
    name = html.escape(run.name)
    return (
        f"<figure><figcaption>{name} "
        f'<span class="quiet">at {curve.length:,}, mean {share.mean():.0%}</span></figcaption>'
        f'<svg role="img" aria-label="Entropy of the heads of {name}" width="{24 + size * heads}" '
        f'height="{14 + size * layers}"><text x="24" y="10">heads</text>'
        f'<text transform="translate(18 {14 + size * layers}) rotate(-90)">layers</text>{cells}</svg></figure>'
    )
