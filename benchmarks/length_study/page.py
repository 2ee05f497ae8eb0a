"""Writes docs/length_generalization.md from the reports of the length study, complete or not."""

import csv
import datetime
import itertools
import os
import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from nope_jax.evaluation.tasks import PAPER_RANKS
from nope_jax.evaluation.tasks.ranks import mean_reciprocal_ranks

PAGE = Path(__file__).parents[2] / "docs/length_generalization.md"
PAPER = {
    "copy": (0.986, 0.771, 0.289, 0.000, 0.0),
    "copy_replaced": (0.967, 0.939, 0.170, 0.016, 0.0),
    "copy_multi": (0.305, 0.420, 0.331, 0.011, 0.028),
    "reverse": (0.230, 0.242, 0.171, 0.077, 0.023),
    "scan": (0.797, 0.799, 0.438, 0.283, 0.057),
    "pcfg": (0.433, 0.439, 0.428, 0.439, 0.367),
    "addition": (0.085, 0.072, 0.078, 0.000, 0.004),
}
"""Exact match out of distribution in the paper, by the encodings of PAPER_RANKS in their order."""
SEEDS = 3

Row = Mapping[str, str]


def read(folder: Path) -> dict[tuple[str, str], dict[str, list[Row]]]:
    """Rows of all reports, by task and encoding and then by seed; runs are named TASK-ENCODING-SEED."""
    found: dict[tuple[str, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.glob("reports/*/tasks.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                task, encoding, seed = row["run"].split("-")
                found[task, encoding][seed].append(row)
    return found


def share(rows: Sequence[Row]) -> float:
    """Right answers per question; a length that an encoding does not support is wrong."""
    return sum(int(row["correct"] or 0) for row in rows) / sum(int(row["examples"]) for row in rows)


def write(page: Path, folder: Path, command: str, tasks: Sequence[str], encodings: Sequence[str]) -> None:
    """Write the page of the study in a folder.

    Args:
        page: the file to write.
        folder: the reports are in its folder `reports`.
        command: what made them.
        tasks: tasks of the study, in the order of the page.
        encodings: its encodings.
    """
    found = read(folder)
    short = {cell: SEEDS - len(found.get(cell, ())) for cell in itertools.product(tasks, encodings)}
    missing = [
        f"{task} ({', '.join(f'{name}: {short[task, name]}' for name in encodings if short[task, name])})"
        for task in tasks
        if any(short[task, name] for name in encodings)
    ]

    def shares(task: str, encoding: str, where: str) -> list[float]:
        seeds = found.get((task, encoding), {})
        return [share(rows) for own in seeds.values() if (rows := [r for r in own if r["distribution"] == where])]

    def mean(values: Sequence[float]) -> str:
        return f"{100 * sum(values) / len(values):.1f}" if values else "-"

    scores = {
        encoding: {
            (task, seed): share(rows)
            for task in tasks
            for seed, own in found.get((task, encoding), {}).items()
            if (rows := [row for row in own if row["distribution"] == "out"])
        }
        for encoding in encodings
    }
    paper_only = {name: own for name, own in scores.items() if name in PAPER_RANKS}
    (all_ranks, cells), (ranks, paper_cells) = mean_reciprocal_ranks(scores), mean_reciprocal_ranks(paper_only)

    def rank(found: Mapping[str, float], name: str) -> str:
        return f"{found[name]:.3f}" if name in found else "missing" if not found else ""

    lines = [
        "# Length generalization",
        "",
        "The tasks of Kazemnejad et al. 2023 ([data.md](data.md#tasks)): exact match of greedy answers past the",
        f"lengths of training. `{command}`, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}, on {hardware()}.",
        "",
        f"**Incomplete.** Seeds missing: {'; '.join(missing)}."
        if missing
        else "All tasks, encodings and seeds are here.",
        "",
        "## Mean reciprocal ranks",
        "",
        f"Ranks by exact match out of distribution, over {paper_cells} cells (task and seed) among the paper's five",
        f"encodings, and {cells} among all. Of equal encodings, the one listed first ranks higher, as in the",
        "paper's code.",
        "",
        *table(
            ("encoding", "paper", "here, the paper's five", "here, all"),
            [(name, rank(PAPER_RANKS, name), rank(ranks, name), rank(all_ranks, name)) for name in encodings],
        ),
        "",
        "## By task",
        "",
        "Percent right, in / out of distribution, mean over seeds; in brackets the paper's, out of distribution.",
        "",
    ]
    rows = []
    for task in tasks:
        paper = dict(zip(PAPER_RANKS, PAPER.get(task, ()), strict=False))
        cells_of_task = [
            (
                f"{mean(shares(task, name, 'in'))} / {mean(shares(task, name, 'out'))}"
                if (task, name) in found
                else "missing"
            )
            + (f" [{100 * paper[name]:.1f}]" if name in paper else "")
            for name in encodings
        ]
        rows.append((task, *cells_of_task))
    lines += [*table(("task", *encodings), rows), "", "## By length", ""]
    for task in dict.fromkeys(task for task, _ in found):
        lengths = sorted(
            {
                int(row["length"])
                for (name, _), own in found.items()
                if name == task
                for rows_of_seed in own.values()
                for row in rows_of_seed
            }
        )
        by_length = []
        for encoding in encodings:
            own = [row for rows_of_seed in found.get((task, encoding), {}).values() for row in rows_of_seed]
            at = [[row for row in own if int(row["length"]) == length] for length in lengths]
            by_length.append((encoding, *(f"{100 * share(chosen):.0f}" if chosen else "" for chosen in at)))
        lines += [f"### {task}", "", *table(("encoding", *map(str, lengths)), by_length), ""]
    page.write_text("\n".join(lines).rstrip() + "\n")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def hardware() -> str:
    """The devices of this process."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} {device.device_kind}"
    return f"{os.cpu_count()} cores ({platform.machine()})"
