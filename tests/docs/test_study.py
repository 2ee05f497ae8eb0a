"""The page of the study: its verdicts follow the numbers, and `make study` makes all that it reads."""

import csv
import itertools
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks.pages import Curves
from benchmarks.study import write_page
from nope_jax.cli import parse_train
from nope_jax.config import load_file

ROOT = Path(__file__).parents[2]
L = 128


def curves(path, losses, entropies=lambda run, start: 1.0):
    """curves.csv with one row per run, length and octave; `losses` by run and length."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("run", "length", "position_start", "position_end", "tokens", "nll", "entropy"))
        for (run, length), nll in losses.items():
            edges = [0, *[2**k for k in range(6, 11) if 2**k <= length]]
            for start, end in itertools.pairwise(edges):
                writer.writerow((run, length, start, end, end - start, nll, entropies(run, start)))
    return Curves(path)


def recipe(*variables):
    command = [
        "make",
        "--no-print-directory",
        "--dry-run",
        "--file",
        "benchmarks/study/Makefile",
        "RUNS=nowhere",
        *variables,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("size", ["small", "10m", "100m", "1b"])
def test_every_size_of_the_study_has_as_many_tokens_a_step_at_every_length(size):
    """And what is evaluated and tuned follows from the length."""
    for length in (512, 1024):
        made = recipe(f"SIZE={size}", f"LENGTH={length}").stdout
        (command,) = re.findall(r"(train\.py .*--model.encoding nope .*?) +>", made)
        config = parse_train(command.split()[1:]).config
        own = load_file(command.split()[2])
        assert config.data.context_length == config.model.train_length == length
        assert config.data.batch_size * length == own.data.batch_size * own.data.context_length
        assert config.data.batch_size % (8 * config.optimizer.accumulation) == 0 or size == "small"
        assert f"--lengths {length} {length * 9 // 8} {length * 5 // 4} " in made
        assert f"--lengths {8 * length} --eval.documents" in made
        assert f"write_page nowhere docs/study_{size}_{length}.md {command.split()[2]}" in made


def test_the_study_of_the_default_size_is_the_one_of_docs():
    made = recipe().stdout.replace("\\\n", " ")
    assert "--lengths 128 144 160 192 256 512 1024 --eval.stride 64 --eval.documents 4" in " ".join(made.split())
    assert "write_page nowhere docs/study.md benchmarks/study/decoder.py" in made
    assert "--data.context_length 128 --data.batch_size 16 " in made


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        (["SIZE=2b"], "SIZE must be small, 10m, 100m or 1b, not 2b"),
        (
            ["SIZE=10m", "LENGTH=500"],
            "LENGTH must be a multiple of 8 that divides the 131072 tokens of a step, not 500",
        ),
        (["LENGTH=-8"], "LENGTH must be a multiple of 8 that divides the 2048 tokens of a step, not -8"),
        (["LENGTH=long"], "LENGTH must be a multiple of 8 that divides the 2048 tokens of a step, not long"),
    ],
)
def test_a_study_that_cannot_be_is_refused_before_anything_runs(variables, says):
    refused = recipe(*variables)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert says in refused.stderr


def test_the_page_reads_what_the_recipe_makes():
    made = recipe().stdout
    for run in write_page.NAMES:
        assert f"--workdir nowhere/{run} " in made or f"--out nowhere/{run} " in made
        assert f"nowhere/{run} " in made.split("--out nowhere/window")[0].rsplit("eval.py --workdirs", 1)[1]


def test_a_run_holds_up_to_the_last_length_before_it_leaves(tmp_path):
    losses = {("nope", n): nll for n, nll in {128: 1.0, 192: 1.09, 256: 1.2, 512: 1.0}.items()}
    assert curves(tmp_path / "curves.csv", losses).holds_to("nope", L) == 192


def test_means_are_over_tokens(tmp_path):
    found = curves(tmp_path / "c.csv", {("nope", 256): 1.0}, lambda run, start: float(start))
    assert found.mean("nope", 256, "entropy") == (64 * 0 + 64 * 64 + 128 * 128) / 256
    assert found.mean("nope", 256, "entropy", 64, 128) == 64


@pytest.mark.parametrize("order, sign", [([1.0, 2.0, 3.0], 1), ([3.0, 2.0, 1.0], -1)])
def test_rank_correlation(order, sign):
    assert write_page._rank_correlation([1.0, 20.0, 300.0], order) == sign


def test_verdicts_follow_the_numbers(tmp_path):
    tuned = {
        f"{run}-uniform-8x": {"lengths": [{"factor": factor, "loss_before": 2.0, "loss_at_factor": loss}]}
        for run, factor, loss in (("nope", 1.5, 1.5), ("rope", 1.1, 1.9))
    }
    losses = {(run, n): 1.0 for run in write_page.NAMES for n in (L, 2 * L, 4 * L, 8 * L)}
    for i, run in enumerate(write_page.ENCODINGS):
        losses[run, 8 * L] = 2.0 + i
    losses |= {("rope", 2 * L): 2.0, ("nope-uniform-4x", 4 * L): 1.5, ("nope-uniform-8x", 8 * L): 1.8}
    losses |= {("nope-head-8x-unconstrained", 8 * L): 1.2, ("nope-head-8x-from-one", 8 * L): 1.3}

    def spread(run, start):
        return 1.0 + (0.5 * write_page.ENCODINGS.index(run) if run in write_page.ENCODINGS and start > L else 0.0)

    start = {(run, 8 * L): 1.0 for run in write_page.NAMES}
    start = curves(tmp_path / "start.csv", start, spread)

    def page():
        return write_page._findings(
            curves(tmp_path / "window.csv", losses), start, tuned, L, list(write_page.ENCODINGS)
        )

    assert "All of it agrees." in page()
    losses["nope-head-8x-from-one", 8 * L] = 1.1
    tuned["rope-uniform-8x"]["lengths"][0]["loss_at_factor"] = 1.6
    assert "2 of 6 do not agree." in page()
