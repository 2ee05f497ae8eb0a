"""The arrays of a call, heads first and filled up to whole blocks, and one block of them within a kernel.

Shapes as in `pallas`, with q = k.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped

from nope_jax.attention.backends.pallas.block import Block
from nope_jax.attention.backends.pallas.call import Call, Tokens
from nope_jax.attention.backends.pallas.served import LANES, SUBLANES


class Inputs(NamedTuple):
    """What every kernel reads: arrays, their BlockSpecs or, within a kernel, references to their blocks."""

    query: Any
    """[B, N, T, H]."""
    factor: Any
    """[B, N, 1, T]."""
    key: Any
    """[B, K, S, H]."""
    value: Any
    """[B, K, S, H2]."""
    table: tuple[Any, ...]
    """What the logit is computed from. By distance: [#N, 1, distances], in pieces of q entries, of which number
    i - j + (blocks of keys) begins with the distance of the first query of block i from the first key of block j; of
    these that piece, and the one before it. Pair by pair: [N, P, q], the parameters, each as a row of equal numbers."""
    query_features: Any
    """[B, N, 1, T] each."""
    key_features: Any
    """[B, N, 1, S] each."""
    vectors: Any
    """See `Vectors`; None: no term has vectors."""
    of_queries: Any
    """[#B, 1, T] each."""
    of_keys: Any
    """[#B, 1, S] each."""
    rows: Any
    """More arrays of queries, [B, N, 1, T] or [B, N, T, H2]."""


def filled(x: Array, axis: int, size: int, fill: float = 0) -> Array:
    """Fill up an axis to whole blocks of this size."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % size)
    return jnp.pad(x, padding, constant_values=fill)


def filled_tokens(call: Call, tokens: Tokens) -> Tokens:
    """The same as rows [#B, 1, T] and [#B, 1, S] of whole blocks."""
    of_queries = tuple(filled(x[:, None], 2, call.query_size) for x in tokens.of_queries)
    return Tokens(tokens.offset, of_queries, tuple(filled(x[:, None], 2, call.key_size) for x in tokens.of_keys))


def block_at(
    call: Call, inputs: Inputs, term: Any, value_term: Any, offset: Any, i: Any, j: Any, masked: bool
) -> Block:
    """Query block i and key block j, from references to their arrays, and the terms of the logit and the output."""
    visible = None
    if masked:
        shape = call.key_size, call.query_size
        visible = call.visible(
            i * call.query_size + lax.broadcasted_iota(jnp.int32, shape, 1),
            j * call.key_size + lax.broadcasted_iota(jnp.int32, shape, 0),
            offset,
            tuple(reference[0] for reference in inputs.of_queries),
            tuple(column(reference[0]) for reference in inputs.of_keys),
        )
    return Block(
        call,
        keys_first=True,
        query=inputs.query[0, 0],
        key=inputs.key[0, 0],
        value=inputs.value[0, 0],
        factor=inputs.factor[0, 0],
        visible=visible,
        careful=masked,
        term=None if term is None else term.logits(),
        value_term=value_term,
        rows=tuple(reference[0, 0] for reference in inputs.rows),
    )


def not_all_finite(x: Float[Array, "*shape"]) -> Bool[Array, ""]:
    """Not by `all`, which Mosaic lowers to 64 bits where JAX has them."""
    return jnp.where(jnp.isfinite(x), 0.0, 1.0).max() > 0


def column(row: Shaped[Array, "1 k"]) -> Shaped[Array, "k 1"]:
    return jnp.broadcast_to(row, (SUBLANES, row.shape[1])).T[:, :1]


def row(column: Shaped[Array, "k 1"]) -> Shaped[Array, "1 k"]:
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]
