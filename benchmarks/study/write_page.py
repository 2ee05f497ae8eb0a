"""Writes a page and its figure from the results of `make study`, as the last step of the Makefile next to it.

python -m benchmarks.study.write_page runs/study docs/study.md benchmarks/study/decoder.py
"""

import json
import math
import shutil
import sys
from pathlib import Path

import jax
from flax import nnx

from benchmarks.pages import Curves, date, hardware, number, table
from nope_jax.config import Config, load
from nope_jax.models import Decoder

STRETCHES = (1, 2, 4, 8)

PAPER = {
    "rope": ("RoPE", "14.5", "491", "489", "600"),
    "nope": ("NoPE", "14.6", "327", "> 1,000", "> 1,000"),
    "rope-ntk-8x": ("RoPE, NTK", "14.5", "14.9", "22.8", "80"),
    "rope-yarn-8x": ("RoPE, YaRN", "14.5", "14.5", "15.0", "17.1"),
    "nope-uniform-4x": ("NoPE, λ = 1.5", "19.0", "20.2", "45", "224"),
    "nope-head-4x": ("NoPE, HeadScale for 4 L", "15.7", "15.3", "21.1", "722"),
    "nope-head-8x": ("NoPE, HeadScale for 9 L", "18.3", "19.0", "18.8", "30.4"),
}
"""Wang et al. 2024 (arXiv 2404.12224): 1.1 B parameters, L = 2,048, PG-19, a sliding window with stride 256."""

NAMES = {
    "nope": "NoPE",
    "rope": "RoPE",
    "alibi": "ALiBi",
    "t5": "T5 bias",
    "sinusoidal": "sinusoidal",
    "smollm3": "SmolLM3 (RoPE, RoPE, RoPE, NoPE)",
    "nope-uniform-2x": "NoPE, UniformScale for 2 L",
    "nope-uniform-4x": "NoPE, UniformScale for 4 L",
    "nope-uniform-8x": "NoPE, UniformScale for 8 L",
    "nope-head-4x": "NoPE, HeadScale for 4 L",
    "nope-head-8x": "NoPE, HeadScale for 8 L",
    "nope-head-8x-unconstrained": "NoPE, HeadScale for 8 L, without the focus constraint",
    "nope-head-8x-from-one": "NoPE, HeadScale for 8 L, started at 1",
    "rope-uniform-8x": "RoPE, UniformScale for 8 L",
    "rope-ntk-8x": "RoPE, NTK for 8 L",
    "rope-yarn-8x": "RoPE, YaRN for 8 L",
}
ENCODINGS = tuple(NAMES)[:6]
WORDS = {5: "five", 6: "six"}


def main(runs: Path, page: Path, recipe: Path) -> None:
    config = load(runs / "nope")
    trained = [run for run in ENCODINGS if (runs / run / "config.json").exists()]
    picture = Path("images", page.stem).with_suffix(".png")
    window, start = Curves(runs / "window" / "curves.csv"), Curves(runs / "start" / "curves.csv")
    tuned = {path.parent.name: json.loads(path.read_text()) for path in runs.glob("*/tune.json")}
    length = config.data.context_length
    unit = "byte" if config.data.tokenizer == "bytes" else "token"
    shutil.copy(runs / "start" / "curves.png", page.parent / picture)
    parts = [
        _introduction(config, runs, recipe, trained, unit),
        _findings(window, start, tuned, length, trained),
        _past_the_length(window, length, trained, unit),
        _entropy(start, length, trained, picture),
        _uniform(tuned, length, unit),
        _heads(window, tuned, length, unit),
        _limits(),
    ]
    page.write_text("\n".join(parts), encoding="utf-8")


def _introduction(config: Config, runs: Path, recipe: Path, trained: list[str], unit: str) -> str:
    model, data, train = config.model, config.data, config.train
    minutes = [_training_minutes(runs / run / "metrics.jsonl", config) for run in trained]
    params = nnx.state(nnx.eval_shape(lambda: Decoder(model, rngs=nnx.Rngs(0))))
    millions = sum(array.size for array in jax.tree.leaves(params)) / 1e6
    source = {"python_stdlib": "Python's standard library"}.get(data.source, f"`{data.source}`")
    return f"""# The study

{WORDS[len(trained)].capitalize()} decoders that differ only in their encoding are trained at
L = {data.context_length:,} {unit}s and tested up to 8 L.
The question is that of Wang et al. 2024 ([arXiv 2404.12224](https://arxiv.org/abs/2404.12224)): at which length
does a model without positions fail, has its attention spread out by then, and does a logit scale help?
Their model has 1.1 billion parameters and L = 2,048; this one has {millions:,.1f} million, and its results may differ.

`make study` wrote this page, with its numbers and verdicts: {date()}, {hardware()}.
The decoder ([{recipe}](../{recipe})) has {model.num_layers} layers of
{model.num_heads} heads and width {model.model_dim};
{train.steps:,} steps of {data.batch_size} x {data.context_length:,} {unit}s of {source} took
{min(minutes):.0f} to {max(minutes):.0f} minutes per encoding. One seed each.
"""


def _findings(window: Curves, start: Curves, tuned: dict, length: int, trained: list[str]) -> str:
    far = 8 * length
    nope, rope = (window.holds_to(run, length) / length for run in ("nope", "rope"))
    # Do the models whose perplexity rises most also have the attention that spreads out most?
    left = {run: math.log(window.perplexity(run, far) / window.perplexity(run, length)) for run in trained}
    spread = {run: _share(start, run, far) - _share(start, run, length) for run in trained}
    ranks = _rank_correlation([left[run] for run in trained], [spread[run] for run in trained])
    gains = {run: _last(tuned[f"{run}-uniform-8x"]) for run in ("nope", "rope")}
    helps = {run: outcome["loss_before"] - outcome["loss_at_factor"] for run, outcome in gains.items()}
    scaled = {k: [window.perplexity(f"nope-{m}-{k}x", k * length) for m in ("head", "uniform")] for k in (4, 8)}
    ablation = [window.perplexity(f"nope-head-8x{suffix}", far) for suffix in ("", "-unconstrained", "-from-one")]
    rows = [
        (
            "NoPE holds further past L than RoPE (perplexity within 10 %)",
            "1.2 L, 1.1 L",
            f"{nope:.4g} L, {rope:.4g} L",
            nope > rope,
        ),
        (
            "Where perplexity rises, attention entropy has risen (rank correlation of the two changes over the "
            f"{WORDS[len(trained)]} encodings, from L to 8 L; agrees above 0.5)",
            "seen in every model",
            f"{ranks:.2f}",
            ranks > 0.5,
        ),
        (
            "A uniform λ > 1 helps NoPE past L (at 8 L)",
            "yes",
            f"λ = {gains['nope']['factor']:.2f}, {helps['nope']:+.3f} nats gained",
            gains["nope"]["factor"] > 1,
        ),
        (
            "It does not help RoPE (at 8 L; agrees when RoPE gains less than half of what NoPE does)",
            "no gain",
            f"λ = {gains['rope']['factor']:.2f}, {helps['rope']:+.3f} nats gained",
            helps["rope"] < helps["nope"] / 2,
        ),
        (
            "HeadScale beats UniformScale far past L (perplexity at 4 L and 8 L; the paper's are tuned for 4 L, and "
            "9 L against 4 L)",
            "21.1 < 45; 30.4 < 224",
            "; ".join(f"{number(head)} against {number(uniform)}" for head, uniform in scaled.values()),
            all(head < uniform for head, uniform in scaled.values()),
        ),
        (
            "Ablation of HeadScale: both parts, without the focus constraint, without the start at the best λ",
            "passkey 81 %, 53 %, 26 %",
            "perplexity at 8 L " + ", ".join(map(number, ablation)),
            ablation == sorted(ablation),
        ),
    ]
    body = [(finding, paper, here, "yes" if agrees else "**no**") for finding, paper, here, agrees in rows]
    disagreements = sum(not row[-1] for row in rows)
    verdict = "All of it agrees." if not disagreements else f"{disagreements} of {len(rows)} do not agree."
    return f"""## Does it agree with the paper?

{verdict}

{table(("finding", "Wang et al.", "here", "agrees"), body)}
"""


def _past_the_length(window: Curves, length: int, trained: list[str], unit: str) -> str:
    lengths = [k * length for k in STRETCHES]
    body = []
    for run in [*trained, *[run for run in NAMES if run not in ENCODINGS]]:
        numbers = [number(window.perplexity(run, n)) for n in lengths]
        paper = PAPER.get(run, ("", *[""] * len(lengths)))
        body.append((NAMES[run], *numbers, f"{window.holds_to(run, length) / length:.4g} L", *paper[1:]))
    header = ("run", "L", "2 L", "4 L", "8 L", "holds to", "paper: L", "2 L", "4 L", "8 L")
    return f"""## Perplexity past the training length

A window of 1, 2, 4 and 8 times L slid over whole documents by half of L ({length // 2:,} {unit}s; the paper slides by
an eighth), each token scored once: all lengths score the same tokens. Perplexity per {unit} here, per token of its own
tokenizer in the paper, so compare how it changes. "Holds to" is the longest of 1, 1.125, 1.25, 1.5, 2, 4 and 8 L up to
which perplexity stays within 10 %. The paper's UniformScale was chosen for 4 L, its last HeadScale for 9 L.

{table(header, body)}
"""


def _entropy(start: Curves, length: int, trained: list[str], picture: Path) -> str:
    body = []
    for run in trained:
        cells = [NAMES[run]]
        for k in (1, 2, 4, 8):
            entropy = start.mean(run, 8 * length, "entropy", k * length // 2, k * length)
            cells.append(f"{entropy:.2f} ({_share(start, run, k * length):.0%})")
        body.append(tuple(cells))
    return f"""## Perplexity and attention entropy by position

![Perplexity and attention entropy by position of the {WORDS[len(trained)]} encodings and of NoPE with HeadScale]\
({picture.as_posix()})

Documents are read from their start, so position and context grow together. Mean attention entropy over all heads, in
nats, over the second half of each length; in parentheses its share of the ceiling ln(position + 1), the entropy of
uniform weights over all positions so far:

{table(("run", "L", "2 L", "4 L", "8 L"), body)}
"""


def _uniform(tuned: dict, length: int, unit: str) -> str:
    outcomes = {("NoPE", k): _last(tuned[f"nope-uniform-{k}x"]) for k in (2, 4, 8)}
    outcomes |= {("RoPE", o["length"] // length): o for o in tuned["rope-uniform-8x"]["lengths"]}
    body = [
        (
            run,
            f"{k} L",
            f"{outcome['factor']:.2f}",
            f"{1 + 0.397 * math.log(k):.2f}" if run == "NoPE" else "",
            f"{outcome['loss_before']:.3f}",
            f"{outcome['loss_at_factor']:.3f}",
        )
        for (run, k), outcome in outcomes.items()
    ]
    header = ("run", "target", "best λ", "paper's fit", "loss before", "loss with λ")
    return f"""## One factor for all heads

The λ with the lowest loss at the target length, on documents of the training split read from their start (nats per
{unit}; `eval.py tune --method uniform`). The paper's fit is λ = 1 + 0.397 ln s at s times L.

{table(header, body)}
"""


def _heads(window: Curves, tuned: dict, length: int, unit: str) -> str:
    body = []
    for run in [name for name in NAMES if name.startswith("nope-head")]:
        result = tuned[run]
        factors = [factor for layer in result["learned"]["factors"] for factor in layer]
        outcome = _last(result)
        cells = (f"{result['start']:.2f}", f"{min(factors):.2f} to {max(factors):.2f}", f"{outcome['loss_before']:.3f}")
        perplexity = number(window.perplexity(run, 8 * length))
        body.append((NAMES[run], *cells, f"{outcome['loss_after']:.3f}", perplexity))
    header = ("run", "started at", "factors", "loss before", "loss after", "perplexity at 8 L")
    starts = ("nope-head-8x", "nope-head-8x-from-one")
    best, one = ([f for layer in tuned[run]["learned"]["factors"] for f in layer] for run in starts)
    apart = max(abs(a - b) for a, b in zip(best, one, strict=True))
    return f"""## One factor per head

200 updates of only the factors, on windows of the target length from the training split (`eval.py tune --method head`,
the paper's settings); losses in nats per {unit} at that length. Started at the best λ and at 1, the {len(best)}
factors for 8 L end at most {apart:.2f} apart (the paper learns 704).

{table(header, body)}
"""


def _limits() -> str:
    return """## What this cannot show

One seed, one size, one kind of text: the order of two close numbers here is not evidence. The paper judges its ablation
by passkey retrieval, which small models must be trained for ([configs/passkey.py](../configs/passkey.py)); here it is
judged by perplexity.
"""


def _last(result: dict) -> dict:
    return result["lengths"][-1]


def _share(start: Curves, run: str, position: int) -> float:
    """Mean entropy over [position/2, position) as a share of its ceiling there."""
    length = max(start.lengths(run))
    ceiling = sum(math.log(p + 1) for p in range(position // 2, position)) / (position - position // 2)
    return start.mean(run, length, "entropy", position // 2, position) / ceiling


def _rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's rank correlation, for values without ties."""
    ranks = [[sorted(values).index(value) for value in values] for values in (a, b)]
    n = len(a)
    return 1 - 6 * sum((x - y) ** 2 for x, y in zip(*ranks, strict=True)) / (n * (n**2 - 1))


def _training_minutes(metrics: Path, config: Config) -> float:
    """Training time, from the logged throughput."""
    tokens = config.train.log_every * config.data.batch_size * config.data.context_length
    lines = map(json.loads, metrics.read_text().splitlines())
    return sum(tokens / line["tokens_per_second"] for line in lines if "tokens_per_second" in line) / 60


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
