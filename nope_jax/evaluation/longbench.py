"""LongBench: real tasks over long texts, from a local folder, with LongBench's metrics (Bai et al. 2023,
arXiv 2308.14508).

A prompt with more tokens than the length leaves beside the room for the answer is cut in its middle. A model continues
it greedily, by at most that room or until it ends the document.
"""

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from nope_jax.data import Tokenizer, load_tokenizer
from nope_jax.data.longbench import Dataset, read_datasets, settings_file, skipped
from nope_jax.evaluation.common import continuations, plots
from nope_jax.evaluation.common.console import Bar
from nope_jax.evaluation.common.evaluation import Evaluation
from nope_jax.evaluation.common.files import Csv
from nope_jax.evaluation.common.parts import Part, measure_parts
from nope_jax.evaluation.common.report import Section, Table
from nope_jax.evaluation.common.runs import Run, cannot_read, find_runs, result_identity
from nope_jax.evaluation.common.uncertainty import Estimate, mean, plus_minus
from nope_jax.evaluation.registry import LongbenchConfig, Options
from nope_jax.models import Decoder

BUCKETS = {"0-4k": range(4000), "4-8k": range(4000, 8000), "8k+": range(8000, sys.maxsize)}
"""Lengths of examples in words, as in LongBench-E."""
COLUMNS = "run encoding train_length dataset metric length words examples score score_stderr"
"""Columns of longbench.csv, one row per run, dataset, length (tokens read) and bucket of words, or `all`; scores are
from 0 to 100, with their standard error over examples (empty for a single one)."""
ANSWER_COLUMNS = "run dataset length id words score answers continuation"
"""Columns of longbench_answers.csv, one row per example; `words` is its length, and answers are separated by " | "."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a run wrote for the examples of one dataset at one length."""

    scores: Float[np.ndarray, "examples"]
    """From 0 to 1."""
    continuations: np.ndarray
    """Texts."""
    words: Int[np.ndarray, "examples"]
    """Length of each example in words."""

    def within(self, words: range) -> Float[np.ndarray, "some"]:
        """The scores of the examples of these lengths."""
        return self.scores[(self.words >= words.start) & (self.words < words.stop)]


Results = dict[str, Scores]
"""The scores of a run at one length, by dataset."""


def plan(options: Options) -> "LongBench":
    """Plans the datasets of a folder for every run at every length (prompt plus answer, in its own tokens).

    Raises:
        ValueError: a run, a dataset or a tokenizer is invalid, or a length leaves no prompt beside an answer.
        OSError: a dataset cannot be read.
    """
    settings: LongbenchConfig = options.settings
    if settings.path is None:
        raise ValueError("--longbench.path is missing: it must be a folder with datasets of LongBench, NAME.jsonl")
    runs: list[Run[Results]] = find_runs(options)
    datasets = read_datasets(settings.path, settings.datasets, settings.examples)
    for dataset in datasets:
        if options.lengths[0] < dataset.room + 2:
            raise ValueError(
                f"--lengths must be at least {dataset.room + 2} for {dataset.name}, of which {dataset.room} tokens are "
                f"for the answer, not {options.lengths[0]}; --longbench.datasets can leave it out"
            )
        for run in runs:
            continuations.encode(_tokenizer(run), dataset.rows[0].prompt, bos=run.config.data.bos)
    return LongBench(runs, datasets, settings)


def _tokenizer(run: Run[Results]) -> Tokenizer:
    return _loaded(run.config.data.tokenizer, run.config.data.separator_token)


_loaded = functools.cache(load_tokenizer)


def cut(tokens: Int[np.ndarray, "_"], most: int) -> Int[np.ndarray, "_"]:
    """The first and the last tokens of a prompt, as many of each, where it has more than `most`."""
    half = most // 2
    return tokens if len(tokens) <= most else np.concatenate([tokens[:half], tokens[-half:]])


@dataclasses.dataclass
class LongBench(Evaluation):
    """Datasets of LongBench; `Run.results` holds the scores on each dataset at each length."""

    runs: Sequence[Run[Results]]
    datasets: Sequence[Dataset]
    settings: LongbenchConfig

    def measure(self, out: Path, bar: Bar) -> Iterator[None]:
        bar.total(sum(len(dataset.rows) for dataset in self.datasets) * sum(sum(run.possible) for run in self.runs))
        for run in self.runs:
            parts = [self._part(run, bar, *pair) for pair in itertools.product(run.possible, self.datasets)]
            yield from measure_parts(run, "longbench", parts, Scores, self.settings.batch_size, out, bar)

    def _part(self, run: Run[Results], bar: Bar, length: int, dataset: Dataset) -> Part:
        return Part(
            dataset.name,
            length,
            len(dataset.rows) * length,
            functools.partial(self._identity, run, dataset, length),
            lambda model, rows: self._measure(run, model, dataset, length, rows, bar),
        )

    @staticmethod
    def _identity(run: Run[Results], dataset: Dataset, length: int) -> str:
        return result_identity(run, run.config.data.tokenizer, run.config.data.bos, length, dataset.digest)

    def _measure(self, run: Run[Results], model: Decoder, dataset: Dataset, length: int, rows: int, bar: Bar) -> Scores:
        tokenizer, bos = _tokenizer(run), run.config.data.bos
        most = length - dataset.room
        prompts = [cut(continuations.encode(tokenizer, row.prompt, bos=bos), most) for row in dataset.rows]
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        written = continuations.write(
            model,
            tokenizer,
            [prompts[row] for row in order],
            dataset.room,
            batch_size=rows,
            advance=lambda count: bar.advance(count * length),
        )
        texts = [text for _, text in sorted(zip(order, written, strict=True))]
        scores = [dataset.score(text, row) for text, row in zip(texts, dataset.rows, strict=True)]
        return Scores(np.array(scores, float), np.array(texts), np.array([row.length for row in dataset.rows]))

    def numbers(self) -> Mapping[str, Csv]:
        return {
            "longbench.csv": Csv(COLUMNS, self._csv_rows()),
            "longbench_answers.csv": Csv(ANSWER_COLUMNS, self._answer_rows()),
        }

    def _each(self) -> Iterator[tuple[Run[Results], Dataset, int, Scores]]:
        for run in self.runs:
            for dataset in self.datasets:
                for length, results in sorted(run.results.items()):
                    if dataset.name in results:
                        yield run, dataset, length, results[dataset.name]

    def _csv_rows(self) -> Iterator[tuple]:
        for run, dataset, length, found in self._each():
            what = (run.name, run.encoding, run.train_length, dataset.name, dataset.kind.metric, length)
            for words, scores in [("all", found.scores), *((name, found.within(b)) for name, b in BUCKETS.items())]:
                if len(scores):
                    score = percent(scores)
                    yield (*what, words, len(scores), float(score.value), float(score.stderr))

    def _answer_rows(self) -> Iterator[tuple]:
        for run, dataset, length, found in self._each():
            for row, score, text in zip(dataset.rows, found.scores.tolist(), found.continuations, strict=True):
                yield run.name, dataset.name, length, row.id, row.length, score, " | ".join(row.answers), text

    def figures(self) -> Iterator[tuple[str, Figure]]:
        yield "longbench.png", draw(self.measured, self.datasets)

    def sections(self) -> list[Section]:
        header = ["run", "dataset", "metric", "tokens", "all", *(f"{name} words" for name in BUCKETS)]
        section = Section(
            "LongBench",
            "Real tasks over long texts (Bai et al. 2023).",
            Table("Scores on LongBench by words", header, rows(self.measured, self.datasets), names=3),
            self._notes(),
            figures={"longbench.png": "Score of every run on each dataset, by the words of the examples"},
            files={
                "longbench.csv": "one row per run, dataset, length and bucket of words, with standard errors.",
                "longbench_answers.csv": "what each run wrote for each example, beside the answers.",
            },
        )
        return [section]

    def _notes(self) -> list[str]:
        folder = self.settings.path
        assert folder is not None
        prompts = settings_file(folder, "dataset2prompt")
        asked = "LongBench's, of dataset2prompt.json in the folder" if prompts else "plain ones, not LongBench's"
        rooms = ", ".join(f"{dataset.name} {dataset.room}" for dataset in self.datasets)
        notes = [
            *cannot_read(self.runs),
            "LongBench's score, in percent, ± its standard error over examples (their number); words are those of the "
            f"example by LongBench's count. Prompts are {asked}, without a chat template; those too long are cut in "
            "the middle. Tokens are those of the prompt and the room for the answer, in the run's own tokenizer: "
            f"{rooms}. Greedy decoding.",
        ]
        if left_out := skipped(folder) if self.settings.datasets is None else []:
            notes.append(f"Chinese datasets are left out: {', '.join(left_out)}.")
        return notes


def percent(scores: Float[np.ndarray, "examples"]) -> Estimate:
    """The mean of scores in percent, with its standard error over examples."""
    return mean(100 * scores)


def rows(runs: Sequence[Run[Results]], datasets: Sequence[Dataset]) -> list[tuple[str, ...]]:
    """Table cells, for each run and length a row per dataset and one for their mean: run, dataset, metric, length, all
    examples, and those of each bucket."""

    def cell(scores: Float[np.ndarray, "examples"]) -> str:
        if not len(scores):
            return "-"
        score = percent(scores)
        return f"{plus_minus(f'{score.value:.1f}', float(score.stderr), 1)} ({len(scores)})"

    table = []
    for run in runs:
        for length, results in sorted(run.results.items()):
            for dataset in datasets:
                found = results.get(dataset.name)
                cells = (
                    ["-"] * 4
                    if found is None
                    else [cell(found.scores), *map(cell, map(found.within, BUCKETS.values()))]
                )
                table.append((run.name, dataset.name, dataset.kind.metric, f"{length:,}", *cells))
            if len(datasets) > 1 and len(results) == len(datasets):
                each = [percent(found.scores) for found in results.values()]
                value = np.mean([score.value for score in each])
                error = math.sqrt(sum(float(score.stderr) ** 2 for score in each)) / len(each)
                overall = plus_minus(f"{value:.1f}", error, 1)
                table.append((run.name, f"mean of {len(datasets)}", "", f"{length:,}", overall, *[""] * len(BUCKETS)))
    return table


def draw(runs: Sequence[Run[Results]], datasets: Sequence[Dataset]) -> Figure:
    """Draws the score on each dataset with its standard error by bucket of words, a panel per run and length."""
    shown = [(run, length) for run in runs for length in sorted(run.results)]
    figure = plots.new_figure(max(5.0, 0.5 * len(datasets) + 3.0), 2.4 * len(shown) + 0.8)
    for (run, length), axes in zip(shown, plots.panels(figure, len(shown), 1, sharex=True), strict=True):
        for i, (name, words) in enumerate(BUCKETS.items()):
            points = [
                (x + 0.22 * (i - 1), percent(scores))
                for x, dataset in enumerate(datasets)
                if dataset.name in run.results[length]
                and len(scores := run.results[length][dataset.name].within(words))
            ]
            places, estimates = [x for x, _ in points], [estimate for _, estimate in points]
            errors = np.nan_to_num([float(estimate.stderr) for estimate in estimates])
            style = plots.line_style(i) | {"linestyle": "none", "markersize": 4, "capsize": 2}
            axes.errorbar(places, [float(e.value) for e in estimates], errors, label=f"{name} words", **style)
        plots.finish(axes, "", "Score (bars: standard error)")
        axes.set_title(f"{run.name}, {length:,} tokens", fontsize=9, color=plots.INK)
        axes.set_xticks(range(len(datasets)), [d.name for d in datasets], rotation=45, ha="right", fontsize=8)
        axes.set_xlim(-0.6, len(datasets) - 0.4)
        axes.set_ylim(-3, 103)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
