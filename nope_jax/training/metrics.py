"""The log of a run: `metrics.jsonl`, one JSON object per logged step, and a progress bar or one line of text per step.

Each step is logged once even if the run is stopped and resumed, with the loss of an uninterrupted run. Non-finite
values are omitted. The fields of step `step`, every `train.log_every` steps (the first step is 1):

    loss                nats per token, before the update
    learning_rate       of the update
    grad_norm           global norm of the gradient, before clipping
    param_norm          global norm of the parameters, after the update
    skipped_steps       bad steps skipped so far (only with `train.on_bad_step skip`)
    tokens_per_second   since the previous line: over all devices, in steps and waiting for input
    mfu                 model-FLOPs utilization: tokens_per_second x `model_flops_per_token` over the bfloat16 peak of
                        all devices (`training/flops.py` has the formula and the peaks; absent for other devices)
    goodput             fraction of the time spent in steps
    startup_seconds     reading the corpus, creating or restoring the state
    compile_seconds     compiling the step and the validation loss
    input_seconds       the devices had finished a step, but the next batch was not ready
    validation_seconds  computing the validation loss
    save_seconds        starting to save a checkpoint, and waiting for the previous save; writing overlaps with steps

Seconds and goodput count from the call of `train` in this process; a resumed run starts again from 0. Time that is
neither a step nor one of these losses (logging, starting and stopping a trace) counts only in the total. In addition,
there is one line of `step` and `validation_loss` (nats per token) every `train.eval_every` steps and after the last. If
a checkpoint is saved at the same step, it is saved first; a run that ends in between computes the loss when resumed.

The same numbers go to the trackers that `train` asks for (`training/trackers.py`). With `train.profile_steps`, a trace
of a few steps goes to `<workdir>/profile`; view it in XProf, or its trace.json.gz in Perfetto (ui.perfetto.dev).
"""

import contextlib
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np
from tqdm import tqdm

from nope_jax.config import Config
from nope_jax.paths import Location, write_whole
from nope_jax.retention import validation_losses
from nope_jax.training.flops import chip_of, model_flops_per_token
from nope_jax.training.schedules import learning_rate_schedule
from nope_jax.training.trackers import TRACKERS, Tracker, check_trackers

Activity = Literal["startup", "compile", "step", "input", "validation", "save", "other"]

LOST: tuple[Activity, ...] = ("startup", "compile", "input", "validation", "save")
"""Activities that reduce goodput."""
STEPS_BEFORE_PROFILE = 3
"""Number of steps before the traced ones, because the first steps of a process are not typical."""
INPUT_SHARE = 0.1
"""A run that spends more than this fraction of its training time waiting for input gets a warning."""
INPUT_SECONDS = 10.0
"""Minimum training time over which that fraction is measured."""


class GoodputTimer:
    """Accounts for the time of a run: from creation on, every moment belongs to one activity."""

    def __init__(self) -> None:
        self._seconds: dict[Activity, float] = dict.fromkeys(get_args(Activity), 0.0)
        self._doing: Activity = "startup"
        self._since = time.perf_counter()

    def switch(self, activity: Activity) -> Activity:
        """Start another activity; return the one that ends."""
        now = time.perf_counter()
        self._seconds[self._doing] += now - self._since
        before, self._doing, self._since = self._doing, activity, now
        return before

    @contextlib.contextmanager
    def during(self, activity: Activity) -> Iterator[None]:
        """Switch to another activity for the duration of a block."""
        before = self.switch(activity)
        try:
            yield
        finally:
            self.switch(before)

    def move(self, seconds: float, to: Activity) -> None:
        """Reassign some seconds of the current activity to another."""
        self._seconds[self._doing] -= seconds
        self._seconds[to] += seconds

    def read(self) -> dict[Activity, float]:
        """The seconds of each activity so far."""
        self.switch(self._doing)
        return dict(self._seconds)


class MetricsLog:
    """Appends to a JSON-lines file, after removing lines past the step that the run resumes from."""

    def __init__(self, path: Path, *, start: int):
        """Open `path`, keeping its lines up to step `start`."""
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if _is_up_to(line, start)]
            if len(kept) < len(lines):
                write_whole(path, "".join(kept).encode())
        self._path = path
        self._file = path.open("ab", buffering=0)  # unbuffered, so that lines survive a kill

    def flush(self) -> None:
        """Do nothing: every line is already written."""

    def close(self) -> None:
        self._file.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        try:
            self._file.write(json.dumps({"step": step, **values}).encode() + b"\n")
        except OSError as error:  # the error of a full disk has no path
            raise OSError(error.errno, error.strerror, str(self._path)) from error


class BucketMetricsLog:
    """A `MetricsLog` in a bucket, whose objects do not support appending: rewritten at `flush` and at the end."""

    def __init__(self, path: Location, *, start: int):
        self._path = path
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        self._lines = [line for line in lines if _is_up_to(line, start)]

    def flush(self) -> None:
        self._path.write_text("".join(self._lines))

    def close(self) -> None:
        self.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._lines.append(json.dumps({"step": step, **values}) + "\n")


def _is_up_to(line: str, step: int) -> bool:
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= step
    except ValueError:  # a line half written by a killed process
        return False


def check_can_record(config: Config, workdir: Location) -> None:
    """Check that the requested outputs are possible.

    Raises:
        ValueError: an output needs a package that is not installed, or a workdir on a disk.
    """
    for name in "tensorboard", "profile_steps":
        if getattr(config.train, name) and not isinstance(workdir, Path):
            raise ValueError(f"train.{name} needs a workdir on a disk, not {workdir}")
    check_trackers(config)


class MetricWriter:
    """Reports the progress of a run: lines in `metrics.jsonl`, and a progress bar on a terminal.

    If stdout or stderr is not a terminal (a file, a pipe, a job log), each logged step is a line on stdout, unbuffered.
    Only the first process reports. If `quiet`, files are all that it writes.
    """

    def __init__(
        self,
        config: Config,
        workdir: Location,
        clock: GoodputTimer,
        *,
        start: int,
        tokens_per_step: int,
        quiet: bool = False,
    ):
        is_main = jax.process_index() == 0
        self._config = config.train
        self._workdir = workdir
        self._quiet = quiet
        self._clock = clock
        self._schedule = jax.jit(jax.vmap(learning_rate_schedule(config.optimizer, config.train.steps)))
        self._learning_rates = -1, np.zeros(0)  # which thousand steps, and theirs
        self._tokens_per_step = tokens_per_step
        self._logged = start, clock.read()
        self._judged: dict[Activity, float] | None = clock.read() if is_main and not quiet else None
        chip = chip_of(jax.devices()[0])
        self._peak_rate: float | None = None
        if chip is not None:
            self._peak_rate = chip.flops * jax.device_count() / model_flops_per_token(config)

        before = max(0, min(STEPS_BEFORE_PROFILE, config.train.steps - start - config.train.profile_steps))
        self._profiled = range(start + 1 + before, start + 1 + before + is_main * config.train.profile_steps)
        self._is_tracing = False
        with contextlib.ExitStack() as stack:
            self._bar = stack.enter_context(
                tqdm(
                    total=config.train.steps,
                    initial=start,
                    unit="step",
                    disable=quiet or not (is_main and sys.stdout.isatty() and sys.stderr.isatty()),
                    dynamic_ncols=True,
                )
            )
            path = workdir / "metrics.jsonl" if is_main else Path(os.devnull)
            self._log = (MetricsLog if isinstance(path, Path) else BucketMetricsLog)(path, start=start)
            stack.callback(self._log.close)
            self._trackers: list[Tracker] = []
            for name, tracker in TRACKERS.items():
                if getattr(config.train, name) and is_main:
                    self._trackers.append(tracker(config, workdir, start=start))
                    stack.callback(self._trackers[-1].close)
            stack.callback(self._end_trace)
            # A thread waits for the devices to record when they finish, so the loop does not have to.
            self._watcher = stack.enter_context(ThreadPoolExecutor(1))
            self._open = stack.pop_all()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def dispatching(self, step: int) -> contextlib.AbstractContextManager:
        """Context of the call that starts step `step`; traces the step if it is to be profiled."""
        if step not in self._profiled:
            return contextlib.nullcontext()
        if not self._is_tracing:
            with self._clock.during("other"):
                jax.profiler.start_trace(self._workdir / "profile")
            self._is_tracing = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    @contextlib.contextmanager
    def fetching(self, running: Any) -> Iterator[None]:
        """Context of fetching the next batch, while the devices compute `running`, an output of the current step.

        Time until the devices finish counts as the step; the rest counts as waiting for input.
        """
        began = time.perf_counter()
        finished = self._watcher.submit(_time_when_ready, running)
        yield
        if finished.done():
            waited = time.perf_counter() - max(began, finished.result())
            self._clock.move(waited, to="input")

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Log step `step` (the first is 1) with the metrics of `train_step`."""
        self._bar.update()
        skipped = int(values.get("skipped_steps", 0))
        was_skipped = values.get("skipped_in_a_row", 0) > 0
        if was_skipped:
            self._say(f"step {step} skipped: loss {values['loss']:.4g}, grad_norm {values['grad_norm']:.4g}")
        if self._is_tracing and step == self._profiled[-1]:
            self._end_trace()
        if step % self._config.log_every and step != self._config.steps:
            return
        seconds = self._clock.read()
        with self._clock.during("other"):
            rate = self._rate(step, seconds)
            line = {
                "loss": values["loss"],
                "learning_rate": self._learning_rate(step - 1 - skipped + was_skipped),
                "grad_norm": values["grad_norm"],
                "param_norm": values["param_norm"],
            }
            if self._config.on_bad_step == "skip":
                line["skipped_steps"] = skipped
            line["tokens_per_second"] = rate
            if self._peak_rate is not None:
                line["mfu"] = rate / self._peak_rate
            line["goodput"] = seconds["step"] / sum(seconds.values())
            line |= {f"{lost}_seconds": seconds[lost] for lost in LOST}
            self._write(step, line)
            if self._bar.disable:
                self._say(
                    f"step {step}/{self._config.steps}: loss {line['loss']:.4f}, learning rate "
                    f"{line['learning_rate']:.4g}, {rate:,.0f} tokens/s"
                )
            else:
                self._bar.set_postfix_str(f"loss {line['loss']:.3f}, {rate:,.0f} tokens/s")
            self._warn_of_input(seconds)

    def _learning_rate(self, updates: int) -> float:
        """That of the update after so many. Of many at once: the devices are busy with the next step, and answer
        after it."""
        block, index = divmod(updates, 1000)
        if block != self._learning_rates[0]:
            self._learning_rates = block, np.asarray(self._schedule(1000 * block + np.arange(1000)))
        return float(self._learning_rates[1][index])

    def flush(self) -> None:
        """Make the lines logged so far persistent; call it before the checkpoint of a later step."""
        self._log.flush()

    def validation(self, step: int, loss: float) -> None:
        """Log the validation loss after `step` steps, in nats per token."""
        self._write(step, {"validation_loss": loss})
        self._say(f"step {step}: validation loss {loss:.4f}")

    def finished(self, step: int) -> None:
        """Report the end of the run, after its last step: what it has read, this process's time, its best loss."""
        losses = validation_losses(self._workdir)
        best = min(losses, key=losses.__getitem__)
        self._say(
            f"finished: {step:,} steps, {step * self._tokens_per_step:,} tokens, "
            f"{tqdm.format_interval(sum(self._clock.read().values()))} in this process, lowest validation loss "
            f"{losses[best]:.4f} at step {best}; {self._workdir} has config.json, metrics.jsonl and checkpoints"
        )

    def _rate(self, step: int, seconds: Mapping[Activity, float]) -> float:
        """Tokens per second of training since the last reading."""
        logged_step, logged = self._logged
        self._logged = step, dict(seconds)
        return (step - logged_step) * self._tokens_per_step / sum(_since(logged, seconds))

    def _warn_of_input(self, seconds: Mapping[Activity, float]) -> None:
        if self._judged is None:
            return
        in_steps, in_input = _since(self._judged, seconds)
        if in_steps + in_input < INPUT_SECONDS:
            return
        share = in_input / (in_steps + in_input)
        self._judged = None if share > INPUT_SHARE else dict(seconds)
        if share > INPUT_SHARE:
            warnings.warn(
                f"{share:.0%} of the last {in_steps + in_input:.0f} s of training went by waiting for batches: put the "
                "data on a faster disk (data.dir), or give this process more CPU cores",
                stacklevel=2,
            )

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        values = {name: value for name, value in values.items() if math.isfinite(value)}  # JSON has no NaN
        self._log.write(step, values)
        for tracker in self._trackers:
            tracker.write(step, values)

    def _say(self, message: str) -> None:
        if jax.process_index() or self._quiet:
            return
        with contextlib.suppress(OSError):  # continue the run if the terminal was closed or a pipe has no reader
            if self._bar.disable:
                print(message, flush=True)
            else:
                self._bar.write(message)

    def _end_trace(self) -> None:
        if self._is_tracing:
            self._is_tracing = False
            with self._clock.during("other"):
                jax.profiler.stop_trace()
            self._say(f"profile: {self._workdir / 'profile'}")


def _since(before: Mapping[Activity, float], now: Mapping[Activity, float]) -> tuple[float, float]:
    """Seconds in steps and waiting for input between two readings of a clock."""
    return now["step"] - before["step"], now["input"] - before["input"]


def _time_when_ready(array: jax.Array) -> float:
    array.block_until_ready()
    return time.perf_counter()
