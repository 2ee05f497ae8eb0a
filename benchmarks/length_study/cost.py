"""What SIZE=paper of the length study takes, into docs/length_generalization.md: its programs compiled for a TPU.

    python -m benchmarks.length_study.cost [--slice v5e:1x1] [--utilization 0.4] [--contexts 64 128]

Needs libtpu (`pip install '.[tpu]'`) and no TPU. One program per shape is compiled, of a model without positional
encoding, which no encoding undercuts. Answers to the questions are not counted.
"""

import argparse
import importlib.metadata
import itertools
from collections.abc import Sequence
from pathlib import Path

from benchmarks.length_study import page, study
from benchmarks.pages import date, table
from nope_jax.compile.estimate import Estimate, estimate_run
from nope_jax.compile.memory import GIB
from nope_jax.config import load_file
from nope_jax.training.flops import CHIPS

GPU = "H100"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slice", default="v5e:1x1", help="TPU slice, each chip of which trains models of its own")
    parser.add_argument("--utilization", type=float, default=0.4, help=f"share of its peak that the {GPU} reaches")
    every = sorted({part.context for part in study.SIZES["paper"].parts})
    parser.add_argument("--contexts", nargs="+", type=int, choices=every, default=every, help="tokens of a row")
    parser.add_argument("--page", type=Path, default=page.PAGE)
    given = parser.parse_args()
    if not 0 < given.utilization <= 1:
        parser.error(f"--utilization must be greater than 0 and at most 1, not {given.utilization}")
    if not given.page.exists():
        parser.error(f"--page: there is no {given.page} yet, which `make length-study` writes")
    page.insert(given.page, cost(given.slice, given.utilization, given.contexts))


def cost(slice_name: str, utilization: float, contexts: Sequence[int]) -> str:
    """The table and what it rests on."""
    size = study.SIZES["paper"]
    base = load_file(size.config)
    parts = sorted((part for part in size.parts if part.context in contexts), key=_shape)
    body, totals = [], [0.0, 0.0, 0.0]
    steps = base.train.steps
    for (context, vocab), alike in itertools.groupby(parts, key=_shape):
        cases = [case for part in alike for case in part.cases(study.ENCODINGS)]
        estimate = estimate_run(cases[0]._replace(encoding="nope").config(base), slice_name)
        chip_hours, gpu_hours = hours(estimate, steps * len(cases), utilization)
        totals = [a + b for a, b in zip(totals, (len(cases), chip_hours, gpu_hours), strict=True)]
        memory = max(estimate.training.total, estimate.validation.total) / GIB
        body.append(
            (
                str(context),
                str(vocab),
                str(len(cases)),
                f"{memory:.1f}",
                f"{estimate.flops / 1e12:.2f}",
                f"{1000 * estimate.seconds[1]:.0f}",
                f"{chip_hours:,.0f}",
                f"{gpu_hours:,.0f}",
            )
        )
    body.append(("all", "", f"{totals[0]:,.0f}", "", "", "", f"{totals[1]:,.0f}", f"{totals[2]:,.0f}"))
    chip = slice_name.partition(":")[0]
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in ("jax", "libtpu"))
    header = ("context", "vocabulary", "models", "memory, GiB", "TFLOP a step", "step, ms", f"{chip}, h", f"{GPU}, h")
    total = sum(len(part.cases(study.ENCODINGS)) for part in size.parts)
    command = f"python -m benchmarks.length_study.cost --slice {slice_name} --utilization {utilization:g}"
    command += f" --contexts {' '.join(map(str, contexts))}"
    return f"""`make length-study SIZE=paper` trains the paper's decoder for {steps:,} steps of {base.data.batch_size}
examples, one to a row: {total:,} models. It has not been run. What training those of some contexts takes of one chip,
answers not counted:

{table(header, body)}

`{command}`, {date()}, {versions}.
Memory (of {CHIPS[chip].memory / GIB:.0f} GiB) and step are the compiler's account of one model without positional
encoding on {slice_name}, by the cycles that it expects. FLOPs are those of the model (`nope_jax.training.flops`), of
which the {GPU} is taken to do {utilization:.0%} of its published {CHIPS[GPU].flops / 1e12:.0f} TFLOP/s."""


def hours(estimate: Estimate, steps: int, utilization: float) -> tuple[float, float]:
    """Hours of so many steps on one chip of the slice, and on one GPU."""
    chip = estimate.seconds[1] * estimate.chips * steps / 3600
    return chip, estimate.flops * steps / (CHIPS[GPU].flops * utilization) / 3600


def _shape(part: study.Part) -> tuple[int, int]:
    return part.context, part.vocab


if __name__ == "__main__":
    main()
