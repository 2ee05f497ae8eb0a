"""Tuning: factors and scalings that are found, and the run that has them.

The runs are hand-made: documents are drawn from a decoder, the teacher, and a run is that decoder with its queries
divided by known factors. No factors can then have a lower expected loss than those.
"""

import csv
import dataclasses
import functools
import json
import math
import os
import shlex
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from matplotlib.figure import Figure

from nope_jax import ModelConfig
from nope_jax import config as configs
from nope_jax.checkpoint import Checkpointer, load_model
from nope_jax.config import Config, DataConfig
from nope_jax.data import load_corpus
from nope_jax.encodings import (
    ALiBi,
    HeadScale,
    LogN,
    NoPE,
    RoPE,
    SSMax,
    UniformScale,
    Windowed,
    YaRNScaling,
)
from nope_jax.evaluation.common.console import progress_bar
from nope_jax.evaluation.common.evaluation import evaluate
from nope_jax.evaluation.common.placement import Placement, place
from nope_jax.evaluation.registry import Options, TuneConfig
from nope_jax.evaluation.tune import plan as plan_tune
from nope_jax.evaluation.tune import report, search
from nope_jax.evaluation.tune.search import best_factor
from nope_jax.evaluation.tune.state import read_updates
from nope_jax.locks import held
from tests.support.drawn_model import drawn_model
from tests.support.tiny_runs import call_eval

LONG, SHORT, TRAINED = 32, 16, 8
DOCUMENTS = 48
UNIFORM = np.full((2, 2), 1.6, np.float32)
HEADS = np.array([[1.4, 2.2], [0.6, 1.8]], np.float32)
MODEL = ModelConfig(vocab_size=256, num_layers=2, num_heads=2, model_dim=16, encoding="alibi", train_length=TRAINED)
EVERY = TuneConfig(documents=1000)


@functools.cache
def teacher():
    """A decoder whose predictions depend much on where it attends, which is not to be changed."""
    model = drawn_model(MODEL, 1)
    for block in model.blocks:
        block.attention.query[...] *= 4
        block.attention.out[...] *= 3
    model.head[...] *= 4
    return model


def write_run(folder, factors=UNIFORM, source="", model=MODEL, head=1.0):
    """A run whose best factors are these, as train.py would leave it."""
    decoder = nnx.clone(teacher()) if model is MODEL else drawn_model(model, 1)
    for slot, block in enumerate(decoder.blocks):
        block.attention.query[...] /= factors[slot :: len(decoder.blocks), None, :, None]
    decoder.head[...] *= head
    folder.mkdir(parents=True)
    configs.save(Config(model, DataConfig(source=source, context_length=TRAINED)), folder)
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(7, {"params": nnx.state(decoder)})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Documents of the teacher, and runs whose best factors are known."""
    folder = tmp_path_factory.mktemp("tuning")
    random = np.random.default_rng(0)
    texts = random.integers(0, 256, (DOCUMENTS, LONG + 1))
    model = nnx.clone(teacher())
    for i in range(1, LONG + 1):
        scores = np.asarray(logits_of(model, texts), np.float64)[:, i - 1]
        texts[:, i] = (scores + random.gumbel(size=scores.shape)).argmax(-1)
    (folder / "text").mkdir()
    for i, text in enumerate(texts):
        (folder / "text" / f"{i}.txt").write_bytes(bytes(text[: LONG + 1 if i % 4 else SHORT + 1].tolist()))
    source = f"text:{folder}/text"
    write_run(folder / "uniform", UNIFORM, source)
    write_run(folder / "heads", HEADS, source)
    return folder


def run(workdir, out, method, lengths=(SHORT, LONG), settings=EVERY, **overrides):
    """Calls tune; what tune.json then says, and the tuned config and decoder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw", lambda *_: Figure())  # pictures have tests of their own
        evaluate("tune", Options((workdir,), lengths, out, overrides, settings, method, command="python eval.py tune"))
    config, model, step = load_model(out)
    assert step == 7
    return json.loads((out / "tune.json").read_text()), config, model


def documents(workdir, length, split="train"):
    """All documents of a split that reach a length, cut to it and its last target."""
    corpus = load_corpus(configs.load(workdir).data, split)
    return np.stack([corpus[i][: length + 1] for i in range(len(corpus)) if corpus.lengths[i] > length])


@functools.partial(jax.jit, static_argnums=0)
def apply(graphdef, state, tokens, logit_scale):
    return nnx.merge(graphdef, state)(tokens, logit_scale=logit_scale)


ONES = np.ones((2, 2), np.float32)


def logits_of(model, rows, logit_scale=ONES):
    """The logits of all tokens of rows but the last. Padded to one shape, which changes nothing before."""
    tokens = np.pad(rows[:, :-1], [(0, DOCUMENTS - len(rows)), (0, LONG + 1 - rows.shape[1])])
    graphdef, state = nnx.split(model)
    logits = apply(graphdef, jax.tree.map(np.asarray, state), tokens, logit_scale)
    return np.asarray(logits)[: len(rows), : rows.shape[1] - 1]


def row_losses(model, rows, logit_scale=ONES):
    """The mean loss of each row, from the whole logits, in float64."""
    logits = np.asarray(logits_of(model, rows, logit_scale), np.float64)
    top = logits.max(-1, keepdims=True)
    targets = np.take_along_axis(logits, rows[:, 1:, None], -1)[..., 0]
    return (top[..., 0] + np.log(np.exp(logits - top).sum(-1)) - targets).mean(-1)


def full_nll(model, rows, logit_scale=ONES):
    return row_losses(model, rows, logit_scale).mean()


# Methods


@pytest.mark.slow
def test_uniform_finds_the_factor_that_brute_force_finds(folder, tmp_path):
    found, config, model = run(folder / "uniform", tmp_path / "out", "uniform")
    _, source, _ = load_model(folder / "uniform")
    for outcome, length in zip(found["lengths"], (SHORT, LONG), strict=True):
        rows = documents(folder / "uniform", length)

        def loss(factor, rows=rows):
            return full_nll(source, rows, factor * ONES)

        grid = outcome["factor"] + np.arange(-4, 5) / 100
        losses = [loss(float(factor)) for factor in grid]
        assert 0 < np.argmin(losses) < len(grid) - 1
        assert abs(outcome["factor"] - grid[np.argmin(losses)]) <= 0.02
        assert (outcome["length"], outcome["documents"]) == (length, len(rows))
        np.testing.assert_allclose(outcome["loss_at_factor"], min(losses), rtol=1e-5)
        np.testing.assert_allclose(outcome["loss_before"], loss(1.0), rtol=1e-5)
        np.testing.assert_allclose(outcome["loss_after"], loss(found["factor"]), rtol=1e-5)
    assert found["factor"] == found["lengths"][-1]["factor"] != found["lengths"][0]["factor"]
    assert abs(found["factor"] - 1.6) < 0.1  # what the queries were divided by, up to chance
    assert config.model == dataclasses.replace(MODEL, encoding=UniformScale(ALiBi(), found["factor"]))
    np.testing.assert_array_equal(logits_of(model, rows), logits_of(source, rows, found["factor"] * ONES))


def test_uniform_takes_the_factor_of_the_least_loss_at_the_longest_length(folder, tmp_path, monkeypatch, capsys):
    least = {SHORT: 1.25, LONG: 1.6}

    def judge(graphdef, state, batch, factor):
        length, last = batch.tokens.shape[1], np.asarray(batch.tokens)[:, -1]
        return np.asarray(batch.weights)[:, 0] * (1 + (factor - least[length]) ** 2 + last / 256)

    monkeypatch.setattr(search, "_judge", judge)
    found, config, _ = run(folder / "uniform", tmp_path / "out", "uniform")
    for outcome, length in zip(found["lengths"], (SHORT, LONG), strict=True):
        last = documents(folder / "uniform", length)[:, length - 1]
        assert (outcome["length"], outcome["documents"]) == (length, len(last))
        assert abs(outcome["factor"] - least[length]) <= 0.01
        np.testing.assert_allclose(outcome["loss_before"], 1 + (1 - least[length]) ** 2 + last.mean() / 256, rtol=1e-6)
        np.testing.assert_allclose(outcome["loss_at_factor"], 1 + last.mean() / 256, atol=1e-4)
    assert found["factor"] == found["lengths"][-1]["factor"]
    assert config.model == dataclasses.replace(MODEL, encoding=UniformScale(ALiBi(), found["factor"]))
    printed = capsys.readouterr().out
    for outcome in found["lengths"]:
        assert f"{outcome['loss_before']:.4f}" in printed and f"{outcome['factor']:.2f}" in printed
    assert f"{1 + 0.397 * math.log(LONG / TRAINED):.2f}" in printed

    with (tmp_path / "out" / "tune.csv").open() as file:
        table = list(csv.DictReader(file))
    names = {"loss_before": "loss_before", "best_factor": "factor"}
    names |= {"loss_at_best_factor": "loss_at_factor", "loss_after": "loss_after"}
    for row, outcome in zip(table, found["lengths"], strict=True):
        assert (row["run"], row["method"], row["train_length"]) == ("uniform", "uniform", str(TRAINED))
        assert (row["length"], row["documents"]) == (str(outcome["length"]), str(outcome["documents"]))
        for column, name in names.items():
            assert row[column] == f"{outcome[name]:.6g}"
        before, best, after = (
            np.array(outcome["of_documents"][name]) for name in ("before", str(outcome["factor"]), "after")
        )
        assert len(before) == int(row["documents"])
        errors = {"loss_before": before, "loss_at_best_factor": best, "loss_after": after, "gain": before - after}
        for column, values in errors.items():
            np.testing.assert_allclose(float(row[column]), values.mean(), rtol=1e-4)
            error = values.std(ddof=1) / math.sqrt(len(values))
            np.testing.assert_allclose(float(row[f"{column}_stderr"]), error, rtol=1e-4)
        assert f"{before.mean():.4f} ± {before.std(ddof=1) / math.sqrt(len(before)):.3f}" in printed
        assert f"{(before - after).mean():+.4f} ± " in printed


def plan(workdir, out, method, lengths=(SHORT, LONG), settings=EVERY):
    return plan_tune(Options((workdir,), lengths, out, {}, settings, method)).job


def test_documents_are_chosen_from_the_training_split_by_the_seed(folder, tmp_path):
    chosen = []
    for seed in (0, 0, 1):
        job = plan(folder / "uniform", tmp_path / "out", "log-n", settings=TuneConfig(documents=5, seed=seed))
        for length in (SHORT, LONG):
            read = [job.window(i, 0, length) for i in job.documents[length]]
            among = documents(folder / "uniform", length)
            assert len(read) == 5 and all((among == row).all(1).any() for row in read)
        chosen.append(np.stack(read).tolist())
    assert chosen[0] == chosen[1] != chosen[2]


def test_batches_are_windows_anywhere_in_documents_that_reach_the_length(folder, tmp_path):
    corpus = load_corpus(configs.load(folder / "uniform").data, "train")
    texts = [bytes(corpus[i].tolist()) for i in range(len(corpus)) if corpus.lengths[i] > 20]
    settings = TuneConfig(batch_size=4)
    job = plan(folder / "uniform", tmp_path / "out", "head", settings=settings)
    with progress_bar() as bar:
        tuner = search.Tuner(job, job.begin(""), place([job.run.config.model], 4), bar)
    starts = set()
    for step in range(30):
        batch = map(np.asarray, tuner._draw(step, 20))
        for tokens, target, weight in zip(*batch, strict=True):
            window = bytes([*tokens.tolist(), int(target[-1])])
            found = [text.index(window) for text in texts if window in text]
            assert found and weight == 1 and np.array_equal(tokens[1:], target[:-1])
            starts.add(found[0])
    assert starts == set(range(LONG - 20 + 1))
    np.testing.assert_array_equal(tuner._draw(3, 20).tokens, tuner._draw(3, 20).tokens)
    assert not np.array_equal(tuner._draw(3, 20).tokens, tuner._draw(4, 20).tokens)


LEARN = TuneConfig(documents=1000, steps=50, warmup_steps=5, learning_rate=0.1)


@pytest.fixture(scope="module")
def head(folder, tmp_path_factory):
    out, before = tmp_path_factory.mktemp("head") / "out", search._update._cache_size()
    found = run(folder / "heads", out, "head", (LONG,), LEARN)
    assert search._update._cache_size() <= before + 1  # a program for the length
    return out, *found


def test_head_lowers_the_loss_below_that_of_any_uniform_factor(folder, head):
    _, found, _, model = head
    source = load_model(folder / "heads")[1]
    rows = documents(folder / "heads", LONG)
    after = found["lengths"][-1]["loss_after"]
    np.testing.assert_allclose(full_nll(model, rows), after, rtol=1e-5)
    best, uniform = best_factor(lambda factor: full_nll(source, rows, factor * ONES))
    assert after < uniform - 0.02 < found["lengths"][-1]["loss_before"] - 0.1
    assert abs(found["start"] - best) <= 0.01 < abs(best - 1)
    error = np.array(found["learned"]["factors"]) - np.maximum(HEADS, 1)
    assert abs(error).mean() < 0.5 * abs(found["start"] - np.maximum(HEADS, 1)).mean()


def test_head_changes_nothing_else_and_has_exactly_its_factors(folder, head):
    _, found, config, model = head
    source = load_model(folder / "heads")[1]
    assert config.model == dataclasses.replace(MODEL, encoding=HeadScale(ALiBi()))
    given, tuned = (dict(nnx.to_flat_state(nnx.state(decoder))) for decoder in (source, model))
    new = {path for path in tuned if path[-1] == "head_scale"}
    assert set(tuned) - new == set(given) and len(new) == 1
    for path in given:
        np.testing.assert_array_equal(tuned[path][...], given[path][...])
    factors = np.array(found["learned"]["factors"], np.float32)
    assert len(np.unique(factors)) == factors.size
    (path,) = new
    np.testing.assert_array_equal(tuned[path][...], factors)
    rows = documents(folder / "heads", LONG)
    np.testing.assert_array_equal(logits_of(model, rows), logits_of(source, rows, factors))


def test_focus_keeps_factors_at_one_and_above(folder, head, tmp_path):
    _, found, _, _ = head
    least = np.array(found["learned"]["factors"])[1, 0]  # of the head that would be best at 0.6
    assert least == 1 and np.min(found["learned"]["factors"]) == 1
    free = dataclasses.replace(LEARN, focus=False, start="one", steps=20)
    loose, *_ = run(folder / "heads", tmp_path / "out", "head", (LONG,), settings=free)
    assert np.array(loose["learned"]["factors"])[1, 0] < 0.9
    assert loose["lengths"][-1]["loss_after"] < found["lengths"][-1]["loss_after"]


def test_each_update_is_recorded(head):
    lines = [json.loads(line) for line in (head[0] / "tune.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 51))
    assert all(1 <= line["least"] <= line["mean"] <= line["most"] for line in lines)
    np.testing.assert_allclose(lines[-1]["mean"], np.mean(head[1]["learned"]["factors"]), rtol=1e-6)
    assert lines[-1]["most"] == np.max(head[1]["learned"]["factors"])


@pytest.fixture
def free_losses(monkeypatch):
    """Every row of every model has a loss of 1, for which nothing is compiled."""
    monkeypatch.setattr(search, "_judge", lambda graphdef, state, batch, factor: batch.weights[:, 0])


def test_lengths_take_turns_and_the_longest_is_last(folder, tmp_path, monkeypatch, free_losses):
    read, rates = [], []

    def update(graphdef, state, factors, opt_state, batch, rate, least):
        read.append(batch.tokens.shape[1])
        rates.append(rate)
        return factors, opt_state, dict.fromkeys(("loss", "grad_norm", "least", "mean", "most"), 1.0)

    monkeypatch.setattr(search, "_update", update)
    run(folder / "heads", tmp_path / "out", "head", settings=dataclasses.replace(LEARN, steps=49))
    assert read == [LONG] + [SHORT, LONG] * 24
    np.testing.assert_allclose(rates[:5], np.arange(1, 6) * 0.02, rtol=1e-6)
    assert np.argmax(rates) in (4, 5) and 0.01 < rates[-1] < 0.0105
    lines = [json.loads(line) for line in (tmp_path / "out" / "tune.jsonl").read_text().splitlines()]
    assert [(line["length"], line["learning_rate"]) for line in lines] == list(zip(read, rates, strict=True))


@pytest.mark.slow
def test_updates_are_those_of_clipped_adam(folder, tmp_path):
    # With one document to train on, no longer than the window, every batch is known; the other one is for validation.
    texts = tmp_path / "text"
    texts.mkdir()
    for name in "12":
        shutil.copy(folder / "text" / f"{name}.txt", texts / name)
    workdir = write_run(tmp_path / "run", HEADS, f"text:{texts}", head=4.0)  # of large gradients
    settings = TuneConfig(steps=4, warmup_steps=2, batch_size=2, learning_rate=0.3, start="one", focus=False)
    found, *_ = run(workdir, tmp_path / "out", "head", (LONG,), settings)
    source, rows = load_model(workdir)[1], documents(workdir, LONG)
    assert rows.shape == (1, LONG + 1)
    assert found["start"] == 1 and found["lengths"][0]["factor"] is None

    def whole(factors):
        logits = jax.nn.log_softmax(source(rows[:, :-1], logit_scale=factors))
        return -jnp.take_along_axis(logits, rows[:, 1:, None], -1).mean()

    gradient = jax.jit(jax.grad(whole))
    factors, mean, square = np.full((2, 2), found["start"]), np.zeros((2, 2)), np.zeros((2, 2))
    clipped = 0
    for step in range(4):
        grads = np.asarray(gradient(jnp.asarray(factors, jnp.float32)), np.float64)
        norm = np.sqrt((grads**2).sum())
        clipped += norm > 1.5
        grads /= max(1, norm)
        mean, square = 0.9 * mean + 0.1 * grads, 0.95 * square + 0.05 * grads**2
        progress = min(max((step - 2) / 2, 0), 1)
        rate = 0.3 * min((step + 1) / 2, 0.55 + 0.45 * math.cos(math.pi * progress))
        moved = mean / (1 - 0.9 ** (step + 1)) / (np.sqrt(square / (1 - 0.95 ** (step + 1))) + 1e-8)
        factors = factors - rate * moved
    assert clipped
    np.testing.assert_allclose(found["learned"]["factors"], factors, rtol=1e-3)


@pytest.mark.slow
def test_ssmax_learns_s_from_one_over_the_logarithm_of_the_training_length(folder, tmp_path):
    settings = dataclasses.replace(LEARN, steps=8, start="one")
    found, config, model = run(folder / "heads", tmp_path / "out", "ssmax", (LONG,), settings=settings)
    assert found["start"] == 1 / math.log(TRAINED)
    assert config.model.encoding == SSMax(ALiBi(), 1 / math.log(TRAINED))
    factors = np.array(found["learned"]["factors"], np.float32)
    assert factors.min() < 1 and len(np.unique(factors)) == factors.size  # no focus constraint
    np.testing.assert_array_equal(model.blocks[0].attention.position["ssmax"][...], factors)
    rows = documents(folder / "heads", LONG)
    before = nnx.clone(model)
    before.blocks[0].attention.position["ssmax"][...] = jnp.full((2, 2), found["start"])
    assert full_nll(model, rows) < full_nll(before, rows)
    np.testing.assert_allclose(found["lengths"][-1]["loss_after"], full_nll(model, rows), rtol=1e-5)


@pytest.mark.slow
def test_log_n_is_around_every_layer(folder, tmp_path):
    found, config, model = run(folder / "uniform", tmp_path / "out", "log-n", (LONG,))
    assert config.model.encoding == LogN(ALiBi(), TRAINED)
    source = load_model(folder / "uniform")[1]
    rows = documents(folder / "uniform", LONG)
    factor = np.maximum(1, np.log(np.arange(1, LONG + 1)) / np.log(TRAINED))
    logits = logits_of(source, rows, factor[None, None].astype(np.float32))
    np.testing.assert_allclose(logits_of(model, rows), logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["lengths"][0]["loss_before"], full_nll(source, rows), rtol=1e-5)
    np.testing.assert_allclose(found["lengths"][0]["loss_after"], full_nll(model, rows), rtol=1e-5)
    assert not (tmp_path / "out" / "tune.jsonl").exists()


ROPE = ("nope", HeadScale(Windowed(RoPE(base=500.0), 9)))


@pytest.mark.slow
def test_a_scaled_run_is_the_source_with_another_encoding(folder, tmp_path):
    model = dataclasses.replace(MODEL, encoding=ROPE)
    workdir = write_run(tmp_path / "run", 0 * UNIFORM + 0.2, f"text:{folder}/text", model)
    found, config, model = run(workdir, tmp_path / "out", "yarn", (LONG,), TuneConfig(documents=4))
    source = load_model(workdir)[1]
    expected = nnx.merge(nnx.graphdef(model), nnx.state(source))  # the parameters of the one, the encoding of the other
    rows = documents(workdir, LONG)
    assert config.model.encoding == (
        NoPE(),
        HeadScale(Windowed(RoPE(base=500.0, scaling=YaRNScaling(LONG / TRAINED, TRAINED)), 9)),
    )
    np.testing.assert_array_equal(logits_of(model, rows), logits_of(expected, rows))
    losses = row_losses(model, rows), row_losses(source, rows)
    assert not np.allclose(*losses, rtol=1e-2)
    for name, expected in zip(("loss_after", "loss_before"), losses, strict=True):
        assert expected.min() <= found["lengths"][0][name] <= expected.max()


@pytest.fixture(scope="module")
def stopped(folder, tmp_path_factory):
    """A tuning of 14 updates, and what it had left when it was killed within the 13th."""
    whole = tmp_path_factory.mktemp("stopped")
    half, calls, update = whole / "half", [], search._update

    def copied(*arguments):
        calls.append(arguments)
        if len(calls) == 13:
            shutil.copytree(whole / "out", half)
        return update(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_update", copied)
        run(folder / "heads", whole / "out", "head", (LONG,), STOPPED)
    return whole / "out", half


STOPPED = dataclasses.replace(LEARN, steps=14, documents=4)


def test_it_goes_on_as_if_it_had_never_been_stopped(folder, stopped, tmp_path, monkeypatch):
    whole, out = stopped[0], tmp_path / "out"
    shutil.copytree(stopped[1], out, ignore=shutil.ignore_patterns("lock"))  # taken while it ran
    kept = json.loads((out / "tune.json").read_text())
    assert kept["learned"]["updates"] == 10 and len(read_updates(out)) == 12
    assert not (out / "config.json").exists()
    with (out / "tune.jsonl").open("a") as file:
        file.write('{"step": 13, "le')  # cut off by the kill

    losses, updates = [], []
    judge, update = search.Tuner.losses, search._update
    monkeypatch.setattr(search.Tuner, "losses", lambda *arguments: losses.append(arguments) or judge(*arguments))
    monkeypatch.setattr(search, "_update", lambda *arguments: updates.append(arguments) or update(*arguments))
    _, _, model = run(folder / "heads", out, "head", (LONG,), STOPPED)
    assert len(updates) == 4 and len(losses) == 1  # that after it
    for name in "tune.json", "tune.jsonl", "tune.csv":
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    expected, found = (dict(nnx.to_flat_state(nnx.state(m))) for m in (load_model(whole)[1], model))
    assert expected.keys() == found.keys()
    for path in expected:
        np.testing.assert_array_equal(found[path][...], expected[path][...])


OTHERWISE = {
    "--tune.steps: --out .* holds an interrupted tuning with 14, not 15; to resume it, give that value": {
        "settings": dataclasses.replace(STOPPED, steps=15)
    },
    "--tune.focus: .* with True, not False": {"settings": dataclasses.replace(STOPPED, focus=False)},
    "--method: .* with head, not ssmax": {"method": "ssmax"},
    "--lengths: .* with 32, not 16 32": {"lengths": (SHORT, LONG)},
    "--workdirs: .*heads, not .*uniform": {"workdir": "uniform"},
    "of another checkpoint of .*touched, of other documents or by other code": {"workdir": "touched"},
    "tune.jsonl lacks updates that tune.json records": {"removed": "tune.jsonl"},
    "tune.json is not the state of an interrupted tune": {"removed": "tune.json"},
}


@pytest.mark.parametrize("message", OTHERWISE)
def test_it_goes_on_only_with_the_same(folder, stopped, tmp_path, message):
    case = {"workdir": "heads", "method": "head", "settings": STOPPED, "lengths": (LONG,)} | OTHERWISE[message]
    out, workdir = tmp_path / "out", folder / case["workdir"]
    shutil.copytree(stopped[1], out, ignore=shutil.ignore_patterns("lock"))  # taken while it ran
    if case["workdir"] == "touched":
        workdir = tmp_path / "touched"
        shutil.copytree(folder / "heads", workdir)
        (workdir / "checkpoints" / "7").touch()
        kept = (out / "tune.json").read_text()
        (out / "tune.json").write_text(kept.replace(str(folder / "heads"), str(workdir)))
    if "removed" in case:
        (out / case["removed"]).write_text("")
    before = {path: path.read_bytes() for path in out.iterdir()}
    options = Options((workdir,), case["lengths"], out, {}, case["settings"], case["method"])
    with pytest.raises(ValueError, match=message):
        if case["settings"] is STOPPED:  # the model need not be loaded to see it
            plan_tune(options).job.begin("").or_continued(out)
        else:
            evaluate("tune", options)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_of_two_that_write_to_one_folder_the_second_is_refused(folder, tmp_path):
    options = Options((folder / "uniform",), (SHORT,), tmp_path, {}, LEARN, "uniform")
    with held(tmp_path), pytest.raises(ValueError, match=f"{tmp_path} is being written by process {os.getpid()} on"):
        evaluate("tune", options)
    assert not list(tmp_path.iterdir())


def test_what_was_found_is_shown_when_it_is_interrupted(folder, tmp_path, monkeypatch, capsys):
    update, calls = search._update, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return update(*arguments)

    monkeypatch.setattr(search, "_update", interrupted)
    settings, out = dataclasses.replace(LEARN, start="one", documents=4), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(folder / "heads", out, "head", (LONG,), settings)
    found = json.loads((out / "tune.json").read_text())
    assert found["learned"]["updates"] == 2 and np.shape(found["learned"]["factors"]) == (2, 2)
    assert found["lengths"][0]["loss_before"] > 0 and found["lengths"][0]["loss_after"] is None
    assert len((out / "tune.jsonl").read_text().splitlines()) == 2
    assert not (out / "config.json").exists()
    for printed in capsys.readouterr().out, (out / "report.html").read_text():
        assert f"{found['lengths'][0]['loss_before']:.4f}" in printed and "on average after 2 of 50 updates" in printed
    assert plan(folder / "heads", out, "head").out == out  # which is no run yet


def test_a_loss_that_is_not_finite_stops_it(folder, tmp_path):
    broken = np.full((2, 2), np.nan, np.float32)
    workdir = write_run(tmp_path / "run", broken, f"text:{folder}/text")
    settings = dataclasses.replace(LEARN, start="one", documents=4)
    with pytest.raises(FloatingPointError, match="loss is nan at update 1; a smaller --tune.learning_rate"):
        run(workdir, tmp_path / "out", "head", (LONG,), settings)
    assert json.loads((tmp_path / "out" / "tune.json").read_text())["lengths"][0]["loss_before"] is None
    assert not (tmp_path / "out" / "config.json").exists()


# The command line


def command(monkeypatch, *words):
    """Exit status of `python eval.py ...`."""
    return call_eval(monkeypatch, shlex.join(map(str, words)))


def test_the_command_writes_a_run(folder, tmp_path, monkeypatch, capsys, free_losses):
    words = ["--workdirs", folder / "uniform", "--method", "uniform", "--lengths", SHORT, "--out", tmp_path / "out"]
    assert command(monkeypatch, "tune", *words, "--tune.documents", 8) == 0
    files = {"tune.json", "tune.csv", "tune.png", "report.html", "sections"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoints", "config.json"} | files
    found = json.loads((tmp_path / "out" / "tune.json").read_text())
    assert found["command"].startswith("python eval.py tune --workdirs") and found["source"] == str(folder / "uniform")
    assert (found["method"], found["step"], found["settings"]["documents"]) == ("uniform", 7, 8)
    assert f"Written to {tmp_path / 'out'}" in capsys.readouterr().out.replace("\n", "")
    assert command(monkeypatch, "tune", *words) == 2
    assert "holds a run already" in capsys.readouterr().err


@pytest.mark.slow
def test_curves_of_a_tuned_run_gather_how_it_was_tuned(folder, tmp_path, monkeypatch):
    words = ["--workdirs", folder / "uniform", "--method", "log-n", "--lengths", SHORT, "--out", tmp_path / "tuned"]
    assert command(monkeypatch, "tune", *words) == 0
    words = ["--workdirs", folder / "uniform", tmp_path / "tuned", "--lengths", SHORT, "--out", tmp_path / "report"]
    assert command(monkeypatch, *words) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert "by position</h2>" in page and page.count("<h2>tuned: uniform tuned by log-n</h2>") == 1


REFUSED = {
    "--workdirs: tune takes one run, not 2": {"workdirs": ["uniform", "heads"]},
    "nowhere is not the workdir of a run": {"workdirs": ["nowhere"]},
    "empty: no checkpoint yet": {"workdirs": ["empty"]},
    "reaches length 99, which takes 100 tokens; documents that reach 16: ": {"lengths": [16, 99]},
    "99: 0; the longest has 33 tokens": {"lengths": [16, 99]},
    "cannot read 16 tokens, its learned encoding has 8 positions": {"workdirs": ["learned"], "lengths": [4, 16]},
    "--method yarn scales RoPE, but no layer of the run has it: its encoding is alibi": {"method": "yarn"},
    "must be above the training length 8, not 8": {"workdirs": ["rope"], "method": "ntk", "lengths": [4, 8]},
    "--method ntk: dim must be at least 4": {"workdirs": ["narrow"], "method": "ntk"},
    "--method linear: the RoPE of the run has YaRNScaling already": {"workdirs": ["scaled"], "method": "linear"},
    "--method head: the run has HeadScale already": {"workdirs": ["head"], "method": "head"},
    "--method uniform: the run has UniformScale already": {"workdirs": ["head"], "method": "uniform"},
    "--method ssmax needs a run whose model.train_length is at least 2": {
        "workdirs": ["one"],
        "method": "ssmax",
    },
    "--eval.documents changes nothing about tune": {"extra": ["--eval.documents", "3"]},
    "--tune.steps must be at least 1, not 0": {"extra": ["--tune.steps", "0"]},
    "'bytes' has 256 tokens, but": {"workdirs": ["small"]},
    "matches no file": {"extra": ["--data.source", "text:/nowhere/*"]},
}
OTHERS = {
    "learned": {"model.encoding": "learned"},
    "rope": {"model.encoding": "rope"},
    "narrow": {"model.encoding": RoPE(rotary_dim=2)},
    "scaled": {"model.encoding": (NoPE(), RoPE(scaling=YaRNScaling(2.0, 12)))},
    "head": {"model.encoding": (NoPE(), Windowed(UniformScale(HeadScale(NoPE())), 9))},
    "one": {"model.train_length": 1},
    "small": {"model.vocab_size": 99},
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_input_is_refused_in_one_line_before_anything_is_written(folder, tmp_path, monkeypatch, capsys, message):
    case = {"workdirs": ["uniform"], "method": "uniform", "lengths": [16], "extra": []} | REFUSED[message]
    for name in case["workdirs"]:
        # What is refused is refused before the checkpoint is read, so that any will do.
        if name in OTHERS or name == "empty":
            shutil.copytree(folder / "uniform", tmp_path / name)
            changed = configs.override(configs.load(folder / "uniform"), OTHERS.get(name, {}))
            configs.save(changed, tmp_path / name)
        if name == "empty":
            shutil.rmtree(tmp_path / name / "checkpoints")
    workdirs = [folder / name if (folder / name).exists() else tmp_path / name for name in case["workdirs"]]
    words = ["--workdirs", *workdirs, "--method", case["method"], "--lengths", *case["lengths"]]
    assert command(monkeypatch, "tune", *words, "--out", tmp_path / "out", *case["extra"]) == 2
    said = capsys.readouterr().err.splitlines()  # whoever reads the corpus first is told of the binary file in it
    assert said[-1].startswith("error: ") and message in said[-1] and not any("error" in line for line in said[:-1])
    assert not (tmp_path / "out").exists()


def test_no_batch_has_more_rows_than_there_are_documents(folder, tmp_path, monkeypatch, free_losses):
    rows = set()
    put = Placement.put
    monkeypatch.setattr(Placement, "put", lambda self, batch: rows.add(len(batch[0])) or put(self, batch))
    words = ["--workdirs", folder / "uniform", "--method", "log-n", "--lengths", SHORT, "--tune.documents", 2]
    assert command(monkeypatch, "tune", *words, "--out", tmp_path / "out") == 0
    assert rows == {2}
