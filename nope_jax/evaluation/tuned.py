"""What eval.py tune has found: the file that it goes on from, and the table, picture and section that show it.

Shapes: L layers, N query heads. Losses in nats per token.
"""

import csv
import dataclasses
import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from nope_jax.evaluation import report
from nope_jax.evaluation.figures import COLOURS, INK, MARKERS, QUIET
from nope_jax.evaluation.files import replace_file
from nope_jax.evaluation.uncertainty import Estimate, mean, number, plus_minus

COLUMNS = (
    "run",
    "method",
    "train_length",
    "length",
    "documents",
    "loss_before",
    "best_factor",
    "loss_at_best_factor",
    "loss_after",
    "loss_before_stderr",
    "loss_at_best_factor_stderr",
    "loss_after_stderr",
    "gain",
    "gain_stderr",
)
"""Of tune.csv: one row per length, losses in nats per token; what was not computed is empty.

`gain` is `loss_before` less `loss_after`: above 0 where the new run is better. A column `..._stderr` is the standard
error of another over documents (`nope_jax.evaluation.uncertainty`), that of the gain paired by document; empty where
there is one document."""


@dataclasses.dataclass
class Outcome:
    """What was found at one length; None where it has not been computed or the method has no such thing."""

    length: int
    documents: int
    loss_before: float | None = None
    tried: dict[float, float] = dataclasses.field(default_factory=dict)
    """The loss at each factor for all layers and heads that was tried; of ssmax in units of 1 / ln L."""
    factor: float | None = None
    """The best of them."""
    loss_at_factor: float | None = None
    loss_after: float | None = None
    """Of the run that is written."""
    of_documents: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """The loss of each document `before`, `after`, and at each factor in `tried`, under its decimal digits."""

    def keep(self, when: str, losses: Float[np.ndarray, "documents"]) -> float:
        """Takes in the losses of all documents, and returns their mean."""
        self.of_documents[when] = losses.tolist()
        return float(losses.mean())

    def estimate(self, when: str) -> Estimate | None:
        """The mean of what was kept under a name, with its error over documents; None where nothing was."""
        losses = self.of_documents.get(when)
        return mean(np.array(losses, np.float64)) if losses else None

    def gain(self, when: str = "after") -> Estimate | None:
        """By how much the loss of the same documents is lower than before."""
        before, then = self.estimate("before"), self.estimate(when)
        return before - then if before and then else None

    @property
    def at_edge(self) -> bool:
        """Whether the best factor is the least or the greatest that was tried."""
        return self.factor is not None and self.factor in (min(self.tried), max(self.tried))


@dataclasses.dataclass(frozen=True)
class Learned:
    """Where the learning of factors stands."""

    updates: int
    """So many have been made."""
    factors: list[list[float]]
    """[L, N]."""
    optimizer: list[Any] | None
    """The leaves of its state; None once all updates have been made."""


@dataclasses.dataclass
class Tuning:
    """A tuning as far as it has come. tune.json holds it; what is None has not been computed."""

    method: str
    source: str
    """The workdir of the run."""
    data: str
    train_length: int
    settings: dict[str, Any]
    content: str
    """A digest of the run's checkpoint, of the code that was run, and of the documents."""
    lengths: list[Outcome]
    """Ascending."""
    command: str
    step: int
    """Of the run's checkpoint."""
    factor: float | None = None
    """For all layers and heads, of the method uniform."""
    start: float | None = None
    """Where learned factors began."""
    learned: Learned | None = None
    encoding: str | None = None
    """Of the run that is written."""

    def keep(self, out: Path) -> None:
        """Writes tune.json."""
        text = json.dumps(_finite(dataclasses.asdict(self)), indent=2)
        with replace_file(out / "tune.json") as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    def or_continued(self, out: Path) -> "Tuning":
        """Itself; or where `out` holds what the same tuning has found before it was interrupted, that.

        Raises:
            ValueError: `out` holds another one that was interrupted.
        """
        path = out / "tune.json"
        if not path.exists():
            return self
        otherwise = "choose another --out, or remove that one"
        try:
            kept = self._load(path)
            unlike = {name: value for name, value in self._asked().items() if kept._asked().get(name) != value}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is not what an interrupted tune leaves; {otherwise}") from error
        for name, value in unlike.items():
            theirs = kept._asked().get(name)
            raise ValueError(
                f"{name}: --out {out} holds a tuning that was interrupted, with {theirs}, not {value}; to go on give "
                f"that, otherwise {otherwise}"
            )
        if kept.content != self.content:
            raise ValueError(
                f"--out {out} holds a tuning that was interrupted, of another checkpoint of {self.source}, of "
                f"other documents or by other code; {otherwise}"
            )
        if kept.learned is not None and len(read_updates(out)) < kept.learned.updates:
            raise ValueError(f"{out}/tune.jsonl lacks some of the updates that tune.json tells of; {otherwise}")
        return dataclasses.replace(kept, command=self.command)

    def _asked(self) -> dict[str, Any]:
        """What was asked for, by the option that says it."""
        return {
            "--workdirs": str(Path(self.source).resolve()),
            "--method": self.method,
            "--lengths": " ".join(str(outcome.length) for outcome in self.lengths),
            "--data.source": self.data,
            **{f"--tune.{name}": value for name, value in self.settings.items()},
        }

    def _load(self, path: Path) -> "Tuning":
        fields = json.loads(path.read_text(encoding="utf-8"))
        for outcome in fields["lengths"]:
            # JSON has no infinity, which is what a loss counts as that is not finite.
            outcome["tried"] = {float(k): math.inf if v is None else v for k, v in outcome["tried"].items()}
        learned = None if fields["learned"] is None else Learned(**fields["learned"])
        return type(self)(**fields | {"lengths": [Outcome(**o) for o in fields["lengths"]], "learned": learned})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_updates(out: Path) -> list[dict[str, Any]]:
    """The updates in tune.jsonl, a last line that was cut off left out."""
    path = out / "tune.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wang_fit(stretch: float) -> float:
    """The factor that Wang et al. 2024 (arXiv 2404.12224) fit for `stretch` times the training length."""
    return 1 + 0.397 * math.log(stretch)


# Table


def write_table(path: Path, tuning: Tuning) -> None:
    """Writes one CSV row per length."""

    def errors(outcome: Outcome) -> list[str]:
        estimates = [outcome.estimate(when) for when in ("before", str(outcome.factor), "after")]
        gain = outcome.gain()
        numbers = [e and e.stderr for e in estimates] + [gain and gain.value, gain and gain.stderr]
        return [cell(value) for value in numbers]

    def cell(value: Any) -> str:
        return "" if value is None else number(float(value))

    with replace_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for o in tuning.lengths:
            what = (_name(tuning), tuning.method, tuning.train_length, o.length, o.documents)
            losses = (o.loss_before, o.factor, o.loss_at_factor, o.loss_after)
            writer.writerow((*what, *map(cell, losses), *errors(o)))


def title(tuning: Tuning) -> str:
    return f"Loss of {_name(tuning)} in nats per token, tuned by {tuning.method}"


def header(tuning: Tuning) -> list[str]:
    searched = ["best factor", "Wang's fit", "with the best"] if tuning.method == "uniform" else []
    return ["length", "documents", "before", *searched, "new run", "gain"]


def rows(tuning: Tuning) -> list[list[str]]:
    """One row of cells per length, under `header`."""

    def written(value: float | None, digits: int = 4, estimate: Estimate | None = None) -> str:
        if value is None:
            return "-"
        return plus_minus(f"{value:.{digits}f}", float(estimate.stderr) if estimate else math.nan, 3)

    cells = []
    for outcome in tuning.lengths:
        before = written(outcome.loss_before, 4, outcome.estimate("before"))
        row = [f"{outcome.length:,}", str(outcome.documents), before]
        if tuning.method == "uniform":
            stretch = outcome.length / tuning.train_length
            fit = wang_fit(stretch) if stretch >= 1 else None
            at_factor = written(outcome.loss_at_factor, 4, outcome.estimate(str(outcome.factor)))
            row += [written(outcome.factor, 2), written(fit, 2), at_factor]
        gain, after = outcome.gain(), written(outcome.loss_after, 4, outcome.estimate("after"))
        cells.append([*row, after, plus_minus(f"{gain.value:+.4f}", float(gain.stderr), 3) if gain else "-"])
    return cells


def notes(tuning: Tuning) -> list[str]:
    """What a reader of the table must know."""
    said = [
        f"Mean loss over all tokens of documents of the training split of {tuning.data}, read from their starts. ±: "
        "standard error over documents"
        + ("" if all(outcome.documents > 1 for outcome in tuning.lengths) else ", of which one alone has none")
        + ". Gain: before less the new run, its error paired by document; the factors were found on documents of this "
        "split, so that on others it may be less."
    ]
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
                f"{least:.2f} to {most:.2f}: there may be a better one further out."
            )
    if tuning.learned is not None:
        factors, updates, steps = np.array(tuning.learned.factors), tuning.learned.updates, tuning.settings["steps"]
        after = f" after {updates} of {steps} updates" if updates < steps else ""
        said.append(
            f"Factors began at {tuning.start:.3f}, and are now {factors.min():.3f} to {factors.max():.3f}, "
            f"{factors.mean():.3f} on average{after}."
        )
    if tuning.method == "ssmax":
        said.append("They are s in s ln n, to which the focus constraint does not apply.")
    return said


def _name(tuning: Tuning) -> str:
    return Path(tuning.source).resolve().name


# Picture


def plot(path: Path, tuning: Tuning, updates: Sequence[dict[str, Any]]) -> None:
    """Draws what the method has to show: losses over factors, learned factors, or the losses before and after.

    Args:
        path: of the PNG.
        tuning: what was found.
        updates: the lines of tune.jsonl.
    """
    figure = Figure(figsize=(9.5, 4), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
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
    with replace_file(path) as temporary:
        figure.savefig(temporary, format="png", facecolor="white")


def _draw_search(axes: Axes, tuning: Tuning) -> None:
    """The loss over the factor, a line for each length."""
    for i, outcome in enumerate(tuning.lengths):
        tried = [(factor, loss) for factor, loss in sorted(outcome.tried.items()) if math.isfinite(loss)]
        if tried:
            colour = COLOURS[i % len(COLOURS)]
            axes.plot(*zip(*tried, strict=True), ".-", color=colour, linewidth=1.4, label=f"{outcome.length:,} tokens")
        if outcome.factor is not None and outcome.loss_at_factor is not None:
            axes.plot(outcome.factor, outcome.loss_at_factor, "o", color=colour, markersize=9, markeredgecolor=INK)
            _draw_error(axes, outcome.factor, outcome.loss_at_factor, outcome.gain(str(outcome.factor)), colour)
    _finish(
        axes, "Factor of the attention logits", "Loss (nats per token); circles: the least,\nbars: error of the gain"
    )


def _draw_best(axes: Axes, tuning: Tuning) -> None:
    """The best factor over the multiple of the training length, beside Wang's fit."""
    found = [(o.length / tuning.train_length, o.factor) for o in tuning.lengths if o.factor is not None]
    last = max(2.0, *(o.length / tuning.train_length for o in tuning.lengths))
    fitted = np.geomspace(1, last, 64)
    axes.plot(fitted, [wang_fit(s) for s in fitted], "--", color=QUIET, label="Wang et al. 2024: 1 + 0.397 ln s")
    if found:
        axes.plot(*zip(*found, strict=True), "o-", color=COLOURS[0], markersize=7, label="best")
    _mark(axes, [o.length / tuning.train_length for o in tuning.lengths])
    _finish(axes, "s: length / training length (log scale)", "Best factor")


def _draw_factors(figure: Figure, axes: Axes, method: str, factors: Float[np.ndarray, "L N"]) -> None:
    """A map of layers (down) by heads (across)."""
    image = axes.imshow(factors, aspect="auto", cmap="viridis", interpolation="nearest")
    figure.colorbar(image, ax=axes, label="s in s ln n" if method == "ssmax" else "Factor")
    for axis in axes.xaxis, axes.yaxis:
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("Head")
    axes.set_ylabel("Layer")


def _draw_updates(axes: Axes, updates: Sequence[dict[str, Any]]) -> None:
    """The loss of each update, on the windows that it read."""
    for i, length in enumerate(sorted({line["length"] for line in updates})):
        points = [(line["step"], line["loss"]) for line in updates if line["length"] == length]
        (line,) = axes.plot(*zip(*points, strict=True), linewidth=1, markersize=3, label=f"{length:,} tokens")
        line.set(marker=MARKERS[i % len(MARKERS)], color=COLOURS[i % len(COLOURS)])
    _finish(axes, "Update", "Loss of its windows (nats per token)")


def _draw_losses(axes: Axes, tuning: Tuning) -> None:
    """The losses before and after, by length."""
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
    _finish(axes, "Length (tokens, log scale); dotted: trained at", "Loss (nats per token);\nbars: error of the gain")


def _draw_error(axes: Axes, x: float, y: float, estimate: Estimate | None, colour: str) -> None:
    """A bar of one standard error on either side."""
    if estimate is not None and math.isfinite(estimate.stderr):
        axes.vlines(x, y - estimate.stderr, y + estimate.stderr, color=colour, linewidth=1.4)


def _mark(axes: Axes, values: Sequence[float]) -> None:
    """Makes the axis below logarithmic, with these values marked."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{value:,}" if isinstance(value, int) else f"{value:.3g}" for value in values])
    axes.xaxis.set_minor_formatter(NullFormatter())


def _finish(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e4e4", linewidth=0.7)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


# Report

_SAY = {
    "uniform": "One factor of all attention logits, the one with the least loss (Wang et al. 2024).",
    "head": "A factor of the attention logits for each layer and head, learned while all else is frozen (Wang et al. "
    "2024).",
    "log-n": "Attention logits times max(1, log n) for a query that sees n keys, the logarithm to the base of the "
    "training length.",
    "ssmax": "Attention logits times s ln n for a query that sees n keys, s learned for each layer and head "
    "(Nakanishi 2025).",
    "linear": "RoPE with all its angles divided by one number (position interpolation).",
    "ntk": "RoPE with a larger base (NTK-aware scaling).",
    "dynamic": "RoPE with a base that grows with the text (dynamic NTK scaling).",
    "yarn": "RoPE with its slow pairs interpolated (YaRN).",
}


def section(out: Path, tuning: Tuning) -> str:
    """The section of the report, from tune.csv and tune.png in `out`."""
    heading = f"{out.resolve().name}: {_name(tuning)} tuned by {tuning.method}"
    quiet = "".join(report.paragraph(note, quiet=True) for note in notes(tuning))
    return f"""<h2>{html.escape(heading)}</h2>
{report.paragraph(_SAY[tuning.method])}
{report.table_of(header(tuning), rows(tuning))}
{quiet}
{report.figure(out / "tune.png", f"What tuning by {tuning.method} found")}
{report.download(out / "tune.csv", "one row per length; losses in nats per token.")}
{report.download(out / "tune.json", "all factors that were tried or learned.")}
{report.command_line(tuning.command)}
"""
