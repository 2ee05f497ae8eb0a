"""A published model stands wherever a run does: evaluated, tuned, trained further, and given back."""

import csv
import json
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from nope_jax import config as configs
from nope_jax import export
from nope_jax.checkpoint import load_model
from nope_jax.cli import parse_train, run
from nope_jax.config import Config, DataConfig, OptimizerConfig, TrainConfig
from nope_jax.data.tokenizers import ByteTokenizer
from nope_jax.encodings import RoPE, YaRNScaling
from nope_jax.interop import load_pretrained, save_pretrained
from nope_jax.trained import find_trained
from nope_jax.training import train
from tests.interop.test_families import folder_of
from tests.support.published import CONFIGS
from tests.support.shared_programs import share_programs
from tests.support.tiny_runs import call_eval, write_documents, write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A published model of bytes without a tokenizer, documents, and a run."""
    folder = tmp_path_factory.mktemp("trained")
    write_documents(folder)
    folder_of(folder / "llama", CONFIGS["llama"] | {"vocab_size": 256})
    write_run(folder, "run")
    return folder


def data(folder):
    return f"--data.tokenizer bytes --data.source text:{folder}/text"


def test_it_is_evaluated_as_a_run_is(folder, tmp_path, monkeypatch, capsys):
    words = f"--workdirs hf:{folder}/llama --lengths 48 {data(folder)} --eval.documents 4"
    assert call_eval(monkeypatch, f"{words} --out {tmp_path}/report") == 0, capsys.readouterr().err
    with (tmp_path / "report" / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["run"], row["encoding"], row["train_length"]) for row in rows} == {("llama", "rope", "24")}
    assert all(np.isfinite(float(row["nll"])) for row in rows)
    # Run again, everything is kept; with other weights, nothing is.
    identity = find_trained(f"hf:{folder}/llama").identity(0)
    measured = [path.stat().st_mtime_ns for path in sorted((tmp_path / "report" / "measured").iterdir())]
    assert call_eval(monkeypatch, f"{words} --out {tmp_path}/report") == 0
    assert measured == [path.stat().st_mtime_ns for path in sorted((tmp_path / "report" / "measured").iterdir())]
    settings = folder / "llama" / "config.json"
    before = settings.read_text()
    settings.write_text(json.dumps(json.loads(before) | {"rope_theta": 99.0}))
    assert find_trained(f"hf:{folder}/llama").identity(0) != identity
    settings.write_text(before)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def exported(monkeypatch, workdir, out):
    with monkeypatch.context() as patch:
        patch.setattr(warnings, "showwarning", warnings.showwarning)  # run sets its own
        patch.setattr(sys, "argv", ["export", "--workdir", str(workdir), "--out", str(out)])
        return run(export.main)


def test_a_run_is_published(folder, tmp_path, monkeypatch, capsys):
    assert exported(monkeypatch, folder / "run", tmp_path / "folder") == 0, capsys.readouterr().err
    save_pretrained(load_model(folder / "run")[1], tmp_path / "expected", tokenizer=ByteTokenizer())
    assert contents(tmp_path / "folder") == contents(tmp_path / "expected")


@pytest.mark.slow  # test_tune.py tunes a run, and test_families.py gives back what has YaRN's scaling
def test_it_is_tuned_and_given_back(folder, tmp_path, monkeypatch, capsys):
    tune = f"tune --workdirs hf:{folder}/llama --method yarn --lengths 48 {data(folder)} --tune.documents 2"
    assert call_eval(monkeypatch, f"{tune} --out {tmp_path}/yarn") == 0, capsys.readouterr().err
    config, model, _ = load_model(tmp_path / "yarn")
    assert config.model.encoding == RoPE(base=10_000.0, scaling=YaRNScaling(2.0, 24))
    assert exported(monkeypatch, tmp_path / "yarn", tmp_path / "folder") == 0, capsys.readouterr().err
    again, _ = load_pretrained(f"{tmp_path}/folder")
    assert again.config.encoding == config.model.encoding
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))


@pytest.fixture
def further(folder):
    """The config of a run that starts from it, and hardly moves."""
    return Config(
        find_trained(f"hf:{folder}/llama").config.model,
        DataConfig(source=f"text:{folder}/text", context_length=24, batch_size=8),
        OptimizerConfig(learning_rate=1e-9, warmup_steps=1, weight_decay=0.0),
        TrainConfig(steps=1, init_from=f"hf:{folder}/llama", eval_every=2),
    )


def test_what_trains_further_must_have_its_shape(folder, further, tmp_path):
    wider = configs.override(further, {"model.mlp_dim": 48})
    with pytest.raises(ValueError, match=f"train.init_from hf:{folder}/llama: its model.mlp_dim is 40, not 48"):
        train(wider, tmp_path / "run")


@pytest.mark.slow  # test_training.py starts from the weights of a run
def test_training_starts_from_it(folder, further, tmp_path, monkeypatch):
    share_programs(monkeypatch)
    source, _ = load_pretrained(f"{folder}/llama")
    config = further
    train(config, tmp_path / "run")
    assert configs.load(tmp_path / "run") == config
    close = lambda new, old: np.testing.assert_allclose(new, old, atol=1e-7)  # noqa: E731
    jax.tree.map(close, nnx.state(load_model(tmp_path / "run")[1]), nnx.state(source))


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
@pytest.mark.parametrize("spec", ["hf:{}/llama", "{}/run"])
def test_it_is_loaded_in_a_dtype(folder, spec, dtype):
    model, _ = find_trained(spec.format(folder)).load(dtype=dtype)
    assert model.config.dtype == dtype and {x.dtype.name for x in jax.tree.leaves(nnx.state(model))} == {dtype}
    whole, _ = find_trained(spec.format(folder)).load()
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(dtype), nnx.state(whole))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), rounded)


def test_what_is_no_model_is_refused_in_one_line(folder, tmp_path, monkeypatch, capsys):
    for words in (
        f"--workdirs hf:{folder}/nothing --lengths 16 --out {tmp_path}/out",
        f"--workdirs gguf:{folder}/nothing.gguf --lengths 16 --out {tmp_path}/out",
        f"--workdirs hf: --lengths 16 --out {tmp_path}/out",
        f"--workdirs hf:{folder}/llama --lengths 16 --out {tmp_path}/out",  # no tokenizer
    ):
        assert call_eval(monkeypatch, words) == 2, words
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"--workdir must be a folder; to start from hf:x, use --train\.init_from"):
        parse_train(["--config", str(Path(__file__).parents[1] / "configs" / "tiny.py"), "--workdir", "hf:x"])
