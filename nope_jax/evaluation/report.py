"""One self-contained HTML page: the table, the figures, every head's entropy, the data, the command that made them."""

import base64
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
pre { overflow-x: auto; padding: .8rem 1rem; border: 1px solid var(--line); border-radius: 6px;
  background: var(--card); }
.heads { display: flex; flex-wrap: wrap; gap: 1.5rem; } .heads figure { margin: 0; }
.heads svg { display: block; } .heads text { fill: var(--quiet); font-size: 10px; }
@media print { body { max-width: none; } figure, table { break-inside: avoid; } }
"""


SECTIONS = ("curves", "passkey", "similarity", "probe")
"""In the order of the page."""


def add_section(out: Path, name: str, body: str) -> None:
    """Writes one section of the report, and `report.html` with all sections that have been computed into `out`.

    Args:
        out: the directory of the report; sections are kept in its folder `sections`.
        name: one of SECTIONS.
        body: HTML that needs no file beside it; it begins with an <h2>.
    """
    folder = out / "sections"
    folder.mkdir(parents=True, exist_ok=True)
    with replace_file(folder / f"{name}.html") as temporary:
        temporary.write_text(body, encoding="utf-8")
    paths = [folder / f"{section}.html" for section in SECTIONS]
    bodies = "\n".join(path.read_text(encoding="utf-8") for path in paths if path.exists())
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


def curves_section(out: Path, runs: Sequence[Run], *, command: str, stride: int | None, corpus: str) -> str:
    """Perplexity and entropy by position, from `perplexity.png`, `entropy.png` and `curves.csv` in `out`.

    Args:
        out: the directory of the report.
        runs: with at least one measured curve among them.
        command: what the user typed.
        stride: the protocol.
        corpus: what was read, in words.
    """
    notes = "".join(paragraph(note, quiet=True) for note in table.notes(runs, stride))
    data = download(
        out / "curves.csv", "one row per run, evaluated length and position bucket; losses and entropies in nats."
    )
    return f"""<h2>Perplexity by position</h2>
{paragraph(describe_protocol(stride))}
{paragraph(corpus, quiet=True)}
<div class="wide">{_table(runs, stride)}</div>
{notes}
{figure(out / "perplexity.png", "Perplexity by position of every run")}
<h2>Attention entropy by position</h2>
{figure(out / "entropy.png", "Mean attention entropy by position of every run, and its ceiling")}
<h2>Every head</h2>
<p>Attention entropy as a share of its ceiling ln(position + 1), over the second half of each run's longest window:
dark (0) is a head that looks at one token, bright (1) one that looks at all alike. Point at a cell for its values.</p>
<div class="heads">{"".join(_heads(run) for run in runs if run.curves)}</div>
{data}
{command_line(command)}
"""


def _table(runs: Sequence[Run], stride: int | None) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.HEADER)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows(runs, stride)
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _heads(run: Run) -> str:
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
        f"<title>layer {layer}, head {head}: {entropy[layer, head]:.2f} nats, {share[layer, head]:.0%}</title></rect>"
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
