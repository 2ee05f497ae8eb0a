"""eval.py longppl: which tokens are key tokens, and the perplexity over them."""

import csv

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nope_jax import ModelConfig, trained
from nope_jax.evaluation import longppl
from nope_jax.evaluation.longppl import key_tokens, losses, short_windows
from nope_jax.evaluation.registry import LongpplConfig
from tests.support.drawn_model import drawn_model
from tests.support.tiny_runs import call_eval, copy_run, write_documents, write_run

SMALL = "--longppl.short 8 --longppl.step 4 --eval.documents 3"


class Copier(nnx.Module):
    """Expects tokens that it has read, and is surprised by others."""

    def __init__(self, surprise=5):
        self.surprise = nnx.Param(np.float32(surprise))

    def hidden(self, tokens):
        return tokens, None

    def nll(self, tokens, targets):
        seen = (tokens[:, None] == targets[..., None]) & jnp.tri(tokens.shape[1], dtype=bool)
        return jnp.where(seen.any(-1), 0.5, self.surprise[...])


def by_hand(loss, document, settings):
    """Key tokens and long losses of a document by the definition: loss(context, token) one by one."""
    keys, long = [], []
    for t in range(1, len(document)):
        long.append(loss(document[:t], document[t]))
        if t < settings.short:
            keys.append(False)
            continue
        start = (t - settings.short) // settings.step * settings.step
        gain = loss(document[start:t], document[t]) - long[-1]
        keys.append(gain > settings.gain and long[-1] < settings.loss)
    return keys, long


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(("short", "step"), [(8, 4), (5, 3), (6, 100), (3, 1)])
def test_key_tokens_of_a_model_that_copies_are_those_last_read_before_the_short_context(short, step):
    tokens = np.random.default_rng(0).integers(0, 24, (3, 42)).astype(np.int32)
    settings, model = LongpplConfig(short=short, step=step), Copier()
    windows, whose = short_windows(tokens, short, step)
    nll = losses(model, tokens, batch_size=2)
    found = key_tokens(nll, losses(model, windows, batch_size=2), whose, settings)
    wanted = [
        by_hand(lambda context, token: 0.5 if token in context else 5.0, document, settings) for document in tokens
    ]
    np.testing.assert_array_equal(found, [keys for keys, _ in wanted])
    np.testing.assert_allclose(nll, [long for _, long in wanted])
    assert 0 < found.sum() < found.size / 2 or step == 100


def test_key_tokens_of_a_decoder_are_those_of_the_definition():
    model = drawn_model(ModelConfig(num_layers=1, num_heads=2, model_dim=8, mlp_dim=8, vocab_size=16))
    tokens = np.random.default_rng(1).integers(0, 16, (1, 24)).astype(np.int32)
    settings = LongpplConfig(short=8, step=3, gain=0.02, loss=2.8)

    logits_of = nnx.jit(lambda model, tokens: model(tokens))

    def loss(context, token):
        padded = np.zeros((1, 24), np.int32)
        padded[0, : len(context)] = context
        logits = np.asarray(logits_of(model, padded), np.float64)[0, len(context) - 1]
        return np.log(np.exp(logits).sum()) - logits[token]

    windows, whose = short_windows(tokens, 8, 3)
    nll = losses(model, tokens)
    found = key_tokens(nll, losses(model, windows), whose, settings)
    wanted = [by_hand(loss, document, settings) for document in tokens]
    np.testing.assert_array_equal(found, [keys for keys, _ in wanted])
    np.testing.assert_allclose(nll, [long for _, long in wanted], rtol=1e-5)
    assert found.any()


def test_windows_of_a_bos_begin_with_it():
    tokens = np.arange(40).reshape(2, 20)
    windows, whose = short_windows(tokens, 8, 4, bos=True)
    assert (windows[:, 0] == [tokens[i, 0] for i, _ in whose]).all()
    assert windows[-1].tolist() == [20, *range(29, 40)] and whose == [(i, start) for i in (0, 1) for start in (0, 4, 8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("longppl")
    write_documents(folder)
    write_run(folder, "nope")
    copy_run(folder / "nope", folder / "learned", {"model.encoding": "learned"})
    return folder


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.usefixtures("stand_ins")
def test_perplexity_over_key_tokens_is_beside_that_over_all(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trained, "load_model", lambda workdir, mesh, **_: (None, Copier(), 0))
    words = f"longppl --workdirs {folder}/nope --lengths 16 64 {SMALL} --out {tmp_path}"
    assert call_eval(monkeypatch, words, pictures=True) == 0
    lines = table(tmp_path / "longppl.csv")
    assert [row["length"] for row in lines] == ["16", "64"] and {row["judge"] for row in lines} == {"nope"}
    for row in lines:
        # Every key token has been read before: exp(0.5); others may be new: more.
        assert float(row["longppl"]) == pytest.approx(np.exp(0.5), rel=1e-4)
        assert float(row["perplexity"]) > 2 and int(row["key_tokens"]) > 0 and row["documents"] == "3"
    said = " ".join(capsys.readouterr().out.split())
    assert "Plain perplexity predicts long-context ability poorly" in said and "judged for itself" in said
    monkeypatch.setattr(longppl, "losses", None)  # what is stored is not measured again
    assert call_eval(monkeypatch, words) == 0


@pytest.mark.usefixtures("stand_ins")
def test_a_judge_decides_for_all_runs(folder, tmp_path, monkeypatch, capsys):
    surprise = {"nope": 5, "learned": 0.6, "judge": 4}  # by itself, learned has no key tokens
    monkeypatch.setattr(trained, "load_model", lambda workdir, mesh, **_: (None, Copier(surprise[workdir.name]), 0))
    copy_run(folder / "nope", folder / "judge")
    words = f"longppl --workdirs {folder}/nope {folder}/learned --lengths 12 20 {SMALL}"
    assert call_eval(monkeypatch, f"{words} --longppl.judge {folder}/judge --out {tmp_path}") == 0
    lines = table(tmp_path / "longppl.csv")
    assert [(row["run"], row["length"]) for row in lines] == [("nope", "12"), ("nope", "20"), ("learned", "12")]
    assert lines[0]["key_tokens"] == lines[2]["key_tokens"] != "0" and {row["judge"] for row in lines} == {"judge"}
    assert [float(row["longppl"]) for row in lines] == pytest.approx([np.exp(0.5)] * 3, rel=1e-4)
    said = " ".join(capsys.readouterr().out.split())
    assert "The judge is judge at step 0" in said and "learned cannot read 20 tokens" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--lengths 11 20",
            "--lengths must be at least --longppl.short + --longppl.step, 8 + 4, not 11, ",
        ),
        ("--lengths 20 --longppl.judge {0}/learned", "learned reads none of them, its learned encoding has 16"),
        ("--lengths 12 20 --longppl.judge {0}/learned", "learned cannot read 20 tokens, its learned encoding has 16"),
        ("--lengths 20 --longppl.judge {0}/nowhere", "nowhere is not the workdir of a run"),
        ("--lengths 20 --longppl.judge {0}/other", "data.tokenizer differs between the runs (nope: bytes, other: "),
    ],
)
def test_judges_and_lengths_that_cannot_be_are_refused(folder, tmp_path, monkeypatch, capsys, words, message):
    if "other" in words and not (folder / "other").exists():
        copy_run(folder / "nope", folder / "other", {"data.tokenizer": "task:copy"})
    command = f"longppl --workdirs {folder}/nope {words.format(folder)} {SMALL} --out {tmp_path}/out"
    assert call_eval(monkeypatch, command) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
