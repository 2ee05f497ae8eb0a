"""Decoders whose parameters NumPy draws: JAX would compile an initializer for every shape."""

import jax
import numpy as np
from flax import nnx

from nope_jax import Decoder, ModelConfig
from nope_jax.models import abstract_decoder


def drawn_model(config: ModelConfig, seed: int = 0) -> Decoder:
    """A decoder none of whose parameters, biases and norms included, has the value with which it is created."""
    model, draw = abstract_decoder(config), np.random.default_rng(seed)

    def drawn(path: tuple, x: jax.ShapeDtypeStruct) -> jax.Array:
        around = 1 if any(name in str(part) for part in path for name in ("norm", "scale")) else 0
        noise = config.model_dim**-0.5 * draw.standard_normal(x.shape)
        return jax.device_put((around + noise).astype(x.dtype))

    nnx.update(model, jax.tree_util.tree_map_with_path(drawn, nnx.state(model)))
    return model


def small_model(seed: int = 0, **settings) -> Decoder:
    """A drawn decoder, small where the settings of `ModelConfig` do not say otherwise."""
    small = {"vocab_size": 32, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "model_dim": 16}
    return drawn_model(ModelConfig(**small | settings), seed)
