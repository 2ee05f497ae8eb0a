"""The Flax NNX decoder, text generation, and weight transfer between encodings."""

from nope_jax.models.decoder import Decoder, DecodeState, abstract_decoder
from nope_jax.models.generation import generate, generate_stream
from nope_jax.models.weight_transfer import transfer_weights

__all__ = ["DecodeState", "Decoder", "abstract_decoder", "generate", "generate_stream", "transfer_weights"]
