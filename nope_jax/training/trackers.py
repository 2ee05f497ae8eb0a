"""Experiment trackers, which receive the numbers of metrics.jsonl as well: one class each, and the table TRACKERS.

To add one: a class with the methods of `Tracker`, its line in TRACKERS, and a field of the same name in TrainConfig.
"""

import dataclasses
import importlib.util
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from nope_jax.config import Config
from nope_jax.paths import Location, write_whole


class Tracker(Protocol):
    """A tracker of one run, made as `Tracker(config, workdir, start=step)` by the first process.

    `start` is the step that the run goes on from, 0 if it begins.
    """

    package: str
    """The package that it needs."""

    def __init__(self, config: Config, workdir: Location, *, start: int): ...

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Send the finite numbers of one step."""

    def close(self) -> None: ...


class TensorBoard:
    """Event files in WORKDIR/tensorboard."""

    package = "tensorboardX"

    def __init__(self, config: Config, workdir: Location, *, start: int):
        from tensorboardX import SummaryWriter

        # Readers drop the steps from `purge_step` on that an earlier process wrote.
        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1, filename_suffix=f".{start}")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, by the name of the workdir, which keeps its id in `wandb_id` for when it is resumed.

    Project, entity and mode are those of the environment (WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE=offline).
    """

    package = "wandb"

    def __init__(self, config: Config, workdir: Location, *, start: int):
        import wandb

        path = workdir / "wandb_id"
        if not path.exists():
            write_whole(path, secrets.token_hex(8).encode())
        try:
            self._run = wandb.init(
                id=path.read_text(),
                resume="allow",
                name=workdir.name,
                config=dataclasses.asdict(config),
                dir=str(workdir) if isinstance(workdir, Path) else None,
            )
        except wandb.Error as error:  # without an account, or without its server
            raise ValueError(f"train.wandb: {error} (WANDB_MODE=offline needs neither account nor network)") from error
        self._run.define_metric("*", step_metric="step")  # a resumed run may send steps that were sent before

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB}
"""The trackers by the field of TrainConfig that asks for them."""


def check_trackers(config: Config) -> None:
    """Check that the packages of the trackers that the config asks for are installed.

    Raises:
        ValueError: one is not.
    """
    for name, tracker in TRACKERS.items():
        if getattr(config.train, name) and importlib.util.find_spec(tracker.package) is None:
            raise ValueError(f"train.{name} needs a package that is not installed: pip install {tracker.package}")
