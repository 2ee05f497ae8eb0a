"""What the pages that are written from results have in common: curves read back, tables, date and hardware."""

import csv
import datetime
import math
import os
import platform
from collections import defaultdict
from pathlib import Path

import jax


class Curves:
    """The curves.csv of a report: mean losses and entropies, weighted by tokens."""

    def __init__(self, path: Path):
        self.rows = defaultdict(list)
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                self.rows[Path(row["run"]).name, int(row["length"])].append(row)

    def lengths(self, run: str) -> list[int]:
        return sorted(length for name, length in self.rows if name == run)

    def mean(self, run: str, length: int, column: str, start: int = 0, end: int | None = None) -> float:
        """Mean of a column over the positions in [start, end)."""
        rows = [
            row
            for row in self.rows[run, length]
            if int(row["position_start"]) >= start and int(row["position_end"]) <= (end or length)
        ]
        tokens = [int(row["tokens"]) for row in rows]
        return sum(float(row[column]) * n for row, n in zip(rows, tokens, strict=True)) / sum(tokens)

    def perplexity(self, run: str, length: int, start: int = 0, end: int | None = None) -> float:
        return math.exp(self.mean(run, length, "nll", start, end))

    def holds_to(self, run: str, train_length: int) -> int:
        """The longest length up to which perplexity stays within 10 % of its value at the training length."""
        held = train_length
        for length in self.lengths(run):
            if length > train_length:
                if self.perplexity(run, length) > 1.1 * self.perplexity(run, train_length):
                    break
                held = length
        return held


def hardware() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}, jax {jax.__version__}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    return f"{os.cpu_count()} cores ({model}), jax {jax.__version__}"


def date() -> str:
    return datetime.date.today().isoformat()


def number(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def table(header: tuple[str, ...], body: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
