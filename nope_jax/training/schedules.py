"""Learning-rate schedules by name. To add one, write its function here and its settings in `config/choices.py`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from nope_jax.config import OptimizerConfig

Decay = Callable[[jax.Array, jax.Array], jax.Array]
"""The fraction of the peak rate after the warm-up, as a function of two fractions of steps taken: of those after the
warm-up, and of all."""


def _cosine(*, floor: float) -> Decay:
    """Half a cosine (Loshchilov & Hutter 2017)."""
    middle, amplitude = (1 + floor) / 2, (1 - floor) / 2
    return lambda progress, taken: middle + amplitude * jnp.cos(jnp.pi * progress)


def _linear(*, floor: float) -> Decay:
    """A straight line."""
    return lambda progress, taken: 1 - (1 - floor) * progress


def _constant() -> Decay:
    """The peak rate to the end."""
    return lambda progress, taken: jnp.ones_like(progress)


def _wsd(*, floor: float, decay_share: float) -> Decay:
    """Warm-up, stable, decay (Hu et al. 2024, arXiv 2404.06395): the peak rate, then a straight line at the end."""
    return lambda progress, taken: 1 - (1 - floor) * jnp.clip((taken - (1 - decay_share)) / decay_share, 0, 1)


SCHEDULES: dict[str, Callable[..., Decay]] = {"cosine": _cosine, "linear": _linear, "constant": _constant, "wsd": _wsd}
"""Schedules by `optimizer.schedule`; each takes its settings by name."""


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of the update after `count` updates: linear warm-up, then the schedule, with its floor at `steps`.

    The first update has the rate peak / warmup_steps, not 0. A run shorter than its warm-up ends during it.
    """
    decay = SCHEDULES[config.schedule](**config.settings("schedule"))

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(count, jnp.float32)
        warmup = (count + 1) / max(1, config.warmup_steps)
        progress = (count - config.warmup_steps) / max(1, steps - config.warmup_steps)
        decayed = decay(jnp.clip(progress, 0, 1), jnp.clip(count / steps, 0, 1))
        return config.learning_rate * jnp.minimum(warmup, decayed)

    return schedule
