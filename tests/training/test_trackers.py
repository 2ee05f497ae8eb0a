"""Trackers receive what metrics.jsonl receives, and are refused before a run if they cannot."""

import json
import struct
import sys
import types
import warnings
from pathlib import Path

import pytest

from nope_jax import cli
from nope_jax.config import Config, DataConfig, ModelConfig, TrainConfig, override
from nope_jax.training import trackers, train
from nope_jax.training.metrics import GoodputTimer, MetricWriter

CONFIG = Config(
    model=ModelConfig(num_layers=2, num_heads=2, model_dim=16, mlp_dim=32),
    data=DataConfig(context_length=32, batch_size=4),
    train=TrainConfig(steps=100, log_every=2),
)
VALUES = {"loss": 2.0, "grad_norm": 1.0, "param_norm": 3.0, "skipped_steps": 0}


def write_two_processes(config: Config, workdir: Path) -> dict[tuple[int, str], float]:
    """Steps 2 and 4 of a run, and step 4 again by a process that resumes from step 2; return the lines' numbers."""
    clock = GoodputTimer()
    clock.switch("step")
    with MetricWriter(config, workdir, clock, start=0, tokens_per_step=128) as record:
        record.step(2, VALUES)
        record.validation(2, 2.5)
        record.step(4, VALUES)
    with MetricWriter(config, workdir, clock, start=2, tokens_per_step=128) as record:
        record.step(4, VALUES | {"loss": 1.5})
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {(line["step"], name): number for line in lines for name, number in line.items() if name != "step"}


def events(directory: Path) -> list:
    """The records of TensorBoard's files, oldest file first."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(directory.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack_from("<Q", data)  # length, its checksum, the record, its checksum
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_tensorboard_holds_what_the_lines_hold(tmp_path):
    logged = write_two_processes(override(CONFIG, {"train.tensorboard": True}), tmp_path)
    written = events(tmp_path / "tensorboard")
    scalars = {(event.step, value.tag): value.simple_value for event in written for value in event.summary.value}
    assert scalars == pytest.approx(logged)
    # What the first process wrote of step 4 is to be forgotten.
    assert [event.step for event in written if event.session_log.status == event.session_log.START] == [1, 3]


def test_weights_and_biases_resumes_the_run_of_the_workdir(tmp_path, monkeypatch):
    opened, sent, closed = [], {}, []

    def init(**options):
        opened.append(options)

        def log(values):
            step = values["step"]
            sent.update({(step, name): number for name, number in values.items() if name != "step"})

        return types.SimpleNamespace(log=log, define_metric=lambda *_, **__: None, finish=lambda: closed.append(True))

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Error=RuntimeError))
    logged = write_two_processes(override(CONFIG, {"train.wandb": True}), tmp_path)
    assert sent == logged
    assert opened[0]["id"] == opened[1]["id"] == (tmp_path / "wandb_id").read_text()
    assert [options["resume"] for options in opened] == ["allow"] * 2 and len(closed) == 2
    assert opened[0]["config"]["model"]["num_layers"] == 2 and opened[0]["name"] == tmp_path.name


def test_weights_and_biases_without_an_account_is_refused(tmp_path, monkeypatch):
    def init(**_):
        raise RuntimeError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Error=RuntimeError))
    with pytest.raises(ValueError, match=r"^train.wandb: No API key configured.*WANDB_MODE=offline"):
        trackers.WandB(CONFIG, tmp_path, start=0)


@pytest.mark.parametrize("name", trackers.TRACKERS)
def test_without_its_package_it_is_refused(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    config = override(CONFIG, {f"train.{name}": True})
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # which `run` sets
    assert cli.run(lambda: train(config, tmp_path / "run")) == 2
    assert capsys.readouterr().err.startswith(
        f"error: train.{name} needs a package that is not installed: pip install {trackers.TRACKERS[name].package}"
    )
    assert not (tmp_path / "run").exists()
