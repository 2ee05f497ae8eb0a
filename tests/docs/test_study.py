"""The page of the study: its verdicts follow the numbers, and `make study` makes all that it reads."""

import csv
import importlib.util
import itertools
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
L = 128


@pytest.fixture(scope="module")
def write_study():
    spec = importlib.util.spec_from_file_location("write_study", ROOT / "docs" / "write_study.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def curves(write_study, path, losses, entropies=lambda run, start: 1.0):
    """curves.csv with one row per run, length and octave; `losses` by run and length."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("run", "length", "position_start", "position_end", "tokens", "nll", "entropy"))
        for (run, length), nll in losses.items():
            edges = [0, *[2**k for k in range(6, 11) if 2**k <= length]]
            for start, end in itertools.pairwise(edges):
                writer.writerow((run, length, start, end, end - start, nll, entropies(run, start)))
    return write_study.Curves(path)


def test_the_page_reads_what_the_recipe_makes(write_study):
    made = subprocess.run(
        ["make", "--dry-run", "--file", "configs/study/Makefile", "RUNS=nowhere"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for run in write_study.NAMES:
        assert f"--workdir nowhere/{run} " in made or f"--out nowhere/{run} " in made
        assert f"nowhere/{run} " in made.split("--out nowhere/window")[0].rsplit("eval.py --workdirs", 1)[1]


def test_a_run_holds_up_to_the_last_length_before_it_leaves(write_study, tmp_path):
    losses = {("nope", n): nll for n, nll in {128: 1.0, 192: 1.09, 256: 1.2, 512: 1.0}.items()}
    assert curves(write_study, tmp_path / "curves.csv", losses).holds_to("nope", L) == 192


def test_means_are_over_tokens(write_study, tmp_path):
    found = curves(write_study, tmp_path / "c.csv", {("nope", 256): 1.0}, lambda run, start: float(start))
    assert found.mean("nope", 256, "entropy") == (64 * 0 + 64 * 64 + 128 * 128) / 256
    assert found.mean("nope", 256, "entropy", 64, 128) == 64


@pytest.mark.parametrize("order, sign", [([1.0, 2.0, 3.0], 1), ([3.0, 2.0, 1.0], -1)])
def test_rank_correlation(write_study, order, sign):
    assert write_study._rank_correlation([1.0, 20.0, 300.0], order) == sign


def test_verdicts_follow_the_numbers(write_study, tmp_path):
    tuned = {
        f"{run}-uniform-8x": {"lengths": [{"factor": factor, "loss_before": 2.0, "loss_at_factor": loss}]}
        for run, factor, loss in (("nope", 1.5, 1.5), ("rope", 1.1, 1.9))
    }
    losses = {(run, n): 1.0 for run in write_study.NAMES for n in (L, 2 * L, 4 * L, 8 * L)}
    for i, run in enumerate(write_study.TRAINED):
        losses[run, 8 * L] = 2.0 + i
    losses |= {("rope", 2 * L): 2.0, ("nope-uniform-4x", 4 * L): 1.5, ("nope-uniform-8x", 8 * L): 1.8}
    losses |= {("nope-head-8x-unconstrained", 8 * L): 1.2, ("nope-head-8x-from-one", 8 * L): 1.3}

    def spread(run, start):
        return 1.0 + (0.5 * write_study.TRAINED.index(run) if run in write_study.TRAINED and start > L else 0.0)

    start = {(run, 8 * L): 1.0 for run in write_study.NAMES}
    start = curves(write_study, tmp_path / "start.csv", start, spread)

    def page():
        return write_study._findings(curves(write_study, tmp_path / "window.csv", losses), start, tuned, L)

    assert "All of it agrees." in page()
    losses["nope-head-8x-from-one", 8 * L] = 1.1
    tuned["rope-uniform-8x"]["lengths"][0]["loss_at_factor"] = 1.6
    assert "2 of 6 do not agree." in page()
