"""Training: the state, one step, the optimizer, and the loop around them."""

from nope_jax.training.loop import Interrupted, train

__all__ = ["Interrupted", "train"]
