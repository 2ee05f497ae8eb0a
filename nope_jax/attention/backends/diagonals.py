"""Traversal of query and key blocks by diagonals: a diagonal is the set of block pairs (i, j) with the same i - j.

Terms that depend only on distance (a bias, the causal mask, a window) are the same for all blocks of a diagonal, so
they are computed once per diagonal. Diagonals without visible pairs are skipped.

Shapes: B batch, N query heads, K key/value heads, G = N/K; q = k the size of query and key blocks.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped

from nope_jax.attention.blocks import at, mask_at
from nope_jax.attention.mask_spec import MaskSpec


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The static arguments of a call: how queries and keys are split into blocks."""

    query_length: int
    key_length: int
    size: int
    groups: int
    contiguous: bool
    """Positions are contiguous, so the distance between two blocks follows from their indices."""
    per_block: bool
    """Visibility does not depend only on distance, so it is computed for every block."""
    with_entropy: bool
    precision: Any
    softcap: float | None

    @property
    def query_blocks(self) -> int:
        return -(-self.query_length // self.size)

    @property
    def key_blocks(self) -> int:
        return -(-self.key_length // self.size)

    def distance_range(self, diagonal: Any) -> tuple[Any, Any]:
        """Smallest and largest distance within the blocks of a diagonal, for contiguous positions.

        `MaskSpec.query_offset` is not included.
        """
        middle = diagonal * self.size + self.key_length - self.query_length
        return middle - (self.size - 1), middle + (self.size - 1)

    def distances(self, mask_spec: MaskSpec) -> Array:
        """All distances between queries and keys of the grid, ascending, as indexed by `distance_values`."""
        first, last = self.distance_range(1 - self.key_blocks)[0], self.distance_range(self.query_blocks - 1)[1]
        return jnp.arange(first, last + 1, dtype=jnp.int32) + mask_spec.query_offset_or_0

    def distance_start(self, diagonal) -> Any:
        """Index in `distances` of the first of a diagonal's 2·size - 1 distances."""
        return (diagonal + self.key_blocks - 1) * self.size

    def diagonals(self, mask_spec: MaskSpec) -> list[tuple[int, int, bool]]:
        """Ranges (start, stop, masked) of consecutive diagonals with visible pairs and the same `masked`."""
        first, last = 1 - self.key_blocks, self.query_blocks - 1
        if not self.contiguous or mask_spec.query_offset is not None:
            return [(first, last + 1, False)]
        kinds = []
        for diagonal in range(first, last + 1):
            low, high = self.distance_range(diagonal)
            nearest = 0 if low <= 0 <= high else min(abs(low), abs(high))
            span = [n for n in (mask_spec.window, mask_spec.chunk_size) if n is not None]
            window = min(span, default=max(abs(low), abs(high)) + 1)
            if not (mask_spec.is_causal and high < 0) and nearest < window:
                kinds.append((diagonal, (mask_spec.is_causal and low < 0) or max(abs(low), abs(high)) >= window))
        ranges: list[tuple[int, int, bool]] = []
        for diagonal, masked in kinds:
            if ranges and ranges[-1][2] == masked:
                ranges[-1] = (ranges[-1][0], diagonal + 1, masked)
            else:
                ranges.append((diagonal, diagonal + 1, masked))
        return ranges


def _visible_on(tiling: Tiling, mask_spec: MaskSpec, diagonal) -> Bool[Array, "1 1 1 q k"]:
    """Visibility within every block of a diagonal, if it depends only on distance."""
    middle = diagonal * tiling.size + tiling.key_length - tiling.query_length
    index = jnp.arange(tiling.size, dtype=jnp.int32)
    return mask_spec.by_distance(middle + index[:, None] - index)[None, None, None]


def _visible(tiling: Tiling, mask_spec: MaskSpec, i, j):
    """Visibility of the keys of block j to the queries of block i, [B or 1, K or 1, G or 1, q, k]."""
    rule = dataclasses.replace(
        mask_spec,
        query_positions=at(mask_spec.query_positions, i),
        key_positions=at(mask_spec.key_positions, j),
        query_segments=at(mask_spec.query_segments, i),
        key_segments=at(mask_spec.key_segments, j),
        mask=None,
    )
    visible = rule.matrix(tiling.size, tiling.size)
    if mask_spec.mask is not None:
        visible = visible & mask_at(mask_spec.mask, i, j)
    visible = visible & (j * tiling.size + jnp.arange(tiling.size, dtype=jnp.int32) < tiling.key_length)
    return split_heads(visible, 1 if visible.shape[1] == 1 else tiling.groups)


def sweep(tiling: Tiling, mask_spec: MaskSpec, visit_diagonal, state):
    """Fold visit_diagonal(diagonal, masked, state) over the diagonals with visible pairs."""
    for start, stop, masked in tiling.diagonals(mask_spec):
        state = lax.fori_loop(start, stop, lambda diagonal, s, m=masked: visit_diagonal(diagonal, m, s), state)
    return state


def along(tiling: Tiling, mask_spec: MaskSpec, diagonal, masked: bool, state, take, update, put):
    """Visit the blocks (i, j) of a diagonal: entries = take(state, i, j), state = put(state, update(...), i, j).

    Only the entries pass through the branch that skips blocks without visible pairs, and barriers separate them from
    the state; otherwise XLA would copy the whole state for every block.
    """

    on_all = _visible_on(tiling, mask_spec, diagonal) if masked else None

    def visit(i, state):
        j = i - diagonal
        entries = take(state, i, j)
        if tiling.per_block:
            visible = _visible(tiling, mask_spec, i, j)
            entries = lax.cond(visible.any(), lambda e: update(i, j, visible, e), lambda e: e, entries)
        else:
            entries = update(i, j, on_all, entries)
        return put(state, entries, i, j)

    first, stop = jnp.maximum(diagonal, 0), jnp.minimum(tiling.query_blocks, tiling.key_blocks + diagonal)
    return lax.fori_loop(first, stop, visit, state)


def shear(values: Float[Array, "N span"]) -> Float[Array, "N c c"]:
    """Return the block whose entry (x, y) is the value of distance x - y, given the values of -(c-1)..c-1.

    Equal rows of descending distance, padded by an entry and read as rows without it: each begins one entry before the
    last. Where all rows are equal, this is faster than `skew`.
    """
    heads, span = values.shape
    size = (span + 1) // 2
    rows = jnp.pad(jnp.broadcast_to(values[:, None, ::-1], (heads, size, span)), [(0, 0), (0, 0), (0, 1)])
    flat = rows.reshape(heads, -1)[:, size - 1 : size - 1 + size * span]
    return flat.reshape(heads, size, span)[..., :size]


def unshear(block: Float[Array, "N c c"]) -> Float[Array, "N 2*c-1"]:
    """The transpose of `shear`, of a block stored as [keys, queries]: its sums over the pairs of each distance.

    Cut into rows that are one entry shorter, the padded block has each of its own rows one entry further right, and
    every distance in a column. The barrier keeps XLA from computing where each entry lies while it sums them.
    """
    heads, size, _ = block.shape
    rows = jnp.pad(block[:, ::-1], ((0, 0), (0, 0), (0, size))).reshape(heads, -1)
    rows = lax.optimization_barrier(rows)[:, : size * (2 * size - 1)].reshape(heads, size, 2 * size - 1)
    return rows.sum(1)


def split_heads(x: Shaped[Array, "B N q k"], groups: int) -> Shaped[Array, "B K G q k"]:
    return x.reshape(x.shape[0], -1, groups, *x.shape[2:])


def merge_heads(x: Shaped[Array, "#B K G *shape"]) -> Shaped[Array, "#B N *shape"]:
    return x.reshape(x.shape[0], -1, *x.shape[3:])
