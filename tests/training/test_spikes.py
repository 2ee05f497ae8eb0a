"""Steps whose loss or gradient cannot be right: what they leave as it was, and what becomes of the run."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nope_jax.checkpoint import Checkpointer, load_model
from nope_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig, override
from nope_jax.data import Batch
from nope_jax.sharding import make_mesh
from nope_jax.training import loop, step, train
from nope_jax.training.optimizer import learning_rate_schedule, make_optimizer
from nope_jax.training.state import Skips, abstract_state
from nope_jax.training.step import detect_bad_step
from tests.support.shared_programs import share_programs

BAD = (3, 7, 8)
"""The steps of the runs here whose batch has a token that does not exist: their loss is NaN."""
AVERAGED, BEFORE_SPIKES, FACTOR = 4, 3, 1.02
"""Of the runs here, so that they are long enough for spikes."""
STOP = {"train.on_bad_step": "stop", "train.spike_factor": None}


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    """The runs here know spikes early, and share what they compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "AVERAGED_STEPS", AVERAGED)
        patch.setattr(step, "STEPS_BEFORE_SPIKES", BEFORE_SPIKES)
        share_programs(patch)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    corpus = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    for document in range(10):
        (corpus / f"{document}.txt").write_text(" ".join("".join(draw.choices("aeiou", k=3)) for _ in range(100)))
    return Config(
        model=ModelConfig(num_layers=1, num_heads=2, model_dim=16, mlp_dim=32),
        data=DataConfig(source=f"text:{corpus}/*.txt", context_length=16, batch_size=4),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=4),
        train=TrainConfig(
            steps=12,
            log_every=1,
            checkpoint_every=4,
            eval_every=12,
            eval_batches=1,
            on_bad_step="skip",
            spike_factor=FACTOR,
        ),
    )


def with_bad_steps(patch: pytest.MonkeyPatch, *steps: int) -> None:
    batches = loop.train_batches

    def some_bad(data: DataConfig, *, start_step: int, **hosts: int) -> Iterator[Batch]:
        for number, batch in enumerate(batches(data, start_step=start_step, **hosts), start_step + 1):
            yield batch._replace(tokens=np.full_like(batch.tokens, 256)) if number in steps else batch

    patch.setattr(loop, "train_batches", some_bad)


def lines(workdir: Path) -> list[dict]:
    """What the run logged of its steps, without what depends on the machine."""
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "loss", "learning_rate", "grad_norm", "param_norm", "skipped_steps")
    return [{name: line[name] for name in names if name in line} for line in logged if "param_norm" in line]


@pytest.fixture(scope="module")
def run(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run that skipped the bad steps, never stopped."""
    workdir = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        with_bad_steps(patch, *BAD)
        train(config, workdir)
    return workdir


def skipped(workdir: Path) -> list[int]:
    totals = [0, *[line["skipped_steps"] for line in lines(workdir)]]
    return [number for number in range(1, len(totals)) if totals[number] > totals[number - 1]]


def test_what_is_not_finite_and_spikes_are_skipped(run):
    expected, average, averaged = [], 0.0, 0
    for line in lines(run):
        norm = line.get("grad_norm", np.inf)
        if norm > (FACTOR * average if averaged >= BEFORE_SPIKES else 1e9):
            expected.append(line["step"])
        else:
            averaged += 1
            average += (norm - average) / min(averaged, AVERAGED)
    assert skipped(run) == expected
    assert set(BAD) < set(expected)  # a spike was among them
    assert [line["step"] for line in lines(run) if "loss" not in line] == list(BAD)


def test_a_skipped_step_changes_nothing(run):
    norms = {line["step"]: line["param_norm"] for line in lines(run)}
    assert [number for number in range(2, 13) if norms[number] == norms[number - 1]] == skipped(run)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(nnx.state(load_model(run)[1])))


@pytest.mark.slow
def test_the_run_is_one_whose_data_lacks_the_bad_batches(config, run, tmp_path, monkeypatch):
    batches = loop.train_batches

    def without_bad(data: DataConfig, *, start_step: int, **hosts: int) -> Iterator[Batch]:
        numbered = enumerate(batches(data, start_step=start_step, **hosts), start_step + 1)
        return (batch for number, batch in numbered if number not in skipped(run))

    monkeypatch.setattr(loop, "train_batches", without_bad)
    train(override(config, STOP), tmp_path)
    good = [line for line in lines(run) if line["step"] not in skipped(run)]
    for line, expected in zip(good, lines(tmp_path), strict=False):
        for name in "loss", "learning_rate", "grad_norm", "param_norm":
            np.testing.assert_allclose(line[name], expected[name], rtol=1e-5)


def test_a_run_stopped_between_bad_steps_goes_on_to_the_same_bits(config, run, tmp_path, monkeypatch):
    def power_cut(metrics, config):
        if metrics["skipped_in_a_row"] == 2:
            raise RuntimeError("power cut")

    with_bad_steps(monkeypatch, *BAD)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(loop, "reason_to_stop", power_cut)
        train(override(config, {"train.checkpoint_every": BAD[1]}), tmp_path)
    train(config, tmp_path)
    assert lines(tmp_path) == lines(run)
    models = [nnx.state(load_model(workdir)[1]) for workdir in (tmp_path, run)]
    jax.tree.map(np.testing.assert_array_equal, *models)


def test_too_many_bad_steps_in_a_row_stop_the_run(config, tmp_path, monkeypatch):
    with_bad_steps(monkeypatch, 1, 2, *range(4, 13))
    message = (
        r"4 bad steps in a row \(train.max_skipped 3\), .* loss nan .* at step 7; the checkpoint of step 4 is kept"
    )
    with pytest.raises(FloatingPointError, match=message):
        train(override(config, {"train.max_skipped": 3}), tmp_path)


@pytest.mark.slow
def test_a_run_that_a_bad_step_stopped_can_go_on_without_it(config, tmp_path, monkeypatch):
    with_bad_steps(monkeypatch, 5)
    with pytest.raises(FloatingPointError, match="grad_norm is nan at step 5; the checkpoint of step 4 is kept"):
        train(override(config, STOP), tmp_path)
    train(config, tmp_path)
    assert lines(tmp_path)[-1]["step"] == 12
    assert 5 in [line["step"] for line in lines(tmp_path) if line.get("skipped_steps") == 1]


@pytest.mark.slow
def test_a_run_that_skips_no_more_knows_how_many_updates_it_has_made(config, run, tmp_path):
    workdir = shutil.copytree(run, tmp_path / "copy")
    train(override(config, STOP | {"train.steps": 13}), workdir)
    learning_rate = learning_rate_schedule(config.optimizer, 13)(12 - len(skipped(run)))
    np.testing.assert_allclose(lines(workdir)[-1]["learning_rate"], learning_rate, rtol=1e-6)


@pytest.mark.slow
def test_a_checkpoint_of_an_earlier_version_goes_on(config, run, tmp_path):
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    _, abstract = abstract_state(config, make_optimizer(config.optimizer, 12), mesh)
    with Checkpointer(run, read_only=True) as checkpointer:
        _, trees = checkpointer.restore(abstract.trees())
    assert trees.pop("skips").total == len(skipped(run))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(10, trees)
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    train(config, tmp_path)
    assert [line["skipped_steps"] for line in lines(tmp_path)] == [0, 0]


@pytest.mark.parametrize(
    ("averaged", "grad_norm", "is_good"),
    [(20, 2.01, False), (20, 1.99, True), (19, 2.01, True), (0, np.inf, False)],
    ids=["spike", "below the factor", "too early to say", "not finite"],
)
def test_a_spike_is_judged_by_the_running_average(monkeypatch, averaged, grad_norm, is_good):
    skips = Skips(jnp.int32(5), jnp.int32(2), jnp.int32(averaged), jnp.float32(1))
    with monkeypatch.context() as patch:
        patch.setattr(step, "STEPS_BEFORE_SPIKES", 20)
        good, after = detect_bad_step(skips, jnp.float32(3), jnp.float32(grad_norm), spike_factor=2.0)
    assert good == is_good
    assert (after.total, after.in_a_row) == ((5, 0) if is_good else (6, 3))
    if not is_good:
        assert (after.averaged, after.grad_norm) == (averaged, 1)
    assert detect_bad_step(skips, jnp.float32(np.nan), jnp.float32(1), None)[1].total == 6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train.on_bad_step": "ignore"}, "train.on_bad_step must be one of stop, skip, not 'ignore'"),
        ({"train.spike_factor": 3.0}, "train.spike_factor 3.0 needs train.on_bad_step skip, not stop"),
        (
            {"train.on_bad_step": "skip", "train.spike_factor": 1.0},
            "train.spike_factor must be greater than 1, not 1.0",
        ),
        ({"train.max_skipped": -1}, "train.max_skipped must be at least 0, not -1"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        override(Config(), fields)
