"""Linear probes: how well absolute positions can be decoded from hidden states (`eval.py probe`).

Shapes: B batch, T length, D model width, L layers; S samples, one per token. Everything on the host is float64.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from nope_jax.data import describe
from nope_jax.evaluation.common import plots
from nope_jax.evaluation.common.activations import walk
from nope_jax.evaluation.common.console import Bar, plural
from nope_jax.evaluation.common.documents import VALIDATION, choose_documents, corpus_key, load_same_corpus
from nope_jax.evaluation.common.evaluation import Evaluation
from nope_jax.evaluation.common.files import Csv
from nope_jax.evaluation.common.plots import INK, QUIET
from nope_jax.evaluation.common.report import Section, Table
from nope_jax.evaluation.common.runs import Run, cannot_read, find_runs
from nope_jax.evaluation.common.uncertainty import Estimate, mean, plus_minus, ratio
from nope_jax.evaluation.registry import Options, ProbeConfig
from nope_jax.models import Decoder
from nope_jax.sharding import to_host

COLUMNS = (
    "run encoding train_length length layer probe r2 mae position_start position_end documents r2_stderr mae_stderr"
)
"""Columns of probe.csv, one row per run, length, layer and probe. Positions and `mae`, the mean absolute error, are in
tokens.

A column `..._stderr` is the standard error of the column it names, over the test documents and for the fitted probe
(`nope_jax.evaluation.common.uncertainty`); empty for a single test document. `r2` is empty for a single position."""
_WHAT = ("run", "encoding", "trained at", "length", "probe")
HEADER = (*_WHAT, "R²: layer 0", "last", "best", "at layer", "tokens off there")

Place = Callable[[tuple], tuple]


@dataclasses.dataclass(frozen=True)
class Probe:
    """A linear function of hidden states."""

    weights: Float[np.ndarray, "D"]
    bias: float

    def __call__(self, x: Float[np.ndarray, "*S D"]) -> Float[np.ndarray, "*S"]:
        return np.asarray(x, np.float64) @ self.weights + self.bias


class Moments:
    """Sums over samples that suffice for ridge regression, so that the samples need not be stored."""

    def __init__(self) -> None:
        self.count = 0
        self.x: np.ndarray | float = 0.0
        self.xx: np.ndarray | float = 0.0
        self.y = 0.0
        self.xy: np.ndarray | float = 0.0
        self._origin: np.ndarray | None = None

    def add(self, x: Float[np.ndarray, "S D"], y: Float[np.ndarray, "S"]) -> None:
        """Adds samples, given as features and targets."""
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        if self._origin is None:  # centred sums, so that the variance does not suffer from cancellation
            self._origin = x.mean(0)
        x = x - self._origin
        self.count += len(x)
        self.x = self.x + x.sum(0)
        self.xx = self.xx + x.T @ x
        self.y += float(y.sum())
        self.xy = self.xy + x.T @ y

    def fit(self, ridge: float) -> Probe:
        """Fits the probe that minimizes mean squared error + ridge · |w|², w its weights for unit-variance features.

        Constant features get weight 0.

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
    """Errors of a probe in tokens, accumulated document by document."""

    squared: list[float] = dataclasses.field(default_factory=list)
    """Mean squared error of each document."""
    absolute: list[float] = dataclasses.field(default_factory=list)
    """Mean absolute error of each document."""
    variance: float = 0.0
    """Variance of the positions, which are the same in every document."""

    def add(self, predicted: Float[np.ndarray, "B T"], positions: Float[np.ndarray, "T"]) -> None:
        error = predicted - positions
        self.squared += (error**2).mean(-1).tolist()
        self.absolute += np.abs(error).mean(-1).tolist()
        self.variance = float(positions.var())

    @property
    def r2(self) -> Estimate:
        """1 - (mean squared error) / (variance of the positions): 1 is exact, 0 no better than their mean.

        NaN for a single position.
        """
        squared = np.array(self.squared)
        unexplained = ratio(squared, np.full(len(squared), self.variance))
        return mean(np.ones(len(squared))) - unexplained

    @property
    def mae(self) -> Estimate:
        """Mean absolute error in tokens."""
        return mean(np.array(self.absolute))


def fit_probes(
    model: Decoder,
    documents: Sequence[Int[np.ndarray, "_"]],
    length: int,
    *,
    ridge: float,
    start: int = 0,
    batch_size: int = 8,
    place: Place = jax.device_put,
    advance: Callable[[int], object] = lambda tokens: None,
) -> list[Probe]:
    """Fits [L + 1] position probes: one to the input of the first layer, and one to the output of each layer.

    The target is position / length; multiply the output of a probe by `length`.

    Args:
        model: the decoder.
        documents: at least `length` tokens each, of which the first `length` are read.
        length: positions are 0 to length - 1.
        ridge: as `Moments.fit`.
        start: the first position used.
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
    place: Place = jax.device_put,
    advance: Callable[[int], object] = lambda tokens: None,
) -> list[list[Score]]:
    """Scores sets of probes on held-out documents.

    Args:
        model: the decoder.
        documents: as `fit_probes`.
        length: tokens read per document.
        probes: sets of [L + 1] probes, each with the length it was fitted at.
        start: as `fit_probes`.
        batch_size, place, advance: as `fit_probes`.

    Returns:
        For each set, one score per layer.
    """
    scores = [[Score() for _ in fitted] for fitted, _ in probes]
    positions = np.arange(start, length, dtype=np.float64)
    for layer, hidden in _hidden_states(model, documents, length, batch_size, place, advance):
        for (fitted, scale), found in zip(probes, scores, strict=True):
            found[layer].add(fitted[layer](hidden[:, start:]) * scale, positions)
    return scores


def _hidden_states(
    model: Decoder, documents: Sequence[np.ndarray], length: int, batch_size: int, place: Place, advance: Callable
) -> Iterator[tuple[int, Float[np.ndarray, "B T D"]]]:
    """Yields the residual stream as (layer, states), batch by batch and layer by layer."""
    for first in range(0, len(documents), batch_size):
        batch = documents[first : first + batch_size]
        padded = [*batch, *[batch[-1]] * (batch_size - len(batch))]  # constant shape: one compilation
        tokens = np.stack([document[:length] for document in padded]).astype(np.int32)
        for step in walk(model, place((tokens,))[0]):
            yield step.layer, to_host(step.stream).astype(np.float64)[: len(batch)]
        advance(tokens[: len(batch)].size)


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of one probe on a run: one row of the table, and one row of probe.csv per layer."""

    length: int
    probe: str
    """in-window: fitted at the training length; own: fitted at `length`, on the positions it is tested on."""
    layers: list[Score]
    position_start: int
    documents: int


def plan(options: Options) -> "PositionProbe":
    """Plans linear probes that measure in which layers, and up to which lengths, runs represent absolute positions.

    A causal decoder can recover absolute positions without any encoding, from its first layer on (Kazemnejad et al.
    2023, arXiv 2305.19466, Theorem 1). For each layer, a ridge regression from the residual stream to the position is
    fitted on half of the documents at the training length ("in-window"), and tested on the other half at that length
    and at each requested length. A second probe ("own") is fitted at the tested length itself: if only this one decodes
    the positions, the hidden states still encode them, but no longer in the form of the training length. At a length
    past the training length only the positions past it are used: to test both probes, and to fit the second. Layer 0 is
    the input of the first layer.

    Raises:
        ValueError: a run, a corpus or a length is invalid.
    """
    count = options.settings.documents
    if count < 2:
        raise ValueError(f"--probe.documents must be at least 2, half of which are for testing, not {count}")
    runs = find_runs(options, (*VALIDATION, "eval.seed"))
    lengths = sorted({*options.lengths, *(run.train_length for run in runs)})
    read: dict[tuple, dict[int, list[np.ndarray]]] = {}
    for run in runs:
        if (key := corpus_key(run.config)) in read:
            continue
        corpus = load_same_corpus(run.config.data, "validation")
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
        # The documents of a longer length are the first of those of a shorter one, so that the two halves never mix.
        chosen = choose_documents(corpus.lengths, lengths, count, run.config.eval.seed)
        tokens = {int(i): corpus[int(i)][: max(lengths)] for indices in chosen.values() for i in indices}
        read[key] = {n: [tokens[int(i)] for i in indices] for n, indices in chosen.items()}
    return PositionProbe(runs, [read[corpus_key(run.config)] for run in runs], options.settings)


@dataclasses.dataclass
class PositionProbe(Evaluation):
    """Position probes; `Run.results` holds the scores of each run by length, the training length first."""

    runs: Sequence[Run[list[Scores]]]
    documents: Sequence[Mapping[int, Sequence[np.ndarray]]]
    """The documents that each run reads, by length."""
    settings: ProbeConfig

    def measure(self, out: Path, bar: Bar) -> Iterator[None]:
        tested = [[run.train_length, *(n for n in run.possible if n != run.train_length)] for run in self.runs]
        of_runs = list(zip(self.runs, self.documents, tested, strict=True))
        bar.total(sum(length * len(read[length]) for _, read, lengths in of_runs for length in lengths))
        for run, read, lengths in of_runs:
            bar.describe(f"{run.name}: loading")
            placement = run.place(run.config.eval.batch_size, math.gcd(*lengths))
            model = run.load(placement.mesh)
            common: dict[str, Any] = {"batch_size": placement.rows, "place": placement.put, "advance": bar.advance}
            in_window: list[Probe] = []
            for length in lengths:
                bar.describe(f"{run.name} at {length:,}")
                training, testing = read[length][::2], read[length][1::2]
                start = run.train_length if length > run.train_length else 0
                with jax.set_mesh(placement.mesh):
                    own = fit_probes(model, training, length, ridge=self.settings.ridge, start=start, **common)
                    in_window = in_window or own
                    sets = {"in-window": (in_window, run.train_length), "own": (own, length)}
                    if length == run.train_length:
                        del sets["own"]  # identical to in-window
                    scores = score_probes(model, testing, length, list(sets.values()), start=start, **common)
                run.results[length] = [
                    Scores(length, name, layers, start, len(testing)) for name, layers in zip(sets, scores, strict=True)
                ]
                yield

    @property
    def scores(self) -> list[tuple[Run, Scores]]:
        """All scores so far, in order."""
        return [(run, one) for run in self.runs for of_length in run.results.values() for one in of_length]

    def numbers(self) -> Mapping[str, Csv]:
        return {"probe.csv": Csv(COLUMNS, self._csv_rows())}

    def _csv_rows(self) -> Iterator[tuple]:
        for run, one in self.scores:
            for layer, score in enumerate(one.layers):
                r2, mae = score.r2, score.mae
                what = (run.name, run.encoding, run.train_length, one.length, layer, one.probe)
                errors = (float(r2.stderr), float(mae.stderr))
                yield (*what, float(r2.value), float(mae.value), one.position_start, one.length, one.documents, *errors)

    def figures(self) -> Iterator[tuple[str, Figure]]:
        yield "probe.png", draw(self.scores)

    def sections(self) -> list[Section]:
        section = Section(
            "Positions in the hidden states",
            "How well a linear probe decodes a token's position from the residual stream, layer by layer. A causal "
            "decoder can recover it without any encoding (Kazemnejad et al. 2023, Theorem 1).",
            Table("Positions decoded by a linear probe", HEADER, table_rows(self.scores)),
            self.notes(),
            figures={"probe.png": "R² of a linear probe for the position by layer, for every run and length"},
            files={"probe.csv": "one row per run, length, layer and probe; mae in tokens."},
        )
        return [section]

    def notes(self) -> list[str]:
        """Notes below the table."""
        counts = sorted({one.documents for _, one in self.scores})
        fewest = f"{counts[0]} to " * (len(counts) > 1)
        source = describe(self.runs[0].config.data, "validation")
        return [
            *cannot_read(self.runs),
            "Probe: a ridge regression from the residual stream to the position in tokens. in-window: fitted at the "
            "training length; own: fitted at the tested length. Layer 0 is the input of the first layer.",
            f"Tested on {fewest}{plural(counts[-1], 'validation document')} of {source} that "
            "the probes were not fitted on. At a length past the training length, only the positions past it are used, "
            "also to fit its own probe.",
            "R²: 1 is exact, 0 no better than the mean position, below 0 worse. ±: standard error over the test "
            "documents, for the fitted probe" + ("; a single document has none." if counts[0] == 1 else "."),
        ]


def table_rows(scores: Iterable[tuple[Run, Scores]]) -> list[tuple[str, ...]]:
    """Table cells under HEADER, one row per run, length and probe."""
    cells: list[tuple[str, ...]] = []
    for run, one in scores:
        r2 = [score.r2 for score in one.layers]
        best = int(np.argmax(np.nan_to_num([float(layer.value) for layer in r2], nan=-np.inf)))
        mae = one.layers[best].mae
        what = (run.name, run.short_encoding, str(run.train_length), str(one.length), one.probe)
        error = plus_minus(f"{mae.value:.1f}", float(mae.stderr), 1)
        cells.append((*what, *map(_number, (r2[0], r2[-1], r2[best])), str(best), error))
    return cells


def _number(r2: Estimate) -> str:
    value = float(r2.value)
    if np.isnan(value):
        return "-"
    if value > -10:
        return plus_minus(f"{value:.3f}", float(r2.stderr), 3)
    return f"{value:,.0f}" if value > -1e6 else f"{value:.1e}"


def draw(scores: Sequence[tuple[Run, Scores]]) -> Figure:
    """Draws R² by layer, one panel per run: solid within the training length, dashed past it, dotted for own probes."""
    runs = list({run.name: run for run, _ in scores}.values())
    lengths = sorted({one.length for _, one in scores})
    columns = math.ceil(math.sqrt(len(runs)))
    lines = -(-len(runs) // columns)
    drawing = plots.new_figure(2.6 + 2.6 * columns, 1.2 + 2.6 * lines)
    panels = plots.panels(drawing, len(runs), columns, sharey=True)
    colours = {n: colormaps["viridis"](0.85 * i / max(1, len(lengths) - 1)) for i, n in enumerate(lengths)}
    named: dict[tuple[int, str], tuple[Line2D, str]] = {}
    for axes, run in zip(panels, runs, strict=True):
        for one in (one for other, one in scores if other is run):
            past = one.length > run.train_length
            style = ":" if one.probe == "own" else "--" if past else "-"
            estimates = [score.r2 for score in one.layers]
            r2, errors = (np.array([float(getattr(r2, name)) for r2 in estimates]) for name in ("value", "stderr"))
            r2, shown = np.maximum(r2, _FLOOR), np.where(r2 > _FLOOR, errors, np.nan)
            label = f"{one.length:,}, own probe" if one.probe == "own" else f"{one.length:,}"
            colour = colours[one.length]
            (line,) = axes.plot(
                range(len(r2)), r2, style, color=colour, linewidth=1.6, marker="o", markersize=3, clip_on=False
            )
            axes.vlines(range(len(r2)), r2 - shown, r2 + shown, color=colour, linewidth=1.2)
            named.setdefault((one.length, one.probe), (line, label))
        axes.axhline(0, color=QUIET, linewidth=0.8)
        axes.set_title(f"{run.name}, trained at {run.train_length:,}", fontsize=10, color=INK)
        axes.set_ylim(_FLOOR, 1)
        axes.set_xlabel("layers applied", fontsize=8, color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        plots.finish(axes)
    drawing.supylabel("R² of the position", fontsize=10)
    plots.note(
        drawing,
        "Solid: within the training length; dashed: past it;\ndotted: the length's own probe. "
        f"R² below {_FLOOR:g} is drawn at {_FLOOR:g}.\nBars: one standard error over the test documents.",
    )
    handles, labels = zip(*(named[key] for key in sorted(named)), strict=True)
    drawing.legend(
        handles, labels, loc="outside right upper", title="length", frameon=False, fontsize=8, handlelength=4
    )
    return drawing


_FLOOR = -0.5
"""Lowest R² of the figure; the table has lower values."""
