"""Arrays cut into blocks of queries or keys: an axis is cut, and entries are read, written and summed."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

BLOCK_SIZE = 256
"""Queries and keys per block: on a CPU faster than 128 and 512."""


def cut(x: Array, size: int, axis: int) -> Array:
    """Cut an axis into blocks of a size, the last one padded by its edge, and move their index to the front."""
    blocks = -(-x.shape[axis] // size)
    if blocks * size != x.shape[axis]:
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, blocks * size - x.shape[axis])
        x = jnp.pad(x, padding, mode="edge")
    return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, size, *x.shape[axis + 1 :]), axis, 0)


def cut_mask(mask: Bool[Array, "#B #N #T #S"], size: int) -> Bool[Array, "#m #n #B #N #q #k"]:
    """A mask in blocks; an axis along which it is broadcast stays one entry."""
    for axis in (2, 4):
        mask = mask[None] if mask.shape[axis] == 1 else cut(mask, size, axis)
    return mask


def mask_at(mask: Bool[Array, "#m #n #B #N #q #k"], i, j) -> Bool[Array, "#B #N #q #k"]:
    """What `cut_mask` made of query block i and key block j."""
    keys, queries = mask.shape[:2]
    return mask[jnp.minimum(j, keys - 1), jnp.minimum(i, queries - 1)]


def at(x: Any, index) -> Any:
    """Entry `index` of every leaf."""
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), x)


def put(x: Any, entry: Any, index) -> Any:
    """With entry `index` of every leaf replaced."""
    return jax.tree.map(lambda leaf, new: lax.dynamic_update_index_in_dim(leaf, new, index, 0), x, entry)


def zero_sums(x: Any) -> Any:
    """Float32 zeros in the shapes of x, to be summed into."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), x)


def summed(sums: Any, more: Any) -> Any:
    """Float32 sums with more, of whatever dtype it is."""
    return jax.tree.map(lambda x, y: x + y.astype(x.dtype), sums, more)
