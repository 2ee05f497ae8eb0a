"""Helpers for blockwise attention: split an axis into blocks; read, write and accumulate entries."""

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Shaped

Leaf: TypeAlias = Any
"""Any pytree leaf: JAX flattens and rebuilds dataclasses with arbitrary leaves, and backends split them into blocks."""

BLOCK_SIZE = 256
"""Queries and keys per block. On a CPU, faster than 128 and 512."""


def few_queries(query_length: int, key_length: int, block_size: int = BLOCK_SIZE) -> bool:
    """Whether all queries form one block of their own, as in decoding: some tens, against more keys."""
    return query_length <= block_size // 4 and query_length < key_length


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CachedLayer:
    """The keys or values of one layer, [B, S, K, H], within KV caches that are stacked over layers.

    Attention with few queries reads it block by block. As an array, all of it would be copied in every step.
    """

    stack: Shaped[Array, "L B K S H"] | Leaf
    """As stored, see `to_storage`."""
    index: Int[Array, ""] | Leaf
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        _, batch, heads, length, dim = self.stack.shape
        return batch, length, heads, dim

    @property
    def ndim(self) -> int:
        return len(self.shape)


def to_storage(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """The bits of 16-bit numbers, as integers: to update bfloat16, XLA converts whole arrays to float32 on a CPU."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def from_storage(x: Shaped[Array, "*shape"], dtype: Any) -> Shaped[Array, "*shape"]:
    """The inverse of `to_storage`."""
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


def key_block(x: Shaped[Array, "B S K H"] | CachedLayer, start, size: int) -> Shaped[Array, "B K k H"]:
    """`size` keys or values from `start` on."""
    if isinstance(x, CachedLayer):
        zero, (_, batch, heads, _, dim) = jnp.int32(0), x.stack.shape
        at = jnp.int32(x.index), zero, zero, jnp.int32(start), zero
        return from_storage(lax.dynamic_slice(x.stack, at, (1, batch, heads, size, dim))[0], x.dtype)
    return jnp.swapaxes(lax.dynamic_slice_in_dim(x, start, size, axis=1), 1, 2)


def whole(x: Shaped[Array, "B S K H"] | CachedLayer) -> Shaped[Array, "B S K H"]:
    """All keys or values as one array."""
    return key_block(x, 0, x.shape[1]).swapaxes(1, 2) if isinstance(x, CachedLayer) else x


def cut(x: Array, size: int, axis: int) -> Array:
    """Split an axis into blocks of `size`, edge-padding the last one; the block index becomes the first axis."""
    blocks = -(-x.shape[axis] // size)
    if blocks * size != x.shape[axis]:
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, blocks * size - x.shape[axis])
        x = jnp.pad(x, padding, mode="edge")
    return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, size, *x.shape[axis + 1 :]), axis, 0)


def cut_mask(mask: Bool[Array, "#B #N #T #S"], query_size: int, key_size: int) -> Bool[Array, "#m #n #B #N #q #k"]:
    """Split a mask into blocks; broadcast axes keep size 1."""
    for axis, size in ((2, query_size), (4, key_size)):
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
    """Add values of any dtype to float32 accumulators; gradients of integers are nothing to add."""
    return jax.tree.map(lambda x, y: x if y.dtype == jax.dtypes.float0 else x + y.astype(x.dtype), sums, more)
