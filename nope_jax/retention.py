"""Which checkpoints of a run are kept, which one is read, and the disk that they take."""

import json
import math
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from nope_jax.config import Step
from nope_jax.paths import Location, size_of_bytes


class Retention(NamedTuple):
    """The checkpoints that a run keeps."""

    newest: int = 2
    """Number of newest checkpoints."""
    every: int | None = None
    """Keep those of steps that are multiples of this for ever; None: none."""
    best: int = 0
    """Number of checkpoints with the lowest validation losses."""

    def kept(self, steps: Collection[int], losses: Mapping[int, float]) -> set[int]:
        """Return those of the saved steps that are kept.

        Args:
            steps: The saved steps.
            losses: Validation losses by step; a step without one is not among the best.
        """
        newest = sorted(steps)[-self.newest :]
        forever = [step for step in steps if self.every is not None and step % self.every == 0]
        return {*newest, *forever, *best_steps(steps, losses)[: self.best]}

    def most(self, steps: int, interval: int) -> int:
        """Return the largest number of checkpoints at a time: those kept, and the one being written.

        Args:
            steps: Steps of the run.
            interval: Steps between checkpoints.
        """
        forever = 0 if self.every is None else steps // self.every
        return min(self.newest + self.best + forever + 1, -(-steps // interval))


DEFAULT = Retention()


def best_steps(steps: Iterable[int], losses: Mapping[int, float]) -> list[int]:
    """Return the saved steps that have a finite validation loss, the lowest first; of equal ones, the earlier."""
    return sorted((s for s in steps if math.isfinite(losses.get(s, math.inf))), key=lambda step: (losses[step], step))


def saved_steps(workdir: Location) -> list[int]:
    """Return the steps of the complete checkpoints in a workdir, ascending."""
    if isinstance(workdir, Path):  # renamed when complete
        whole = (workdir / "checkpoints").glob("*")
    else:  # marked when complete
        whole = (marker.parent for marker in (workdir / "checkpoints").glob("*/commit_success.txt"))
    return sorted(int(entry.name) for entry in whole if entry.name.isdigit())


def read_log(workdir: Location) -> list[dict[str, float]]:
    """Read the complete lines of metrics.jsonl; none if there is no such file."""
    path = workdir / "metrics.jsonl"
    lines = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        try:
            lines.append(json.loads(line) if line.endswith("\n") else {})
        except ValueError:  # a line half written by a killed process
            continue
    return [line for line in lines if "step" in line]


def validation_losses(workdir: Location, until: int | None = None) -> dict[int, float]:
    """Read the validation losses that a run has logged, nats per token by step; inf if one was not finite.

    Args:
        workdir: Workdir of the run.
        until: The last step to read; None: all.
    """
    losses = {
        int(line["step"]): line.get("validation_loss", math.inf)
        for line in read_log(workdir)
        if line.keys() <= {"step", "validation_loss"}
    }
    return {step: loss for step, loss in losses.items() if until is None or step <= until}


def find_step(workdir: Location, step: Step) -> int:
    """Return the step of a saved checkpoint.

    Raises:
        ValueError: there is no such checkpoint; the message names those that are there.
    """
    saved = saved_steps(workdir)
    if not saved:
        raise ValueError(f"{workdir}: no checkpoint yet")
    if step == "newest":
        return saved[-1]
    there = f"it has {'that' if len(saved) == 1 else 'those'} of step {', '.join(map(str, saved))}"
    if step == "best":
        best = best_steps(saved, validation_losses(workdir))
        if not best:
            raise ValueError(f"{workdir}: no checkpoint has a validation loss by which it could be the best; {there}")
        return best[0]
    if step not in saved:
        raise ValueError(f"{workdir}: no checkpoint of step {step}; {there}")
    return step


def disk_budget(workdir: Location, size: int, retention: Retention, steps: int, interval: int) -> str:
    """Describe the disk that the checkpoints of a run will take.

    Args:
        workdir: Workdir of the run.
        size: Bytes of a checkpoint.
        retention: Those that are kept.
        steps: Steps of the run.
        interval: Steps between checkpoints.

    Raises:
        ValueError: the newest ones and the one being written do not fit on the disk.
    """
    most, there = retention.most(steps, interval), len(saved_steps(workdir))
    said = f"checkpoints: {size_of_bytes(size)} each, at most {most} at a time, {size_of_bytes(most * size)}"
    if not isinstance(workdir, Path):
        return said
    disk = workdir.absolute()
    while not disk.exists():
        disk = disk.parent
    free = shutil.disk_usage(disk).free
    least = min(most, retention.newest + 1)
    if max(1, least - there) * size > free:
        raise ValueError(
            f"train.keep {retention.newest} and the checkpoint being written take {size_of_bytes(least * size)} "
            f"({size_of_bytes(size)} each), but {disk} has {size_of_bytes(free)} free"
        )
    enough = (most - there) * size <= free
    return f"{said}; {size_of_bytes(free)} free" + ("" if enough else ", which is not enough for all")
