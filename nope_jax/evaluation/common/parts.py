"""Results in parts, each stored when it is done, so that an interrupted evaluation continues where it was."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from nope_jax.evaluation.common.console import Bar
from nope_jax.evaluation.common.files import store, stored
from nope_jax.evaluation.common.runs import Run, checkpoint_step
from nope_jax.models import Decoder


class Part(NamedTuple):
    """What a run is asked in one go: a task or dataset at a length."""

    name: str
    length: int
    work: int
    """What it adds to the progress bar if its result is already there."""
    identity: Callable[[], str]
    """What its result is computed from; asked again once the model is loaded, as a run in training moves on."""
    measure: Callable[[Decoder, int], Any]
    """From the model and the number of rows at a time, its result: a dataclass as `store` takes it."""


def measure_parts(
    run: Run[Any], kind: str, parts: Iterable[Part], result: type, batch_size: int, out: Path, bar: Bar
) -> Iterator[None]:
    """Measure or load the parts of a run into `run.results`, by length and name; yield after each.

    Args:
        run: The run.
        kind: Name of the evaluation, with which the names of the stored files begin.
        parts: Its parts.
        result: The dataclass of a result.
        batch_size: Rows at a time, before they are rounded up to what the devices share.
        out: Folder of the results.
        bar: Shows the progress.
    """
    run.step, model, placement = checkpoint_step(run), None, run.place(batch_size)
    for part in parts:
        path = out / "measured" / f"{kind}-{run.name.replace('/', '-')}-{part.name}-{part.length}.npz"
        identity = part.identity()
        found = stored(path, result, identity)
        if found is None:
            if model is None:
                bar.describe(f"{run.name}: loading")
                model = run.load(placement.mesh)
                identity = part.identity()
            bar.describe(f"{run.name}: {part.name} at {part.length:,}")
            with jax.set_mesh(placement.mesh):
                found = part.measure(model, placement.rows)
            store(path, found, identity)
        else:
            bar.advance(part.work)
        run.results.setdefault(part.length, {})[part.name] = found
        yield
