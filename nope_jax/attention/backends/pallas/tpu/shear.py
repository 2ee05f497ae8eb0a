"""From distances to the pairs of a block and back: entry (x, y) of a block belongs to distance y - x.

A row of distances has them in the order 0..q-1, -q..-1, so that y - x, if negative, counts from the end. A TPU rotates
each row of an array by one more lane than the row before; it does not rotate the other way, nor columns.

Shapes as in `pallas`, with q = k.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from nope_jax.attention.backends.pallas.served import SUBLANES
from nope_jax.attention.mesh import platform


def sheared(rows: Float[Array, "q distances"]) -> Float[Array, "q q"]:
    """The block of which row x is that of x."""
    return (_rotated(rows) if platform() == "cpu" else strided(rows))[:, : len(rows)]


def strided(rows: Float[Array, "q distances"]) -> Float[Array, "q distances"]:
    """Rotate each row by its index: an operation of a TPU, but in interpret mode one for every row."""
    return pltpu.roll(rows, 0, 1, stride=1, stride_axis=0)


def unsheared(block: Float[Array, "q q"]) -> Float[Array, "q 2*q"]:
    """The transpose of `sheared`."""
    size = len(block)
    if platform() == "cpu":
        return _rotated(jnp.concatenate([block, jnp.zeros_like(block)], axis=1), back=True)
    groups = [_wide(block[x : x + SUBLANES], 2 * size - x) for x in range(0, size, SUBLANES)]
    return _rotated(jnp.concatenate(groups, axis=0), SUBLANES, back=True)


def diagonal_sums(block: Float[Array, "q q"]) -> Float[Array, "1 2*q"]:
    """The sums of a block along its diagonals, for the distances -q..q-1."""
    size = len(block)
    sums = functools.reduce(jnp.add, (_wide(block[x : x + SUBLANES], size - x) for x in range(0, size, SUBLANES)))
    return _rotated(sums, SUBLANES, back=True).sum(0, keepdims=True)


def _wide(rows: Float[Array, "8 q"], shift: int) -> Float[Array, "8 2*q"]:
    """Eight rows, filled up to twice their length and rotated."""
    return pltpu.roll(jnp.concatenate([rows, jnp.zeros_like(rows)], axis=1), shift % (2 * rows.shape[1]), 1)


def _rotated(
    rows: Float[Array, "x distances"], count: int | None = None, *, back: bool = False
) -> Float[Array, "x distances"]:
    """Rotate each row by its index, or its index among `count`, bit by bit."""
    index, bit = lax.broadcasted_iota(jnp.int32, rows.shape, 0), 1
    while bit < (count or len(rows)):
        rows = jnp.where(index & bit != 0, pltpu.roll(rows, rows.shape[1] - bit if back else bit, 1), rows)
        bit *= 2
    return rows
