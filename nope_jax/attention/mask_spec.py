"""Visibility of keys to queries: causality, window, chunks, segments and an explicit mask, based on positions.

Shapes: B batch, T query length, S key length, N query heads.
"""

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Int, Integer, Shaped

from nope_jax.attention.blocks import CachedLayer, Leaf, cut, cut_mask
from nope_jax.encodings.checks import as_array, boolean, known_values


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskSpec:
    """The rule that determines which keys a query sees.

    Positions are None if they are contiguous: 0..S-1 for keys, S-T..S-1 for queries.
    """

    query_positions: Int[Array, "#B T"] | Leaf | None
    key_positions: Int[Array, "#B S"] | Leaf | None
    query_segments: Int[Array, "#B T"] | Leaf | None
    key_segments: Int[Array, "#B S"] | Leaf | None
    mask: Bool[Array, "#B #N #T #S"] | Leaf | None
    is_causal: bool = dataclasses.field(metadata={"static": True})
    window: int | None = dataclasses.field(metadata={"static": True})
    chunk_size: int | None = dataclasses.field(default=None, metadata={"static": True})
    start: Int[Array, ""] | Leaf | None = None
    """For one part of a sequence with contiguous positions: the position of its first key. None: 0."""
    query_offset: Int[Array, ""] | Leaf | None = None
    """For such a part: offset of the query positions from alignment with the end of the keys. None: 0."""

    def positions(self, query_length: int, key_length: int) -> tuple[Int[Array, "#B T"], Int[Array, "#B S"]]:
        """Explicit positions of all queries and keys. By default, queries are aligned with the end of the keys."""
        query, key = self.query_positions, self.key_positions
        if query is None:
            query = _run_on(key_length - query_length, query_length)
        if key is None:
            key = _run_on(0, key_length)
        if self.start is None or not self.contiguous:
            return query, key
        return query + self.start + self.query_offset_or_0, key + self.start

    @property
    def query_offset_or_0(self) -> Int[Array, ""] | int:
        """`query_offset`, or 0 if it is None."""
        return 0 if self.query_offset is None else self.query_offset

    @property
    def contiguous(self) -> bool:
        """Whether positions are contiguous, so that the indices of a query and a key determine their distance."""
        return self.query_positions is None and self.key_positions is None

    def by_distance(self, distance: Int[Array, "*shape"]) -> Bool[Array, "*shape"]:
        """The part of the rule that depends only on the query position minus the key position."""
        visible = jnp.ones(distance.shape, bool)
        if self.is_causal:
            visible &= distance >= 0
        if self.window is not None:
            visible &= jnp.abs(distance) < self.window
        return visible

    def in_blocks(self, query_length: int, key_length: int, query_size: int, key_size: int) -> "MaskSpec":
        """The same with all positions, segments and the mask split into blocks of these sizes, see `cut`."""
        query_positions, key_positions = self.positions(query_length, key_length)
        return dataclasses.replace(
            self,
            query_positions=cut(query_positions, query_size, 1),
            key_positions=cut(key_positions, key_size, 1),
            query_segments=None if self.query_segments is None else cut(self.query_segments, query_size, 1),
            key_segments=None if self.key_segments is None else cut(self.key_segments, key_size, 1),
            mask=None if self.mask is None else cut_mask(self.mask, query_size, key_size),
        )

    def matrix(self, query_length: int, key_length: int) -> Bool[Array, "#B #N T S"]:
        """The whole rule as a boolean mask."""
        query_positions, key_positions = self.positions(query_length, key_length)
        visible = self.by_distance(query_positions[:, None, :, None] - key_positions[:, None, None, :])
        if self.chunk_size is not None:
            query_chunk, key_chunk = query_positions // self.chunk_size, key_positions // self.chunk_size
            visible &= query_chunk[:, None, :, None] == key_chunk[:, None, None, :]
        if self.query_segments is not None and self.key_segments is not None:
            visible &= self.query_segments[:, None, :, None] == self.key_segments[:, None, None, :]
        return visible if self.mask is None else visible & self.mask


def _run_on(start: int, length: int) -> Int[Array, "1 length"]:
    positions = lax.broadcasted_iota(jnp.int32, (1, length), 1)  # one operation: each is a separate call outside jit
    return positions + start if start else positions


_FARTHEST = 2**31 - 1
"""The largest position and segment. A window beyond it could not be compared with distances, and hides nothing."""


def make_mask_spec(
    query: Shaped[Array | np.ndarray, "B T N H"],
    key: Shaped[Array | np.ndarray, "B S K H"] | CachedLayer,
    *,
    query_positions: Integer[ArrayLike, "..."] | None = None,
    key_positions: Integer[ArrayLike, "..."] | None = None,
    mask: Shaped[ArrayLike, "..."] | None = None,
    is_causal: bool = True,
    window: Any = None,
    chunk_size: Any = None,
    segment_ids: Any = None,
) -> MaskSpec:
    """Validate these keywords of `dot_product_attention` and combine them into a `MaskSpec`.

    Raises:
        ValueError: A keyword is invalid; the message names it and what it should be.
    """
    (batch, query_length, num_heads, _), key_length = query.shape, key.shape[1]
    boolean(is_causal=is_causal)
    window, chunk_size = _span(window, chunk_size)
    query_segments, key_segments = _segments(segment_ids, batch, query_length, key_length)
    return MaskSpec(
        query_positions=per_token("query_positions", query_positions, batch, query_length),
        key_positions=per_token("key_positions", key_positions, batch, key_length),
        query_segments=query_segments,
        key_segments=key_segments,
        mask=_mask(mask, (batch, num_heads, query_length, key_length)),
        is_causal=bool(is_causal),
        window=window,
        chunk_size=chunk_size,
    )


def _span(window: Any, chunk_size: Any) -> tuple[int | None, int | None]:
    """Convert window and chunk size to Python integers; refuse values that exclude the query itself."""
    span = {"window": window, "chunk_size": chunk_size}
    for name, number in span.items():
        if number is None:
            continue
        try:
            span[name] = operator.index(number)
        except TypeError:
            span[name] = 0
        if span[name] < 1 or isinstance(number, bool):
            raise ValueError(f"{name} must be an integer of at least 1 (the query itself), not {number!r}")
        span[name] = min(span[name], _FARTHEST)
    return span["window"], span["chunk_size"]


def per_token(name: str, x, batch: int, length: int) -> Array | None:
    """Reshape integers [T] or [B, T] to [1, T] or [B, T]."""
    if x is None:
        return None
    x = as_array(name, x)
    if x.shape not in ((length,), (1, length), (batch, length)):
        raise ValueError(f"{name} must have shape [{length}] or [{batch}, {length}], not {list(x.shape)}")
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, not {x.dtype}")
    if jnp.iinfo(x.dtype).max > _FARTHEST:
        known_values(f"at most {_FARTHEST}, which fits int32", lambda x: np.abs(x) <= _FARTHEST, **{name: x})
    return x.astype(jnp.int32).reshape(-1, length)  # unsigned integers would wrap around in subtraction


def _segments(segment_ids, batch: int, query_length: int, key_length: int):
    if segment_ids is None:
        return None, None
    if not isinstance(segment_ids, tuple):
        if query_length != key_length:
            lengths = f"{query_length} and {key_length}"
            raise ValueError(f"segment_ids must be a pair (of queries, of keys) when their lengths differ: {lengths}")
        segment_ids = segment_ids, segment_ids
    if len(segment_ids) != 2:
        raise ValueError(
            f"segment_ids must be an array or a pair (of queries, of keys), not {len(segment_ids)} of them"
        )
    query_segments, key_segments = segment_ids
    return (
        per_token("segment_ids", query_segments, batch, query_length),
        per_token("segment_ids", key_segments, batch, key_length),
    )


def _mask(mask, shape: tuple[int, ...]) -> Array | None:
    if mask is None:
        return None
    if not hasattr(mask, "dtype"):
        mask = as_array("mask", mask)
    if jnp.issubdtype(mask.dtype, jnp.inexact):
        raise ValueError(
            f"mask must be boolean, True where a query may attend, not {mask.dtype}: convert zeros and ones with "
            "mask != 0; pass terms to add to the logits as logit= to dot_product_attention (a DistanceLogit or "
            "BlockLogit)"
        )
    if mask.dtype != bool:
        known_values("booleans, or zeros and ones", lambda x: (x == 0) | (x == 1), mask=mask)
    mask = jnp.asarray(mask)
    if mask.ndim > 4 or any(m not in (1, s) for m, s in zip(mask.shape[::-1], shape[::-1], strict=False)):
        raise ValueError(f"mask must broadcast to [B, N, T, S] = {list(shape)}, not shape {list(mask.shape)}")
    return mask.astype(bool).reshape((1,) * (4 - mask.ndim) + mask.shape)
