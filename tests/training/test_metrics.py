"""What a run says of itself: where its time went, how much of the hardware it uses, traces of its steps."""

import dataclasses
import errno
import gzip
import io
import json
import os
import re
import sys
import threading
import warnings
from pathlib import Path
from unittest import mock

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nope_jax.config import Config, DataConfig, ModelConfig, TrainConfig, override
from nope_jax.data import Batch
from nope_jax.encodings import Chunked, NoPE, Windowed
from nope_jax.models import abstract_decoder
from nope_jax.training import metrics
from nope_jax.training.flops import CHIPS, Chip, chip_of, model_flops_per_token
from nope_jax.training.metrics import GoodputTimer, MetricWriter
from nope_jax.training.schedules import learning_rate_schedule
from nope_jax.training.step import total_nll


class FakeTime:
    """A clock that a test turns on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        monkeypatch.setattr(metrics.time, "perf_counter", lambda: self.now)


class FakeStep:
    """An array that a device is still computing."""

    def __init__(self):
        self._finished = threading.Event()

    def finish(self, record: MetricWriter) -> None:
        self._finished.set()
        record._watcher.submit(int).result()  # what it was given before is then done

    def block_until_ready(self) -> None:
        self._finished.wait()


@pytest.fixture
def fake_time(monkeypatch) -> FakeTime:
    return FakeTime(monkeypatch)


CONFIG = Config(
    model=ModelConfig(num_layers=2, num_heads=2, model_dim=16, mlp_dim=32),
    data=DataConfig(context_length=32, batch_size=4),
    train=TrainConfig(steps=100, log_every=2),
)


def open_record(config: Config, workdir: Path, start: int = 0) -> tuple[MetricWriter, GoodputTimer]:
    clock = GoodputTimer()
    record = MetricWriter(config, workdir, clock, start=start, tokens_per_step=128)
    clock.switch("step")
    return record, clock


def lines(workdir: Path) -> list[dict]:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


VALUES = {"loss": 2.0, "grad_norm": 1.0, "param_norm": 3.0}


def test_a_line_asks_nothing_of_the_devices(tmp_path, monkeypatch):
    """They are busy with the next step, for which it would wait: learning rates come a thousand at a time."""
    config = override(CONFIG, {"train.steps": 1200, "train.log_every": 1, "optimizer.schedule": "linear"})
    record, _ = open_record(config, tmp_path)
    asked, schedule = [], record._schedule
    monkeypatch.setattr(record, "_schedule", lambda updates: asked.append(len(updates)) or schedule(updates))
    with record:
        for step in (1, 2, 999, 1000, 1001, 1200):
            record.step(step, VALUES)
    assert asked == [1000, 1000]
    rates = learning_rate_schedule(config.optimizer, 1200)
    wanted = [float(rates(step - 1)) for step in (1, 2, 999, 1000, 1001, 1200)]
    np.testing.assert_allclose([line["learning_rate"] for line in lines(tmp_path)], wanted, rtol=1e-6)


# Floating-point operations


def matmul_flops(jaxpr: jax.extend.core.Jaxpr) -> int:
    """Multiplications and additions of all matrix products of a program, loops counted as often as they turn."""
    flops = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            contracted = equation.params["dimension_numbers"][0][0]
            shape = equation.invars[0].aval.shape
            flops += 2 * equation.outvars[0].aval.size * int(np.prod([shape[axis] for axis in contracted]))
        inner = [p for p in equation.params.values() if hasattr(p, "eqns") or hasattr(p, "jaxpr")]
        turns = equation.params["length"] if equation.primitive.name == "scan" else 1
        flops += turns * sum(matmul_flops(getattr(p, "jaxpr", p)) for p in inner)
    return flops


@pytest.mark.parametrize(
    "model",
    [
        ModelConfig(num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, model_dim=16, mlp_dim=24, vocab_size=20),
        ModelConfig(num_layers=2, num_heads=2, model_dim=8, mlp="plain", tie_embeddings=True, vocab_size=20),
    ],
    ids=["grouped, gated", "tied, plain"],
)
def test_model_flops_are_those_of_the_program(model):
    B, T, N, H = 2, 12, model.num_heads, model.head_dim or model.model_dim // model.num_heads
    config = Config(model=dataclasses.replace(model, attention="reference"), data=DataConfig(context_length=T))
    graphdef, params = nnx.split(abstract_decoder(config.model))
    batch = Batch(jnp.zeros((B, T), int), jnp.zeros((B, T), int))
    program = jax.make_jaxpr(jax.grad(lambda params: total_nll(graphdef, params, batch)))(params)
    # The reference multiplies with what it then hides, too.
    hidden = 12 * model.num_layers * N * H * (T - (T + 1) / 2)
    assert model_flops_per_token(config) == matmul_flops(program.jaxpr) / (B * T) - hidden


@pytest.mark.parametrize(
    ("wrapper", "keys"),
    [
        (lambda e: Windowed(e, window=5), [1, 2, 3, 4, 5, 5, 5, 5]),
        (lambda e: Chunked(e, chunk_size=3), [1, 2, 3] * 2 + [1, 2]),
    ],
    ids=["window", "chunks"],
)
def test_model_flops_count_what_a_layer_sees(wrapper, keys):
    data = DataConfig(context_length=8)
    schedule = (wrapper(NoPE()), NoPE())
    whole, limited = (
        model_flops_per_token(Config(model=ModelConfig(num_layers=3, num_heads=2, head_dim=4, encoding=e), data=data))
        for e in ("nope", schedule)
    )
    assert whole - limited == 12 * 2 * 2 * 4 * (np.mean(range(1, 9)) - np.mean(keys))  # layers 0 and 2


def test_chips_are_known_by_what_jax_calls_them():
    assert chip_of(mock.Mock(spec=jax.Device, device_kind="TPU v5 lite")) is CHIPS["v5e"]
    assert chip_of(jax.devices("cpu")[0]) is None
    kinds = [kind for chip in CHIPS.values() for kind in chip.device_kinds]
    assert len(set(kinds)) == len(kinds)


# Where the time went


def test_every_moment_belongs_to_one_activity(fake_time):
    clock = GoodputTimer()
    fake_time.now = 1.0
    clock.switch("step")
    fake_time.now = 3.0
    with pytest.raises(KeyError), clock.during("save"):
        fake_time.now = 7.0
        raise KeyError
    fake_time.now = 15.0
    clock.move(3.0, to="input")
    expected = {"startup": 1.0, "step": 7.0, "save": 4.0, "input": 3.0}
    assert {name: seconds for name, seconds in clock.read().items() if seconds} == expected


def test_a_line_tells_where_the_time_went(fake_time, tmp_path, monkeypatch):
    chip = Chip(flops=1e9, memory=0, memory_bandwidth=0, interconnect_bandwidth=0, device_kinds=())
    monkeypatch.setattr(metrics, "chip_of", lambda device: chip)
    record, clock = open_record(CONFIG, tmp_path)
    with record:
        for activity, seconds in {
            "startup": 5.0,
            "compile": 20.0,
            "save": 2.0,
            "validation": 3.0,
            "step": 10.0,
        }.items():
            with clock.during(activity):
                fake_time.now += seconds
        record.step(1, VALUES)
        record.step(2, VALUES)
        fake_time.now += 4.0
        record.step(3, VALUES)
        record.step(4, VALUES | {"loss": np.nan})
    first, second = lines(tmp_path)
    assert first["tokens_per_second"] == 2 * 128 / 10
    assert first["mfu"] == pytest.approx(first["tokens_per_second"] * model_flops_per_token(CONFIG) / 1e9)
    assert first["goodput"] == 10 / 40
    lost = {"startup_seconds": 5, "compile_seconds": 20, "input_seconds": 0, "validation_seconds": 3, "save_seconds": 2}
    assert first.items() >= lost.items()
    assert second["tokens_per_second"] == 2 * 128 / 4
    assert second["goodput"] == 14 / 44
    assert "loss" not in second


@pytest.mark.parametrize("terminals", [("stdout", "stderr"), ("stderr",), ("stdout",), ()])
def test_a_terminal_has_a_bar_and_anything_else_a_line_for_each_logged_step(tmp_path, monkeypatch, terminals):
    written = {}
    for name in "stdout", "stderr":
        written[name] = io.BytesIO()
        stream = io.TextIOWrapper(written[name], encoding="utf-8")  # buffered by block, as a pipe is
        stream.isatty = lambda name=name: name in terminals
        monkeypatch.setattr(sys, name, stream)
    record, _ = open_record(CONFIG, tmp_path)
    with record:
        for step in 1, 2:
            record.step(step, VALUES)
        record.validation(2, 1.5)
        out, err = (written[name].getvalue().decode() for name in ("stdout", "stderr"))  # what is there at once
    if len(terminals) == 2:
        sys.stdout.flush()
        assert "loss 2.000" in written["stderr"].getvalue().decode()
        assert "step 2: validation loss 1.5000" in written["stdout"].getvalue().decode()
    else:
        step, validation = out.splitlines()
        assert re.fullmatch("step 2/100: loss 2.0000, learning rate 4e-05, [0-9,]+ tokens/s", step)
        assert validation == "step 2: validation loss 1.5000"
        assert not err


def test_nobody_need_read_what_a_run_says(tmp_path, monkeypatch):
    record, _ = open_record(CONFIG, tmp_path)
    gone = OSError(errno.EIO, os.strerror(errno.EIO))  # a terminal that was closed
    monkeypatch.setattr(sys, "stdout", mock.Mock(write=mock.Mock(side_effect=gone)))
    with record:
        record.step(2, VALUES)
    assert lines(tmp_path)[0]["loss"] == 2.0


def test_the_documented_fields_are_those_written(tmp_path, monkeypatch):
    documented = {
        line.split()[0] for line in metrics.__doc__.splitlines() if line.startswith("    ") and line[4] != " "
    }
    monkeypatch.setattr(metrics, "chip_of", lambda device: CHIPS["v4"])
    record, _ = open_record(override(CONFIG, {"train.on_bad_step": "skip"}), tmp_path)
    with record:
        record.step(2, VALUES | {"skipped_steps": 0.0, "skipped_in_a_row": 0.0})
    assert lines(tmp_path)[0].keys() == documented | {"step"}


def test_a_device_of_unknown_peak_has_no_utilisation(tmp_path):
    record, _ = open_record(CONFIG, tmp_path)
    with record:
        record.step(2, VALUES)
    assert "mfu" not in lines(tmp_path)[0]


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("finished_at", "waited"),
    [(0.0, 10.0), (4.0, 6.0), (None, 0.0)],
    ids=["before the batch was asked for", "meanwhile", "not before it came"],
)
def test_waiting_for_input_is_what_the_device_had_nothing_to_do_in(fake_time, tmp_path, finished_at, waited):
    record, clock = open_record(CONFIG, tmp_path)
    running = FakeStep()
    with record:
        with record.fetching(running):
            if finished_at is not None:
                fake_time.now = finished_at
                running.finish(record)
            fake_time.now = 10.0
        running.finish(record)
        seconds = clock.read()
    assert (seconds["input"], seconds["step"]) == (waited, 10 - waited)


def test_a_run_that_waits_for_its_input_is_told_once(fake_time, tmp_path):
    record, clock = open_record(CONFIG, tmp_path)

    def log(step: int, seconds: float, waiting: float) -> None:
        fake_time.now += seconds
        clock.move(waiting, to="input")
        record.step(step, VALUES)

    with record:
        log(2, 20.0, 1.0)
        log(4, 6.0, 3.0)  # too short to tell
        with pytest.warns(UserWarning, match="50% of the last 12 s of training went by waiting for batches"):
            log(6, 6.0, 3.0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            log(8, 100.0, 90.0)


# Traces and TensorBoard


def test_a_trace_holds_the_steps_asked_for(tmp_path):
    record, _ = open_record(override(CONFIG, {"train.profile_steps": 2}), tmp_path, start=10)
    square = jax.jit(lambda x: x @ x)
    with record:
        for step in range(11, 18):
            with record.dispatching(step):
                out = square(jnp.ones((8, 8)))
            out.block_until_ready()
            record.step(step, VALUES)
    (path,) = (tmp_path / "profile").rglob("*.trace.json.gz")
    assert [*(tmp_path / "profile").rglob("*.xplane.pb")]
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps = [event["args"]["step_num"] for event in events if event.get("name") == "train"]
    assert sorted(map(int, steps)) == [14, 15]


def test_more_steps_than_there_are_cannot_be_traced():
    with pytest.raises(ValueError, match="train.profile_steps must be at most train.steps 100, not 101"):
        override(CONFIG, {"train.profile_steps": 101})
