"""The arrays of a call, heads first and filled up to whole blocks, and one block of them within a kernel.

Shapes as in `pallas`, with q = k.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from nope_jax.attention.backends.pallas.block import Block
from nope_jax.attention.backends.pallas.call import Call, Tokens

SUBLANES = 8


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
    near: Any
    """[#N, 1, distances]: the logit by distance, in pieces of q entries, of which number i - j + (blocks of keys)
    begins with the distance of the first query of block i from the first key of block j. This is that piece."""
    far: Any
    """The piece before it."""
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


def block_at(call: Call, inputs: Inputs, offset: Any, i: Any, j: Any, masked: bool) -> Block:
    """Query block i and key block j, from references to their arrays."""
    visible = None
    if masked:
        shape = call.key_size, call.query_size
        visible = call.visible(
            i * call.query_size + lax.broadcasted_iota(jnp.int32, shape, 1),
            j * call.key_size + lax.broadcasted_iota(jnp.int32, shape, 0),
            offset,
            tuple(reference[0] for reference in inputs.of_queries),
            tuple(_column(reference[0]) for reference in inputs.of_keys),
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
        term=None if inputs.near is None else sheared(inputs.near[0], inputs.far[0]),
        rows=tuple(reference[0, 0] for reference in inputs.rows),
    )


def _column(row: Int[Array, "1 k"]) -> Int[Array, "k 1"]:
    return jnp.broadcast_to(row, (SUBLANES, row.shape[1])).T[:, :1]


def sheared(near: Float[Array, "1 q"], far: Float[Array, "1 q"]) -> Float[Array, "k q"]:
    """The term of a block, entry (a, b) being that of distance b - a from its first query and key.

    Args:
        near: The terms of distances 0..q-1.
        far: Those of -q..-1.
    """
    size = near.shape[1]
    rows = jnp.broadcast_to(jnp.concatenate([near, far], axis=1), (size, 2 * size))
    return pltpu.roll(rows, 0, 1, stride=1, stride_axis=0)[:, :size]


def unsheared(block: Float[Array, "k q"]) -> Float[Array, "1 2*q"]:
    """The transpose of `sheared`: the sums of a block along its diagonals, for the distances -q..q-1."""
    size = block.shape[0]
    sums = jnp.zeros((SUBLANES, 2 * size), jnp.float32)
    for row in range(0, size, SUBLANES):  # entry (a, b) moves to column size + b - a; first by the eights in a
        rows = jnp.concatenate([jnp.zeros((SUBLANES, size), jnp.float32), block[row : row + SUBLANES]], axis=1)
        sums += pltpu.roll(rows, (2 * size - row) % (2 * size), 1)
    sublane = lax.broadcasted_iota(jnp.int32, sums.shape, 0)
    for bit in (1, 2, 4):
        sums = jnp.where(sublane & bit != 0, pltpu.roll(sums, 2 * size - bit, 1), sums)
    return sums.sum(0, keepdims=True)
