"""The report: one self-contained HTML page with the tables, figures, data files and commands."""

import base64
import hashlib
import html
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from nope_jax.evaluation.common.files import replace_file
from nope_jax.evaluation.registry import EVALUATIONS
from nope_jax.paths import Location, resolved


class Table(NamedTuple):
    title: str
    """Printed above the table in the terminal."""
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 2
    """Number of leading text columns, left-aligned in the terminal; the other columns hold numbers."""


class Section(NamedTuple):
    """A section of the report. The terminal shows its table, `notes` and `spoken`."""

    heading: str
    about: str = ""
    """Text above the table."""
    table: Table | None = None
    notes: Sequence[str] = ()
    """Notes below the table, one paragraph each."""
    spoken: Sequence[str] = ()
    """Terminal-only text for what the report shows as a figure."""
    html: str = ""
    """Additional HTML of the report, without references to other files."""
    figures: Mapping[str, str] = {}
    """Alternative texts of the images in the report directory, by file name."""
    files: Mapping[str, str] = {}
    """Descriptions of the data files in the report directory, by file name."""


CAVEAT = (
    "Plain perplexity and passkeys predict long-context ability poorly (Yen et al. 2024; Fang et al. 2024): measure it "
    "with eval.py ruler and eval.py longppl too."
)
"""A note below the tables of perplexity and of passkeys."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1d1d1f; --quiet: #6a6a70; --paper: #fdfdfb; --line: #dcdcd6; --card: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf0; --quiet: #a0a0a8; --paper: #17181b; --line: #3a3b40; --card: #202126; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 4rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
p, li { max-width: 46rem; }
.quiet { color: var(--quiet); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
figure { margin: 1rem 0; }
figure img { display: block; width: 100%; max-width: 52rem; border-radius: 6px; background: #fff; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .8rem 1rem; border: 1px solid var(--line);
  border-radius: 6px; background: var(--card); }
details { margin: .5rem 0; } summary { cursor: pointer; }
.heads { display: flex; flex-wrap: wrap; gap: 1.5rem; } .heads figure { margin: 0; }
.heads svg { display: block; } .heads text { fill: var(--quiet); font-size: 10px; }
@media print {
  body { max-width: none; } figure, table { break-inside: avoid; }
  .wide { overflow: visible; } table { font-size: .75rem; } td { white-space: normal; overflow-wrap: anywhere; }
}
"""


def add_sections(out: Path, name: str, sections: Iterable[Section], command: str, workdirs: Sequence[Location]) -> None:
    """Writes the sections of an evaluation, and `report.html` with the sections of all evaluations in `out`.

    Args:
        out: the report directory; its folder `sections` holds the sections of each evaluation.
        name: the evaluation, one of EVALUATIONS, which give the order of the page.
        sections: the sections of this evaluation.
        command: the command as typed.
        workdirs: the runs evaluated. If eval.py tune wrote a run, the report includes the section on its tuning from
            `sections` in that workdir.
    """
    folder = out / "sections"
    folder.mkdir(parents=True, exist_ok=True)
    body = "".join(_section(out, section) for section in sections) + f"<pre>{html.escape(command)}</pre>\n"
    with replace_file(folder / f"{name}.html") as temporary:
        temporary.write_text(body, encoding="utf-8")
    for workdir in {resolved(workdir) for workdir in workdirs} - {out.resolve()}:
        if (tuned := workdir / "sections" / "tune.html").exists():
            mark = hashlib.sha256(os.fsencode(workdir)).hexdigest()[:8]  # several runs may share a name
            with replace_file(folder / f"tune-{workdir.name}-{mark}.html") as temporary:
                temporary.write_bytes(tuned.read_bytes())
    patterns = [f"{known}{end}.html" for known in EVALUATIONS for end in ("", "-*")]
    paths = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    bodies = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>How far does each model hold?</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>How far past its training length does each model hold?</h1>
{bodies}
</body>
</html>
"""
    with replace_file(out / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")


def _section(out: Path, section: Section) -> str:
    parts = [
        f"<h2>{html.escape(section.heading)}</h2>",
        paragraph(section.about) if section.about else "",
        table_of(section.table.header, section.table.rows) if section.table else "",
        *(paragraph(note, quiet=True) for note in section.notes),
        *(_figure(out / name, alternative) for name, alternative in section.figures.items()),
        section.html,
        *(_download(out / name, description) for name, description in section.files.items()),
    ]
    return "\n".join(part for part in parts if part) + "\n"


def paragraph(text: str, *, quiet: bool = False) -> str:
    kind = ' class="quiet"' if quiet else ""
    return f"<p{kind}>{html.escape(text)}</p>"


def table_of(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table that scrolls if it is too wide; its first two columns hold text."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(image: Path, alternative: str) -> str:
    """An image embedded in the page."""
    data = base64.b64encode(image.read_bytes()).decode()
    return f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(alternative)}"></figure>'


def _download(file: Path, description: str) -> str:
    """A download link to a file embedded in the page."""
    data = base64.b64encode(file.read_bytes()).decode()
    kind = "text/csv" if file.suffix == ".csv" else "application/octet-stream"
    return (
        f'<p><a download="{file.name}" href="data:{kind};base64,{data}">{file.name}</a>: {html.escape(description)}</p>'
    )
