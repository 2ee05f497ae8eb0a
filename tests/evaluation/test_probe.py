"""Linear probes for positions: the regression, its scores, and what they find in decoders."""

import csv
import shutil

import jax
import numpy as np
import pytest

from nope_jax import Decoder, ModelConfig
from nope_jax.checkpoint import load_model
from nope_jax.data import load_corpus
from nope_jax.evaluation import probe
from nope_jax.evaluation.common.activations import Activations, walk
from nope_jax.evaluation.probe import Moments, Probe, Score, fit_probes, score_probes
from tests.support.drawn_model import drawn_model
from tests.support.tiny_runs import call_eval, write_documents, write_run


def samples(count: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features of unlike sizes, far from 0 and correlated, and a target that they explain in part."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) * 10.0 ** rng.integers(-2, 3, width)
    x += 50 * rng.normal(size=width)
    return x, x @ rng.normal(size=width) / 100 + rng.normal(size=count)


def fitted(x: np.ndarray, y: np.ndarray, ridge: float, pieces: int = 3) -> Probe:
    moments = Moments()
    for part in zip(np.array_split(x, pieces), np.array_split(y, pieces), strict=True):
        moments.add(*part)
    return moments.fit(ridge)


@pytest.mark.parametrize("pieces", [1, 7])
def test_without_ridge_it_is_least_squares(pieces):
    x, y = samples(300, 6)
    probe = fitted(x, y, 1e-13, pieces)
    wanted = np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]), y, rcond=None)[0]
    np.testing.assert_allclose(probe.weights, wanted[:-1], rtol=1e-6)
    np.testing.assert_allclose(probe.bias, wanted[-1], rtol=1e-6)
    np.testing.assert_allclose(probe(x), x @ wanted[:-1] + wanted[-1], rtol=1e-6, atol=1e-6)


def test_ridge_is_relative_to_the_variance_of_each_feature():
    x, y = samples(300, 5)
    standard = (x - x.mean(0)) / x.std(0)
    # Ridge regression of standardised features as least squares: a row of sqrt(ridge · samples) for each weight.
    more = np.sqrt(0.3 * len(x)) * np.eye(5)
    weights = np.linalg.lstsq(np.vstack([standard, more]), np.append(y - y.mean(), np.zeros(5)), rcond=None)[0]
    np.testing.assert_allclose(fitted(x, y, 0.3)(x), standard @ weights + y.mean(), rtol=1e-8, atol=1e-8)
    scaled = x * 10.0 ** np.arange(5) + 7
    np.testing.assert_allclose(fitted(scaled, y, 0.3)(scaled), fitted(x, y, 0.3)(x), rtol=1e-7, atol=1e-7)


def test_a_feature_that_does_not_vary_gets_no_weight():
    x, y = samples(100, 3)
    x[:, 1] = 1e5 / 3
    probe = fitted(x, y, 1e-12)
    assert probe.weights[1] == 0
    np.testing.assert_allclose(probe(x), fitted(x[:, [0, 2]], y, 1e-12)(x[:, [0, 2]]), rtol=1e-6, atol=1e-6)
    x[:, 1] = 0
    assert np.isfinite(fitted(x, y, 1e-12).weights).all()


def test_scores_are_their_definitions():
    rng = np.random.default_rng(0)
    positions = np.arange(20.0)
    predicted = positions + rng.normal(size=(5, 20))
    score = Score()
    for part in (predicted[:2], predicted[2:]):
        score.add(part, positions)
    error = predicted - positions
    np.testing.assert_allclose(score.mae.value, np.abs(error).mean())
    np.testing.assert_allclose(score.r2.value, 1 - (error**2).mean() / positions.var())
    np.testing.assert_allclose(score.mae.stderr, np.abs(error).mean(1).std(ddof=1) / np.sqrt(5))
    np.testing.assert_allclose(score.r2.stderr, (error**2).mean(1).std(ddof=1) / np.sqrt(5) / positions.var())
    mean, one = Score(), Score()
    mean.add(np.full((3, 20), 9.5), positions)
    one.add(np.full((3, 1), 9.5), positions[4:5])
    assert mean.r2.value == 0 and mean.mae.value == 5
    assert np.isnan(one.r2.value) and one.mae.value == 5.5


# Hidden states


class Layers(Decoder):
    """Stands for a decoder of two layers, of which only the number is asked for."""

    class config:  # noqa: N801
        num_layers = 2

    def __init__(self):
        pass


def constructed(model, tokens):
    """Layer 0: noise. Layer 1: the position, turned into 8 features. Layer 2: so up to position 15, then at rest."""
    batch, length = tokens.shape
    rng = np.random.default_rng(int(tokens[0, 0]))
    position = np.arange(length) * np.ones((batch, 1))
    direction, mean = np.random.default_rng(7).normal(size=(2, 8))
    features = [rng.normal(size=(batch, length, 8))]
    for known in (position, np.minimum(position, 15)):
        features.append(known[..., None] * direction + mean + 1e-3 * rng.normal(size=(batch, length, 8)))
    for layer, hidden in enumerate(features):
        yield Activations(layer, jax.device_put(hidden.astype(np.float32)), None)


def test_what_carries_the_position_is_read_and_noise_is_not(monkeypatch):
    monkeypatch.setattr(probe, "walk", constructed)
    documents = [np.full(64, i) for i in range(48)]
    probes = fit_probes(Layers(), documents[::2], 16, ridge=1e-6, batch_size=8)
    (scores,) = score_probes(Layers(), documents[1::2], 16, [(probes, 16)], batch_size=8)
    noise, linear, resting = (score.r2.value for score in scores)
    assert -0.1 < noise < 0.1 and linear > 0.9999 and resting > 0.9999
    assert scores[0].mae.value > 3 and scores[1].mae.value < 0.01

    # Past the length that they were fitted at, the one goes on and the other stays at 15.
    own = fit_probes(Layers(), documents[::2], 32, ridge=1e-6, start=16, batch_size=8)
    in_window, beyond = score_probes(Layers(), documents[1::2], 32, [(probes, 16), (own, 32)], start=16, batch_size=8)
    positions = np.arange(16, 32)
    assert in_window[1].r2.value > 0.999 and beyond[1].r2.value > 0.999
    np.testing.assert_allclose(in_window[2].mae.value, (positions - 15).mean(), rtol=1e-3)
    np.testing.assert_allclose(in_window[2].r2.value, 1 - ((positions - 15.0) ** 2).mean() / positions.var(), rtol=1e-3)
    # No other probe finds what is not there, nor is it blamed for the positions that it has not seen.
    assert -0.1 < beyond[2].r2.value < 0.1 and -0.1 < beyond[0].r2.value < 0.1


def test_the_last_batch_is_filled_up_and_counts_once(monkeypatch):
    shapes, read = [], []

    def watched(model, tokens):
        shapes.append(tokens.shape)
        yield from constructed(model, tokens)

    monkeypatch.setattr(probe, "walk", watched)
    documents = [np.full(20, i) for i in range(5)]
    (scores,) = score_probes(
        Layers(), documents, 16, [([Probe(np.zeros(8), 0.5)] * 3, 16)], batch_size=4, advance=read.append
    )
    assert shapes == [(4, 16), (4, 16)] and read == [4 * 16, 16]
    assert [len(score.absolute) for score in scores] == [5] * 3
    np.testing.assert_allclose(scores[0].mae.value, np.abs(np.arange(16) - 8).mean())


@pytest.mark.parametrize(
    ("encoding", "low", "high"),
    [
        ("nope", -0.2, 0.1),
        pytest.param("sinusoidal", 0.98, 1, marks=pytest.mark.slow),
        ("learned", 0.98, 1),
    ],
)
def test_positions_enter_with_the_encodings_that_add_them(encoding, low, high):
    config = ModelConfig(
        vocab_size=8, num_layers=1, num_heads=2, model_dim=32, mlp_dim=16, encoding=encoding, train_length=16
    )
    model = drawn_model(config)
    documents = list(np.random.default_rng(0).integers(0, 8, (64, 16)))
    probes = fit_probes(model, documents[::2], 16, ridge=1e-6, batch_size=32)
    (scores,) = score_probes(model, documents[1::2], 16, [(probes, 16)], batch_size=32)
    assert len(scores) == 2
    assert low < scores[0].r2.value <= high


# The evaluation


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_documents(folder)
    write_run(folder, "alibi", encoding="alibi")
    write_run(folder, "learned", encoding="learned")
    (folder / "empty").mkdir()
    shutil.copy(folder / "alibi" / "config.json", folder / "empty")
    return folder


def read(out):
    with (out / "probe.csv").open() as file:
        return list(csv.DictReader(file))


def of_tokens(model, tokens):
    """Features of two layers that depend on each token, its position and the layer alone."""
    angles = np.asarray(tokens)[..., None] * np.arange(1, 9) + 0.1 * np.arange(tokens.shape[1])[:, None]
    for layer in range(3):
        yield Activations(layer, jax.device_put(np.sin(angles * (layer + 1)).astype(np.float32)), None)


@pytest.mark.parametrize("walk", [of_tokens, pytest.param(walk, marks=pytest.mark.slow)])
def test_probe_measures_what_each_run_can_read(workdirs, tmp_path, monkeypatch, capsys, walk):
    monkeypatch.setattr(probe, "walk", walk)
    words = f"probe --workdirs {workdirs}/alibi {workdirs}/learned --lengths 32 8 --out {tmp_path}/a"
    assert call_eval(monkeypatch, f"{words} --probe.documents 5 --probe.ridge 0.01", pictures=True) == 0
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"probe.csv", "probe.png", "report.html", "sections"}
    rows = read(tmp_path / "a")
    assert list(rows[0]) == [
        *("run", "encoding", "train_length", "length", "layer", "probe", "r2", "mae"),
        *("position_start", "position_end", "documents", "r2_stderr", "mae_stderr"),
    ]
    measured = list(dict.fromkeys((r["run"], r["length"], r["probe"], r["position_start"]) for r in rows))
    alibi = [("16", "in-window", "0"), ("8", "in-window", "0"), ("8", "own", "0")]
    past = [("32", probe, "16") for probe in ("in-window", "own")]
    assert measured == [*[("alibi", *what) for what in (*alibi, *past)], *[("learned", *what) for what in alibi]]
    assert [row["layer"] for row in rows] == ["0", "1", "2"] * len(measured)

    # One number by another way: ridge regression on all hidden states at once.
    config, model, _ = load_model(workdirs / "alibi")
    corpus = load_corpus(config.data, "validation")
    order = np.random.default_rng(0).permutation(len(corpus))
    order = order[np.argsort(-np.sum([corpus.lengths[order] > n for n in (8, 16, 32)], axis=0), kind="stable")][:5]
    hidden = [np.asarray([step.stream[0] for step in walk(model, corpus[i][None, :32])][1], np.float64) for i in order]
    x = np.concatenate([states[:16] for states in hidden[::2]])
    y = np.tile(np.arange(16), 3)
    standard = (x - x.mean(0)) / x.std(0)
    width = x.shape[1]
    weights = np.linalg.solve(
        standard.T @ standard / len(x) + 0.01 * np.eye(width), standard.T @ (y - y.mean()) / len(x)
    )
    for length, start, end in (("16", 0, 16), ("32", 16, 32)):
        tested = np.concatenate([states[start:end] for states in hidden[1::2]])
        error = (tested - x.mean(0)) / x.std(0) @ weights + y.mean() - np.tile(np.arange(start, end), 2)
        wanted = {"run": "alibi", "length": length, "layer": "1", "probe": "in-window"}
        (row,) = [row for row in rows if wanted.items() <= row.items()]
        np.testing.assert_allclose(float(row["mae"]), np.abs(error).mean(), rtol=1e-4)
        first, second = np.abs(error).reshape(2, -1).mean(1)  # of two documents
        np.testing.assert_allclose(float(row["mae_stderr"]), abs(first - second) / 2, rtol=1e-3)
        np.testing.assert_allclose(float(row["r2"]), 1 - (error**2).mean() / np.arange(start, end).var(), rtol=1e-4)
        assert row["documents"] == "2"

    printed = " ".join(capsys.readouterr().out.split())
    assert "learned cannot read 32 tokens: its learned encoding has 16 positions." in printed
    page = (tmp_path / "a" / "report.html").read_text()
    assert "Positions in the hidden states" in page and page.count("data:image/png") == 1 and "eval.py probe" in page


@pytest.mark.slow
def test_what_was_measured_is_kept_when_interrupted(workdirs, tmp_path, monkeypatch):
    def stop(workdir, mesh, **_):
        if workdir.name == "learned":
            raise KeyboardInterrupt
        return load_model(workdir, mesh)

    monkeypatch.setattr("nope_jax.trained.load_model", stop)
    words = f"probe --workdirs {workdirs}/alibi {workdirs}/learned --lengths 16 --out {tmp_path} --probe.documents 2"
    assert call_eval(monkeypatch, words) == 130
    assert {row["run"] for row in read(tmp_path)} == {"alibi"} and (tmp_path / "report.html").exists()


BAD = {
    "nowhere is not the workdir of a run": ("nowhere", "--lengths 8"),
    "empty: no checkpoint yet": ("empty", "--lengths 8"),
    "--lengths: learned reads none of them, its learned encoding has 16 positions": ("alibi learned", "--lengths 17"),
    "--lengths: a probe needs two validation documents that reach length 9999, ": ("alibi", "--lengths 8 9999"),
    "--probe.documents must be at least 2, half of which": ("alibi", "--lengths 8 --probe.documents 1"),
    "--probe.ridge must be greater than 0, not 0.0": ("alibi", "--lengths 8 --probe.ridge 0"),
    "--lengths is missing": ("alibi", ""),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line_and_writes_nothing(workdirs, tmp_path, monkeypatch, capsys, message):
    runs, more = BAD[message]
    folders = " ".join(str(workdirs / run) for run in runs.split())
    assert call_eval(monkeypatch, f"probe --workdirs {folders} --out {tmp_path}/out {more}") == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
