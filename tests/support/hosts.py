"""Runs of several processes on this machine, each with some CPU devices, connected over loopback."""

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from nope_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig

ROOT = Path(__file__).parents[2]


def smoke_config(folder: Path) -> Config:
    """A run of 12 steps over text that is the same everywhere, with checkpoints at 4, 8 and 12."""
    draw = random.Random(0)
    corpus = folder / "corpus"
    corpus.mkdir()
    for document in range(20):
        words = ["".join(draw.choices("aeiou", k=3)) for _ in range(100)]
        (corpus / f"{document:02}.txt").write_text(" ".join(words))
    return Config(
        model=ModelConfig(num_layers=1, num_heads=2, model_dim=16, mlp_dim=32),
        data=DataConfig(source=f"text:{corpus}/*.txt", context_length=16, batch_size=8),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=4),
        train=TrainConfig(steps=12, log_every=1, checkpoint_every=4, eval_every=6, eval_batches=2),
    )


class Ended(NamedTuple):
    """What a process left behind."""

    status: int
    output: str


class Started:
    """Processes 0, 1, ... of one run."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        processes: int,
        devices: int,
        run: Sequence[int] | None = None,
        prepare: dict[int, Callable[[], None]] | None = None,
    ):
        """Starts a command, with the options of each process of several.

        Args:
            command: the command line after `python`.
            processes: of the run.
            devices: of each process.
            run: those that are started; None: all.
            prepare: what is done first in the process of a number.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        flags = f"--xla_force_host_platform_device_count={devices} {os.environ.get('XLA_FLAGS', '')}"
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        self.processes = []
        for number in range(processes) if run is None else run:
            place = ["--coordinator", f"127.0.0.1:{port}", "--num_processes", str(processes), "--process_id"]
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, *command, *([*place, str(number)] if processes > 1 else [])],
                    cwd=ROOT,
                    env=environment,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    preexec_fn=(prepare or {}).get(number),
                )
            )

    def wait(self, timeout: float = 900) -> list[Ended]:
        """What all left behind, once the last has ended; none outlives `timeout` seconds."""
        try:
            outputs = [process.communicate(timeout=timeout)[0] for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [Ended(process.returncode, output) for process, output in zip(self.processes, outputs, strict=True)]


def logged(workdir: Path, name: str) -> dict[int, float]:
    """What a run logged under a name, by step; a step that is there twice fails."""
    file = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []
    steps = [line["step"] for line in lines if name in line]
    assert len(steps) == len(set(steps))
    return {line["step"]: line[name] for line in lines if name in line}


def checkpoints(workdir: Path) -> list[str]:
    return sorted(entry.name for entry in (workdir / "checkpoints").iterdir())
