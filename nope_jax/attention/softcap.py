"""Soft capping of logits (Bello et al. 2016, arXiv 1611.09940; Gemma 2, arXiv 2408.00118)."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def softcapped(logits: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """cap · tanh(logits / cap), which lies within ±cap; the logits as they are if cap is None."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)
