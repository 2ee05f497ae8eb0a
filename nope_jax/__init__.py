"""How causal transformers know where tokens stand, and what happens past the training length."""

from nope_jax.config import ModelConfig
from nope_jax.models import Decoder

__all__ = ["Decoder", "ModelConfig"]
