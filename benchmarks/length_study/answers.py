"""The answers of the length study, which are committed, and their scores.

Each task and format of its scratchpad is a folder TASK-FORMAT: `config.json` is the config of its model without
positional encoding and of seed 0, and `answers.csv` has a row for every encoding, seed and length. Answers of another
config than the study has by now are stale: the first of the new config replace all of them.
"""

import csv
import dataclasses
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nope_jax import config as configs
from nope_jax.config import Config
from nope_jax.evaluation.tasks.ranks import mean_reciprocal_ranks
from nope_jax.paths import write_whole

RESULTS = Path(__file__).parents[1] / "results/length_study"
"""Has a folder for each size of the study, which has those of the cases."""
ANSWERS = "answers.csv"
SEEDS = 3

Case = tuple[str, str]
"""A task and the format of its scratchpad."""
Model = tuple[str, int]
"""Encoding and seed of a model of a case."""


class Row(NamedTuple):
    """A row of answers.csv: how a model answered the questions of one length."""

    encoding: str
    seed: int
    length: int
    distribution: str
    """`in` for lengths of training, `out` for others."""
    examples: int
    """Questions."""
    correct: int | None
    """Right answers. None, an empty cell: the encoding does not support the length."""
    date: str
    hardware: str
    """As `benchmarks.pages.hardware` of where it answered."""

    @classmethod
    def parsed(cls, cells: Mapping[str, str]) -> "Row":
        """From the cells of these columns, among others."""
        count = cells["correct"]
        numbers = {name: int(cells[name]) for name in ("seed", "length", "examples")}
        return cls(**{name: cells[name] for name in cls._fields} | numbers | {"correct": int(count) if count else None})

    @property
    def model(self) -> Model:
        return self.encoding, self.seed


def read(folder: Path) -> list[Row]:
    """The rows of a case, stale or not; it must have some."""
    with (folder / ANSWERS).open(newline="", encoding="utf-8") as file:
        return [*map(Row.parsed, csv.DictReader(file))]


def read_of(folder: Path, config: Config) -> list[Row]:
    """The rows of a case of this config: none if there are no answers yet, or stale ones."""
    if not (folder / ANSWERS).exists() or _written_out(configs.load(folder)) != _written_out(config):
        return []
    return read(folder)


def _written_out(config: Config) -> Config:
    return dataclasses.replace(config, optimizer=config.optimizer.with_defaults())


def merge(folder: Path, config: Config, rows: Sequence[Row]) -> None:
    """Write all rows of some models of a case, whole or not at all, beside those of its other models.

    Args:
        folder: The folder of the case.
        config: Of its model without positional encoding and of seed 0.
        rows: In any order.
    """
    before = read_of(folder, config)
    if not before:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ANSWERS).unlink(missing_ok=True)  # first: it is of another config
        configs.save(config, folder)
    models = {row.model for row in rows}
    kept = [row for row in before if row.model not in models]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Row._fields)
    writer.writerows(sorted([*kept, *rows], key=lambda row: (row.model, row.length)))
    write_whole(folder / ANSWERS, text.getvalue().encode())


class Score(NamedTuple):
    """Right answers of a model per question; a length that its encoding does not support is wrong."""

    within: float
    """In distribution: at lengths of training."""
    beyond: float
    at: Mapping[int, float]
    """By length."""
    trained: tuple[int, int]
    """Shortest and longest length of training."""


class Answers:
    """The scores of all models that have answered."""

    def __init__(self, folder: Path):
        """Reads the folders of all cases in a folder."""
        self.scores: dict[Case, dict[str, dict[int, Score]]] = {}
        self.configs: list[Config] = []
        """Of the cases."""
        self.rows: list[Row] = []
        for path in sorted(folder.glob(f"*/{ANSWERS}")):
            task, format = path.parent.name.split("-")
            by_model: dict[Model, list[Row]] = defaultdict(list)
            for row in read(path.parent):
                by_model[row.model].append(row)
                self.rows.append(row)
            for (encoding, seed), rows in by_model.items():
                self.scores.setdefault((task, format), {}).setdefault(encoding, {})[seed] = _score(rows)
            self.configs.append(configs.load(path.parent))

    def seeds(self, case: Case, encoding: str) -> list[Score]:
        return list(self.scores.get(case, {}).get(encoding, {}).values())

    def whole(self, case: Case, encodings: Iterable[str]) -> bool:
        """Whether these encodings have all seeds."""
        return all(len(self.seeds(case, encoding)) == SEEDS for encoding in encodings)

    def mean(self, case: Case, encoding: str, where: str) -> float | None:
        """Mean over seeds of a field of `Score`."""
        scores = self.seeds(case, encoding)
        return float(np.mean([getattr(score, where) for score in scores])) if scores else None

    def ranks(self, cases: Sequence[Case], encodings: Sequence[str], **options: bool) -> tuple[dict[str, float], int]:
        """Mean reciprocal ranks by right answers out of distribution over the cells of cases and seeds."""
        return mean_reciprocal_ranks(
            {
                encoding: {
                    (case, seed): score.beyond
                    for case in cases
                    for seed, score in self.scores.get(case, {}).get(encoding, {}).items()
                }
                for encoding in encodings
            },
            **options,
        )


def _score(rows: Sequence[Row]) -> Score:
    def share(chosen: Sequence[Row]) -> float:
        return sum(row.correct or 0 for row in chosen) / sum(row.examples for row in chosen)

    within, beyond = ([row for row in rows if row.distribution == where] for where in ("in", "out"))
    trained = [row.length for row in within]
    at = {row.length: share([row]) for row in rows}
    return Score(share(within), share(beyond), at, (min(trained), max(trained)))
