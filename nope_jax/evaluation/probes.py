"""How well a linear probe reads absolute positions out of hidden states: what `eval.py probe` does.

Shapes: B batch, T length, D model width, L layers; S samples, one per token. Everything on the host is float64.
"""

import csv
import dataclasses
import functools
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from nope_jax.checkpoint import load_model
from nope_jax.cli import EvalArguments
from nope_jax.config import MeshConfig
from nope_jax.data import load_corpus
from nope_jax.evaluation.console import plural, print_table, progress_bar
from nope_jax.evaluation.figures import INK, QUIET
from nope_jax.evaluation.files import replace_file
from nope_jax.evaluation.inside import Subject, find_subjects, walk
from nope_jax.evaluation.protocol import choose_documents
from nope_jax.evaluation.report import add_section, command_line, download, figure, paragraph, table_of
from nope_jax.evaluation.uncertainty import Estimate, mean, number, plus_minus, ratio
from nope_jax.models import Decoder
from nope_jax.sharding import make_mesh, place_batch

COLUMNS = (
    "run",
    "encoding",
    "train_length",
    "length",
    "layer",
    "probe",
    "r2",
    "mae",
    "position_start",
    "position_end",
    "documents",
    "r2_stderr",
    "mae_stderr",
)
"""Of probe.csv: one row per run, length, layer and probe; positions and `mae`, the mean absolute error, in tokens.

A column `..._stderr` is the standard error of another over the documents tested, of the probe as it was fitted
(`nope_jax.evaluation.uncertainty`); empty where one document was tested. `r2` is empty for a single position."""
HEADER = (
    "run",
    "encoding",
    "trained at",
    "length",
    "probe",
    "R²: layer 0",
    "last",
    "best",
    "at layer",
    "tokens off there",
)

ProcessSpec = Callable[[tuple], tuple]


@dataclasses.dataclass(frozen=True)
class Probe:
    """A linear function of hidden states."""

    weights: Float[np.ndarray, "D"]
    bias: float

    def __call__(self, x: Float[np.ndarray, "*S D"]) -> Float[np.ndarray, "*S"]:
        return np.asarray(x, np.float64) @ self.weights + self.bias


class Moments:
    """What ridge regression needs of its samples: sums over them, so that they need not be kept."""

    def __init__(self) -> None:
        self.count = 0
        self.x: np.ndarray | float = 0.0
        self.xx: np.ndarray | float = 0.0
        self.y = 0.0
        self.xy: np.ndarray | float = 0.0
        self._origin: np.ndarray | None = None

    def add(self, x: Float[np.ndarray, "S D"], y: Float[np.ndarray, "S"]) -> None:
        """Takes in samples: their features and their targets."""
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        if self._origin is None:  # sums about a point amid the samples: a variance is then no small difference
            self._origin = x.mean(0)
        x = x - self._origin
        self.count += len(x)
        self.x = self.x + x.sum(0)
        self.xx = self.xx + x.T @ x
        self.y += float(y.sum())
        self.xy = self.xy + x.T @ y

    def fit(self, ridge: float) -> Probe:
        """The probe that minimises the mean squared error + ridge · |w|², w its weights for features of variance 1.

        A feature that does not vary gets weight 0.

        Args:
            ridge: greater than 0.
        """
        assert self._origin is not None
        mean, target = self.x / self.count, self.y / self.count
        covariance = self.xx / self.count - np.outer(mean, mean)
        variance = np.diag(covariance)
        varies = variance > 1e-24 * (variance + (mean + self._origin) ** 2)
        scale = np.where(varies, np.sqrt(np.where(varies, variance, 1.0)), np.inf)
        correlation = covariance / np.outer(scale, scale) + ridge * np.eye(len(scale))
        weights = np.linalg.solve(correlation, (self.xy / self.count - mean * target) / scale) / scale
        return Probe(weights, float(target - weights @ (mean + self._origin)))


@dataclasses.dataclass
class Score:
    """How near a probe comes to positions, in tokens; filled in document by document."""

    squared: list[float] = dataclasses.field(default_factory=list)
    """The mean squared error of each document, and"""
    absolute: list[float] = dataclasses.field(default_factory=list)
    """its mean absolute error."""
    variance: float = 0.0
    """Of the positions, which are the same in every document."""

    def add(self, predicted: Float[np.ndarray, "B T"], positions: Float[np.ndarray, "T"]) -> None:
        error = predicted - positions
        self.squared += (error**2).mean(-1).tolist()
        self.absolute += np.abs(error).mean(-1).tolist()
        self.variance = float(positions.var())

    @property
    def r2(self) -> Estimate:
        """1 - the mean squared error over the variance of the positions: 1 is exact, 0 no better than their mean.

        NaN where all are the same position.
        """
        squared = np.array(self.squared)
        unexplained = ratio(squared, np.full(len(squared), self.variance))
        return mean(np.ones(len(squared))) - unexplained

    @property
    def mae(self) -> Estimate:
        """Mean absolute error, tokens."""
        return mean(np.array(self.absolute))


def fit_probes(
    model: Decoder,
    documents: Sequence[Int[np.ndarray, "_"]],
    length: int,
    *,
    ridge: float,
    start: int = 0,
    batch_size: int = 8,
    place: ProcessSpec = jax.device_put,
    advance: Callable[[int], object] = lambda tokens: None,
) -> list[Probe]:
    """Fits a probe for the position to every layer's hidden states: [L + 1] of them, the first before layer 0.

    The target is position / length; multiply what a probe returns by `length`.

    Args:
        model: the decoder.
        documents: at least `length` tokens each, of which those before `length` are read.
        length: positions are 0 to length - 1.
        ridge: as `Moments.fit`.
        start: the first position that counts.
        batch_size: documents per call of the model.
        place: puts a tuple of arrays [B, T] on the devices.
        advance: called with the number of tokens just read, to report progress.
    """
    moments = [Moments() for _ in range(model.config.num_layers + 1)]
    target = np.arange(start, length) / length
    for layer, hidden in _hidden_states(model, documents, length, batch_size, place, advance):
        rows, _, width = hidden.shape
        moments[layer].add(hidden[:, start:].reshape(-1, width), np.tile(target, rows))
    return [sums.fit(ridge) for sums in moments]


def score_probes(
    model: Decoder,
    documents: Sequence[Int[np.ndarray, "_"]],
    length: int,
    probes: Sequence[tuple[Sequence[Probe], int]],
    *,
    start: int = 0,
    batch_size: int = 8,
    place: ProcessSpec = jax.device_put,
    advance: Callable[[int], object] = lambda tokens: None,
) -> list[list[Score]]:
    """Scores sets of probes on documents that they have not seen.

    Args:
        model: the decoder.
        documents: as `fit_probes`.
        length: tokens read.
        probes: each set, [L + 1] of them, with the length that it was fitted at.
        start: as `fit_probes`.
        batch_size, place, advance: as `fit_probes`.

    Returns:
        For each set a score per layer.
    """
    scores = [[Score() for _ in fitted] for fitted, _ in probes]
    positions = np.arange(start, length, dtype=np.float64)
    for layer, hidden in _hidden_states(model, documents, length, batch_size, place, advance):
        for (fitted, scale), found in zip(probes, scores, strict=True):
            found[layer].add(fitted[layer](hidden[:, start:]) * scale, positions)
    return scores


def _hidden_states(
    model: Decoder, documents: Sequence[np.ndarray], length: int, batch_size: int, place: ProcessSpec, advance: Callable
) -> Iterator[tuple[int, Float[np.ndarray, "B T D"]]]:
    """The residual stream of every document: (layer, states) for one batch and one layer after the other."""
    for first in range(0, len(documents), batch_size):
        batch = documents[first : first + batch_size]
        padded = [*batch, *[batch[-1]] * (batch_size - len(batch))]  # one shape: compiled once
        tokens = np.stack([document[:length] for document in padded]).astype(np.int32)
        for inside in walk(model, place((tokens,))[0]):
            yield inside.layer, np.asarray(inside.stream[: len(batch)].astype(jnp.float32), np.float64)
        advance(tokens[: len(batch)].size)


@dataclasses.dataclass(frozen=True)
class Row:
    """What one probe scored: a row of probe.csv."""

    run: Subject
    length: int
    layer: int
    probe: str
    """in-window: fitted at the training length; own: fitted at `length`, to the positions that it is tested on."""
    score: Score
    position_start: int
    documents: int

    def cells(self) -> tuple:
        r2, mae, run = self.score.r2, self.score.mae, self.run
        values, errors = (number(float(r2.value)), number(float(mae.value))), (float(r2.stderr), float(mae.stderr))
        what = (run.name, run.encoding, run.train_length, self.length, self.layer, self.probe)
        return (*what, *values, self.position_start, self.length, self.documents, *map(number, errors))


def probe(options: EvalArguments, *, command: str) -> None:
    """Measures where and how far runs represent absolute positions, with a linear probe per layer.

    A causal decoder can recover absolute positions without any encoding, from its first layer on (Kazemnejad et al.
    2023, arXiv 2305.19466, Theorem 1). A ridge regression from the residual stream to the position is fitted on half
    of the documents at the training length ("in-window") and tested on the other half: at that length, and at each of
    the lengths asked for. Beside it stands a probe fitted at the tested length itself ("own"): where only that one
    reads the positions, they are there, but no longer in the form that the model was trained with. At a length past
    the training length only the positions past it count: both are tested on them, and the second is fitted to them.
    Layer 0 is what enters the first layer.

    Writes probe.csv, probe.png and a section of the report, and prints a table. What has been measured is written even
    if the rest fails or is interrupted.

    Args:
        options: the command line: workdirs, lengths, where to write, and settings (`ProbeConfig`).
        command: what the user typed, for the report.

    Raises:
        ValueError: a run, a corpus or a length that cannot be had.
        OSError: the results cannot be written.
    """
    runs, documents = _plan(options)
    out, lengths = options.out, sorted(set(options.lengths))
    out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()
    rows: list[Row] = []
    try:
        _measure_all(runs, documents, lengths, options, rows)
    finally:
        if rows:
            plot(out / "probe.png", rows)
            notes = _notes(runs, lengths, rows)
            add_section(out, "probe", _section(out, rows, notes, command), options.workdirs)
            print_table(
                "Positions read by a linear probe",
                HEADER,
                table_rows(rows),
                *notes,
                f"Written to {out}: see report.html there.",
            )


def _plan(options: EvalArguments) -> tuple[list[Subject], dict[str, dict[int, list[np.ndarray]]]]:
    """Finds out all that can be wrong before anything large is loaded; returns the runs and what each reads."""
    count = options.settings.documents
    if count < 2:
        raise ValueError(f"--probe.documents must be at least 2, half of which are for testing, not {count}")
    runs = find_subjects(options.workdirs, options.overrides)
    lengths = sorted({*options.lengths, *(run.train_length for run in runs)})
    for run in runs:
        if not any(run.takes(length) for length in options.lengths):
            raise ValueError(
                f"--lengths: {run.name} reads none of them, its {run.encoding} encoding has {run.max_length} positions"
            )
    read: dict[tuple, dict[int, list[np.ndarray]]] = {}
    documents = {}
    for run in runs:
        data = run.config.data
        key = data.dir, data.tokenizer, data.bos
        if key not in read:
            corpus = load_corpus(data, "validation")
            reaching = {length: int((corpus.lengths > length).sum()) for length in lengths}
            for length in lengths:
                if reaching[length] < 2:
                    given = "--lengths" if length in options.lengths else "the training length"
                    reached = ", ".join(f"{n}: {number}" for n, number in reaching.items())
                    raise ValueError(
                        f"{given}: a probe needs two validation documents that reach length {length}, which takes "
                        f"{length + 1} tokens; documents that reach {reached}; the longest has "
                        f"{corpus.lengths.max(initial=0)} tokens"
                    )
            # A longer length's documents are the first of a shorter one's, so that the two halves never mix.
            chosen = choose_documents(corpus.lengths, lengths, count, run.config.eval.seed)
            tokens = {int(i): corpus[int(i)][: max(lengths)] for indices in chosen.values() for i in indices}
            read[key] = {n: [tokens[int(i)] for i in indices] for n, indices in chosen.items()}
        documents[run.name] = read[key]
    return runs, documents


def _measure_all(
    runs: Sequence[Subject], documents: dict, lengths: Sequence[int], options: EvalArguments, rows: list[Row]
) -> None:
    """Appends what every run scores to `rows`, and keeps probe.csv up to date with them."""
    mesh = make_mesh(MeshConfig())
    tested = {
        run.name: [run.train_length, *(n for n in lengths if n != run.train_length and run.takes(n))] for run in runs
    }
    with progress_bar() as progress:
        total = sum(length * len(documents[run.name][length]) for run in runs for length in tested[run.name])
        bar = progress.add_task("", total=total)
        for run in runs:
            progress.update(bar, description=f"{run.name}: loading")
            model = load_model(run.workdir, mesh)[1]
            batch_size = -(-run.config.eval.batch_size // mesh.shape["data"]) * mesh.shape["data"]
            keywords = {
                "batch_size": batch_size,
                "place": functools.partial(place_batch, mesh=mesh),
                "advance": functools.partial(progress.advance, bar),
            }
            in_window: list[Probe] = []
            for length in tested[run.name]:
                progress.update(bar, description=f"{run.name} at {length:,}")
                training, testing = documents[run.name][length][::2], documents[run.name][length][1::2]
                start = run.train_length if length > run.train_length else 0
                own = fit_probes(model, training, length, ridge=options.settings.ridge, start=start, **keywords)
                in_window = in_window or own
                sets = {"in-window": (in_window, run.train_length), "own": (own, length)}
                if length == run.train_length:
                    del sets["own"]  # is the same
                scores = score_probes(model, testing, length, list(sets.values()), start=start, **keywords)
                for name, of_layers in zip(sets, scores, strict=True):
                    rows += [
                        Row(run, length, layer, name, score, start, len(testing))
                        for layer, score in enumerate(of_layers)
                    ]
                _write_rows(options.out / "probe.csv", rows)
        progress.update(bar, description="measured")


def _write_rows(path: Path, rows: Iterable[Row]) -> None:
    with replace_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(row.cells() for row in rows)


def _curves(rows: Iterable[Row]) -> dict[tuple[str, int, str], list[Row]]:
    """The rows of each run, length and probe, layer by layer."""
    curves: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        curves.setdefault((row.run.name, row.length, row.probe), []).append(row)
    return curves


def table_rows(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """One row of cells per run, length and probe, under HEADER."""
    cells: list[tuple[str, ...]] = []
    for layers in _curves(rows).values():
        run, r2 = layers[0].run, [row.score.r2 for row in layers]
        best = int(np.argmax(np.nan_to_num([float(one.value) for one in r2], nan=-np.inf)))
        cells.append(
            (
                run.name,
                run.encoding,
                str(run.train_length),
                str(layers[0].length),
                layers[0].probe,
                _number(r2[0]),
                _number(r2[-1]),
                _number(r2[best]),
                str(best),
                plus_minus(f"{layers[best].score.mae.value:.1f}", float(layers[best].score.mae.stderr), 1),
            )
        )
    return cells


def _number(r2: Estimate) -> str:
    value = float(r2.value)
    if np.isnan(value):
        return "-"
    if value > -10:
        return plus_minus(f"{value:.3f}", float(r2.stderr), 3)
    return f"{value:,.0f}" if value > -1e6 else f"{value:.1e}"


def _notes(runs: Sequence[Subject], lengths: Sequence[int], rows: Sequence[Row]) -> list[str]:
    """What a reader of the results must know."""
    refusals = []
    for run in runs:
        if refused := [length for length in lengths if not run.takes(length)]:
            refusals.append(
                f"{run.name} cannot read {', '.join(f'{n:,}' for n in refused)} tokens: its {run.encoding} encoding "
                f"has {run.max_length:,} positions."
            )
    counts = sorted({row.documents for row in rows})
    fewest = f"{counts[0]} to " * (len(counts) > 1)
    return [
        *refusals,
        "Probe: a ridge regression from the residual stream to the position in tokens. in-window: fitted at the "
        "training length; own: fitted at the length that it is tested at. Layer 0 is what enters the first layer.",
        f"Tested on {fewest}{plural(counts[-1], 'validation document')} of {runs[0].config.data.source} that the "
        "probes have not seen. At a length past the training length only the positions past it count, also for fitting "
        "its own probe.",
        "R²: 1 is exact, 0 no better than the mean position, below 0 worse than it. ±: standard error over the "
        "documents tested, of the probe as it was fitted"
        + (", of which one alone has none." if counts[0] == 1 else "."),
    ]


def plot(path: Path, rows: Sequence[Row]) -> None:
    """Draws R² by layer, a panel per run: in-window solid; past it dashed, or dotted for a length's own probe."""
    curves = _curves(rows)
    runs = list({row.run.name: row.run for row in rows}.values())
    lengths = sorted({row.length for row in rows})
    columns = math.ceil(math.sqrt(len(runs)))
    lines = -(-len(runs) // columns)
    size = (2.6 + 2.6 * columns, 1.2 + 2.6 * lines)
    drawing = Figure(figsize=size, dpi=160, layout="constrained")
    FigureCanvasAgg(drawing)
    panels = drawing.subplots(lines, columns, sharey=True, squeeze=False)
    colours = {n: colormaps["viridis"](0.85 * i / max(1, len(lengths) - 1)) for i, n in enumerate(lengths)}
    named: dict[tuple[int, str], tuple[Line2D, str]] = {}
    for axes, run in zip(panels.flat, runs, strict=False):
        for (name, length, kind), layers in curves.items():
            if name != run.name:
                continue
            past = length > run.train_length
            style = ":" if kind == "own" else "--" if past else "-"
            estimates = [row.score.r2 for row in layers]
            r2, errors = (np.array([float(getattr(one, name)) for one in estimates]) for name in ("value", "stderr"))
            r2, shown = np.maximum(r2, _FLOOR), np.where(r2 > _FLOOR, errors, np.nan)
            label = f"{length:,}, own probe" if kind == "own" else f"{length:,}"
            (line,) = axes.plot(
                range(len(r2)), r2, style, color=colours[length], linewidth=1.6, marker="o", markersize=3, clip_on=False
            )
            axes.vlines(range(len(r2)), r2 - shown, r2 + shown, color=colours[length], linewidth=1.2)
            named.setdefault((length, kind), (line, label))
        axes.axhline(0, color=QUIET, linewidth=0.8)
        axes.set_title(f"{run.name}, trained at {run.train_length:,}", fontsize=10, color=INK)
        axes.set_ylim(_FLOOR, 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e4e4e4", linewidth=0.7)
    for axes in panels.flat[len(runs) :]:
        axes.set_visible(False)
    drawing.supylabel("R² of the position", fontsize=10)
    drawing.supxlabel(
        f"Layers passed. Solid: within the training length; dashed: past it; dotted: the length's own probe. "
        f"R² below {_FLOOR:g} is drawn there.\nBars: one standard error over the documents tested.",
        fontsize=8,
        color=QUIET,
    )
    handles, labels = zip(*(named[key] for key in sorted(named)), strict=True)
    drawing.legend(
        handles, labels, loc="outside right upper", title="length", frameon=False, fontsize=8, handlelength=4
    )
    with replace_file(path) as temporary:
        drawing.savefig(temporary, format="png", facecolor="white")


_FLOOR = -0.5
"""The lowest R² of the figure: further down a probe is wrong, and how wrong is in the table."""


def _section(out: Path, rows: Sequence[Row], notes: Sequence[str], command: str) -> str:
    say = (
        "How well a linear probe reads a token's position out of the residual stream, layer by layer. A causal decoder "
        "can recover it without any encoding (Kazemnejad et al. 2023, Theorem 1)."
    )
    quiet = "".join(paragraph(note, quiet=True) for note in notes)
    picture = figure(out / "probe.png", "R² of a linear probe for the position by layer, for every run and length")
    numbers = download(out / "probe.csv", "one row per run, length, layer and probe; mae in tokens.")
    return f"""<h2>Positions in the hidden states</h2>
{paragraph(say)}
{table_of(HEADER, table_rows(rows))}
{quiet}
{picture}
{numbers}
{command_line(command)}
"""
