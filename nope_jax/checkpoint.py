"""Checkpoints of a run, in `<workdir>/checkpoints/<step>`, written asynchronously and atomically.

Only this module imports orbax.
"""

import contextlib
import functools
import gc
import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, SingleDeviceSharding

from nope_jax import config as configs
from nope_jax.config import Config, Step
from nope_jax.config.format import check_format, stamp
from nope_jax.models import Decoder, abstract_decoder
from nope_jax.paths import location
from nope_jax.retention import DEFAULT, Retention, find_step, saved_steps
from nope_jax.sharding import abstract_on_mesh

PyTree = Any

_VANISHED = 10
"""Number of checkpoints that may disappear while being read before reading fails."""


class _Reports(logging.Filter):
    """Hides orbax's log messages, since errors are raised; keeps the last reported error for `wait`."""

    refusal: BaseException | None = None
    """The last reported error."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and "orbax" in record.pathname:
            self.refusal = record.exc_info[1]
        return record.levelno >= logging.CRITICAL


_reports = _Reports()
logging.getLogger("absl").setLevel(logging.ERROR)
logging.getLogger("absl").addFilter(_reports)


class _Policy:
    """Orbax's question which checkpoints stay, asked when the next one is saved."""

    def __init__(self, retention: Retention, losses: Mapping[int, float]):
        self._retention, self._losses = retention, losses

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        kept = self._retention.kept([info.step for info in checkpoints], self._losses)
        return [info.step in kept for info in checkpoints]


class Checkpointer:
    """The checkpoints of one workdir.

    A checkpoint is a dict of named trees of arrays, each saved with its checksum, so one tree can be read without the
    others. As a context manager, it finishes the current save before it closes.
    """

    losses: dict[int, float]
    """Validation losses by step, which say which checkpoints are the best; on process 0, which removes the others."""

    def __init__(self, workdir: str | os.PathLike[str], *, keep: Retention = DEFAULT, read_only: bool = False):
        self.workdir = folder = location(workdir)
        self._directory = (folder.absolute() if isinstance(folder, Path) else folder) / "checkpoints"
        self.losses = {}
        self._read_only = read_only
        self._saving: int | None = None
        self._broken = False
        # Each process reads alone and synchronizes afterwards, so a process that fails does not block the others.
        process = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})
        # Reading uses no manager, because it fails if a checkpoint is removed while it lists them.
        self._reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=alone)
        self._manager: Any = None
        if not read_only:
            self._manager = ocp.CheckpointManager(
                self._directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=_Policy(keep, self.losses), cleanup_tmp_directories=True
                ),
            )
            # It would ask JAX, late and from a thread, about a past step, and JAX would continue counting from there.
            self._manager.reached_preemption = lambda step: False

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._reader.close()
            if self._manager is not None and not self._broken:
                self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The newest saved step, as seen by process 0."""
        return _told_by_process_0(max(saved_steps(self._directory.parent), default=None))

    def shapes(self, step: int, name: str) -> dict[str, tuple[int, ...]] | None:
        """Return the shapes of a tree's arrays as saved, by dotted name, or None if they cannot be read."""
        try:
            with ocp.StandardCheckpointer() as reader:
                saved = reader.metadata(self._directory / str(step) / name).item_metadata.tree["tree"]
        except Exception:  # orbax raises various exceptions for broken checkpoints
            return None
        return {_dotted(path): tuple(array.shape) for path, array in jax.tree_util.tree_leaves_with_path(saved)}

    def save(self, step: int, trees: dict[str, PyTree]) -> None:
        """Start a save and return once the arrays may be overwritten. Waits for the previous save first.

        Raises:
            OSError: this save could not start, or the previous one failed; earlier checkpoints are unchanged.
        """
        self.wait()
        items = {name: {"tree": tree, "checksum": _checksum(tree)} for name, tree in trees.items()}
        self._saving = step
        _reports.refusal = None
        _drop_late_complaints()
        with self._as_os_error(step):
            args = {name: ocp.args.StandardSave(item) for name, item in items.items()}
            try:
                self._manager.save(step, args=ocp.args.Composite(**args), force=True, custom_metadata=stamp())
            except BaseException:
                self._saving, self._broken = None, jax.process_count() > 1
                raise

    def wait(self) -> None:
        """Wait until the current save is on disk. If an old checkpoint cannot be removed after that, warn.

        Raises:
            OSError: it could not be written; earlier checkpoints are unchanged.
        """
        if self._saving is not None:
            step, self._saving = self._saving, None
            with self._as_os_error(step):
                # If one of several processes cannot write, its orbax and that of the others wait for each other before
                # the error is raised. But it is logged at once.
                while jax.process_count() > 1 and self._manager.is_saving_in_progress():
                    if _reports.refusal:
                        self._broken = True
                        raise _reports.refusal
                    time.sleep(0.02)
                try:
                    self._manager.wait_until_finished()
                except OSError as error:
                    if step not in saved_steps(self._directory.parent):
                        raise
                    _reports.refusal = None
                    warnings.warn(f"{self._directory}: cannot remove an old checkpoint ({error})", stacklevel=2)

    def check(self) -> None:
        """Raise the error of `wait` now, if the current save has already failed."""
        if _reports.refusal:
            self.wait()

    def restore(
        self,
        abstract: dict[str, PyTree],
        optional: Collection[str] = (),
        *,
        instead: Mapping[str, str] = MappingProxyType({}),
        only: int | None = None,
    ) -> tuple[int, dict[str, PyTree]]:
        """Restore the newest checkpoint that all processes can read; return its step and its trees.

        A checkpoint that cannot be read (truncated, corrupted) causes a warning and, unless read-only, is renamed to
        `<step>.unreadable`, so that the run can save that step again. If a checkpoint disappears while being read,
        because the run that saves continues, the newest existing one is read instead.

        Args:
            abstract: The trees to read, as `jax.ShapeDtypeStruct` with shardings, which may differ from those saved.
            optional: Names of trees to omit if they were not saved.
            instead: For names of trees, the names of others that are read in their place if they were saved.
            only: The step to restore, and no other; None: the newest.

        Raises:
            ValueError: there is no checkpoint, or none that can be read; or it was written by a later version.
        """
        unreadable: dict[int, str] = {}
        with _hushed():
            while True:
                # List the steps again each time: if a step is gone, there is a newer one.
                steps = [step for step in saved_steps(self._directory.parent) if only in (None, step)]
                newest = max(set(steps) - unreadable.keys(), default=None)
                step = _told_by_process_0(newest if len(unreadable.keys() - set(steps)) <= _VANISHED else None)
                if step is None:
                    reasons = "; ".join(f"step {step}: {reason}" for step, reason in unreadable.items())
                    raise ValueError(
                        f"{self._directory}: no checkpoint that can be read ({reasons or 'there is none'})"
                    )
                self._check_format(step)
                left_out = {name for name in optional if not self._has(step, name)}
                stored = {
                    name: instead[name] if name in instead and self._has(step, instead[name]) else name
                    for name in abstract
                    if name not in left_out
                }
                read, reason = self._read(step, {saved: abstract[name] for name, saved in stored.items()})
                if reason is None:
                    break
                unreadable[step] = reason
        broken = {other: reason for other, reason in unreadable.items() if other > step}
        for other, reason in broken.items() if jax.process_index() == 0 else ():
            warnings.warn(
                f"{self._directory}: cannot read the checkpoint of step {other} ({reason}); "
                f"going back to that of step {step}",
                stacklevel=2,
            )
        if broken and not self._read_only:
            self._set_aside(list(broken))
        return step, {name: read[saved] for name, saved in stored.items()}

    def _read(self, step: int, abstract: dict[str, PyTree]) -> tuple[dict[str, PyTree], str | None]:
        """Return the trees of a checkpoint, or the reason why some process cannot read it."""
        checksum = np.zeros((), np.uint32)  # a numpy array has no device
        args = {name: ocp.args.StandardRestore({"tree": tree, "checksum": checksum}) for name, tree in abstract.items()}
        reason = None
        try:
            items = self._reader.restore(self._directory / str(step), args=ocp.args.Composite(**args))
        except Exception as error:  # orbax raises various exceptions for broken checkpoints
            reason = str(error).partition("\n")[0][:100] or type(error).__name__
        failed = np.flatnonzero(multihost_utils.process_allgather(np.array([reason is not None])))
        if failed.size:
            return {}, reason or f"process {failed[0]} cannot read its part"
        for name in abstract:
            if int(_checksum(items[name]["tree"])) != int(items[name]["checksum"]):
                return {}, f"the checksum of its {name} is wrong"
        return {name: items[name]["tree"] for name in abstract}, None

    def _has(self, step: int, name: str) -> bool:
        """Whether a checkpoint has a tree of this name, as seen by process 0."""
        return bool(_told_by_process_0(int((self._directory / str(step) / name).exists())))

    def _check_format(self, step: int) -> None:
        folder = self._directory / str(step)
        try:
            found = json.loads((folder / "_CHECKPOINT_METADATA").read_text()).get("custom_metadata") or {}
        except (OSError, ValueError, AttributeError):  # of an early version, or broken: reading it says how
            found = {}
        check_format(found, folder)

    def _set_aside(self, steps: list[int]) -> None:
        if jax.process_index() == 0:
            for step in steps:
                (self._directory / str(step)).replace(self._directory / f"{step}.unreadable")
        multihost_utils.sync_global_devices("set aside")
        self._manager.reload()

    @contextlib.contextmanager
    def _as_os_error(self, step: int) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            code = _error_code(error)
            if code is None:
                raise
            kept = max(saved_steps(self._directory.parent), default=None)
            still = "there is no earlier one" if kept is None else f"that of step {kept} is kept"
            raise OSError(
                code, f"cannot save the checkpoint of step {step} ({os.strerror(code)}); {still}", str(self._directory)
            ) from error


def _error_code(error: BaseException) -> int | None:
    """The operating system's error code, if it caused the error."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"os_error_code='(\d+)'", str(error))  # tensorstore turns a failed write into a ValueError
    return int(match[1]) if match else None


def _told_by_process_0(step: int | None) -> int | None:
    """Broadcast the value of process 0, because a file system may show the others an older state."""
    told = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
    return None if told < 0 else told


def _dotted(path: tuple) -> str:
    """Dotted name of a parameter, from its path in a model or in a checkpoint."""
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


@jax.jit
def _checksum(tree: PyTree) -> jax.Array:
    # Integer sums wrap and commute, so the sharding does not matter. Orbax itself does not detect a flipped bit.
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(tree):
        total = 31 * total + leaf.view(f"uint{8 * leaf.dtype.itemsize}").astype(jnp.uint32).sum(dtype=jnp.uint32)
    return total


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    # If one array cannot be read, orbax abandons its other reads, which print errors when garbage-collected.
    hooks = sys.excepthook, sys.unraisablehook
    sys.excepthook = lambda *_: None
    sys.unraisablehook = lambda *_: None
    try:
        yield
    except BaseException:
        gc.collect()
        raise
    finally:
        sys.excepthook, sys.unraisablehook = hooks


@functools.cache
def _drop_late_complaints() -> None:
    # Writes abandoned by a failed save end later, each with a traceback, because their event loop is closed.
    report = sys.unraisablehook

    def hook(complaint: Any) -> None:
        if str(complaint.exc_value) != "Event loop is closed":
            report(complaint)

    sys.unraisablehook = hook


def load_model(
    workdir: str | os.PathLike[str], mesh: Mesh | None = None, *, step: Step = "newest", trust_code: bool = False
) -> tuple[Config, Decoder, int]:
    """Load the trained decoder of a workdir from its config.json and a checkpoint.

    If the run averaged its weights (`train.ema`), they are the average.

    Args:
        workdir: Folder written by `train.py`.
        step: The checkpoint: its step, "best" (the lowest validation loss), or "newest", of those that can be read.
        mesh: Devices to shard the parameters over; None puts them all on the first device of this process.
        trust_code: Run the code of the run's custom encoding even if it was not trained on this machine by you.

    Returns:
        The config of the run, the decoder, and the step of the checkpoint.

    Raises:
        ValueError: there is no such run, it does not have that checkpoint or it cannot be read, its config.json
            describes a decoder with other parameters, or it comes with code that is not trusted
            (`nope_jax.config.own_code`).
    """
    config = configs.load(workdir, trust_code=trust_code)
    graphdef, abstract = nnx.split(abstract_decoder(config.model))
    if mesh is None:
        device = SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=device), abstract)
    else:
        abstract = abstract_on_mesh(abstract, mesh)
    with Checkpointer(workdir, read_only=True) as checkpointer:
        chosen = _told_by_process_0(find_step(checkpointer.workdir, step))
        assert chosen is not None
        _check_shapes(workdir, chosen, checkpointer, abstract)
        read, trees = checkpointer.restore(
            {"params": abstract}, instead={"params": "ema"}, only=None if step == "newest" else chosen
        )
    return config, nnx.merge(graphdef, trees["params"]), read


def _check_shapes(workdir: str | os.PathLike[str], step: int, checkpointer: Checkpointer, abstract: nnx.State) -> None:
    """Check that the parameters of config.json match those of a checkpoint."""
    saved = checkpointer.shapes(step, "params")
    if saved is None:
        return
    ours = {_dotted(path): tuple(array.shape) for path, array in jax.tree_util.tree_leaves_with_path(abstract)}
    for name in sorted(ours | saved, key=lambda name: ("position" not in name, name)):
        if ours.get(name) != saved.get(name):
            shapes = ours.get(name), saved.get(name)
            here, there = ("missing" if shape is None else f"of shape {list(shape)}" for shape in shapes)
            raise ValueError(
                f"{workdir}: config.json does not fit the checkpoint of step {step}: {name} is {here} by config.json, "
                f"{there} in the checkpoint"
            )
