"""Decoders whose parameters NumPy draws: JAX would compile an initializer for every shape."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nope_jax import Decoder, ModelConfig
from nope_jax.models import abstract_decoder


def drawn_model(config: ModelConfig, seed: int = 0) -> Decoder:
    """A decoder none of whose parameters, biases and norms included, has the value with which it is created."""
    model, draw = abstract_decoder(config), np.random.default_rng(seed)

    def drawn(path: tuple, x: jax.ShapeDtypeStruct) -> jax.Array:
        around = 1 if any("norm" in str(part) for part in path) else 0
        noise = config.model_dim**-0.5 * draw.standard_normal(x.shape)
        return jnp.asarray((around + noise).astype(x.dtype))

    nnx.update(model, jax.tree_util.tree_map_with_path(drawn, nnx.state(model)))
    return model
