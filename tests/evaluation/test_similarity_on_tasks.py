"""eval.py similarity of runs trained on a task: their attention on its examples, by length."""

import csv
import dataclasses

import jax
import numpy as np
import pytest

from nope_jax import config as configs
from nope_jax.checkpoint import load_model
from nope_jax.data.tasks import find_task
from nope_jax.evaluation.common import activations
from nope_jax.evaluation.common.activations import Activations
from nope_jax.evaluation.similarity import examples
from nope_jax.evaluation.similarity.distances import head_distances
from nope_jax.evaluation.similarity.examples import COLUMNS, read_examples
from tests.support.tiny_runs import call_eval, copy_run, write_documents, write_run

ON_TASK = {"data.source": "task:parity", "data.tokenizer": "task:parity"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity")
    write_documents(folder, 3)
    for name, changes in {
        "nope": {"encoding": "nope"},
        "learned": {"encoding": "learned", "train_length": 40, "num_heads": 4, "num_layers": 3, "seed": 1},
    }.items():
        write_run(folder, f"{name}-on-text", **changes)
        copy_run(folder / f"{name}-on-text", folder / name, ON_TASK)
    copy_run(folder / "nope", folder / "same")
    copy_run(folder / "nope", folder / "short", {"data.lengths": (1, 4)})
    copy_run(folder / "nope", folder / "bos", {"data.bos": True})
    return folder


def table(out):
    with (out / "similarity.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def constructed(model, tokens, *, weights):
    """Attention that depends on the run, the layer and the tokens up to each query."""
    assert weights
    yield Activations(0, None, None)
    for layer in range(model.config.num_layers):
        each = [head + 2 * layer + 5 * (model.config.encoding == "learned") for head in range(model.config.num_heads)]
        of_keys = 1 + (np.asarray(tokens)[:, None, None] + np.array(each)[:, None, None]) % 11
        seen = np.tril(np.repeat(of_keys, tokens.shape[1], axis=2))
        yield Activations(layer + 1, None, jax.device_put(np.float32(seen / seen.sum(-1, keepdims=True))))


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("walk", [constructed, pytest.param(activations.walk, marks=pytest.mark.slow)])
def test_the_attention_of_a_run_is_compared_with_others_example_by_example(runs, tmp_path, monkeypatch, capsys, walk):
    monkeypatch.setattr(examples, "walk", walk)
    monkeypatch.setattr(examples, "ROOM", 48)  # one program for all lengths
    words = f"similarity --workdirs {runs}/nope {runs}/same {runs}/learned --out {tmp_path}"
    assert call_eval(monkeypatch, f"{words} --similarity.documents 2", pictures=True) == 0
    rows = table(tmp_path)
    assert list(rows[0]) == COLUMNS.split() and {row["layer"] for row in rows} == {"0", "1"}
    assert {(row["run"], row["other"], row["task"]) for row in rows} == {
        ("nope", other, "parity") for other in ("same", "learned")
    }
    assert all((row["distribution"] == "in") == (int(row["length"]) <= 8) for row in rows)
    assert {row["distance"] for row in rows if row["other"] == "same"} == {"0"}

    # The numbers are those of each example read alone.
    config, nope, _ = load_model(runs / "nope")
    learned = load_model(runs / "learned")[1]
    texts = read_examples(config.data, 0, 2)
    apart = []
    for tokens in texts[9]:
        walks = [list(walk(model, tokens[None], weights=True))[1:3] for model in (nope, learned)]
        layers = zip(*([np.asarray(step.weights)[0] for step in steps] for steps in walks), strict=True)
        apart.append([np.min(head_distances(a, b)) for a, b in layers])
    found = [row for row in rows if (row["other"], row["length"]) == ("learned", "9")]
    np.testing.assert_allclose([float(row["distance"]) for row in found], np.mean(apart, 0), rtol=1e-4)
    assert {int(row["examples"]) for row in found} == {len(apart)}

    printed = " ".join(capsys.readouterr().out.split())
    assert "Distance of attention from nope (nope)" in printed
    longest = max(length for length, rows in texts.items() if max(map(len, rows)) <= 40)
    assert (
        f"of lengths {min(texts)} to {longest}" in printed
        and longest < max(texts)
        and "as some run has too few positions: lengths" in printed
    )
    assert "Figure 4" in (tmp_path / "report.html").read_text() and (tmp_path / "similarity.png").exists()


def test_examples_are_those_of_the_test_split_whole_and_with_a_bos(runs):
    data = dataclasses.replace(configs.load(runs / "nope").data, source="task:scan", tokenizer="task:scan")
    texts = read_examples(data, 3, 4)
    with_bos = read_examples(dataclasses.replace(data, bos=True), 3, 4)
    task = find_task("scan")
    example = task.example(3, 0, 30, split="test")
    assert len(texts[30]) <= 4 and len(texts[30][0]) == len(with_bos[30][0]) - 1
    assert (texts[30][0] == with_bos[30][0][1:]).all() and len(texts[30][0]) > len(example.target.split())
    assert 47 not in texts  # which no command has


BAD = {
    "data.lengths differs between the runs": "{0}/nope {0}/short",
    "data.bos differs between the runs": "{0}/nope {0}/bos",
    "data.source differs between the runs": "{0}/nope {0}/nope-on-text",
    "--workdirs must be the two runs to compare, not 1": "{0}/nope",
    "--similarity.length has no meaning for data.source task:parity: its examples are read whole": (
        "{0}/nope {0}/same --similarity.length 8"
    ),
    "data.source task:passkey has no answers of its own": (
        "{0}/nope {0}/same --data.source task:passkey --data.tokenizer bytes"
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_one_line_and_writes_nothing(runs, tmp_path, monkeypatch, capsys, message):
    words = f"similarity --workdirs {BAD[message].format(runs)} --out {tmp_path}/out"
    assert call_eval(monkeypatch, words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
