"""Training many small models at once: models of one shape take their steps together, in one program.

The step of `train` is mapped over runs, which differ in their seeds and in the examples they read, and the runs are
spread over the devices (of a CPU, as many as `--xla_force_host_platform_device_count` in XLA_FLAGS says). Every run has
its own workdir, as `train` writes it, and either of the two continues it.

N runs.
"""

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nope_jax import config as configs
from nope_jax.checkpoint import Checkpointer
from nope_jax.config import HINTS, Config, DataConfig, MeshConfig
from nope_jax.data import Batch, Corpus, Mixture, load_corpus, train_batches, validation_batches
from nope_jax.data.batches import masks_loss
from nope_jax.data.corpora import Split
from nope_jax.data.tokenizers import with_vocab_size
from nope_jax.distributed import agreed_stop
from nope_jax.locks import held
from nope_jax.paths import Location, check_reachable, location
from nope_jax.sharding import make_mesh
from nope_jax.training.loop import (
    Interrupted,
    budget,
    caught_signals,
    check_run,
    evaluates_after,
    restore_state,
    retention,
)
from nope_jax.training.metrics import GoodputTimer, MetricWriter
from nope_jax.training.optimizer import make_optimizer
from nope_jax.training.resume import digest_data, save_digests
from nope_jax.training.state import TrainState, abstract_state, new_state
from nope_jax.training.step import Metrics, num_targets, reason_to_stop, seeded_step, step_settings, total_loss

MAY_DIFFER = frozenset(
    {
        "data.source",
        "data.weights",
        "data.validation_source",
        "data.split",
        "data.text_field",
        "data.dir",
        "data.tokenizer",
        "data.document_separator",
        "data.separator_token",
        "data.seed",
        "data.lengths",
        "data.scratchpad",
        "train.seed",
        *(name for name in HINTS if name.startswith("eval.")),
    }
)
"""Fields in which runs that train together may differ."""

_Tree = TypeVar("_Tree")
_Item = TypeVar("_Item")


@dataclasses.dataclass(eq=False)
class _Run:
    """One of the runs."""

    config: Config
    workdir: Location
    checkpointer: Checkpointer
    validation: list[Batch]
    start: int
    """Steps taken when it was resumed."""
    state: TrainState | None
    """Its state at `start`; None: it starts from its seed. Released when the runs are stacked."""
    batches: Iterator[Batch]
    batch: Batch
    """The batch of its next step."""
    record: MetricWriter
    diverged: str = ""
    """Why it stopped before the end."""

    def steps_at(self, step: int) -> bool:
        """Whether it takes this step; one that is ahead of the others waits for them."""
        return self.start < step and not self.diverged


def train_together(
    runs: Sequence[tuple[Config, str | os.PathLike[str]]],
    load: Callable[[DataConfig, Split], Corpus | Mixture] | None = None,
) -> None:
    """Train runs up to their last step, each from the newest checkpoint in its workdir or else from the start.

    Each run gives what `train` gives for it alone, up to rounding: its config.json, metrics.jsonl and checkpoints. Its
    `tokens_per_second` is its own share. Of runs that are not equally far, those ahead wait for the others.

    Args:
        runs: The config and the workdir of each run. All are in this process, and each model is on one device.
        load: `load_corpus`, cached: one cache for several calls saves reading their data again. None: a new cache.

    Raises:
        ValueError: as `train`, or the configs differ in a field that shapes the program (all but MAY_DIFFER).
        OSError: as `train`.
        FloatingPointError: runs diverged as in `train`; the others have finished.
        Interrupted: as `train`; all runs are saved.
    """
    clock = GoodputTimer()
    runs = [(with_vocab_size(config), workdir) for config, workdir in runs]
    check_alike(runs)
    config = runs[0][0]
    devices = jax.devices()
    one = make_mesh(MeshConfig(), devices[:1])
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    graphdef, abstract = abstract_state(config, optimizer, one)
    with contextlib.ExitStack() as stack:
        load = load or functools.cache(load_corpus)
        opened = [_open(*run, load, abstract, one, clock, stack) for run in runs]
        trained = [run for run in opened if run is not None]
        if not trained:
            print(f"all {len(runs)} runs have already finished at step {config.train.steps}")
            return
        print(budget(config, trained[0].workdir, abstract, len(trained)), flush=True)
        count, slots = slots_of(trained, len(devices))
        spread = NamedSharding(Mesh(np.array(devices[:count]), ("runs",)), PartitionSpec("runs"))
        seeds = jax.device_put(np.array([run.config.train.seed for run in slots]), spread)

        def take_step(state: TrainState, batch: Batch, seed: jax.Array, takes: jax.Array) -> tuple[TrainState, Metrics]:
            after, metrics = step_of_one(state, batch, seed)
            return jax.tree.map(lambda new, old: jnp.where(takes, new, old), after, state), metrics

        step_of_one = seeded_step(graphdef, optimizer, **step_settings(config))
        with clock.during("compile"):
            state = _stacked_states(slots, lambda seed: new_state(config, optimizer, jax.random.key(seed)), spread)
            arguments = state, _stacked([run.batch for run in slots], spread), seeds, _takes(slots, 0, spread)
            step_of_all = jax.jit(_for_all(take_step, spread), donate_argnums=0).lower(*arguments).compile()
            losses = jax.jit(_for_all(total_loss(graphdef, config.optimizer.accumulation), spread))
            validate = losses.lower(state.weights, arguments[1]).compile()
            shardings = jax.tree.map(lambda array: array.sharding, abstract)
            take = jax.jit(lambda states, i: jax.tree.map(lambda x: x[i], states))

        def evaluate(step: int, chosen: Sequence[_Run]) -> None:
            with clock.during("validation"):
                rows = [_stacked(list(batches), spread) for batches in zip(*(r.validation for r in slots), strict=True)]
                totals = sum(np.asarray(validate(state.weights, batch), np.float64) for batch in rows)
                for run, total in zip(trained, np.asarray(totals), strict=False):
                    if run in chosen:
                        loss = float(total) / sum(int(num_targets(batch)) for batch in run.validation)
                        run.checkpointer.losses[step] = loss
                        run.record.validation(step, loss)

        def save(step: int, chosen: Sequence[_Run]) -> None:
            with clock.during("save"):
                for i, run in enumerate(trained):
                    if run in chosen:
                        run.record.flush()
                        run.checkpointer.save(step, jax.device_put(take(state, i), shardings).trees())

        signals = stack.enter_context(caught_signals())
        say = _Progress(config, trained)
        unread: tuple[int, Metrics] | None = None
        clock.switch("step")
        for start in sorted({run.start for run in trained}):
            unmeasured = [r for r in trained if r.start == start and start not in r.checkpointer.losses]
            if evaluates_after(start, config) and unmeasured:
                evaluate(start, unmeasured)
        for step in range(min(run.start for run in trained) + 1, config.train.steps + 1):
            batch = _stacked([run.batch for run in slots], spread)
            state, metrics = step_of_all(state, batch, seeds, _takes(slots, step, spread))
            for run in trained:
                if run.steps_at(step) and step < config.train.steps:
                    run.batch = next(run.batches)
            if unread is not None:  # a step late, so that the devices stay busy
                _record(trained, *unread, say)
            unread = step, metrics
            signum = agreed_stop(signals, step)
            stops = signum is not None and step < config.train.steps
            evaluates = evaluates_after(step, config)
            saves = step % config.train.checkpoint_every == 0 or step == config.train.steps or stops
            if saves or evaluates:
                _record(trained, *unread, say)
                unread = None
            chosen = [run for run in trained if run.steps_at(step)]
            if saves:
                save(step, chosen)
            if signum is not None and stops:
                for run in trained:
                    run.checkpointer.wait()
                raise Interrupted(signum, step)
            if evaluates:
                evaluate(step, chosen)
            if all(run.diverged for run in trained):
                break
        for run in trained:
            run.checkpointer.wait()
    if diverged := [f"{run.workdir}: {run.diverged}" for run in trained if run.diverged]:
        raise FloatingPointError("; ".join(diverged))


def check_alike(runs: Sequence[tuple[Config, Any]]) -> None:
    """Check that runs, given by config and workdir, can train together.

    Raises:
        ValueError: as `train_together`.
    """
    if jax.process_count() > 1:
        raise ValueError("train_together is for one process")
    if not runs:
        raise ValueError("runs must have at least one run")
    first = runs[0][0]
    for config, workdir in runs:
        for name in HINTS:
            group, field = name.split(".")
            was, is_now = (getattr(getattr(whole, group), field) for whole in (first, config))
            if was != is_now and name not in MAY_DIFFER:
                raise ValueError(f"{name} of {workdir} is {is_now!r}, but {was!r} in the run that it trains with")
        if masks_loss(config.data) != masks_loss(first.data):
            raise ValueError(f"data.source {config.data.source} counts other losses than {first.data.source}")
    if (first.mesh.data, first.mesh.fsdp, first.mesh.tensor, first.mesh.sequence) not in ((-1, 1, 1, 1), (1, 1, 1, 1)):
        raise ValueError("mesh axes must be 1: models that train together are each on one device")
    for field, value in {"init_from": None, "profile_steps": 0}.items():
        if getattr(first.train, field) != value:
            raise ValueError(f"train.{field} must be {value} for models that train together")


def _open(config, path, load, abstract: TrainState, one: Mesh, clock: GoodputTimer, stack) -> _Run | None:
    """Open a workdir and read the data; None if the run has finished."""
    workdir = location(path)
    check_reachable(workdir)
    check_run(config, workdir, one)
    corpora = {split: load(config.data, split) for split in get_args(Split)}
    data = digest_data(config.data, corpora)
    workdir.mkdir(parents=True, exist_ok=True)
    stack.enter_context(held(workdir))
    checkpointer = stack.enter_context(Checkpointer(workdir, keep=retention(config)))
    start, state = restore_state(config, data, workdir, checkpointer, abstract)
    if start == config.train.steps and start in checkpointer.losses:
        return None
    save_digests(data, workdir)
    configs.save(config, workdir)
    validation = validation_batches(config.data, config.train.eval_batches, corpus=corpora["validation"])
    batches = train_batches(config.data, start_step=start, corpus=corpora["train"])
    batch = next(batches)
    tokens = batch.targets.size
    record = MetricWriter(config, workdir, clock, start=start, tokens_per_step=tokens, quiet=True)
    stack.enter_context(record)
    return _Run(config, workdir, checkpointer, validation, start, state, batches, batch, record)


def slots_of(runs: Sequence[_Item], devices: int) -> tuple[int, list[_Item]]:
    """How runs are spread: on as few devices as take the fewest turns, with a slot for each device and turn.

    Returns:
        The number of devices, and the runs of all slots. The last slots repeat the first runs; their results go unread.
    """
    turns = -(-len(runs) // devices)
    count = -(-len(runs) // turns)
    return count, [*runs, *runs[: turns * count - len(runs)]]


def _for_all(function: Any, spread: NamedSharding) -> Any:
    """A function of one run as a function of stacked ones, each computed where it is."""

    def of_stacked(*stacked: Any) -> Any:
        if vectorizes(spread.mesh.devices.flat[0]):
            return jax.vmap(function)(*stacked)
        return jax.lax.map(lambda one: function(*one), stacked)

    spec = spread.spec
    return jax.shard_map(of_stacked, mesh=spread.mesh, in_specs=spec, out_specs=spec, check_vma=False)


def vectorizes(device: jax.Device) -> bool:
    """Whether runs on one device are vectorized; on a CPU, which is slow at batches of matrices, they take turns."""
    return device.platform != "cpu"


def _stacked(trees: Sequence[_Tree], spread: NamedSharding) -> _Tree:
    """Stack arrays [...] of all runs as [N, ...], spread over the devices."""
    return jax.device_put(jax.tree.map(lambda *arrays: np.stack(arrays), *trees), spread)


def _stacked_states(runs: Sequence[_Run], new: Any, spread: NamedSharding) -> TrainState:
    """The states of all runs [N, ...]: those restored, and new ones from the seeds of the others."""
    seeds = jax.device_put(np.array([run.config.train.seed for run in runs]), spread)
    fresh = jax.jit(_for_all(new, spread))
    if all(run.state is None for run in runs):
        return fresh(seeds)
    if all(run.state is not None for run in runs):
        states = [jax.device_get(run.state) for run in runs]
    else:
        drawn = jax.device_get(fresh(seeds))
        states = [
            jax.tree.map(lambda x: x[i], drawn) if run.state is None else jax.device_get(run.state)  # noqa: B023
            for i, run in enumerate(runs)
        ]
    for run in runs:
        run.state = None
    return _stacked(states, spread)


def _takes(runs: Sequence[_Run], step: int, spread: NamedSharding) -> jax.Array:
    return jax.device_put(np.array([run.steps_at(step) for run in runs]), spread)


def _record(runs: Sequence[_Run], step: int, metrics: Metrics, say: "_Progress") -> None:
    """Log a step of the runs that took it; those that diverged in it stop."""
    read = jax.device_get(metrics)
    losses = []
    for i, run in enumerate(runs):
        if not run.steps_at(step):
            continue
        values = {name: float(array[i]) for name, array in read.items()}
        if reason := reason_to_stop(values, run.config.train):
            run.diverged = f"{reason} at step {step}; its newest checkpoint is kept"
            continue
        run.record.step(step, values)
        losses.append(values["loss"])
    say(step, losses)


class _Progress:
    """One line for all runs, every `train.log_every` steps."""

    def __init__(self, config: Config, runs: Sequence[_Run]):
        self._config, self._tokens = config.train, runs[0].batch.targets.size
        self._since, self._taken = time.perf_counter(), 0

    def __call__(self, step: int, losses: Sequence[float]) -> None:
        self._taken += len(losses)
        if not losses or (step % self._config.log_every and step != self._config.steps):
            return
        now = time.perf_counter()
        rate = self._taken * self._tokens / (now - self._since)
        self._since, self._taken = now, 0
        span = f"loss {min(losses):.4f} to {max(losses):.4f}"
        print(f"step {step}/{self._config.steps}: {len(losses)} runs, {span}, {rate:,.0f} tokens/s", flush=True)
