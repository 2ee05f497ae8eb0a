"""The training step and the validation loss, as pure functions of the state and a batch.

B batch, T length, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from nope_jax.config import Config, TrainConfig
from nope_jax.data import Batch
from nope_jax.models import Decoder
from nope_jax.sharding import auto_axes
from nope_jax.training.state import Skips, TrainState

Metrics = dict[str, jax.Array]
_Sums = TypeVar("_Sums")

AVERAGED_STEPS = 100
"""Approximate number of steps in the running average of the gradient norm."""
STEPS_BEFORE_SPIKES = 20
"""Number of steps to average before comparing a step with the average; the first steps vary a lot."""


@auto_axes
def total_losses(
    graphdef: nnx.GraphDef[Decoder],
    params: nnx.State,
    batch: Batch,
    key: jax.Array | None = None,
    z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """The sums over the targets that count of what is minimized, and of their negative log-likelihood alone, in nats.

    float32. Only the first has a gradient. `key` as in `Decoder`, `z_loss` as in `train_step`.
    """
    tokens, targets, positions, segment_ids, loss_mask = jax.tree.map(jnp.asarray, batch)
    model = nnx.merge(graphdef, params)
    hidden, _ = model.hidden(tokens, positions=positions, segment_ids=segment_ids, key=key)
    return model.total_loss(hidden, targets, loss_mask, z_loss)


def total_nll(
    graphdef: nnx.GraphDef[Decoder], params: nnx.State, batch: Batch, key: jax.Array | None = None
) -> jax.Array:
    """The first of `total_losses`."""
    return total_losses(graphdef, params, batch, key)[0]


def num_targets(batch: Batch) -> int | jax.Array:
    """The number of targets that count in the loss of a batch."""
    return batch.targets.size if batch.loss_mask is None else jnp.sum(batch.loss_mask)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    graphdef: nnx.GraphDef[Decoder],
    optimizer: optax.GradientTransformation,
    accumulation: int = 1,
    key: jax.Array | None = None,
    skip_bad: bool = False,
    spike_factor: float | None = None,
    z_loss: float = 0.0,
    ema: float | None = None,
) -> tuple[TrainState, Metrics]:
    """Take one optimizer step on the mean negative log-likelihood per target that counts.

    With `skip_bad`, a step is bad if its loss or gradient norm is not finite, or if its gradient norm is more than
    `spike_factor` times the running average. A bad step is counted and leaves parameters and optimizer state unchanged.

    Args:
        batch: Arrays [B, T], with B a multiple of `accumulation`.
        accumulation: Number of microbatches, processed in sequence; the update is that of the whole batch.
        key: Random key for randomized encodings.
        skip_bad: Whether to skip bad steps.
        spike_factor: None to treat only non-finite values as bad.
        z_loss: Weight of the mean squared logsumexp of the logits, which is part of the gradient but not of the loss.
        ema: Decay rate of the moving average of the parameters. It is (1 + n) / (10 + n) after n updates if that is
            less, so that the average soon forgets where training started.

    Returns:
        The new state, and metrics: `loss` (nats per token) and `grad_norm` (global, unclipped) of the given state, and
        `param_norm` (global) of the new one. If all three are finite, so is the new state. Also `skipped_steps` (total)
        and, with `skip_bad`, `skipped_in_a_row` (0 if this step was not skipped); the new state is then finite if
        `param_norm` is.
    """

    def objective(params: nnx.State, rows: Batch) -> tuple[jax.Array, jax.Array]:
        return total_losses(graphdef, params, rows, key, z_loss)

    gradient = jax.grad(objective, has_aux=True)
    zeros = jax.tree.map(jnp.zeros_like, (state.params, jnp.float32(0)))
    sums = _over_microbatches(lambda rows: gradient(state.params, rows), batch, accumulation, zeros)
    grads, loss = jax.tree.map(lambda x: x / num_targets(batch), sums)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = state.ema
    if ema is not None:
        count = updates_taken(opt_state)
        decay = jnp.minimum(ema, (1 + count) / (10 + count))
        average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, params)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
    skips = state.skips
    if skip_bad:
        good, skips = detect_bad_step(skips, loss, metrics["grad_norm"], spike_factor)
        params, opt_state, average = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (params, opt_state, average),
            (state.params, state.opt_state, state.ema),
        )
        metrics["skipped_in_a_row"] = skips.in_a_row
    metrics["skipped_steps"] = skips.total
    metrics["param_norm"] = optax.tree.norm(params)
    return TrainState(params, opt_state, skips, average), metrics


def updates_taken(opt_state: optax.OptState) -> jax.Array:
    """The number of updates that an optimizer has made."""
    (_, count), *_ = optax.tree_utils.tree_get_all_with_path(opt_state, "count")
    return count


def detect_bad_step(
    skips: Skips, loss: jax.Array, grad_norm: jax.Array, spike_factor: float | None
) -> tuple[jax.Array, Skips]:
    """Return whether a step is good, given the steps before it, and the new `Skips`."""
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if spike_factor is not None:
        good &= (grad_norm <= spike_factor * skips.grad_norm) | (skips.averaged < STEPS_BEFORE_SPIKES)
    averaged = skips.averaged + 1
    # The plain mean at first, then an exponential moving average.
    average = skips.grad_norm + (grad_norm - skips.grad_norm) / jnp.minimum(averaged, AVERAGED_STEPS)
    after_good = Skips(skips.total, jnp.zeros_like(skips.in_a_row), averaged, average)
    after_bad = skips._replace(total=skips.total + 1, in_a_row=skips.in_a_row + 1)
    return good, jax.tree.map(lambda a, b: jnp.where(good, a, b), after_good, after_bad)


def reason_to_stop(metrics: Mapping[str, float], config: TrainConfig) -> str | None:
    """Return why a run must stop after a step with these metrics, or None if it can continue."""
    in_a_row = metrics.get("skipped_in_a_row", 0)
    if in_a_row > config.max_skipped:
        return (
            f"{in_a_row:.0f} bad steps in a row (train.max_skipped {config.max_skipped}), "
            f"the last with loss {metrics['loss']:.4g} and grad_norm {metrics['grad_norm']:.4g},"
        )
    for name, value in metrics.items():
        if not math.isfinite(value) and not (in_a_row and name in ("loss", "grad_norm")):
            return f"{name} is {value}"
    return None


def _over_microbatches(function: Callable[[Batch], _Sums], batch: Batch, count: int, zeros: _Sums) -> _Sums:
    """Sum a function of rows over the batch, processed in `count` microbatches in sequence."""
    if count == 1:
        return function(batch)

    def microbatches(array: jax.Array) -> jax.Array:
        # Microbatch i is rows i, i + count, ..., so every device computes part of each from rows it already holds.
        return array.reshape(-1, count, *array.shape[1:]).swapaxes(0, 1)

    sums, _ = jax.lax.scan(
        lambda sums, rows: (jax.tree.map(jnp.add, sums, function(rows)), None), zeros, jax.tree.map(microbatches, batch)
    )
    return sums


def step_settings(config: Config) -> dict[str, Any]:
    """The keyword arguments of `train_step` that the config of a run says."""
    return {
        "accumulation": config.optimizer.accumulation,
        "skip_bad": config.train.on_bad_step == "skip",
        "spike_factor": config.train.spike_factor,
        "z_loss": config.optimizer.z_loss,
        "ema": config.train.ema,
    }


def seeded_step(
    graphdef: nnx.GraphDef[Decoder], optimizer: optax.GradientTransformation, **settings: Any
) -> Callable[[TrainState, Batch, jax.typing.ArrayLike], tuple[TrainState, Metrics]]:
    """Return `train_step` as a function of the state, a batch and the seed of randomized encodings.

    They draw from the seed and the step count, so a resumed run draws the same as an uninterrupted one.

    Args:
        graphdef: The structure of the model.
        optimizer: The optimizer.
        settings: As `step_settings`.
    """

    def step(state: TrainState, batch: Batch, seed: jax.typing.ArrayLike) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), updates_taken(state.opt_state) + state.skips.total)
        return train_step(state, batch, graphdef=graphdef, optimizer=optimizer, key=key, **settings)

    return step


def jit_train_step(
    graphdef: nnx.GraphDef[Decoder],
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    **settings: Any,
) -> jax.stages.Wrapped:
    """Jit `seeded_step` for the shardings of `abstract`, donating the state it is given: one program for all seeds."""
    shardings = jax.tree.map(lambda array: array.sharding, abstract)
    step = seeded_step(graphdef, optimizer, **settings)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def total_loss(graphdef: nnx.GraphDef[Decoder], accumulation: int = 1) -> Callable[[nnx.State, Batch], jax.Array]:
    """Return `total_nll` as a function of parameters and a batch, in as many microbatches as a training step."""

    def validation(params: nnx.State, batch: Batch) -> jax.Array:
        return _over_microbatches(lambda rows: total_nll(graphdef, params, rows), batch, accumulation, jnp.float32(0))

    return validation


def jit_validation(graphdef: nnx.GraphDef[Decoder], accumulation: int = 1) -> jax.stages.Wrapped:
    """Jit `total_loss`."""
    return jax.jit(total_loss(graphdef, accumulation))
