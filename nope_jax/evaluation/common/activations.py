"""Activations of a decoder, layer by layer: the residual stream and the attention weights.

Shapes: B batch, T length, N query heads, D model width.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from nope_jax.models import Decoder


class Activations(NamedTuple):
    """Activations of a decoder between two layers."""

    layer: int
    """Number of layers applied so far; 0 is the input of the first layer."""
    stream: Shaped[Array, "B T D"]
    """The residual stream, before any normalization."""
    weights: Float[Array, "B N T T"] | None
    """Attention weights of the layer just applied, if requested: query by key; see `attention_weights`."""


def walk(model: Decoder, tokens: Int[Array | np.ndarray, "B T"], *, weights: bool = False) -> Iterator[Activations]:
    """Runs a decoder one layer at a time, so that only one layer's activations exist at once.

    Args:
        model: the decoder.
        tokens: token ids, at positions 0..T-1.
        weights: whether to return the attention weights of every layer, [B, N, T, T].

    Raises:
        ValueError: a token is outside the vocabulary, or there are more tokens than the encoding has positions.
    """
    model.check_tokens(tokens)
    x, arguments = _embed(*nnx.split(model), tokens)
    yield Activations(0, x, None)
    for index in range(model.config.num_layers):
        structure, state = nnx.split(model.layer(index))
        x, written = _pass_layer(structure, weights, state, x, arguments[index % len(arguments)])
        yield Activations(index + 1, x, written)


@functools.partial(jax.jit, static_argnums=0)
def _embed(structure: nnx.GraphDef, state: nnx.State, tokens: Int[Array, "B T"]) -> tuple:
    return nnx.merge(structure, state).embed(tokens)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pass_layer(
    structure: nnx.GraphDef, weights: bool, state: nnx.State, x: Shaped[Array, "B T D"], arguments
) -> tuple:
    block, (shared, keywords) = nnx.merge(structure, state), arguments
    written = None
    if weights:
        written = block.weights(x, shared, **keywords)
    return block(x, shared, **keywords)[0], written
