"""A decoder with any weights, drawn by numpy: its own initial ones are drawn by a compiled program for each shape."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from nope_jax import Decoder, ModelConfig
from nope_jax.models.decoder import abstract_decoder


def untrained(config: ModelConfig, seed: int = 0) -> Decoder:
    """Norms and scales of 1, biases of 0, and all else normal.

    Its standard deviation is model_dim^-0.5, times (2 num_layers)^-0.5 for what enters the residual stream.
    """
    model, random = abstract_decoder(config), np.random.default_rng(seed)

    def drawn(name, shape):
        if "bias" in name:
            return np.zeros(shape)
        if "norm" in name or "scale" in name:
            return np.ones(shape)
        gain = (2 * config.num_layers) ** -0.5 if name in ("out", "down") else 1
        return random.normal(size=shape) * gain * config.model_dim**-0.5

    state = [
        (path, parameter.replace(jnp.asarray(drawn(path[-1], parameter.shape).astype(parameter.dtype))))
        for path, parameter in nnx.to_flat_state(nnx.state(model))
    ]
    nnx.update(model, nnx.from_flat_state(state))
    return model
