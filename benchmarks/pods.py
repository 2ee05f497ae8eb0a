"""What fits where: decoders of four sizes compiled for slices of TPUs, into the table of docs/pods.md.

    python -m benchmarks.pods [--minutes 60] [--results docs/pods.jsonl]

Needs libtpu (`pip install '.[tpu]'`) and no TPU. A row of the table is one decoder, without positional encoding, on one
slice, in microbatches of as many rows as make the shortest step. Each compilation, of a training step and of the
validation loss, takes minutes of one core; the memory in the table is that of the larger. Each result is
appended to the results file and the table is rewritten, so that the command resumes where it was stopped. After a
change to what is compiled, take the old lines out.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

from nope_jax.compile.estimate import estimate_run
from nope_jax.compile.memory import GIB, DoesNotFitError
from nope_jax.config import Config, DataConfig, MeshConfig, ModelConfig, load_file, override
from nope_jax.evaluation.common.files import replace_file
from nope_jax.models.decoder import LOGITS_AT_ONCE
from nope_jax.training.flops import CHIPS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/pods.md"
BEGIN, END = "<!-- made by benchmarks/pods.py: begin -->", "<!-- made by benchmarks/pods.py: end -->"


def _llama(rows: int, **shape: int) -> Config:
    model = ModelConfig(vocab_size=32_000, dtype="bfloat16", remat=True, **shape)
    return Config(model=model, data=DataConfig(context_length=2048, batch_size=rows))


SHAPES = {
    "125 M": load_file(ROOT / "configs/gpt2.py"),
    "1 B": load_file(ROOT / "configs/nope_1b.py"),
    "7 B": _llama(1024, num_layers=32, num_heads=32, num_kv_heads=8, model_dim=4096, mlp_dim=14_336),
    "70 B": _llama(2048, num_layers=80, num_heads=64, num_kv_heads=8, model_dim=8192, mlp_dim=28_672),
}
"""The decoders and their batches: NoPE, which no encoding undercuts."""
SLICES = {
    "125 M": ("v5e:2x2", "v6e:2x2", "v5p:2x2x1"),
    "1 B": ("v5e:4x4", "v5e:16x16", "v6e:4x4", "v5p:2x2x4"),
    "7 B": ("v5e:16x16", "v6e:8x8", "v5p:4x4x4"),
    "70 B": ("v5e:16x16", "v6e:16x16", "v5p:4x8x8"),
}

Cell = tuple[str, str]
"""Decoder and slice."""


def cells() -> list[Cell]:
    return [(shape, where) for shape in SHAPES for where in SLICES[shape]]


def configs(cell: Cell) -> Iterator[Config]:
    """The cell's run with fewer and fewer rows of a chip at a time, from as many as a rough reckoning lets fit."""
    shape, where = cell
    # Each chip has all of a small model; of a larger one all chips share the parameters.
    config = dataclasses.replace(SHAPES[shape], mesh=MeshConfig() if shape == "125 M" else MeshConfig(data=1, fsdp=-1))
    chips = _chips(where)
    rows = config.data.batch_size // chips
    while rows > 1 and reckoned(config, chips, rows) > 0.8 * CHIPS[where.partition(":")[0]].memory:
        rows //= 2
    while rows:
        yield override(config, {"optimizer.accumulation": config.data.batch_size // (chips * rows)})
        rows //= 2


def reckoned(config: Config, chips: int, rows: int) -> float:
    """Roughly, the bytes of a chip that a training step takes with so many rows at a time."""
    model, mesh, tokens = config.model, config.mesh, rows * config.data.context_length
    d, f, layers = model.model_dim, model.mlp_size, model.num_layers
    heads = (model.head_dim or d // model.num_heads) * (model.num_heads + (model.num_kv_heads or model.num_heads))
    layer = 2 * d * heads + (3 if model.mlp == "gated" else 2) * d * f
    weights = layers * layer + 2 * model.vocab_size * d
    parts = chips // mesh.data if mesh.fsdp == -1 else mesh.tensor
    state = (12 + 2 * 4) * weights / parts  # and gradients, twice for a moment
    gathered = 3 * 2 * max(layer, model.vocab_size * d) / mesh.tensor
    kept = 2 * layers * tokens * d
    logits = min(tokens * model.vocab_size / mesh.tensor, LOGITS_AT_ONCE)
    within = tokens * (2 * 8 * d + 2 * 6 * f / mesh.tensor) + 4 * 3 * logits
    return state + gathered + kept + within


# Results


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def compile_all(path: Path, minutes: float) -> None:
    """Appends to the results file, and writes the table, until all is compiled or the time is over.

    Rows are halved until they fit; once that is done for every cell, further while that shortens the step.
    """
    end = time.monotonic() + 60 * minutes
    for further in (False, True):
        for cell in cells():
            shortest = math.inf
            for config in configs(cell):
                key = {"cell": list(cell), "rows": _rows(config, cell)}
                line = next((line for line in read(path) if key.items() <= line.items()), None)
                if line is None:
                    if time.monotonic() > end:
                        return
                    line = key | compiled(config, cell)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with path.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                    write_table(path)
                if line["fits"]:
                    if not further or line["seconds"][1] >= shortest:
                        break
                    shortest = line["seconds"][1]


def _chips(where: str) -> int:
    return math.prod(int(size) for size in where.partition(":")[2].split("x"))


def _rows(config: Config, cell: Cell) -> int:
    return config.data.batch_size // (_chips(cell[1]) * config.optimizer.accumulation)


def compiled(config: Config, cell: Cell) -> dict:
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("jax", "libtpu"))
    made = {"date": str(datetime.date.today()), "versions": versions}
    try:
        estimate = estimate_run(config, cell[1])
    except DoesNotFitError as error:
        return {"fits": False, "says": str(error)} | made
    return made | {
        "fits": True,
        "accumulation": config.optimizer.accumulation,
        "tokens": config.data.batch_size * config.data.context_length,
        "memory": max(estimate.training, estimate.validation, key=lambda memory: memory.total)._asdict(),
        "computing": estimate.computing,
        "communicating": estimate.communicating,
        "sent": estimate.sent,
        "seconds": estimate.seconds,
        "mfu": estimate.mfu,
        "shape": estimate.mesh,
    }


# The page


def table(lines: list[dict]) -> str:
    """The line of each cell with the shortest step if no communication hides."""
    rows = []
    missing: dict[str, list[str]] = {}
    for shape in SHAPES:
        for where in SLICES[shape]:
            fitting = [line for line in lines if line["cell"] == [shape, where] and line["fits"]]
            if fitting:
                rows.append(_row(shape, where, min(fitting, key=lambda line: line["seconds"][1])))
            else:
                missing.setdefault(shape, []).append(where)
    dates = sorted({line["date"] for line in lines})
    versions = "; ".join(sorted({line["versions"] for line in lines}))
    return "\n".join(
        [
            "| decoder | slice | chips | mesh | rows at a time | memory, GiB | step, s | MFU |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            f"`python -m benchmarks.pods`, {' to '.join(dict.fromkeys(dates[:1] + dates[-1:]))}, {versions}.",
            "",
            "Not compiled yet: " + (";\n".join(f"{k} on {', '.join(v)}" for k, v in missing.items()) or "none") + ".",
        ]
    )


def write_table(path: Path) -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    with replace_file(PAGE) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n{table(read(path))}\n{END}{after}", encoding="utf-8")


def _row(shape: str, where: str, line: dict) -> str:
    chips = math.prod(line["shape"].values())
    mesh = " x ".join(f"{axis} {size}" for axis, size in line["shape"].items() if size > 1)
    memory = f"{sum(line['memory'].values()) / GIB:.1f} of {CHIPS[where.partition(':')[0]].memory / GIB:.0f}"
    (best, worst), (low, high) = line["seconds"], line["mfu"]
    return (
        f"| {shape} | {where} | {chips} | {mesh} | {line['rows']} | {memory} | "
        f"{best:.2f} to {worst:.2f} | {low:.0%} to {high:.0%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing new after so many")
    parser.add_argument("--results", type=Path, default=PAGE.with_suffix(".jsonl"))
    arguments = parser.parse_args()
    compile_all(arguments.results, arguments.minutes)
    write_table(arguments.results)


if __name__ == "__main__":
    main()
