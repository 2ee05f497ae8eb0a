"""The Flax NNX decoder, text from it, and its weights under another encoding."""

from nope_jax.models.adoption import adopt_weights
from nope_jax.models.decoder import Cache, Decoder
from nope_jax.models.generation import generate

__all__ = ["Cache", "Decoder", "adopt_weights", "generate"]
