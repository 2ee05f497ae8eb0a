"""A decoder with any weights, drawn by numpy: its own initial ones are drawn by a compiled program for each shape."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nope_jax import Decoder, ModelConfig
from nope_jax.models.decoder import abstract_decoder


def untrained(config: ModelConfig, seed: int = 0) -> Decoder:
    """Norms and scales of 1, biases of 0, and all else normal with a standard deviation of model_dim^-0.5."""
    model, random = abstract_decoder(config), np.random.default_rng(seed)

    def drawn(path, shape):
        name, values = jax.tree_util.keystr(path), random.normal(size=shape.shape) * config.model_dim**-0.5
        if "bias" in name:
            values = 0 * values
        elif "norm" in name or "scale" in name:
            values = 0 * values + 1
        return jnp.asarray(values.astype(shape.dtype))

    nnx.update(model, jax.tree.map_with_path(drawn, nnx.state(model)))
    return model
