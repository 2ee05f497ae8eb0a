"""The Flax NNX decoder, and text from it."""

from nope_jax.models.decoder import Cache, Decoder
from nope_jax.models.generation import generate

__all__ = ["Cache", "Decoder", "generate"]
