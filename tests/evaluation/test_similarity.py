"""The activations of a decoder, layer by layer, and the comparison of two runs' attention."""

import csv
import dataclasses
import itertools
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nope_jax import Decoder, ModelConfig
from nope_jax.checkpoint import load_model
from nope_jax.data import load_corpus
from nope_jax.encodings import DistanceLogit, Encoding
from nope_jax.evaluation import similarity
from nope_jax.evaluation.common import activations
from nope_jax.evaluation.common.activations import Activations, walk
from nope_jax.evaluation.similarity import (
    COLUMNS,
    Similarity,
    distance_bands,
    head_distances,
    share_by_band,
    weight_by_distance,
)
from nope_jax.models.layers import norm
from tests.support.drawn_model import drawn_model
from tests.support.tiny_runs import call_eval, copy_run, write_documents, write_run

TINY = ModelConfig(vocab_size=32, num_layers=3, num_heads=4, num_kv_heads=2, model_dim=32, mlp_dim=48, train_length=24)
TOKENS = np.random.default_rng(1).integers(0, 32, (2, 24)).astype(np.int32)


def decoder(**changes) -> Decoder:
    return drawn_model(dataclasses.replace(TINY, **changes))


@dataclasses.dataclass(frozen=True)
class LooksBack(Encoding):
    """Attends to the token so far back, and to itself where there is none."""

    distance: int = 0

    def _logit(self, _, distance):
        return jnp.broadcast_to(-1e4 * jnp.abs(distance - self.distance), (4, *distance.shape)).astype(jnp.float32)

    def logit(self, params, query, key, query_features=None, key_features=None):
        return DistanceLogit(self._logit)


def random_weights(heads: int, length: int, seed: int, zeros: float = 0.3) -> np.ndarray:
    """Causal attention, some of it exactly 0 within what a query sees."""
    rng = np.random.default_rng(seed)
    weights = np.tril(rng.exponential(size=(heads, length, length)) ** 3)
    weights *= (rng.random(weights.shape) > zeros) | np.eye(length, dtype=bool)
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """The Jensen-Shannon divergence of two rows by its definition."""
    p, q = p.astype(np.float64), q.astype(np.float64)
    m = (p + q) / 2
    return sum((x[x > 0] * np.log(x[x > 0] / m[x > 0])).sum() for x in (p, q)) / 2


def divergences(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return np.array([[np.mean([divergence(*rows) for rows in zip(a, b, strict=True)]) for b in q] for a in p])


# Inside


@pytest.mark.parametrize(
    "encoding",
    [
        ("randomized", "forgetting"),  # positions, features
        pytest.param(("randomized", "shaw", "forgetting"), marks=pytest.mark.slow),  # terms of logit and value too
        pytest.param(("sinusoidal", "rope", "cope"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_walk_ends_where_the_decoder_does_and_its_weights_have_the_entropy_of_the_statistics(encoding):
    model = decoder(encoding=encoding)
    hidden, stats = jax.jit(lambda tokens: model.hidden(tokens, return_stats=True))(TOKENS)
    before = activations._pass_layer._cache_size()
    steps = list(walk(model, TOKENS, weights=True))
    assert activations._pass_layer._cache_size() == before + len(encoding)  # a program for all layers of one kind
    assert [step.layer for step in steps] == [0, 1, 2, 3] and steps[0].weights is None
    np.testing.assert_allclose(norm(steps[-1].stream, model.norm[...]), hidden, rtol=1e-5, atol=1e-5)

    weights = np.stack([step.weights for step in steps[1:]]).astype(np.float64)
    assert weights.shape == (3, 2, 4, 24, 24)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(weights, np.tril(weights))
    entropy = -(weights * np.log(np.where(weights > 0, weights, 1))).sum(-1)
    np.testing.assert_allclose(entropy, stats.entropy, rtol=1e-5, atol=2e-6)


def test_a_walk_begins_after_the_input_place_and_shows_weights_only_when_asked():
    plain, positioned = decoder(encoding="nope"), decoder(encoding="sinusoidal")
    first = next(walk(plain, TOKENS))
    np.testing.assert_allclose(first.stream, plain.embedding[...][TOKENS] * 32**0.5, rtol=1e-6)
    assert not np.allclose(first.stream, next(walk(positioned, TOKENS)).stream)
    assert [step.weights for step in walk(plain, TOKENS)] == [None] * 4


def test_layers_in_bfloat16_have_weights_in_float32():
    steps = list(walk(decoder(dtype="bfloat16"), TOKENS, weights=True))
    assert steps[1].stream.dtype == jnp.bfloat16 and steps[1].weights.dtype == jnp.float32
    np.testing.assert_allclose(steps[3].weights.sum(-1), 1, rtol=1e-6)


def test_layers_are_those_of_the_schedule():
    model = decoder(encoding=("nope", LooksBack(1)))
    weights = [np.asarray(step.weights) for step in walk(model, TOKENS, weights=True) if step.layer]
    looks_back = np.eye(24, k=-1)
    looks_back[0, 0] = 1
    assert [np.array_equal(w, np.broadcast_to(looks_back, w.shape)) for w in weights] == [False, True, False]


@pytest.mark.slow
def test_layers_called_in_turn_are_the_decoder():
    model = decoder(encoding=("t5", "nope"))
    x, arguments = model.embed(TOKENS)
    for index in range(3):
        shared, keywords = arguments[index % 2]
        x = model.layer(index)(x, shared, **keywords)[0]
    hidden, _ = jax.jit(model.hidden)(TOKENS)
    np.testing.assert_allclose(norm(x, model.norm[...]), hidden, rtol=1e-5, atol=1e-5)


def test_a_walk_refuses_what_the_decoder_refuses():
    with pytest.raises(ValueError, match="tokens must be between 0 and 31"):
        next(walk(decoder(), TOKENS + 30))
    with pytest.raises(ValueError, match="positions must be between 0 and 23"):
        next(walk(decoder(encoding="learned"), np.zeros((1, 25), np.int32)))


# Distances


def test_distance_is_the_divergence_by_its_definition():
    p, q = random_weights(3, 17, seed=0), random_weights(2, 17, seed=1)
    found = np.asarray(head_distances(p, q))
    np.testing.assert_allclose(found, divergences(p, q), rtol=1e-5)
    np.testing.assert_allclose(found, np.asarray(head_distances(q, p)).T, rtol=1e-6)
    assert (found > 0).all() and (found < math.log(2)).all()


def test_distance_of_rows_that_share_no_token_is_the_bound_and_of_equal_rows_0():
    p = np.zeros((1, 4, 4), np.float32)
    q = np.zeros((1, 4, 4), np.float32)
    p[..., :2], q[..., 2:] = 0.5, 0.5
    np.testing.assert_allclose(head_distances(p, q), math.log(2), rtol=1e-6)
    assert head_distances(p, q)[0, 0] <= math.log(2)
    weights = random_weights(3, 33, seed=2)
    assert (np.diag(head_distances(weights, weights)) == 0).all()


def test_distance_of_nearly_equal_rows_is_not_lost_in_rounding():
    p = random_weights(1, 16, seed=3)
    q = p * (1 + 1e-2 * np.random.default_rng(4).normal(size=p.shape).astype(np.float32))
    q /= q.sum(-1, keepdims=True)
    wanted = divergences(p, q)
    assert wanted[0, 0] < 2e-5
    np.testing.assert_allclose(head_distances(p, q), wanted, rtol=2e-3)


def test_distance_of_extreme_ratios_is_finite():
    p = np.array([[[1.0, 0.0, 0.0], [1 - 1e-30, 1e-30, 0.0], [1.0, 1e-44, 0.0]]], np.float32)
    q = np.array([[[1e-30, 1 - 1e-30, 0.0], [1e-20, 1.0, 0.0], [1e-44, 1.0, 0.0]]], np.float32)
    np.testing.assert_allclose(head_distances(p, q), divergences(p, q), rtol=1e-6)


# Weight by distance


def test_weight_by_distance_is_the_mean_of_each_diagonal():
    weights = random_weights(3, 13, seed=5)
    wanted = [[np.diagonal(head, -d).astype(np.float64).mean() for d in range(13)] for head in weights]
    np.testing.assert_allclose(weight_by_distance(weights), wanted, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("back", [0, 5])
def test_a_head_that_looks_at_one_distance_has_its_weight_there(back):
    *_, last = walk(decoder(encoding=LooksBack(back)), TOKENS, weights=True)
    by_distance = np.asarray(weight_by_distance(last.weights[0]))
    # The first queries have no token so far back: they look at the first one, as far as they can.
    wanted = np.zeros(24)
    wanted[:back] = 1 / (24 - np.arange(back))
    wanted[back] = 1
    np.testing.assert_allclose(by_distance, np.tile(wanted, (4, 1)), rtol=1e-6)


def test_bands_double_and_their_shares_sum_to_1():
    assert distance_bands(1).tolist() == [0, 1] and distance_bands(2).tolist() == [0, 1, 2]
    assert distance_bands(20).tolist() == [0, 1, 2, 4, 8, 16, 20]
    weights = random_weights(3, 20, seed=6)
    shares = share_by_band(np.asarray(weight_by_distance(weights), np.float64))
    np.testing.assert_allclose(shares.sum(-1), 1, rtol=1e-5)
    distance = np.subtract.outer(np.arange(20), np.arange(20))
    for band, (start, end) in enumerate(itertools.pairwise([0, 1, 2, 4, 8, 16, 20])):
        inside_band = (distance >= start) & (distance < end)
        np.testing.assert_allclose(shares[:, band], (weights * inside_band).sum((1, 2)) / 20, rtol=1e-5)


# Comparison of runs


@pytest.mark.usefixtures("stand_ins")
def test_the_closest_heads_are_found_over_all_pairs_and_documents(monkeypatch):
    length, layers = 12, 2
    streams = {
        "a": [random_weights(3, length, seed) for seed in (10, 11, 12, 13)],
        "b": [random_weights(2, length, seed) for seed in (20, 21, 22, 23)],
    }
    streams["b"][0][1], streams["b"][2][1] = streams["a"][0][2], streams["a"][2][2]  # layer 0: the same head, elsewhere

    def constructed(model, tokens, *, weights):
        assert weights
        document = int(tokens[0, 0])
        yield Activations(0, None, None)
        for layer in range(layers):
            yield Activations(layer + 1, None, jnp.asarray(streams[model][layers * document + layer])[None])

    monkeypatch.setattr(similarity, "walk", constructed)
    comparison = Similarity(("a", "b"), length)
    for document in range(2):
        comparison.add(["a", "b"], np.full((1, length), document), 1)

    pairs = [divergences(a, b) for a, b in zip(streams["a"], streams["b"], strict=True)]
    wanted = [(pairs[0] + pairs[2]) / 2, (pairs[1] + pairs[3]) / 2]
    np.testing.assert_allclose(comparison.distances.value, wanted, rtol=1e-5, atol=1e-7)
    apart = [np.abs(pairs[0] - pairs[2]) / 2, np.abs(pairs[1] - pairs[3]) / 2]  # standard deviation / sqrt(2) of two
    np.testing.assert_allclose(comparison.distances.stderr, apart, rtol=1e-3, atol=1e-7)
    averages = np.array(pairs).mean((1, 2)).reshape(2, 2)  # document, layer
    np.testing.assert_allclose(comparison.mean_distances.stderr, np.abs(averages[0] - averages[1]) / 2, rtol=1e-3)
    (zero, no_error, *heads), (distance, _, *others) = comparison.closest()
    assert no_error == 0
    assert zero == 0 and heads == [2, 1]
    np.testing.assert_allclose(distance, wanted[1].min(), rtol=1e-5)
    assert wanted[1][tuple(others)] == wanted[1].min()
    by_distance = [np.diagonal(streams["b"][layer][1], -3).mean() for layer in (1, 3)]
    np.testing.assert_allclose(comparison.weights[1][1, 1, 3], np.mean(by_distance), rtol=1e-5)


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_documents(folder)
    write_run(folder, "nope")
    copy_run(folder / "nope", folder / "same")
    copy_run(folder / "nope", folder / "learned", {"model.encoding": "learned", "model.train_length": 12})
    copy_run(folder / "nope", folder / "small", {"model.vocab_size": 300})
    copy_run(folder / "nope", folder / "other", {"data.source": f"text:{folder}/text/*.txt"})
    (folder / "empty").mkdir()
    shutil.copy(folder / "nope" / "config.json", folder / "empty")
    return folder


@pytest.fixture(scope="module")
def unlike(workdirs):
    """Two more runs, of other sizes."""
    write_run(workdirs, "alibi", encoding="alibi", num_heads=4)
    write_run(workdirs, "deep", encoding="learned", num_layers=3, seed=5, train_length=12)
    return workdirs


def read(out):
    with (out / "similarity.csv").open() as file:
        rows = list(csv.DictReader(file))
    with np.load(out / "similarity.npz") as arrays:
        return rows, dict(arrays)


def test_two_copies_of_one_run_are_at_distance_0(workdirs, tmp_path, monkeypatch, capsys):
    words = f"similarity --workdirs {workdirs}/nope {workdirs}/same --out {tmp_path}/a/b --similarity.documents 3"
    assert call_eval(monkeypatch, words, pictures=True) == 0
    rows, arrays = read(tmp_path / "a" / "b")
    assert [[row[name] for name in ("layer", "distance", "head_a", "head_b")] for row in rows] == [
        ["0", "0", "0", "0"],
        ["1", "0", "0", "0"],
    ]
    assert (arrays["distances"][:, [0, 1], [0, 1]] == 0).all() and (arrays["distances"][:, 0, 1] > 0).all()
    np.testing.assert_array_equal(arrays["nope/weight_by_distance"], arrays["same/weight_by_distance"])
    assert list(rows[0]) == COLUMNS.split() and {row["documents"] for row in rows} == {"3"}
    assert all(float(row["distance_stderr"]) == 0 < float(row["mean_distance_stderr"]) for row in rows)
    printed = " ".join(capsys.readouterr().out.split())
    assert "±: standard error over documents" in printed
    assert "Attention of nope and same" in printed and "first 16 tokens of 3 validation documents" in printed


@pytest.mark.slow
def test_runs_of_other_sizes_are_compared_on_the_layers_they_share(unlike, tmp_path, monkeypatch, capsys):
    words = f"similarity --workdirs {unlike}/alibi {unlike}/deep --out {tmp_path} --similarity.documents 2"
    assert call_eval(monkeypatch, words) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"similarity.csv", "similarity.npz", "similarity.png", "report.html", "sections"}
    rows, arrays = read(tmp_path)
    assert {name: array.shape for name, array in arrays.items()} == {
        "distances": (2, 4, 2),
        "distances_stderr": (2, 4, 2),
        "alibi/weight_by_distance": (2, 4, 12),
        "deep/weight_by_distance": (3, 2, 12),
    }
    assert "the first 2 are compared" in " ".join(capsys.readouterr().out.split())

    # The numbers are those of the saved models on the documents that were chosen.
    config, a, _ = load_model(unlike / "alibi")
    b = load_model(unlike / "deep")[1]
    corpus = load_corpus(config.data, "validation")
    order = np.random.default_rng(0).permutation(len(corpus))[:2]
    wanted = np.zeros((2, 4, 2))
    for index in order:
        inner = [list(walk(model, corpus[index][None, :12], weights=True)) for model in (a, b)]
        for layer in range(2):
            wanted[layer] += divergences(*(np.asarray(steps[layer + 1].weights[0]) for steps in inner)) / 2
    np.testing.assert_allclose(arrays["distances"], wanted, rtol=1e-4, atol=1e-7)
    for layer, row in enumerate(rows):
        np.testing.assert_allclose(float(row["distance"]), wanted[layer].min(), rtol=1e-4)
        assert wanted[layer][int(row["head_a"]), int(row["head_b"])] == wanted[layer].min()

    page = (tmp_path / "report.html").read_text()
    assert "Attention of two runs" in page and page.count("data:image/png") == 1 and "eval.py similarity" in page


@pytest.mark.slow
def test_what_was_read_is_kept_when_interrupted(unlike, tmp_path, monkeypatch):
    add = Similarity.add

    def stop(self, models, batch, count):
        if self.documents == 2:
            raise KeyboardInterrupt
        add(self, models, batch, count)

    monkeypatch.setattr(Similarity, "add", stop)
    words = f"similarity --workdirs {unlike}/nope {unlike}/alibi --out {tmp_path} --similarity.length 8"
    assert call_eval(monkeypatch, words) == 130
    assert len(read(tmp_path)[0]) == 2
    assert "first 8 tokens of 2 validation documents" in (tmp_path / "report.html").read_text()


BAD = {
    "--workdirs must be the two runs to compare, not 1": ("nope", ""),
    "--workdirs must be the two runs to compare, not 3": ("nope same small", ""),
    "nowhere is not the workdir of a run": ("nope nowhere", ""),
    "empty: no checkpoint yet": ("nope empty", ""),
    "model.vocab_size differs between the runs (nope: 256, small: 300)": ("nope small", ""),
    "data.tokenizer differs between the runs (nope: bytes, ": ("nope words", ""),
    "data.source differs between the runs (nope: ": ("nope other", ""),
    "--similarity.length: learned cannot read 13 tokens, its learned encoding has 12 positions": (
        "nope learned",
        "--similarity.length 13",
    ),
    "--similarity.length: no validation document reaches length 9999": ("nope same", "--similarity.length 9999"),
    "--similarity.documents must be at least 1, not 0": ("nope same", "--similarity.documents 0"),
    "unknown field --lengths": ("nope same", "--lengths 8"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line_and_writes_nothing(workdirs, tmp_path, monkeypatch, capsys, message):
    runs, more = BAD[message]
    if "words" in runs:
        vocabulary = '"vocab": {"a": 0, "[SEP]": 1}, "unk_token": "a"'
        (tmp_path / "words.json").write_text('{"version": "1.0", "model": {"type": "WordLevel", ' + vocabulary + "}}")
        copy_run(workdirs / "nope", tmp_path / "words", {"data.tokenizer": str(tmp_path / "words.json")})
    folders = [workdirs / run if (workdirs / run).exists() else tmp_path / run for run in runs.split()]
    words = f"similarity --workdirs {' '.join(map(str, folders))} --out {tmp_path}/out {more}"
    assert call_eval(monkeypatch, words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
