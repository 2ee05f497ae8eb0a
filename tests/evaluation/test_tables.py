"""The table of curves: perplexity at each multiple of the training length, and up to where a run holds."""

import math

import numpy as np

from nope_jax.evaluation.perplexity import table
from nope_jax.evaluation.perplexity.measure import Curve
from nope_jax.evaluation.perplexity.units import Units
from tests.support.evaluation_cases import (
    synthetic_run,
    without_errors,
)


def cells(run, stride=None):
    units = Units(stride)
    return dict(zip(table.header(units), without_errors(table.rows([run], units)[0]), strict=True))


def test_table_of_a_flat_run_holds_to_the_end():
    assert cells(synthetic_run()) == {
        "run": "nope",
        "encoding": "nope",
        "trained at": "128",
        "in-window": "7.39",
        "2x": "7.39",
        "4x": "7.39",
        "8x": "7.39",
        "16x": "7.39",
        "within 10 % up to": ">= 2048",
    }


def test_table_reads_the_last_half_of_each_length():
    steps = synthetic_run("rope", lambda p: 1.0 if p < 64 else math.floor(math.log2(p)) / 6.0)
    row = cells(steps)
    octaves = {"in-window": 6, "2x": 7, "4x": 8, "8x": 9, "16x": 10}
    assert {name: row[name] for name in octaves} == {name: f"{math.exp(o / 6):.2f}" for name, o in octaves.items()}


def test_a_run_holds_up_to_the_octave_that_leaves_ten_percent():
    # Over [p/2, p) the mean excess is 1 - 512/p past 512: above ln 1.1 from p = 576 on, the next bucket edge.
    step = synthetic_run("rope", lambda p: 2.0 + (p >= 512))
    assert table.effective_length(step, Units()) == table.EffectiveLength(512, 128, 2048)
    gentle = synthetic_run("t5", lambda p: 2.0 + 0.1 * (p >= 512))
    assert table.effective_length(gentle, Units()) == table.EffectiveLength(
        960, 128, 2048
    )  # 0.1 (1 - 512/p) passes ln 1.1 between 960, 1024
    assert cells(gentle)["within 10 % up to"] == "960"


def test_a_run_that_returns_does_not_hold():
    bump = synthetic_run("rope", lambda p: 2.0 + (256 <= p < 512))
    assert table.effective_length(bump, Units()) == table.EffectiveLength(256, 128, 2048)


def test_a_run_that_never_holds_says_so():
    at_length = synthetic_run()
    at_length.results[2048] = synthetic_run(nll=lambda p: 9.0).results[2048]
    assert cells(at_length)["within 10 % up to"] == "< 128"


def test_the_extent_compares_the_same_documents():
    run = synthetic_run()
    long, short = run.results[2048], run.results[128]
    # One hard document is all that reaches 2,048; at 128, easy ones follow it.
    run.results[2048] = Curve(
        long.edges, long.nll_sum[:1] * 2, long.tokens[:1], long.entropy_sum[:1], long.heads, long.text_bytes[:1]
    )
    hard_first = short.nll_sum * np.array([[2.0], [1], [1], [1]])
    run.results[128] = Curve(short.edges, hard_first, short.tokens, short.entropy_sum, short.heads, short.text_bytes)
    assert table.effective_length(run, Units()) == table.EffectiveLength(2048, 128, 2048)


def test_table_of_lengths_not_asked_for():
    row = cells(synthetic_run(lengths=(300, 512)))
    assert (row["in-window"], row["2x"], row["4x"], row["8x"], row["within 10 % up to"]) == (
        "7.39",
        "-",
        "7.39",
        "-",
        ">= 512",
    )
    row = cells(synthetic_run(lengths=(64,)))
    assert (row["in-window"], row["2x"], row["within 10 % up to"]) == ("-", "-", "-")


def test_table_of_sliding_windows_takes_all_tokens():
    run = synthetic_run(nll=lambda p: 2.0 + 0.5 * (p >= 512), lengths=(128, 256, 512, 1024))
    row = cells(run, stride=64)
    assert (row["4x"], row["8x"]) == ("7.39", f"{math.exp(2.25):.2f}")
    assert table.effective_length(run, Units(64)) == table.EffectiveLength(512, 128, 1024)


def test_refused_lengths_are_said_and_not_measured():
    run = synthetic_run("table", max_length=128)
    assert run.refused == (256, 512, 1024, 2048) and list(run.results) == [128]
    row = cells(run)
    assert (row["in-window"], row["2x"], row["16x"]) == ("7.39", "cannot", "cannot")
    assert row["within 10 % up to"] == "128 (all it has)"
    assert table.notes([run], Units())[0].startswith("table cannot read 256, 512, 1,024, 2,048 tokens")
