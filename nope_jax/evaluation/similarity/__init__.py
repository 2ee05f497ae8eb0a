"""Similarity of the attention of two runs, and the attention distance of their heads (`eval.py similarity`).

Runs that were trained on a task are compared on its examples instead, by length: see `examples`.

Shapes: T length (queries and keys), L layers, N heads of the first run, M heads of the second. Distances in nats.
Layers and heads are numbered from 0.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from nope_jax.data import describe
from nope_jax.data.tokenizers import tokenizer_digest
from nope_jax.evaluation.common import plots
from nope_jax.evaluation.common.activations import walk
from nope_jax.evaluation.common.console import Bar, plural
from nope_jax.evaluation.common.documents import VALIDATION, choose_documents, load_same_corpus
from nope_jax.evaluation.common.evaluation import Evaluation
from nope_jax.evaluation.common.files import Csv
from nope_jax.evaluation.common.placement import place, refuse_mesh
from nope_jax.evaluation.common.plots import COLOURS, INK, QUIET
from nope_jax.evaluation.common.report import Section, Table
from nope_jax.evaluation.common.runs import Run, find_runs, refuse_differing, refuse_length
from nope_jax.evaluation.common.uncertainty import Estimate, mean, plus_minus
from nope_jax.evaluation.registry import Options
from nope_jax.evaluation.similarity.distances import head_distances, weight_by_distance
from nope_jax.evaluation.similarity.examples import ExampleSimilarity, plan_examples
from nope_jax.models import Decoder
from nope_jax.sharding import to_host

COLUMNS = "layer distance head_a head_b distance_stderr mean_distance mean_distance_stderr documents"
"""Columns of similarity.csv, one row per layer of both runs; distances in nats, means over queries and documents.

`distance` is the distance of the two closest heads, `mean_distance` the mean over all pairs of heads. A column
`..._stderr` is the standard error of the column it names, over documents (`nope_jax.evaluation.common.uncertainty`);
empty for a single document. The closest heads are selected on the same documents; their distance on others is somewhat
larger."""
HEADER = ("layer", "closest heads", "distance", "of ln 2", "mean of all pairs")


_distances = jax.jit(jax.vmap(head_distances))
"""`head_distances` of each row."""
_weights_by_distance = jax.jit(jax.vmap(weight_by_distance))
"""`weight_by_distance` of each row."""


def distance_bands(length: int) -> Int[np.ndarray, "edges"]:
    """Edges of the distance bands 0, 1, 2-3, 4-7, ..., the last one clipped to `length`."""
    edges = [0, 1]
    while edges[-1] < length:
        edges.append(min(2 * edges[-1], length))
    return np.array(edges)


def share_by_band(weight: Float[np.ndarray, "... T"]) -> Float[np.ndarray, "... bands"]:
    """Share of the total weight in each of `distance_bands`, from the mean weight by distance.

    Each distance is weighted by the number of queries that have it, so the shares sum to 1, or to less with
    an attention sink.
    """
    length = weight.shape[-1]
    share = weight * (length - np.arange(length)) / length
    return np.add.reduceat(share, distance_bands(length)[:-1], axis=-1)


def plan(options: Options) -> "Similarity | ExampleSimilarity":
    """Plans a comparison of two runs, layer by layer, on the same documents (Kazemnejad et al. 2023, Figure 4).

    If they were trained on a task, it is on examples of it, and of the first run with any number of others.

    Raises:
        ValueError: there are not exactly two runs, the runs cannot be compared, or no document reaches the length or an
            encoding does not support it.
    """
    runs = find_runs(options, (*VALIDATION, "eval.seed"))
    on_task = str(runs[0].config.data.source).startswith("task:")
    if len(runs) != 2 and not (on_task and len(runs) > 2):
        raise ValueError(f"--workdirs must be the two runs to compare, not {len(runs)}")
    why = ": only runs that read the same tokens can be compared"
    refuse_differing(runs, ["data.tokenizer"], why, tokenizer_digest)
    refuse_differing(runs, ["data.bos", "data.separator_token", "model.vocab_size"], why)
    if on_task:
        return plan_examples(runs, options.settings)
    a, b = runs
    length = options.settings.length or min(a.train_length, b.train_length)
    refuse_length(runs, length, "--similarity.length")
    refuse_mesh(a.mesh, [], [length], "--similarity.length")
    corpus = load_same_corpus(a.config.data, "validation")
    count, seed = options.settings.documents, a.config.eval.seed
    chosen = choose_documents(corpus.lengths, [length], count, seed, option="--similarity.length")
    return Similarity(runs, length, [corpus[int(index)][:length] for index in chosen[length]])


@dataclasses.dataclass
class Similarity(Evaluation):
    """Attention of two runs on the documents read so far."""

    runs: Sequence[Run[Any]]
    length: int
    to_read: list[Int[np.ndarray, "T"]] = dataclasses.field(default_factory=list)
    of_documents: list[Float[np.ndarray, "L N M"]] = dataclasses.field(default_factory=list)
    """Distances on each document, for the layers that both runs have."""
    weight_sums: tuple[Float[np.ndarray, "L N T"] | float, ...] = (0.0, 0.0)
    """Sum over documents of the mean weight by distance, for each run."""

    def add(self, models: Sequence[Decoder], documents: Int[Array | np.ndarray, "B T"], count: int) -> None:
        """Reads a batch of documents, of which the first `count` count.

        It holds the weights of only one layer per run at a time.
        """
        distances: list[np.ndarray] = []
        by_distance: tuple[list[np.ndarray], ...] = ([], [])
        walks = [walk(model, documents, weights=True) for model in models]
        for layer in itertools.zip_longest(*walks):
            weights = [None if one is None else one.weights for one in layer]
            for means, one in zip(by_distance, weights, strict=True):
                if one is not None:
                    means.append(to_host(_weights_by_distance(one))[:count].astype(np.float64))
            if weights[0] is not None and weights[1] is not None:
                distances.append(to_host(_distances(weights[0], weights[1]))[:count].astype(np.float64))
        of_documents = np.stack(distances, axis=1)
        weight_sums = tuple(
            before + np.stack(now, axis=1).sum(0) for before, now in zip(self.weight_sums, by_distance, strict=True)
        )
        # Assigned together, since the results so far are written when this is interrupted.
        self.of_documents, self.weight_sums = [*self.of_documents, *of_documents], weight_sums

    @property
    def documents(self) -> int:
        """Number of documents read."""
        return len(self.of_documents)

    @property
    def distances(self) -> Estimate:
        """Distances [L, N, M], means over documents."""
        return mean(np.stack(self.of_documents))

    @property
    def mean_distances(self) -> Estimate:
        """Distances [L], means over documents and all pairs of heads."""
        return mean(np.stack(self.of_documents).mean((2, 3)))

    @property
    def weights(self) -> tuple[Float[np.ndarray, "L N T"], ...]:
        """Mean weight by distance of each run, over documents."""
        return tuple(np.asarray(total / self.documents) for total in self.weight_sums)

    def closest(self) -> list[tuple[float, float, int, int]]:
        """For each layer, the smallest distance of two heads, its standard error, and the two heads."""
        found = []
        distances = self.distances
        for layer, error in zip(distances.value, distances.stderr, strict=True):
            a, b = divmod(int(layer.argmin()), layer.shape[1])
            found.append((float(layer[a, b]), float(error[a, b]), a, b))
        return found

    def notes(self) -> list[str]:
        """Notes below the table."""
        (a, b), layers = self.runs, [weights.shape[0] for weights in self.weights]
        notes = [
            f"Read: the first {self.length:,} tokens of {plural(self.documents, 'validation document')} of "
            f"{describe(a.config.data, 'validation')}.",
            f"Closest heads: the pair (head of {a.name}, head of {b.name}) of the same layer whose attention differs "
            "least. Distance: Jensen-Shannon divergence of the attention rows in nats, mean over queries and "
            "documents; 0: identical weights, ln 2 = 0.693: no overlap. "
            + ("±: standard error over documents." if self.documents > 1 else "One document has no standard error."),
            "The closest heads were selected on the same documents; on others their distance is somewhat larger.",
        ]
        if layers[0] != layers[1]:
            notes.append(
                f"{a.name} has {layers[0]} layers and {b.name} {layers[1]}: the first {min(layers)} are compared."
            )
        return notes

    def rows(self) -> list[tuple[str, ...]]:
        """Table cells under HEADER, one row per layer."""
        pairs = self.mean_distances
        return [
            (
                str(layer),
                f"{a}, {b}",
                plus_minus(f"{distance:.4f}", error, 4),
                f"{distance / math.log(2):.0%}",
                plus_minus(f"{pairs.value[layer]:.4f}", float(pairs.stderr[layer]), 4),
            )
            for layer, (distance, error, a, b) in enumerate(self.closest())
        ]

    def measure(self, out: Path, bar: Bar) -> Iterator[None]:
        bar.total(len(self.to_read))
        configs, a_device_each = [run.config.model for run in self.runs], min(len(self.to_read), jax.device_count())
        mesh, size = placement = place(configs, a_device_each, self.length, self.runs[0].mesh)
        models = []
        for run in self.runs:
            bar.describe(f"{run.name}: loading")
            models.append(run.load(mesh))
        for first in range(0, len(self.to_read), size):
            bar.describe("documents", f"{first + 1} of {len(self.to_read)}")
            batch = self.to_read[first : first + size]
            rows = np.stack([*batch, *batch[-1:] * (size - len(batch))])
            with jax.set_mesh(mesh):
                self.add(models, placement.put(rows), len(batch))
            bar.advance(len(batch))
            yield

    def numbers(self) -> Mapping[str, Csv | Mapping[str, Any]]:
        """similarity.csv, and similarity.npz: `distances` [L, N, M] of all pairs of heads, their `distances_stderr`,
        and `<run>/weight_by_distance` [L, N, T]."""
        distances, pairs = self.distances, self.mean_distances
        rows = [
            (layer, distance, a, b, error, float(pairs.value[layer]), float(pairs.stderr[layer]), self.documents)
            for layer, (distance, error, a, b) in enumerate(self.closest())
        ]
        arrays = {"distances": distances.value, "distances_stderr": distances.stderr}
        for run, weights in zip(self.runs, self.weights, strict=True):
            arrays[f"{run.name}/weight_by_distance"] = weights
        singles = {name: array.astype(np.float32) for name, array in arrays.items()}
        return {"similarity.csv": Csv(COLUMNS, rows), "similarity.npz": singles}

    def figures(self) -> Iterator[tuple[str, Figure]]:
        yield "similarity.png", draw(self)

    def sections(self) -> list[Section]:
        a, b = (run.name for run in self.runs)
        section = Section(
            "Attention of two runs",
            f"Similarity of the attention of {a} and {b} by layer (Kazemnejad et al. 2023, Figure 4), and the "
            "attention distance of their heads.",
            Table(f"Attention of {a} and {b}", HEADER, self.rows()),
            self.notes(),
            figures={
                "similarity.png": f"Distance of the attention of {a} and {b} by layer, and the reach of their heads"
            },
            files={
                "similarity.csv": "the two closest heads of each layer; distances in nats.",
                "similarity.npz": "all pairs of heads, and the mean weight of every head by distance in tokens.",
            },
        )
        return [section]


def draw(comparison: Similarity) -> Figure:
    """Draws the distance by layer with its ceiling, and for both runs the weight of every head by distance."""
    drawing = plots.new_figure(7.5, 8)
    grid = drawing.add_gridspec(2, 2, height_ratios=(2, 3))
    axes = drawing.add_subplot(grid[0, :])
    distances, errors, _, _ = np.transpose(comparison.closest())
    layers = np.arange(len(distances))
    means = comparison.mean_distances
    axes.axhline(math.log(2), color=QUIET, linestyle=(0, (4, 3)), linewidth=1)
    axes.text(layers[-1], math.log(2) - 0.01, "ceiling: ln 2", ha="right", va="top", color=QUIET, fontsize=9)
    pairs, closest = (means.value, means.stderr, "s--", QUIET), (distances, errors, "o-", COLOURS[0])
    for name, (values, error, marker, colour) in {"mean of all pairs": pairs, "closest heads": closest}.items():
        error = np.nan_to_num(error)
        axes.errorbar(layers, values, error, fmt=marker, color=colour, markersize=5, capsize=3, label=name)
    axes.set_ylim(0, 1.05 * math.log(2))
    plots.finish(axes, "Layer", "Distance of attention (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"Attention of {comparison.runs[0].name} and {comparison.runs[1].name}", fontsize=11, color=INK)
    axes.legend(frameon=False, fontsize=9)
    maps = [drawing.add_subplot(grid[1, i]) for i in range(2)]
    brightest = max(share_by_band(weights).max() for weights in comparison.weights)
    images = [
        _draw_bands(axes, run.name, weights, brightest)
        for axes, run, weights in zip(maps, comparison.runs, comparison.weights, strict=True)
    ]
    drawing.colorbar(images[0], ax=maps, label="Share of the head's weight", shrink=0.7)
    plots.note(
        drawing,
        f"{plural(comparison.documents, 'validation document')}, {comparison.length:,} tokens each."
        + " Bars: one standard error over documents." * (comparison.documents > 1),
    )
    return drawing


def _draw_bands(axes: Axes, name: str, weights: Float[np.ndarray, "L N T"], brightest: float) -> AxesImage:
    """Draws a map of heads (down, layer by layer) by distance bands (across)."""
    layers, heads, length = weights.shape
    share = share_by_band(weights).reshape(layers * heads, -1)
    image = plots.draw_map(axes, share, 0, brightest, name)
    bands = [(int(start), int(end) - 1) for start, end in itertools.pairwise(distance_bands(length))]
    names = [str(start) if start == end else f"{start}-{end}" for start, end in bands]
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    shown = range(0, layers, -(-layers // 16))
    axes.set_yticks([heads * layer + (heads - 1) / 2 for layer in shown], [str(layer) for layer in shown])
    for layer in range(1, layers):
        axes.axhline(heads * layer - 0.5, color="white", linewidth=1)
    axes.set_xlabel("Distance (tokens)")
    axes.set_ylabel("Layer, and the heads in it")
    return image
