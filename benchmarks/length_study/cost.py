"""What SIZE=paper of the length study takes, into docs/length_generalization.md: its programs compiled for a machine.

    python -m benchmarks.length_study.cost [--machine h100:1] [--contexts 64 128]

Needs the machine's compiler (docs/pods.md says how to install it) and not the machine. One program per shape is
compiled, of a model without positional encoding, which no encoding undercuts. Answers to the questions are not counted.
"""

import argparse
import importlib.metadata
import itertools
from collections.abc import Sequence
from pathlib import Path

from benchmarks.length_study import page, study
from benchmarks.pages import date, table
from nope_jax.compile.estimate import estimate_run, find_machine
from nope_jax.compile.memory import GIB
from nope_jax.config import load_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", default="h100:1", help="as in --compile_for of train.py")
    every = sorted({part.context for part in study.SIZES["paper"].parts})
    parser.add_argument("--contexts", nargs="+", type=int, choices=every, default=every, help="tokens of a row")
    parser.add_argument("--page", type=Path, default=page.PAGE)
    given = parser.parse_args()
    if not given.page.exists():
        parser.error(f"--page: there is no {given.page} yet, which `make length-study` writes")
    page.insert(given.page, cost(given.machine, given.contexts))


def cost(name: str, contexts: Sequence[int]) -> str:
    """The table and what it rests on."""
    size = study.SIZES["paper"]
    base = load_file(size.config)
    parts = sorted((part for part in size.parts if part.context in contexts), key=_shape)
    machine, body, totals = find_machine(name), [], [0.0, 0.0]
    steps = base.train.steps
    for (context, vocab), alike in itertools.groupby(parts, key=_shape):
        cases = [case for part in alike for case in part.cases(study.ENCODINGS)]
        estimate = estimate_run(cases[0]._replace(encoding="nope").config(base), name)
        hours = estimate.seconds[1] * steps * len(cases) / 3600
        totals = [a + b for a, b in zip(totals, (len(cases), hours), strict=True)]
        memory = max(estimate.training.total, estimate.validation.total) / GIB
        shape = str(context), str(vocab), str(len(cases))
        body.append((*shape, f"{memory:.1f}", f"{1000 * estimate.seconds[1]:.0f}", f"{hours:,.0f}"))
    body.append(("all", "", f"{totals[0]:,.0f}", "", "", f"{totals[1]:,.0f}"))
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("jax", machine.compiler))
    header = ("context", "vocabulary", "models", "memory, GiB", "step, ms", "hours")
    total = sum(len(part.cases(study.ENCODINGS)) for part in size.parts)
    command = f"python -m benchmarks.length_study.cost --machine {name} --contexts {' '.join(map(str, contexts))}"
    return f"""`make length-study SIZE=paper` trains the paper's decoder for {steps:,} steps of {base.data.batch_size}
examples, one to a row: {total:,} models. It has not been run. What the models take one after the other on {name}, the
answers to the questions not counted:

{table(header, body)}

`{command}`, {date()}, {versions}.
Memory and step are those of one model without positional encoding, by the compiler and estimated as in
[pods.md](pods.md)."""


def _shape(part: study.Part) -> tuple[int, int]:
    return part.context, part.vocab


if __name__ == "__main__":
    main()
