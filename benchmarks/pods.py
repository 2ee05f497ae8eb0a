"""What fits where: decoders compiled for slices of TPUs and for GPUs, into the tables of docs/pods.md.

    python -m benchmarks.pods [--minutes 60] [--results docs/pods.jsonl]

Needs libtpu and the packages of the GPU compiler (`make pods` installs both), and neither TPU nor GPU. A row of the
first table is one decoder, without positional encoding, on one machine, with the rows of a microbatch and the policy of
`model.remat` that make the shortest step; a row of the second a run of the scale study (configs/scale), as its recipe
says. Each compilation, of a training step and of the validation loss, takes a minute or two of one core; the memory in
the tables is that of the larger.
Each result is appended to the results file and the tables are rewritten, so that the command resumes where it was
stopped. After a change to what is compiled, take the old lines out.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from nope_jax.compile.estimate import estimate_run, find_machine
from nope_jax.compile.memory import GIB, DoesNotFitError
from nope_jax.config import Config, DataConfig, MeshConfig, ModelConfig, load_file, override
from nope_jax.evaluation.common.files import replace_file
from nope_jax.models.decoder import LOGITS_AT_ONCE

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/pods.md"
BEGIN, END = "<!-- made by benchmarks/pods.py: begin -->", "<!-- made by benchmarks/pods.py: end -->"
BEGIN_RECIPES, END_RECIPES = BEGIN.replace("pods.py", "pods.py, recipes"), END.replace("pods.py", "pods.py, recipes")


def _llama(rows: int, **shape: int) -> Config:
    model = ModelConfig(vocab_size=32_000, dtype="bfloat16", remat="full", **shape)
    return Config(model=model, data=DataConfig(context_length=2048, batch_size=rows))


SHAPES = {
    "125 M": load_file(ROOT / "configs/gpt2.py"),
    "1 B": load_file(ROOT / "configs/nope_1b.py"),
    "3 B": override(load_file(ROOT / "configs/smollm3_3b.py"), {"model.encoding": "nope"}),
    "7 B": _llama(1024, num_layers=32, num_heads=32, num_kv_heads=8, model_dim=4096, mlp_dim=14_336),
    "70 B": _llama(2048, num_layers=80, num_heads=64, num_kv_heads=8, model_dim=8192, mlp_dim=28_672),
}
"""The decoders and their batches: NoPE, which no encoding undercuts."""
MACHINES = {
    "125 M": ("v5e:4x4", "v6e:4x4", "v5p:2x4x4", "a100:8", "h100:8", "b200:8"),
    "1 B": ("v5e:4x4", "v6e:4x4", "v5p:2x4x4", "v5e:16x16", "2xv5e:16x16", "a100:8", "h100:8", "h100:2x8", "b200:8"),
    "3 B": ("a100:8", "h100:8", "h100:4x8", "h200:8", "b200:8"),
    "7 B": ("v5e:4x4", "v6e:4x4", "v5p:2x4x4", "v5e:16x16", "h100:8x8"),
    "70 B": ("v5e:16x16", "v6e:16x16", "v5p:4x8x8"),
}
POLICIES = "dots", "full"
"""What is tried of `model.remat`."""

LENGTHS = (1024, 512, 2048)
ENCODINGS = ("nope", "t5", "alibi", "rope", "smollm3")
RECIPES = {"10m": "h100:1", "100m": "h100:8", "1b": "h100:8"}
"""The recipes of configs/scale, by size, and the machine that each is for."""

Cell = tuple[str, str]
"""Decoder and machine."""


def cells() -> list[Cell]:
    return [(shape, where) for shape in SHAPES for where in MACHINES[shape]]


def recipes() -> list[Cell]:
    """The runs of the scale study: one of each size and length before the other encodings."""
    runs = itertools.product(ENCODINGS, LENGTHS, RECIPES)
    return [(f"{size}, L = {length}, {encoding}", RECIPES[size]) for encoding, length, size in runs]


def recipe(name: str) -> Config:
    size, length, encoding = name.replace("L = ", "").split(", ")
    config = load_file(ROOT / f"configs/scale/{size}.py")
    rows = config.data.batch_size * config.data.context_length // int(length)
    changes = {"model.encoding": encoding, "data.context_length": int(length), "data.batch_size": rows}
    return override(config, {"model.train_length": None} | changes)


def searches(cell: Cell) -> Iterator[Iterator[Config]]:
    """What to compile for a cell: a recipe as it is, a decoder by each policy with fewer and fewer rows at a time."""
    if cell[0] not in SHAPES:
        yield iter([recipe(cell[0])])
        return
    for policy in POLICIES:
        yield configs(cell, policy)


def configs(cell: Cell, policy: str) -> Iterator[Config]:
    """The cell's run with fewer and fewer rows of a chip at a time, from as many as a rough reckoning lets fit."""
    shape, machine = cell[0], find_machine(cell[1])
    # Each chip has all of a small model; of a larger one the chips of a slice share the parameters.
    mesh = MeshConfig() if shape == "125 M" else MeshConfig(data=machine.num_slices, fsdp=-1)
    config = override(dataclasses.replace(SHAPES[shape], mesh=mesh), {"model.remat": policy})
    chips = machine.num_chips
    most = config.data.batch_size // chips
    rows = most
    while rows > 1 and reckoned(config, chips, rows) > 0.8 * machine.memory:
        rows = _half(rows, most)
    while rows:
        yield override(config, {"optimizer.accumulation": most // rows})
        rows = _half(rows, most)


def _half(rows: int, most: int) -> int:
    """Half of the rows, or the next fewer that divide all rows of a chip; 0 for less than one."""
    return next((fewer for fewer in range(rows // 2, 0, -1) if most % fewer == 0), 0)


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
    kept = 2 * layers * tokens * (d if model.remat == "full" else layer / d + d)
    logits = min(tokens * model.vocab_size / mesh.tensor, LOGITS_AT_ONCE)
    within = tokens * (2 * 8 * d + 2 * 6 * f / mesh.tensor) + 4 * 3 * logits
    return state + gathered + kept + within


# Results


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def compile_all(path: Path, minutes: float) -> None:
    """Appends to the results file, and writes the tables, until all is compiled or the time is over.

    Rows are halved until they fit; once that is done for every cell, further while that shortens the step.
    """
    end = time.monotonic() + 60 * minutes
    for further in (False, True):
        for cell in [*cells(), *recipes()]:
            for search in searches(cell):
                shortest = math.inf
                for config in search:
                    if time.monotonic() > end:
                        return
                    line = compile_once(path, config, cell)
                    if line["fits"]:
                        if not further or line["seconds"][1] >= shortest:
                            break
                        shortest = line["seconds"][1]


def compile_once(path: Path, config: Config, cell: Cell) -> dict:
    """The line of a config in the results file, to which it is added if it is not there yet."""
    key = {"cell": list(cell), "remat": config.model.remat, "rows": _rows(config, cell)}
    line = next((line for line in read(path) if key.items() <= line.items()), None)
    if line is None:
        line = key | compiled(config, cell)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        write_table(path)
    return line


def _rows(config: Config, cell: Cell) -> int:
    return config.data.batch_size // (find_machine(cell[1]).num_chips * config.optimizer.accumulation)


def compiled(config: Config, cell: Cell) -> dict:
    packages = ("jax", find_machine(cell[1]).compiler)
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
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
        "computing": estimate.computing._asdict(),
        "communicating": estimate.communicating,
        "sent": estimate.sent,
        "seconds": estimate.seconds,
        "mfu": estimate.mfu,
        "shape": estimate.mesh,
    }


# The page


def table(lines: list[dict]) -> str:
    """The line of each cell with the shortest step if no communication hides."""
    header = (
        "| decoder | machine | chips | mesh | remat | rows at a time | memory, GiB | step, s | computing, % | MFU |"
    )
    rows, missing = [], []
    for cell in cells():
        found, line = _shortest(lines, cell)
        if line:
            rows.append(_row(cell, line))
        else:
            missing.append(f"{cell[0]} on {cell[1]}{' (does not fit)' if found else ''}")
    return _tabulated(header, rows, missing, [line for line in lines if tuple(line["cell"]) in cells()])


def recipes_table(lines: list[dict]) -> str:
    """The cost of each run of the scale study."""
    header = "| recipe | machine | rows at a time | memory, GiB | step, s | steps | hours | chip hours |"
    rows: list[str] = []
    missing: dict[str, list[str]] = {}
    for cell in sorted(recipes(), key=lambda cell: [*RECIPES].index(cell[0].split(",")[0])):  # and else as compiled
        found, line = _shortest(lines, cell)
        if line:
            steps, chips = recipe(cell[0]).train.steps, math.prod(line["shape"].values())
            hours = [seconds * steps / 3600 for seconds in line["seconds"]]
            rows.append(
                f"| {cell[0]} | {cell[1]} | {line['rows']} | {_memory(cell, line)} | {_span(line['seconds'], '.2f')} | "
                f"{steps:,} | {_span(map(_two_digits, hours), ',g')} | "
                f"{_span([_two_digits(chips * h) for h in hours], ',g')} |"
            )
        else:
            run, _, encoding = cell[0].rpartition(", ")
            missing.setdefault(run, []).append(f"{encoding}{' (does not fit)' if found else ''}")
    not_compiled = [f"{run}: {', '.join(encodings)}" for run, encodings in missing.items()]
    return _tabulated(header, rows, not_compiled, [line for line in lines if tuple(line["cell"]) in recipes()])


def _tabulated(header: str, rows: list[str], missing: list[str], lines: list[dict]) -> str:
    dates = sorted({line["date"] for line in lines})
    versions = "; ".join(sorted({line["versions"] for line in lines}))
    made = f"`python -m benchmarks.pods`, {' to '.join(dict.fromkeys(dates[:1] + dates[-1:]))}, {versions}."
    not_compiled = f"Not compiled: {'; '.join(missing) or 'none'}."
    return "\n".join([header, "|---" * header.count(" | ") + "|---|", *rows, "", made, "", not_compiled])


def _shortest(lines: list[dict], cell: Cell) -> tuple[bool, dict | None]:
    """Whether the cell was compiled, and its fastest line of those that fit."""
    found = [line for line in lines if tuple(line["cell"]) == cell]
    fitting = [line for line in found if line["fits"]]
    return bool(found), min(fitting, key=lambda line: line["seconds"][1], default=None)


def write_table(path: Path) -> None:
    lines = read(path)
    text = PAGE.read_text(encoding="utf-8")
    for begin, end, made in ((BEGIN, END, table(lines)), (BEGIN_RECIPES, END_RECIPES, recipes_table(lines))):
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{made}\n{end}{rest.partition(end)[2]}"
    with replace_file(PAGE) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _row(cell: Cell, line: dict) -> str:
    chips = math.prod(line["shape"].values())
    mesh = " x ".join(f"{axis} {size}" for axis, size in line["shape"].items() if size > 1)
    parts = " + ".join(
        f"{100 * seconds / sum(line['computing'].values()):.0f}" for seconds in line["computing"].values()
    )
    return (
        f"| {cell[0]} | {cell[1]} | {chips} | {mesh} | {line['remat']} | {line['rows']} | {_memory(cell, line)} | "
        f"{_span(line['seconds'], '.2f')} | {parts} | {_span(line['mfu'], '.0%')} |"
    )


def _memory(cell: Cell, line: dict) -> str:
    return f"{sum(line['memory'].values()) / GIB:.1f} of {find_machine(cell[1]).memory / GIB:.0f}"


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")


def _span(values: Iterable[float], form: str) -> str:
    return " to ".join(dict.fromkeys(format(value, form) for value in values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing new after so many")
    parser.add_argument("--results", type=Path, default=PAGE.with_suffix(".jsonl"))
    arguments = parser.parse_args()
    compile_all(arguments.results, arguments.minutes)
    write_table(arguments.results)


if __name__ == "__main__":
    main()
