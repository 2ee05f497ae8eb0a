"""The record of a run: `metrics.jsonl`, one JSON object per logged step, and the progress bar.

A step is logged once however often the run was stopped, and its loss is that of an uninterrupted run.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

import jax
from tqdm import tqdm

from nope_jax.config import Config
from nope_jax.training.optimizer import learning_rate_schedule


class Throughput:
    """Tokens per second of training alone: the clock stands between `pause` and `resume`."""

    def __init__(self, tokens_per_step: int):
        self._tokens_per_step = tokens_per_step
        self._tokens, self._seconds = 0, 0.0
        self.resume()

    def step_done(self) -> None:
        self._tokens += self._tokens_per_step

    def pause(self) -> None:
        self._seconds += time.perf_counter() - self._since

    def resume(self) -> None:
        self._since = time.perf_counter()

    def read(self) -> float:
        """Tokens per second since the last reading."""
        self.pause()
        rate = self._tokens / self._seconds
        self._tokens, self._seconds = 0, 0.0
        self.resume()
        return rate


class MetricsLog:
    """Appends to a JSON-lines file, after dropping from it what came after the step that the run resumes from."""

    def __init__(self, path: Path, *, start: int):
        """Opens `path`, keeping its lines up to step `start`."""
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if _is_up_to(line, start)]
            if len(kept) < len(lines):
                temporary = path.with_name(path.name + ".tmp")
                temporary.write_text("".join(kept))
                os.replace(temporary, path)
        self._path = path
        self._file = path.open("ab", buffering=0)  # what is logged survives a kill

    def close(self) -> None:
        self._file.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        try:
            self._file.write(json.dumps({"step": step, **values}).encode() + b"\n")
        except OSError as error:  # a full disk does not say where
            raise OSError(error.errno, error.strerror, str(self._path)) from error


def _is_up_to(line: str, step: int) -> bool:
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= step
    except ValueError:  # a line that a killed process left half written
        return False


class Record:
    """What a run says of itself as it goes: lines in its `metrics.jsonl`, and a progress bar if stderr is a terminal.

    Only the first process says anything.
    """

    def __init__(self, config: Config, workdir: Path, *, start: int, tokens_per_step: int):
        is_main = jax.process_index() == 0
        self._config = config.train
        self._learning_rate = jax.jit(learning_rate_schedule(config.optimizer, config.train.steps))
        self._throughput = Throughput(tokens_per_step)
        self._log = MetricsLog(workdir / "metrics.jsonl" if is_main else Path(os.devnull), start=start)
        self._bar = tqdm(
            total=config.train.steps, initial=start, unit="step", disable=None if is_main else True, dynamic_ncols=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._log.close()

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Step `step` (the first is 1) is done; `values` are what `train_step` measured in it."""
        self._throughput.step_done()
        self._bar.update()
        if step % self._config.log_every == 0 or step == self._config.steps:
            rate = self._throughput.read()
            with self.paused():
                line = {
                    "loss": values["loss"],
                    "learning_rate": float(self._learning_rate(step - 1)),
                    "grad_norm": values["grad_norm"],
                    "param_norm": values["param_norm"],
                    "tokens_per_second": rate,
                }
                self._log.write(step, line)
                self._bar.set_postfix_str(f"loss {values['loss']:.3f}, {rate:,.0f} tokens/s")

    def validation(self, step: int, loss: float) -> None:
        """The validation loss after `step` steps, in nats per token."""
        self._log.write(step, {"validation_loss": loss})
        if jax.process_index() == 0:
            self._bar.write(f"step {step}: validation loss {loss:.4f}")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock: what happens meanwhile is not training."""
        self._throughput.pause()
        yield
        self._throughput.resume()
