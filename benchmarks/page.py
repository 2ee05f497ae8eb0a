"""Writes the tables of docs/performance.md from the files in benchmarks/results.

    python -m benchmarks.page [--results benchmarks/results] [--page docs/performance.md]

Every file of every benchmark and device is one section. To measure again, run the command that a section names.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import HEADER, RESULTS, cells
from benchmarks.pages import table
from nope_jax.evaluation.common.files import replace_file

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- made by benchmarks/page.py: begin -->", "<!-- made by benchmarks/page.py: end -->"
TITLES = {
    "attention": "Attention",
    "train_step": "A training step",
    "encodings": "Encodings",
    "long_context": "Long contexts",
    "decoding": "Decoding",
}


def section(found: dict[str, Any]) -> str:
    """The tables of one file."""
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    low, high = found["load"]
    made = f"`{found['command']}`, {found['date']}, {found['device']}, {versions}."
    if found["platform"] == "cpu":
        made += f" The load of the machine was {low:g} to {high:g}."
    parts = [f"### {TITLES[found['benchmark']]}: {found['device']}", made]
    for one in found["groups"]:
        rows = [cells(row) for row in one["rows"]]
        ratios = next((f", ratios to {row['of']}" for row in one["rows"] if row["ratio"]), "")
        used = [any(row[i] for row in rows) for i in range(len(HEADER))]
        columns = [tuple(x for x, keep in zip(row, used, strict=True) if keep) for row in (HEADER, *rows)]
        parts += [f"{one['title']}; {one['rounds']} rounds{ratios}:", table(columns[0], columns[1:])]
    return "\n\n".join(parts)


def sections(folder: Path) -> str:
    """All sections, in the order of TITLES and by device."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    files.sort(key=lambda found: (list(TITLES).index(found["benchmark"]), found["device"]))
    return "\n\n".join(map(section, files))


def written(page: str, made: str) -> str:
    """The page with what is between its markers replaced."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page must have the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    text = written(options.page.read_text(encoding="utf-8"), sections(options.results))
    with replace_file(options.page) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
