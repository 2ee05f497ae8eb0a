"""Similarity of the attention of a run and others on examples of the task that they were trained on, by length.

This is Figure 4 of Kazemnejad et al. 2023 (arXiv 2305.19466), which compares NoPE with other encodings on SCAN: the
models read whole examples, source and target. The distance of two layers is that of their two closest heads, for each
example.

Shapes: E examples, L layers that all runs have, T length.
"""

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nope_jax.config import DataConfig
from nope_jax.data import load_tokenizer
from nope_jax.data.tasks import encode, find_task, scratchpad
from nope_jax.evaluation.common import plots
from nope_jax.evaluation.common.activations import walk
from nope_jax.evaluation.common.console import Bar, plural
from nope_jax.evaluation.common.evaluation import Evaluation
from nope_jax.evaluation.common.files import Csv
from nope_jax.evaluation.common.placement import Placement, place
from nope_jax.evaluation.common.plots import QUIET
from nope_jax.evaluation.common.report import Section, Table
from nope_jax.evaluation.common.runs import Run, refuse_differing
from nope_jax.evaluation.common.uncertainty import Estimate, mean, plus_minus
from nope_jax.evaluation.registry import SimilarityConfig
from nope_jax.evaluation.similarity.distances import head_distances
from nope_jax.models import Decoder
from nope_jax.sharding import to_host

COLUMNS = "run encoding other other_encoding task length distribution layer examples distance distance_stderr"
"""Columns of similarity.csv, one row per other run, length of the task and layer: the distance of the closest heads in
nats, mean over examples, with its standard error. `distribution` is `in` for lengths of training, else `out`."""
ROOM = 32
"""Examples are padded to a multiple of this many tokens, for the same reason as `ExampleSimilarity.documents`."""


@dataclasses.dataclass
class Distances:
    """Distances of the closest heads of a run and the first one, on the examples of one length."""

    closest: Float[np.ndarray, "E L"]


def plan_examples(runs: Sequence[Run[Distances]], settings: SimilarityConfig) -> "ExampleSimilarity":
    """Plans a comparison of the first run with the others, on `settings.documents` examples of each length.

    Raises:
        ValueError: the runs write the task differently, it has no answers, or some run can read none of its examples.
    """
    data = runs[0].config.data
    if settings.length is not None:
        raise ValueError(
            f"--similarity.length has no meaning for data.source {data.source}: its examples are read whole"
        )
    refuse_differing(runs, ["data.scratchpad", "data.lengths"], ": only runs of one task can be compared")
    texts = read_examples(data, runs[0].config.eval.seed, settings.documents)
    longest = {length: max(map(len, rows)) for length, rows in texts.items()}
    possible = {n: rows for n, rows in texts.items() if all(run.takes(longest[n]) for run in runs)}
    if not possible:
        raise ValueError(f"--workdirs: not all runs can read {min(longest.values())} tokens of {data.source}")
    task = find_task(data.sources[0].removeprefix("task:"))
    trained = range(data.lengths[0], data.lengths[1] + 1) if data.lengths else task.train_lengths
    too_long = sorted(texts.keys() - possible.keys())
    return ExampleSimilarity(runs, possible, settings.documents, frozenset(trained), too_long)


def read_examples(data: DataConfig, seed: int, count: int) -> dict[int, list[Int[np.ndarray, "_"]]]:
    """Up to `count` different examples held out of training, as tokens, for each length of training and of the test.

    Raises:
        ValueError: the task has no answers of its own, or the tokenizer lacks a word.
    """
    task, tokenizer = (
        find_task(data.sources[0].removeprefix("task:")),
        load_tokenizer(data.tokenizer, data.separator_token),
    )
    if not task.answer_only:
        raise ValueError(f"data.source {data.source} has no answers of its own to compare runs on")
    given = range(data.lengths[0], data.lengths[1] + 1) if data.lengths else ()
    texts = {}
    for length in sorted({*given, *task.train_lengths, *task.test_lengths}):
        try:
            drawn = [task.example(seed, index, length, split="test") for index in range(count)]
        except ValueError:  # there is no instance of this length
            continue
        rows = []
        for example in {example.source: example for example in drawn}.values():
            target = scratchpad.write(example.scratchpad, data.scratchpad) + example.target
            tokens, _ = encode(tokenizer, example.source, target)
            rows.append(np.insert(tokens, 0, tokenizer.bos) if data.bos else tokens)
        texts[length] = rows
    return texts


@jax.jit
def closest_heads(
    p: Float[Array, "E N T T"], q: Float[Array, "E M T T"], queries: Int[Array, "E"]
) -> Float[Array, "E"]:
    """The distance of the two closest heads of two layers on each example, over its first `queries` queries."""
    return jax.lax.map(lambda example: head_distances(*example).min(), (p, q, queries))


@dataclasses.dataclass
class ExampleSimilarity(Evaluation):
    """Distances of the first run from the others; `Run.results` of these hold them for each length of the task."""

    runs: Sequence[Run[Distances]]
    texts: Mapping[int, Sequence[Int[np.ndarray, "_"]]]
    """The examples of each length that all runs can read."""
    documents: int
    """The most examples of a length; fewer are padded to as many, so that few programs are compiled."""
    trained: Collection[int]
    """The lengths of training."""
    too_long: Sequence[int] = ()
    """Lengths that some run cannot read."""

    @property
    def others(self) -> Sequence[Run[Distances]]:
        return self.runs[1:]

    @property
    def lengths(self) -> list[int]:
        """The lengths measured so far."""
        return sorted(self.runs[1].results)

    def measure(self, out: Path, bar: Bar) -> Iterator[None]:
        bar.total(sum(map(len, self.texts.values())))
        placement = place([run.config.model for run in self.runs], self.documents, asked=self.runs[0].mesh)
        models = []
        for run in self.runs:
            bar.describe(f"{run.name}: loading")
            models.append(run.load(placement.mesh))
        exact = any(encoding.depends_on_length for model in models for encoding in model.encodings)
        for length, rows in self.texts.items():
            bar.describe(f"length {length}")
            found: list[list[np.ndarray]] = [[] for _ in self.others]
            for group in self._groups(rows, exact):
                with jax.set_mesh(placement.mesh):
                    distances_of = self._distances(models, group, exact, placement)
                for each, distances in zip(found, distances_of, strict=True):
                    each.append(distances)
                bar.advance(len(group))
            for run, each in zip(self.others, found, strict=True):
                run.results[length] = Distances(np.concatenate(each))
            yield

    @staticmethod
    def _groups(rows: Sequence[np.ndarray], exact: bool) -> list[list[np.ndarray]]:
        """Examples that are read together: all, or those with the same number of tokens."""
        if not exact:
            return [list(rows)]
        return [[row for row in rows if len(row) == size] for size in sorted({len(row) for row in rows})]

    def _distances(
        self, models: Sequence[Decoder], rows: Sequence[np.ndarray], exact: bool, placement: Placement
    ) -> list[Float[np.ndarray, "E L"]]:
        """Distances of the first model from each other one, holding the weights of one layer per model at a time."""
        padded = [*rows, *[rows[0]] * (placement.rows - len(rows))]
        sizes = np.array([len(row) for row in padded])
        longest = min([model.max_length for model in models if model.max_length is not None], default=None)
        width = sizes.max() if exact else -(-sizes.max() // ROOM) * ROOM
        tokens = np.zeros((len(padded), width if longest is None else min(width, longest)), np.int32)
        for line, row in zip(tokens, padded, strict=True):  # no token sees the padding after it
            line[: len(row)] = row
        found: list[list[np.ndarray]] = [[] for _ in models[1:]]
        placed = placement.put(tokens)
        for layer in zip(*(walk(model, placed, weights=True) for model in models), strict=False):
            first, *others = (one.weights for one in layer)
            for each, weights in zip(found, others, strict=True):
                if first is not None and weights is not None:
                    each.append(to_host(closest_heads(first, weights, sizes)).astype(np.float64))
        return [np.stack(each, 1)[: len(rows)] for each in found]

    def estimate(self, run: Run[Distances], lengths: Collection[int]) -> Estimate | None:
        """Distances [L], means over the examples of some lengths; None if none of them is measured."""
        parts = [found.closest for length, found in sorted(run.results.items()) if length in lengths]
        return mean(np.concatenate(parts)) if parts else None

    def over_layers(self, run: Run[Distances], lengths: Collection[int]) -> Estimate | None:
        """The distance, mean over layers and over the examples of some lengths; None if none of them is measured."""
        parts = [found.closest.mean(1) for length, found in sorted(run.results.items()) if length in lengths]
        return mean(np.concatenate(parts)) if parts else None

    @property
    def distributions(self) -> dict[str, list[int]]:
        """The measured lengths in and out of distribution."""
        inside = [length for length in self.lengths if length in self.trained]
        return {"in": inside, "out": [length for length in self.lengths if length not in self.trained]}

    def numbers(self) -> Mapping[str, Csv]:
        return {"similarity.csv": Csv(COLUMNS, self._csv_rows())}

    def _csv_rows(self) -> Iterator[tuple]:
        first, source = self.runs[0], self.runs[0].config.data.sources[0].removeprefix("task:")
        for run in self.others:
            for distribution, lengths in self.distributions.items():
                for length in lengths:
                    what = (first.name, first.encoding, run.name, run.encoding, source, length, distribution)
                    distances = mean(run.results[length].closest)
                    for layer, (value, error) in enumerate(zip(distances.value, distances.stderr, strict=True)):
                        yield (*what, layer, len(run.results[length].closest), float(value), float(error))

    def figures(self) -> Iterator[tuple[str, Figure]]:
        yield "similarity.png", draw(self)

    def rows(self) -> list[tuple[str, ...]]:
        """Table cells, a row per other run: its name, encoding, and its distance in and out of distribution."""

        def cell(estimate: Estimate | None) -> str:
            return "-" if estimate is None else plus_minus(f"{estimate.value:.4f}", float(estimate.stderr), 4)

        return [
            (run.name, run.short_encoding, *(cell(self.over_layers(run, n)) for n in self.distributions.values()))
            for run in self.others
        ]

    def sections(self) -> list[Section]:
        first = self.runs[0]
        header = ("run", "encoding", "in distribution", "out of distribution")
        section = Section(
            f"Attention of {first.name} and others on {first.config.data.source}",
            "Distance of their attention by layer and length (Kazemnejad et al. 2023, Figure 4).",
            Table(f"Distance of attention from {first.name} ({first.short_encoding})", header, self.rows()),
            self._notes(),
            figures={"similarity.png": f"Distance of the attention of other runs from {first.name}"},
            files={"similarity.csv": "one row per other run, length and layer; distances in nats."},
        )
        return [section]

    def _notes(self) -> list[str]:
        count = sum(len(self.texts[length]) for length in self.lengths)
        layers = self.runs[1].results[self.lengths[0]].closest.shape[1]
        notes = [
            f"Read: {plural(count, 'example')} of {self.runs[0].config.data.source}, held out of training, source "
            f"and target, of lengths {self.lengths[0]} to {self.lengths[-1]}. In distribution: lengths of training.",
            "Distance: Jensen-Shannon divergence of the attention rows of the two closest heads of a layer, in nats, "
            f"mean over queries, for each example; here the mean over {plural(layers, 'layer')} and examples ± its "
            "standard error over examples. 0: identical weights, ln 2 = 0.693: no overlap.",
        ]
        if self.too_long:
            notes.append(f"Left out, as some run has too few positions: lengths {', '.join(map(str, self.too_long))}.")
        return notes


def draw(comparison: ExampleSimilarity) -> Figure:
    """Draws the distance of each other run by length, and by layer in and out of distribution."""
    figure = plots.new_figure(11, 3.4)
    by_length, *by_layer = plots.panels(figure, 3, 3, sharey=True)
    trained = [length for length in comparison.lengths if length in comparison.trained]
    if trained:
        by_length.axvspan(min(trained) - 0.5, max(trained) + 0.5, color=QUIET, alpha=0.12, linewidth=0)
    for i, run in enumerate(comparison.others):
        style = plots.line_style(i) | {"linewidth": 1.3, "markersize": 3.5, "capsize": 2}
        points = [comparison.over_layers(run, [length]) for length in comparison.lengths]
        each: list[tuple[list[int], list[Any], Axes]] = [(comparison.lengths, points, by_length)]
        for axes, lengths in zip(by_layer, comparison.distributions.values(), strict=True):
            distances = comparison.estimate(run, lengths)
            layers = [] if distances is None else [distances[layer] for layer in range(len(distances.value))]
            each.append((list(range(len(layers))), layers, axes))
        for x, estimates, axes in each:
            y, errors = ([float(getattr(e, part)) for e in estimates] for part in ("value", "stderr"))
            label = f"{run.name} ({run.short_encoding})"
            axes.errorbar(x, y, np.nan_to_num(errors), label=label, **style)
    for axes in (by_length, *by_layer):
        axes.axhline(math.log(2), color=QUIET, linestyle=(0, (4, 3)), linewidth=1)
    plots.finish(by_length, "Length (shaded: trained)", f"Distance from {comparison.runs[0].name} (nats)")
    for axes, name in zip(by_layer, ("in", "out of"), strict=True):
        plots.finish(axes, "Layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(f"{name} distribution", fontsize=9, color=plots.INK)
    by_length.set_title("mean over layers", fontsize=9, color=plots.INK)
    handles, labels = by_length.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, loc="outside right center")
    plots.note(
        figure, "Closest heads of each layer, mean over examples. Bars: standard error. Dashes: ln 2, no overlap."
    )
    return figure
