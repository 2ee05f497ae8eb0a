"""Training: the state, the step, the optimizer and the training loop."""

from nope_jax.training.loop import Interrupted, train

__all__ = ["Interrupted", "train"]
