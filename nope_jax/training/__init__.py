"""Training: the state, the step, the optimizer and the training loop."""

from nope_jax.training.loop import Interrupted, train
from nope_jax.training.together import train_together

__all__ = ["Interrupted", "train", "train_together"]
