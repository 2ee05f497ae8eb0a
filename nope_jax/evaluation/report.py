"""One self-contained HTML page: the table, the figures, every head's entropy, the data, the command that made them."""

import base64
import hashlib
import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex

from nope_jax.evaluation import table
from nope_jax.evaluation.files import replace_file
from nope_jax.evaluation.protocol import describe_protocol
from nope_jax.evaluation.run import Run
from nope_jax.evaluation.spreading import CRITERION, spreading
from nope_jax.evaluation.view import View

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


SECTIONS = ("curves", "tune", "passkey", "similarity", "probe")
"""In the order of the page."""


def add_section(out: Path, name: str, body: str, workdirs: Sequence[Path] = ()) -> None:
    """Writes one section of the report, and `report.html` with all sections that have been computed into `out`.

    Args:
        out: the directory of the report; sections are kept in its folder `sections`.
        name: one of SECTIONS.
        body: HTML that needs no file beside it; it begins with an <h2>.
        workdirs: the runs that the section is about; of those that eval.py tune wrote, the report takes in what it
            found, which lies in the `sections` of the workdir.
    """
    folder = out / "sections"
    folder.mkdir(parents=True, exist_ok=True)
    with replace_file(folder / f"{name}.html") as temporary:
        temporary.write_text(body, encoding="utf-8")
    for workdir in {workdir.resolve() for workdir in workdirs} - {out.resolve()}:
        if (tuned := workdir / "sections" / "tune.html").exists():
            mark = hashlib.sha256(bytes(workdir)).hexdigest()[:8]  # several runs may have the name
            with replace_file(folder / f"tune-{workdir.name}-{mark}.html") as temporary:
                temporary.write_bytes(tuned.read_bytes())
    paths = [path for section in SECTIONS for path in sorted(folder.glob(f"{section}*.html"))]
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


def paragraph(text: str, *, quiet: bool = False) -> str:
    kind = ' class="quiet"' if quiet else ""
    return f"<p{kind}>{html.escape(text)}</p>"


def table_of(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, which scrolls where it is too wide; its first two columns hold words."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def figure(image: Path, alternative: str) -> str:
    """A picture, within the page."""
    data = base64.b64encode(image.read_bytes()).decode()
    return f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(alternative)}"></figure>'


def download(file: Path, description: str) -> str:
    """A link that saves a file, which is within the page."""
    data = base64.b64encode(file.read_bytes()).decode()
    kind = "text/csv" if file.suffix == ".csv" else "application/octet-stream"
    return (
        f'<p><a download="{file.name}" href="data:{kind};base64,{data}">{file.name}</a>: {html.escape(description)}</p>'
    )


def command_line(command: str) -> str:
    return f"<pre>{html.escape(command)}</pre>"


def curves_section(out: Path, runs: Sequence[Run], view: View, *, command: str, corpus: str) -> str:
    """Perplexity and entropy by position, from `curves.png`, `curves.csv`, `differences.csv` and `heads.csv` in `out`.

    Args:
        out: the directory of the report.
        runs: with at least one measured curve among them.
        view: the protocol and the units.
        command: what the user typed.
        corpus: what was read, in words.
    """
    notes = "".join(paragraph(note, quiet=True) for note in table.notes(runs, view))
    score = view.score_name
    panels = f"{score} (above) and mean attention entropy with its ceiling (below) by position, of every run"
    in_nats = "losses and entropies in nats"
    map_of_heads = (
        f"Attention entropy as a share of its ceiling {view.ceiling_name}, over the second half of each run's longest "
        "window: dark (0) is a head that looks at one token, bright (1) one that looks at all alike. Point at a cell "
        "for its values."
    )
    return f"""<h2>{score} and attention entropy by position</h2>
{paragraph(f"Protocol: {view.protocol}. {describe_protocol(view.stride)}")}
{paragraph(corpus, quiet=True)}
{table_of(table.header(view), table.rows(runs, view))}
{notes}
{figure(out / "curves.png", panels)}
{_differences(out, runs, view)}<h2>Every head</h2>
{paragraph(map_of_heads)}
<div class="heads">{"".join(_heads(run, view) for run in runs if run.curves)}</div>
<h2>Which heads spread out first</h2>
{paragraph(CRITERION)}
{"".join(_spreading(run, view) for run in runs if run.curves)}
<h2>Memory</h2>
{table_of(table.memory_header(runs), table.memory_rows(runs))}
{paragraph(table.memory_note(), quiet=True)}
{download(out / "curves.csv", f"one row per run, evaluated length and position bucket; {in_nats}.")}
{download(out / "heads.csv", f"one row per run and head, in the order in which they spread out; {in_nats}.")}
{command_line(command)}
"""


def _differences(out: Path, runs: Sequence[Run], view: View) -> str:
    """The runs beside the first, where there are several."""
    if len(runs) < 2:
        return ""
    return f"""<h2>{html.escape(table.difference_title(runs, view))}</h2>
{table_of(table.difference_header(runs), table.difference_rows(runs, view))}
{paragraph(table.difference_note(runs, view), quiet=True)}
{download(out / "differences.csv", f"one row per pair of runs and length; differences in {view.loss_unit}.")}
"""


def _heads(run: Run, view: View) -> str:
    """A map of layers (down) by heads (across)."""
    curve = run.curves[max(run.curves)]
    positions = np.arange(curve.length // 2, curve.length)
    entropy = curve.heads[:, :, positions].mean(-1)
    share = entropy / np.log(positions + 1.0).mean() if curve.length > 1 else np.zeros_like(entropy)
    layers, heads = share.shape
    size = min(28, 560 // heads)
    cells = "".join(
        f'<rect x="{24 + size * head}" y="{14 + size * layer}" width="{size - 1}" height="{size - 1}" rx="2" '
        f'fill="{to_hex(colormaps["viridis"](share[layer, head]))}">'
        f"<title>layer {layer}, head {head}: {view.entropy(entropy[layer, head]):.2f} {view.entropy_unit}, "
        f"{share[layer, head]:.0%}</title></rect>"
        for layer in range(layers)
        for head in range(heads)
    )
    name = html.escape(run.name)
    return (
        f"<figure><figcaption>{name} "
        f'<span class="quiet">at {curve.length:,}, mean {share.mean():.0%}</span></figcaption>'
        f'<svg role="img" aria-label="Entropy of the heads of {name}" width="{24 + size * heads}" '
        f'height="{14 + size * layers}"><text x="24" y="10">heads</text>'
        f'<text transform="translate(18 {14 + size * layers}) rotate(-90)">layers</text>{cells}</svg></figure>'
    )


def _spreading(run: Run, view: View) -> str:
    """The first heads of a run in a sentence, and all of them in a table that opens."""
    summary = table.spreading_remark(run)
    if summary is None:
        return paragraph(f"{run.name}: no length past its training length was measured.", quiet=True)
    unit = view.entropy_unit
    header = ("layer", "head", "spreads out from", "share in window", "share at end")
    rows = [
        (
            str(head.layer),
            str(head.head),
            "never" if head.position is None else f"{head.position:,}",
            f"{head.share_in_window:.1%}",
            f"{head.share_at_end:.1%}",
            f"{view.entropy(head.entropy_in_window):.2f}",
            f"{view.entropy(head.entropy_at_end):.2f}",
        )
        for head in spreading(run)
    ]
    every = table_of((*header, f"{unit} in window", f"{unit} at end"), rows)
    return f"<details><summary>{html.escape(summary)}</summary>{every}</details>"
