"""Which key each query may see: causality, window, chunks, segments and a mask, from positions.

Shapes: B batch, T query length, S key length, N query heads.
"""

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

Leaf: TypeAlias = Any
"""While JAX takes a pytree apart and puts it together its leaves are anything; and kernels cut them into blocks."""


def positions_or_default(
    query_positions: Int[Array, "#B T"] | None,
    key_positions: Int[Array, "#B S"] | None,
    query_length: int,
    key_length: int,
) -> tuple[Int[Array, "#B T"], Int[Array, "#B S"]]:
    """The positions given; where none are, keys run on from 0 and queries end where the keys end."""
    if query_positions is None:
        query_positions = jnp.arange(key_length - query_length, key_length, dtype=jnp.int32)[None]
    if key_positions is None:
        key_positions = jnp.arange(key_length, dtype=jnp.int32)[None]
    return query_positions, key_positions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskSpec:
    """The rule by which queries see keys. Positions are None when they run on: keys 0..S-1, queries S-T..S-1."""

    query_positions: Int[Array, "#B T"] | Leaf | None
    key_positions: Int[Array, "#B S"] | Leaf | None
    query_segments: Int[Array, "#B T"] | Leaf | None
    key_segments: Int[Array, "#B S"] | Leaf | None
    mask: Bool[Array, "#B #N #T #S"] | Leaf | None
    is_causal: bool = dataclasses.field(metadata={"static": True})
    window: int | None = dataclasses.field(metadata={"static": True})
    chunk_size: int | None = dataclasses.field(default=None, metadata={"static": True})
    start: Int[Array, ""] | Leaf | None = None
    """Of a part of a sequence whose positions run on: that of the first key. None: 0."""
    query_offset: Int[Array, ""] | Leaf | None = None
    """Of such a part: how much farther after the keys the queries stand than aligned at their end. None: not at all."""

    def positions(self, query_length: int, key_length: int) -> tuple[Int[Array, "#B T"], Int[Array, "#B S"]]:
        """Explicit positions of all queries and keys."""
        query, key = positions_or_default(self.query_positions, self.key_positions, query_length, key_length)
        if self.start is None or not self.contiguous:
            return query, key
        return query + self.start + self.query_offset_or_0, key + self.start

    @property
    def query_offset_or_0(self) -> Int[Array, ""] | int:
        """`query_offset` as a number."""
        return 0 if self.query_offset is None else self.query_offset

    @property
    def contiguous(self) -> bool:
        """Whether positions run on, so that the distance of a query and a key follows from their indices."""
        return self.query_positions is None and self.key_positions is None

    def by_distance(self, distance: Int[Array, "*shape"]) -> Bool[Array, "*shape"]:
        """The part that is decided by query position minus key position."""
        visible = jnp.ones(distance.shape, bool)
        if self.is_causal:
            visible &= distance >= 0
        if self.window is not None:
            visible &= jnp.abs(distance) < self.window
        return visible

    def matrix(self, query_length: int, key_length: int) -> Bool[Array, "#B #N T S"]:
        """The whole rule, written out."""
        query_positions, key_positions = self.positions(query_length, key_length)
        visible = self.by_distance(query_positions[:, None, :, None] - key_positions[:, None, None, :])
        if self.chunk_size is not None:
            query_chunk, key_chunk = query_positions // self.chunk_size, key_positions // self.chunk_size
            visible &= query_chunk[:, None, :, None] == key_chunk[:, None, None, :]
        if self.query_segments is not None and self.key_segments is not None:
            visible &= self.query_segments[:, None, :, None] == self.key_segments[:, None, None, :]
        return visible if self.mask is None else visible & self.mask
