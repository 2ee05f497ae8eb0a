"""The Flax NNX decoder."""

from nope_jax.models.decoder import Decoder

__all__ = ["Decoder"]
