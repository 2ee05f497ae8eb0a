"""A decoder for tests of what it computes, whatever its parameters are."""

import jax
import numpy as np
from flax import nnx

from nope_jax import Decoder, ModelConfig
from nope_jax.models.decoder import abstract_decoder


def drawn_decoder(seed: int = 0, **settings) -> Decoder:
    """A small decoder with parameters from NumPy: to draw initial ones JAX would compile a program for every shape."""
    settings = {"vocab_size": 32, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "model_dim": 16} | settings
    draws = np.random.default_rng(seed)
    structure, shapes = nnx.split(abstract_decoder(ModelConfig(**settings)))
    drawn = jax.tree.map(lambda x: draws.normal(0, 0.5, x.shape).astype(x.dtype), shapes)
    return nnx.merge(structure, jax.device_put(drawn))
