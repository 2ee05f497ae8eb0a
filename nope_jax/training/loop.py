"""The training loop: runs a config up to its last step, resuming from the newest checkpoint in the workdir."""

import contextlib
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from nope_jax import config as configs
from nope_jax.checkpoint import Checkpointer
from nope_jax.config import Config
from nope_jax.data import load_corpus, load_tokenizer, train_batches, validation_batches
from nope_jax.data.corpora import Split
from nope_jax.data.tokenizers import with_vocab_size
from nope_jax.distributed import agreed_stop, make_shared, said_by_all
from nope_jax.errors import is_refusal
from nope_jax.locks import held
from nope_jax.models import Decoder, abstract_decoder, transfer_weights
from nope_jax.paths import Location, check_reachable, location
from nope_jax.retention import Retention, disk_budget, saved_steps, validation_losses
from nope_jax.sharding import check_fits, make_mesh, place_batch, process_share
from nope_jax.trained import find_trained
from nope_jax.training.metrics import GoodputTimer, MetricWriter, check_can_record
from nope_jax.training.optimizer import make_optimizer
from nope_jax.training.resume import DataDigests, check_goes_on, digest_data, save_digests
from nope_jax.training.state import TrainState, abstract_state, init_state, no_skips
from nope_jax.training.step import Metrics, jit_train_step, jit_validation, num_targets, reason_to_stop, step_settings


class Interrupted(KeyboardInterrupt):
    """A signal stopped the run after saving its state."""

    def __init__(self, signum: int, step: int):
        name = signal.Signals(signum).name
        super().__init__(f"{name}: stopped at step {step} and saved; the same command goes on from there")
        self.signum = signum


def train(config: Config, workdir: str | os.PathLike[str]) -> None:
    """Train up to `config.train.steps`, from the newest checkpoint in `workdir` or else from the start.

    A run that is stopped at any point and resumed gives the same bits as an uninterrupted one. It is equal only up to
    rounding if something changed that does not affect the trained function, such as devices or the number of processes
    (`nope_jax.training.resume`). With several processes (`nope_jax.distributed`), all of them call this.

    Raises:
        ValueError: a setting in `config` is not possible; the config or the data differ from those of the run in
            `workdir`; another process writes to `workdir`; or the processes do not read the same data.
        OSError: `workdir` cannot be written; its checkpoints are unchanged.
        FloatingPointError: the loss or its gradient is not finite or, if bad steps are skipped (`train.on_bad_step`),
            too many in a row are bad; that state is not saved.
        Interrupted: Ctrl-C, SIGTERM or a hang-up; the state is saved.
    """
    clock = GoodputTimer()
    workdir = location(workdir)
    check_reachable(workdir)
    steps = config.train.steps
    config = with_vocab_size(config)
    mesh = make_mesh(config.mesh)
    check_run(config, workdir, mesh)
    optimizer = make_optimizer(config.optimizer, steps)
    share, shares = process_share(mesh)
    hosts = {"process_index": share, "process_count": shares}
    corpora = {split: load_corpus(config.data, split) for split in get_args(Split)}
    data = digest_data(config.data, corpora)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        validation = [
            place_batch(rows, mesh)
            for rows in validation_batches(
                config.data, config.train.eval_batches, corpus=corpora.pop("validation"), **hosts
            )
        ]
        graphdef, abstract = abstract_state(config, optimizer, mesh)

        source = _init_source(config, workdir, mesh)
        make_shared(workdir)
        check_is_ours = stack.enter_context(_held_by_process_0(workdir))
        checkpointer = stack.enter_context(Checkpointer(workdir, keep=retention(config)))
        start, state = restore_state(config, data, workdir, checkpointer, abstract)
        # The validation loss is computed after a save: if the run ended in between, compute it now.
        unmeasured = evaluates_after(start, config) and not _seen_by_process_0(start in checkpointer.losses)
        if start == steps and not unmeasured:
            if jax.process_index() == 0:
                print(f"{workdir}: already finished at step {steps}; a larger train.steps would continue it")
            return
        _say_disk_budget(config, workdir, abstract)
        batches = train_batches(config.data, start_step=start, corpus=corpora.pop("train"), **hosts)
        if jax.process_index() == 0:
            save_digests(data, workdir)
            configs.save(config, workdir)
        if state is None:
            state = init_state(config, optimizer, abstract)
            if source is not None:
                params = _initialized_from(state.params, graphdef, source)
                average = None if state.ema is None else jax.tree.map(jnp.copy, params)
                state = state._replace(params=params, ema=average)

        batch = place_batch(next(batches), mesh)
        tokens_per_step = batch.targets.size
        record = stack.enter_context(MetricWriter(config, workdir, clock, start=start, tokens_per_step=tokens_per_step))
        with clock.during("compile"):
            seed = np.int64(config.train.seed)
            jitted = jit_train_step(graphdef, optimizer, abstract, **step_settings(config))
            take_step = jitted.lower(state, batch, seed).compile()
            # Compile validation before the first step too: if it does not fit, the run fails now and not after a day.
            jitted = jit_validation(graphdef, config.optimizer.accumulation)
            validate = jitted.lower(state.weights, batch).compile()

        def evaluate(step: int, weights: nnx.State) -> None:
            with clock.during("validation"):
                nll = sum(float(total) for total in [validate(weights, rows) for rows in validation])
                loss = nll / sum(int(num_targets(rows)) for rows in validation)
                checkpointer.losses[step] = loss
                record.validation(step, loss)

        signals = stack.enter_context(caught_signals())
        unread: deque[tuple[int, Metrics]] = deque()
        clock.switch("step")
        if unmeasured:
            evaluate(start, state.weights)
        for step in range(start + 1, steps + 1):
            with record.dispatching(step):
                state, metrics = take_step(state, batch, seed)
            unread.append((step, metrics))
            if step < steps:
                with record.fetching(metrics["loss"]):
                    batch = place_batch(next(batches), mesh)

            checkpointer.check()
            check_is_ours()
            signum = agreed_stop(signals, step)
            stops = signum is not None and step < steps
            evaluates = evaluates_after(step, config)
            saves = step % config.train.checkpoint_every == 0 or step == steps or stops
            # Leave one step unread, so the device stays busy, but none before a save: only good states are saved.
            while len(unread) > (0 if evaluates or saves else 1):
                record.step(*_sound(*unread.popleft(), config, checkpointer))
            if saves:  # after logging this step: a run resumed from here does not log it
                with clock.during("save"):
                    record.flush()
                    checkpointer.save(step, state.trees())
            if signum is not None and stops:
                checkpointer.wait()
                raise Interrupted(signum, step)
            if evaluates:  # after the save, which evaluation must not delay: a run resumed from there logs it
                evaluate(step, state.weights)
        checkpointer.wait()  # while signals are still caught
        record.flush()
        record.finished(steps)


def evaluates_after(step: int, config: Config) -> bool:
    """Whether to compute the validation loss after this step."""
    return step > 0 and (step % config.train.eval_every == 0 or step == config.train.steps)


def _seen_by_process_0(seen: bool) -> bool:
    """What process 0 sees; all processes must agree on what they do."""
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(seen)))


def retention(config: Config) -> Retention:
    """The checkpoints that a run keeps."""
    return Retention(config.train.keep, config.train.keep_every, config.train.keep_best)


def budget(config: Config, workdir: Location, abstract: TrainState, runs: int = 1) -> str:
    """Describe the disk that the checkpoints of a run, or of several like it, will take, as `disk_budget`."""
    size = runs * sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(abstract))
    return disk_budget(workdir, size, retention(config), config.train.steps, config.train.checkpoint_every)


def _say_disk_budget(config: Config, workdir: Location, abstract: TrainState) -> None:
    """Print the budget on process 0; if it is refused, it is to all."""
    said = refusal = ""
    if jax.process_index() == 0:
        try:
            said = budget(config, workdir, abstract)
        except ValueError as error:
            refusal = str(error)
    if refusal := said_by_all(refusal)[0]:
        raise ValueError(refusal)
    if said:
        with contextlib.suppress(OSError):  # as of a pipe without a reader
            print(said, flush=True)


def check_run(config: Config, workdir: Location, mesh: Mesh) -> None:
    check_can_record(config, workdir)
    check_fits(config, mesh)
    tokens = load_tokenizer(config.data.tokenizer, config.data.separator_token).vocab_size
    if tokens > config.model.num_tokens:
        raise ValueError(
            f"model.vocab_size {config.model.num_tokens} is smaller than the {tokens} tokens of data.tokenizer "
            f"{config.data.tokenizer!r}"
        )


@contextlib.contextmanager
def _held_by_process_0(workdir: Location) -> Iterator[Callable[[], None]]:
    """Hold the lock of the workdir, as `held`; if process 0 is refused, all are."""
    with contextlib.ExitStack() as stack:
        check, refusal = None, ""
        if jax.process_index() == 0:
            try:
                check = stack.enter_context(held(workdir))
            except ValueError as error:
                refusal = str(error)
        if refusal := said_by_all(refusal)[0]:
            raise ValueError(refusal)
        yield check or (lambda: None)


def restore_state(
    config: Config, data: DataDigests, workdir: Location, checkpointer: Checkpointer, abstract: TrainState
) -> tuple[int, TrainState | None]:
    """Return the number of steps taken by the run in `workdir` and its state; 0 and None if it has saved none.

    The checkpointer learns the validation losses of its checkpoints.
    """
    if checkpointer.latest_step is None:
        return 0, None
    check_goes_on(config, data, workdir)
    step, trees = checkpointer.restore(abstract.trees(), optional=["skips"])
    if step > config.train.steps:
        raise ValueError(f"train.steps is {config.train.steps}, but {workdir} has already reached step {step}")
    if "skips" not in trees:  # saved by an earlier version
        trees["skips"] = jax.jit(no_skips, out_shardings=jax.tree.map(lambda array: array.sharding, abstract.skips))()
    checkpointer.losses.update(validation_losses(workdir, until=step))
    return step, TrainState(**trees)


def _init_source(config: Config, workdir: Location, mesh: Mesh) -> Decoder | None:
    """Return the decoder to initialize from, if the run has not saved anything yet."""
    workdir_of_source = config.train.init_from
    # Decided by what process 0 sees: either all processes read the source or none does.
    if workdir_of_source is None or multihost_utils.broadcast_one_to_all(np.int32(len(saved_steps(workdir)))):
        return None
    source, _ = find_trained(workdir_of_source, config.train.init_step).load(mesh)
    try:
        transfer_weights(abstract_decoder(config.model), source)
    except ValueError as error:
        if not is_refusal(error):
            raise
        raise ValueError(f"train.init_from {workdir_of_source}: {error}") from error
    return source


def _initialized_from(params: nnx.State, graphdef: nnx.GraphDef[Decoder], source: Decoder) -> nnx.State:
    """The parameters with the source's weights, in their shardings."""
    model = nnx.merge(graphdef, params)
    transfer_weights(model, source)
    return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), nnx.state(model), params)


def _sound(step: int, metrics: Metrics, config: Config, checkpointer: Checkpointer) -> tuple[int, dict[str, float]]:
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    reason = reason_to_stop(values, config.train)
    if reason is not None:
        checkpointer.wait()
        kept = checkpointer.latest_step
        last = "no checkpoint was saved yet" if kept is None else f"the checkpoint of step {kept} is kept"
        raise FloatingPointError(f"{reason} at step {step}; {last}")
    return step, values


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collect the stop signals received. A second one of the same kind ends the process at once.

    Exception: hang-ups, because a closed terminal and its shell send one each. A hang-up that was ignored at startup
    (nohup) stays ignored. With several processes SIGTERM is left to JAX, see `agreed_stop`.
    """
    received: list[int] = []

    def receive(signum: int, _: object) -> None:
        received.append(signum)
        signal.signal(signum, signal.SIG_IGN if signum == signal.SIGHUP else signal.SIG_DFL)

    caught = [signal.SIGINT]
    if jax.process_count() == 1:
        caught.append(signal.SIGTERM)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        caught.append(signal.SIGHUP)
    previous = {signum: signal.signal(signum, receive) for signum in caught}
    try:
        yield received
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
