"""What a run keeps: checkpoints by retention, and the moving average of its weights."""

import random
import re
import shutil
import types
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from nope_jax import config as configs
from nope_jax.checkpoint import Checkpointer, load_model
from nope_jax.cli import parse_eval, parse_export, parse_generate
from nope_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from nope_jax.data import validation_batches
from nope_jax.evaluation.common.runs import find_runs
from nope_jax.models import abstract_decoder
from nope_jax.retention import find_step, saved_steps, validation_losses
from nope_jax.text_generation import load
from nope_jax.trained import find_trained
from nope_jax.training import loop, train
from nope_jax.training.step import total_nll
from tests.support.shared_programs import share_programs
from tests.support.tiny_runs import call_eval


@pytest.fixture(scope="module", autouse=True)
def compile_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        share_programs(patch)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    corpus, draw = tmp_path_factory.mktemp("corpus"), random.Random(0)
    for document in range(20):
        words = ["".join(draw.choices("aeiou", k=3)) for _ in range(30)]
        (corpus / f"{document:02}.txt").write_text(" ".join(words))
    return Config(
        model=ModelConfig(num_layers=1, num_heads=2, model_dim=16, mlp_dim=32),
        data=DataConfig(source=f"text:{corpus}/*.txt", context_length=16, batch_size=4),
        optimizer=OptimizerConfig("adafactor", learning_rate=1e-2, warmup_steps=2, b1=0.9, z_loss=1e-3),
        train=TrainConfig(
            steps=8, log_every=1, checkpoint_every=2, eval_every=2, eval_batches=1, keep=1, keep_every=4, ema=0.5
        ),
    )


@pytest.fixture(scope="module")
def finished(config: Config, tmp_path_factory: pytest.TempPathFactory, compile_once: None) -> Path:
    workdir = tmp_path_factory.mktemp("finished")
    train(config, workdir)
    return workdir


def weights(workdir: Path, name: str, step: int) -> nnx.State:
    """A tree of parameters as a checkpoint has it."""
    config = configs.load(workdir)
    abstract = nnx.state(abstract_decoder(config.model))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract)
    with Checkpointer(workdir, read_only=True) as checkpointer:
        return checkpointer.restore({name: abstract}, only=step)[1][name]


def test_the_average_is_what_is_validated_and_read_and_it_resumes_to_the_same_bits(config, finished, tmp_path, capsys):
    assert saved_steps(finished) == [4, 8]
    average, params = (weights(finished, name, 8) for name in ("ema", "params"))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(load_model(finished)[1]), average)
    for other in params, weights(finished, "ema", 4):
        apart = jax.tree.map(lambda x, y: np.abs(np.asarray(x) - np.asarray(y)).max(), average, other)
        assert max(jax.tree.leaves(apart)) > 1e-3
    rows = validation_batches(config.data, 1)[0]
    graphdef = nnx.graphdef(abstract_decoder(config.model))
    nll = jax.jit(total_nll, static_argnums=0)
    losses = [float(nll(graphdef, tree, rows)) / rows.targets.size for tree in (average, params)]
    assert validation_losses(finished)[8] == pytest.approx(losses[0], rel=1e-5) != pytest.approx(losses[1], rel=1e-4)

    resumed = Path(shutil.copytree(finished, tmp_path / "resumed"))
    shutil.rmtree(resumed / "checkpoints" / "8")
    capsys.readouterr()
    train(config, resumed)
    assert re.match(r"checkpoints: 1\d\d kB each, at most 4 at a time, 5\d\d kB; .* free\n", capsys.readouterr().out)
    jax.tree.map(np.testing.assert_array_equal, weights(resumed, "ema", 8), average)


def with_losses(patch: pytest.MonkeyPatch, *losses: float) -> None:
    """Let a run measure these validation losses."""
    each = iter(losses)
    measure = types.SimpleNamespace(compile=lambda: lambda weights, rows: next(each) * rows.targets.size)
    patch.setattr(loop, "jit_validation", lambda *_: types.SimpleNamespace(lower=lambda *_: measure))


def test_the_best_stays_until_there_is_a_better_also_when_resumed(config, finished, tmp_path, monkeypatch):
    workdir = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(workdir / "checkpoints" / "8")
    log = workdir / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 4, "validation_loss": 1.0}\n')
    # What a kill leaves behind: an old checkpoint half removed, and a new one half written.
    shutil.copytree(workdir / "checkpoints" / "4" / "params", workdir / "checkpoints" / "2" / "params")
    (workdir / "checkpoints" / "10.orbax-checkpoint-tmp-1" / "params").mkdir(parents=True)
    assert find_step(workdir, "best") == 4
    kept, save = {}, Checkpointer.save

    def saving(checkpointer: Checkpointer, step: int, trees: dict) -> None:
        save(checkpointer, step, trees)
        checkpointer.wait()
        kept[step] = sorted(path.name for path in (workdir / "checkpoints").iterdir())

    monkeypatch.setattr(Checkpointer, "save", saving)
    with_losses(monkeypatch, 0.5, 1.5)
    train(configs.override(config, {"train.keep_every": None, "train.keep_best": 1}), workdir)
    assert kept == {6: ["4", "6"], 8: ["6", "8"]}
    assert [find_step(workdir, step) for step in ("best", "newest")] == [6, 8]


@pytest.mark.slow
def test_every_door_takes_the_step(finished, tmp_path, monkeypatch, capsys):
    expected = weights(finished, "ema", 4)
    evaluated = f"--workdirs {finished} --lengths 16 --out {tmp_path}/out --step"
    [run] = find_runs(parse_eval([*evaluated.split(), "4"]))
    assert run.step == 4
    for model in load(finished, step=4).model, find_trained(finished, 4).load()[0], run.load():
        jax.tree.map(np.testing.assert_array_equal, nnx.state(model), expected)
    assert parse_export(["--workdir", "runs/a", "--out", "a", "--step", "best"])[-1] == "best"
    assert parse_generate(["--workdir", "runs/a", "--prompt", "a", "--step", "7"])["step"] == 7

    for words, complaint in [
        (f"{evaluated} 6", "no checkpoint of step 6; it has those of step 4, 8"),
        (f"{evaluated} first", "--step must be an integer or one of newest, best"),
        (f"{evaluated} -1", "--step must be at least 0, not -1"),
        (evaluated.replace(str(finished), "hf:nowhere") + " best", "but hf:nowhere is a published model"),
    ]:
        assert call_eval(monkeypatch, words) == 2
        assert complaint in (said := capsys.readouterr().err) and said.count("\n") == 1


@pytest.mark.slow
def test_a_run_starts_from_the_step_of_another(config, finished, tmp_path):
    started = {"train.init_from": str(finished), "train.init_step": 4, "optimizer.learning_rate": 1e-9}
    train(configs.override(config, {**started, "train.steps": 1}), tmp_path)
    expected = weights(finished, "ema", 4)
    close = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6)  # noqa: E731
    jax.tree.map(close, weights(tmp_path, "params", 1), expected)
    jax.tree.map(close, weights(tmp_path, "ema", 1), expected)
