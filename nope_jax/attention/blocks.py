"""Helpers for blockwise attention: split an axis into blocks; read, write and accumulate entries."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

BLOCK_SIZE = 256
"""Queries and keys per block. On a CPU, faster than 128 and 512."""


def cut(x: Array, size: int, axis: int) -> Array:
    """Split an axis into blocks of `size`, edge-padding the last one; the block index becomes the first axis."""
    blocks = -(-x.shape[axis] // size)
    if blocks * size != x.shape[axis]:
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, blocks * size - x.shape[axis])
        x = jnp.pad(x, padding, mode="edge")
    return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, size, *x.shape[axis + 1 :]), axis, 0)


def cut_mask(mask: Bool[Array, "#B #N #T #S"], size: int) -> Bool[Array, "#m #n #B #N #q #k"]:
    """Split a mask into blocks; broadcast axes keep size 1."""
    for axis in (2, 4):
        mask = mask[None] if mask.shape[axis] == 1 else cut(mask, size, axis)
    return mask


def mask_at(mask: Bool[Array, "#m #n #B #N #q #k"], i, j) -> Bool[Array, "#B #N #q #k"]:
    """The mask of query block i and key block j, from the result of `cut_mask`."""
    keys, queries = mask.shape[:2]
    return mask[jnp.minimum(j, keys - 1), jnp.minimum(i, queries - 1)]


def at(x: Any, index) -> Any:
    """Entry `index` of every leaf."""
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), x)


def put(x: Any, entry: Any, index) -> Any:
    """Replace entry `index` of every leaf."""
    return jax.tree.map(lambda leaf, new: lax.dynamic_update_index_in_dim(leaf, new, index, 0), x, entry)


def zero_sums(x: Any) -> Any:
    """Float32 accumulators: zeros in the shapes of x."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), x)


def summed(sums: Any, more: Any) -> Any:
    """Add values of any dtype to float32 accumulators."""
    return jax.tree.map(lambda x, y: x + y.astype(x.dtype), sums, more)
