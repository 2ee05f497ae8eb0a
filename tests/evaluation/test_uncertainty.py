"""Standard errors over documents, their paired differences, intervals of shares; and where the curves show them."""

import csv
import itertools

import numpy as np
import pytest

from nope_jax.evaluation.common.uncertainty import mean, plus_minus, ratio, wilson_interval
from nope_jax.evaluation.perplexity.measure import Curve, bucket_edges
from nope_jax.evaluation.perplexity.table import COLUMNS, DIFFERENCE_COLUMNS
from nope_jax.evaluation.perplexity.units import Units
from tests.support.evaluation_cases import HEADS, LAYERS, show, synthetic_run, write


def sampled(documents, resamplings, seed=0):
    """Losses and lengths [D, R] of documents of 24 to 15,920 tokens, of which the long ones are easier to read."""
    rng = np.random.default_rng(seed)
    tokens = np.exp(rng.uniform(np.log(24), np.log(15_920), (documents, resamplings))).round()
    means = 3 - 0.15 * np.log(tokens) + rng.normal(0, 0.3, tokens.shape)
    return tokens * means + np.sqrt(tokens) * rng.normal(size=tokens.shape), tokens


@pytest.mark.parametrize("documents", [64, 400])
def test_the_error_is_the_spread_of_the_estimate_over_samples_of_documents(documents):
    losses, tokens = sampled(documents, 4000)
    estimate = ratio(losses, tokens)
    spread = estimate.value.std(ddof=1)  # known to about 1 / sqrt(2 * 4000) = 1.1 %
    assert 0.9 < np.sqrt((estimate.stderr**2).mean()) / spread < 1.05
    # About two estimates in three are within one of their errors of the truth.
    truth = np.sum(sampled(10**6, 1)[0]) / np.sum(sampled(10**6, 1)[1])
    assert 0.62 < (np.abs(estimate.value - truth) < estimate.stderr).mean() < 0.72
    unweighted = (losses / tokens).std(0, ddof=1) / np.sqrt(documents)  # the error of another mean
    assert np.sqrt((unweighted**2).mean()) / spread < 0.9


def test_documents_of_one_length_have_the_error_of_their_means():
    values = np.random.default_rng(0).normal(size=(5, 3))
    expected = values.std(0, ddof=1) / np.sqrt(5)
    np.testing.assert_allclose(ratio(7 * values, np.full((5, 3), 7)).stderr, expected)
    np.testing.assert_allclose(mean(values).stderr, expected)


def test_only_documents_with_something_to_say_are_counted():
    parts, wholes = np.array([[1.0, 2, 5], [2, 7, 0], [4, 0, 0]]), np.array([[1, 1, 2], [1, 3, 0], [2, 0, 0]])
    estimate = ratio(parts, wholes)
    assert estimate.documents.tolist() == [3, 2, 1]
    np.testing.assert_allclose(estimate.stderr[1], ratio(parts[:2, 1], wholes[:2, 1]).stderr)
    assert np.isnan(estimate.stderr[2]) and not np.isnan(estimate.value[2])  # one document has no error, not one of 0
    nothing = ratio(np.zeros((3, 1)), np.zeros((3, 1)))
    assert np.isnan(nothing.value[0]) and np.isnan(nothing.stderr[0])


def test_the_paired_error_is_that_of_the_differences():
    losses, tokens = sampled(64, 4000)
    better = losses - tokens * np.random.default_rng(1).normal(0.02, 0.02, tokens.shape)
    a, b = ratio(better, tokens), ratio(losses, tokens)
    difference = a - b
    spread = difference.value.std(ddof=1)
    assert 0.9 < np.sqrt((difference.stderr**2).mean()) / spread < 1.05
    assert (difference.stderr < 0.2 * np.hypot(a.stderr, b.stderr)).all()
    np.testing.assert_allclose((a - a).stderr, 0)
    with pytest.raises(ValueError, match="the same documents have a paired difference, not over 64 and 3"):
        a - ratio(losses[:3], tokens[:3])


def test_exp_is_the_delta_method():
    losses, tokens = sampled(400, 2000)
    perplexity = ratio(losses, tokens).exp()
    assert 0.9 < np.sqrt((perplexity.stderr**2).mean()) / perplexity.value.std(ddof=1) < 1.1
    assert mean(np.array([900.0, 901])).exp().value == np.inf


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe 1998, Table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_the_published_ones(successes, trials, low, high):
    np.testing.assert_allclose(wilson_interval(successes, trials), (low, high), atol=5e-5)
    mirrored = wilson_interval(trials - successes, trials)
    np.testing.assert_allclose(mirrored, (1 - high, 1 - low), atol=5e-5)


def test_wilson_intervals_at_the_ends():
    assert wilson_interval(0, 10)[0] == 0 and wilson_interval(10, 10)[1] == 1 and wilson_interval(0, 0) == (0, 1)
    with pytest.raises(ValueError, match="successes must be from 0 to the 3 trials, not 4"):
        wilson_interval(4, 3)


def test_an_error_is_written_with_a_digit_that_is_not_0():
    written = [plus_minus("5.12", error, 2) for error in (0.1234, 0.0041, 0.0, float("nan"), float("inf"))]
    assert written == ["5.12 ± 0.12", "5.12 ± 0.004", "5.12 ± 0.00", "5.12", "5.12"]
    assert plus_minus("1,234", 56.7, 0) == "1,234 ± 57"


# Curves


def uneven_run(name, shift=0.0, documents=9):
    """A run whose documents, of lengths that differ, are as hard for it as for any other but for `shift` nats."""
    run, rng = synthetic_run(name, lengths=(128, 256), documents=documents), np.random.default_rng(5)
    for length, curve in run.results.items():
        shape, edges = (documents, len(curve.edges) - 1), bucket_edges(length)
        tokens = rng.integers(1, 50, (documents, 1)) * np.diff(edges)
        hardness = rng.normal(2, 0.5, (documents, 1))
        losses = tokens * (hardness + shift + (shift != 0) * rng.normal(0, 0.01, shape))
        heads = np.zeros((LAYERS, HEADS, length))
        run.results[length] = Curve(edges, losses, tokens, tokens * hardness, heads, 2 * tokens)
    return run


def read(path):
    with path.open() as file:
        reader = csv.DictReader(file)
        return reader.fieldnames, list(reader)


def test_curves_have_a_column_for_the_error_of_every_mean(tmp_path):
    run = uneven_run("nope")
    write(tmp_path, [run, synthetic_run("one", lengths=(128,), documents=1)], only="curves.csv")
    names, rows = read(tmp_path / "curves.csv")
    assert names == COLUMNS.split()
    curve, last = run.results[128], next(row for row in rows if row["position_end"] == "128")
    per_token = curve.nll_sum[:, -1] - curve.nll_sum[:, -1].sum() / curve.tokens[:, -1].sum() * curve.tokens[:, -1]
    error = np.sqrt(9 / 8 * (per_token**2).sum()) / curve.tokens[:, -1].sum()
    expected = {"nll": error, "perplexity": error * float(last["perplexity"]), "bits_per_byte": error / 2 / np.log(2)}
    for name, value in expected.items():
        np.testing.assert_allclose(float(last[f"{name}_stderr"]), value, rtol=1e-4)
    assert 0.05 < float(last["entropy_stderr"]) < 0.5
    errors = [name for name in names if name.endswith("_stderr")]
    assert len(errors) == 4 and {row[name] for row in rows if row["run"] == "one" for name in errors} == {""}


@pytest.mark.parametrize("stride", [None, 64])
def test_runs_are_compared_document_by_document(tmp_path, stride, capsys):
    runs, units = [uneven_run("nope"), uneven_run("rope", -0.1), uneven_run("t5", 0.2)], Units(stride)
    write(tmp_path, runs, units)
    names, rows = read(tmp_path / "differences.csv")
    assert names == DIFFERENCE_COLUMNS.split()
    pairs = itertools.product([("rope", "nope"), ("t5", "nope"), ("t5", "rope")], ["128", "256"])
    assert [((row["run"], row["reference"]), row["length"]) for row in rows] == list(pairs)
    assert {row["position_start"] for row in rows} == ({"64", "128"} if stride is None else {"0"})
    for row, shift in zip(rows, np.repeat([-0.1, 0.2, 0.3], 2), strict=True):
        error, alone = float(row["difference_stderr"]), runs[0].results[128].between(64, 128).nll.stderr[0]
        assert abs(float(row["difference"]) - shift) < 4 * error < 0.4 * alone
        assert (row["unit"], row["documents"], row["protocol"]) == ("nats per token", "9", units.protocol)
    show(runs, units)
    printed = " ".join(capsys.readouterr().out.split())
    assert "Loss minus that of nope, nats per token" in printed and "paired by document" in printed
    shown = plus_minus(f"{float(rows[0]['difference']):+.3f}", float(rows[0]["difference_stderr"]), 3)
    assert f"rope rope {shown}" in printed
    assert "±: standard error over documents" in printed and "One document has none" not in printed


def test_one_document_has_no_error_and_the_table_says_so(tmp_path, capsys):
    runs = [synthetic_run("nope", documents=1), synthetic_run("rope", documents=1)]
    write(tmp_path, runs)
    assert {row["difference_stderr"] for row in read(tmp_path / "differences.csv")[1]} == {""}
    show(runs)
    printed = " ".join(capsys.readouterr().out.split())
    assert "One document has none." in printed and "7.39 7.39" in printed and "+0.000 +0.000" in printed
