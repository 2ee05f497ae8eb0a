"""Runs that train together give what each gives alone, however often they are stopped, on one device or on several."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from nope_jax.checkpoint import load_model
from nope_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig, override, save
from nope_jax.data.tasks import task
from nope_jax.training import Interrupted, together, train
from nope_jax.training.together import train_together
from tests.support.shared_programs import share_programs

ROOT = Path(__file__).parents[2]
TOGETHER = """
import sys
from nope_jax import config
from nope_jax.data.tasks import task
from nope_jax.training.together import train_together
task.EXAMPLES.update(train=300, test=50)
train_together([(config.load(workdir), workdir) for workdir in sys.argv[1:]])
"""


@pytest.fixture(scope="module", autouse=True)
def few_examples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(task.EXAMPLES, "train", 300)
        patch.setitem(task.EXAMPLES, "test", 50)
        yield


@pytest.fixture(scope="module")
def alike() -> list[Config]:
    """Runs of one shape: other seeds, data and tasks."""
    config = Config(
        ModelConfig(vocab_size=128, num_layers=1, num_heads=2, model_dim=16, mlp_dim=32, encoding="randomized"),
        DataConfig(source="task:copy", tokenizer="task:copy", document_mask=True, context_length=64, batch_size=4),
        OptimizerConfig(learning_rate=1e-2, warmup_steps=4),
        TrainConfig(steps=12, log_every=1, checkpoint_every=4, eval_every=6, eval_batches=2),
    )
    second = {"train.seed": 1, "data.seed": 1}
    other_task = {"data.source": "task:parity", "data.tokenizer": "task:parity", "train.seed": 2}
    return [config, override(config, second), override(config, other_task)]


def train_alone(configs, folder) -> list[Path]:
    workdirs = [folder / str(i) for i in range(len(configs))]
    with pytest.MonkeyPatch.context() as patch:
        share_programs(patch)
        for config, workdir in zip(configs, workdirs, strict=True):
            train(config, workdir)
    return workdirs


@pytest.fixture(scope="module")
def alone(alike, tmp_path_factory) -> list[Path]:
    return train_alone(alike, tmp_path_factory.mktemp("alone"))


def lines(workdir):
    logged = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "loss", "learning_rate", "grad_norm", "param_norm", "validation_loss")
    return [{name: line[name] for name in names if name in line} for line in logged]


def assert_same(workdirs, expected):
    for workdir, other in zip(workdirs, expected, strict=True):
        ours, theirs = lines(workdir), lines(other)
        assert [line.keys() for line in ours] == [line.keys() for line in theirs]
        for line, same in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(list(line.values()), list(same.values()), rtol=1e-5, atol=1e-5)
        (config, model, step), (expected_config, expected_model, _) = load_model(workdir), load_model(other)
        assert step == 12 and config == expected_config
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
            nnx.state(model),
            nnx.state(expected_model),
        )


@pytest.fixture(scope="module")
def trained(alike, tmp_path_factory) -> list[Path]:
    """The workdirs of the runs, trained together and never stopped."""
    folder = tmp_path_factory.mktemp("together")
    workdirs = [folder / name for name in "abc"]
    train_together(list(zip(alike, workdirs, strict=True)))
    return workdirs


def test_together_they_come_to_the_same_as_alone(alike, tmp_path, capsys):
    """Of other seeds, and of another task."""
    pair = [override(config, {"train.checkpoint_every": 12}) for config in alike[1:]]
    runs = list(zip(pair, [tmp_path / "a", tmp_path / "b"], strict=True))
    train_together(runs)
    assert_same([workdir for _, workdir in runs], train_alone(pair, tmp_path / "alone"))
    assert len({lines(workdir)[0]["loss"] for _, workdir in runs}) == 2
    capsys.readouterr()
    train_together(runs)
    assert capsys.readouterr().out == "all 2 runs have already finished at step 12\n"


@pytest.mark.slow
def test_three_come_to_the_same_as_alone(alike, alone, trained):
    assert_same(trained, alone)
    assert len({lines(workdir)[0]["loss"] for workdir in trained}) == 3


@pytest.mark.slow
def test_stopped_and_not_equally_far_they_go_on_to_the_same_numbers(alike, trained, tmp_path, monkeypatch):
    workdirs = [tmp_path / name for name in "abc"]
    monkeypatch.setattr(together, "vectorizes", lambda device: True)  # as on an accelerator
    # One run is ahead of the others, trained alone.
    batches = together.train_batches

    def stopping(data, *, start_step, corpus):
        for step, batch in enumerate(batches(data, start_step=start_step, corpus=corpus), start_step + 1):
            if step == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(
            "nope_jax.training.loop.train_batches",
            lambda data, process_index, process_count, **given: stopping(data, **given),
        )
        train(alike[1], workdirs[1])
    calls = []

    def stop_later(signals, step):
        calls.append(step)
        return signal.SIGTERM if step == 9 else None

    runs = list(zip(alike, workdirs, strict=True))
    with monkeypatch.context() as patch:
        patch.setattr(together, "agreed_stop", stop_later)
        with pytest.raises(Interrupted, match="stopped at step 9"):
            train_together(runs)
    assert calls == list(range(1, 10))
    ahead = [line["step"] for line in lines(workdirs[1])]
    assert ahead == sorted(ahead) and {int(path.name) for path in (workdirs[1] / "checkpoints").iterdir()} >= {9}
    train_together(runs)
    assert_same(workdirs, trained)


@pytest.mark.slow
def test_a_run_that_diverges_stops_and_the_others_go_on(alike, trained, tmp_path, monkeypatch):
    workdirs = [tmp_path / name for name in "abc"]
    real = together.reason_to_stop
    monkeypatch.setattr(
        together, "reason_to_stop", lambda values, config: "bad" if values["loss"] == loss else real(values, config)
    )
    loss = lines(trained[1])[4]["loss"]
    with pytest.raises(FloatingPointError, match=r"b: bad at step 5; its newest checkpoint is kept$"):
        train_together(list(zip(alike, workdirs, strict=True)))
    assert_same([workdirs[0], workdirs[2]], [trained[0], trained[2]])
    assert lines(workdirs[1]) == lines(trained[1])[:4]


@pytest.mark.slow
def test_each_of_twenty_comes_to_the_same_as_alone(alike, tmp_path):
    configs = [
        override(
            alike[0], {"train.seed": seed, "data.seed": seed, "data.source": f"task:{task}", "data.tokenizer": name}
        )
        for seed, (task, name) in enumerate([("copy", "task:copy"), ("parity", "task:parity")] * 10)
    ]
    together_in = [tmp_path / "together" / str(i) for i in range(20)]
    train_together(list(zip(configs, together_in, strict=True)))
    alone_in = [tmp_path / "alone" / str(i) for i in range(20)]
    for config, workdir in zip(configs, alone_in, strict=True):
        train(config, workdir)
    assert_same(together_in, alone_in)
    assert len({lines(workdir)[0]["loss"] for workdir in together_in}) == 20


def test_runs_take_as_few_turns_as_devices_allow():
    assert together.slots_of("abc", 8) == (3, [*"abc"])
    assert together.slots_of("abc", 2) == (2, [*"abca"])
    assert together.slots_of("abcdef", 2) == (2, [*"abcdef"])
    assert together.slots_of("abcde", 4) == (3, [*"abcdea"])


@pytest.mark.slow
def test_they_spread_over_devices(alike, alone, tmp_path):
    workdirs = [tmp_path / name for name in "abc"]
    for config, workdir in zip(alike, workdirs, strict=True):
        workdir.mkdir()
        save(config, workdir)
    # Three runs on two devices take two turns, so one slot repeats a run.
    flags = f"--xla_force_host_platform_device_count=2 {os.environ.get('XLA_FLAGS', '')}"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", TOGETHER, *workdirs], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(workdirs, alone)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model.num_layers", 2, "model.num_layers of b is 2, but 1 in the run that it trains with"),
        ("train.steps", 13, "train.steps of b is 13, but 12 in the run that it trains with"),
        ("data.source", "python_stdlib", "data.source python_stdlib counts other losses than task:copy"),
    ],
)
def test_runs_of_other_shapes_are_refused(alike, field, value, message):
    with pytest.raises(ValueError, match=message):
        train_together([(alike[0], "a"), (override(alike[0], {field: value}), "b")])


def test_what_is_for_one_run_is_refused(alike):
    for field, value in (("profile_steps", 2), ("init_from", "hf:x")):
        other = dataclasses.replace(alike[0], train=dataclasses.replace(alike[0].train, **{field: value}))
        with pytest.raises(ValueError, match=f"train.{field} must be"):
            train_together([(other, "a")])
