"""A call of the kernels: its static arguments, its arrays, filled up to whole blocks, and which blocks meet.

Shapes as in `pallas_tpu`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from nope_jax.attention.mask_spec import MaskSpec


@dataclasses.dataclass(frozen=True)
class Call:
    """The static arguments of a call."""

    size: int
    """Queries and keys per block, a power of two."""
    query_length: int
    key_length: int
    groups: int
    """Query heads per key/value head."""
    rule: MaskSpec
    """Without its arrays."""
    contiguous: bool
    with_entropy: bool
    precision: Any
    softcap: float | None
    interpret: bool

    @property
    def query_blocks(self) -> int:
        return -(-self.query_length // self.size)

    @property
    def key_blocks(self) -> int:
        return -(-self.key_length // self.size)

    @property
    def reach(self) -> int | None:
        """The distance from which on nothing is visible."""
        return min((n for n in (self.rule.window, self.rule.chunk_size) if n is not None), default=None)

    def padded(self, x: Array, axis: int, blocks: int, fill: float = 0) -> Array:
        """Fill up an axis to this number of blocks."""
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, blocks * self.size - x.shape[axis])
        return jnp.pad(x, padding, constant_values=fill)

    def _block_of(self, index: Any) -> Any:
        """The block of an index, which may be negative."""
        return index >> (self.size.bit_length() - 1)

    def keys_of(self, i: Any, offset: Any) -> tuple[Any, Any]:
        """First and last block of keys that the queries of block i may see; the last is before the first for none."""
        return self._meeting(i * self.size + offset, self.key_blocks, before=True, after=not self.rule.is_causal)

    def queries_of(self, j: Any, offset: Any) -> tuple[Any, Any]:
        """First and last block of queries that may see the keys of block j; likewise."""
        return self._meeting(j * self.size - offset, self.query_blocks, before=not self.rule.is_causal, after=True)

    def _meeting(self, low: Any, blocks: int, *, before: bool, after: bool) -> tuple[Any, Any]:
        """First and last of `blocks` blocks within reach of the block that begins at index `low`."""
        first: Any = 0
        last: Any = blocks - 1
        if not self.contiguous:
            return first, last
        high = low + self.size - 1
        if not before:
            first = jnp.maximum(first, self._block_of(low))
        elif self.reach is not None:
            first = jnp.maximum(first, self._block_of(low - self.reach + 1))
        if not after:
            last = jnp.minimum(last, self._block_of(high))
        elif self.reach is not None:
            last = jnp.minimum(last, self._block_of(high + self.reach - 1))
        return first, last

    def steps(self, blocks: int) -> int:
        """The largest number of blocks, of `blocks`, that a block of the other kind meets."""
        if not self.contiguous or self.reach is None:
            return blocks
        sides = 1 if self.rule.is_causal else 2
        return min(blocks, -(-(sides * self.reach + self.size) // self.size) + 1)

    def all_visible(self, i: Any, j: Any, offset: Any) -> Any:
        """Whether each query of block i sees each key of block j, where indices alone determine it."""
        nearest = i * self.size + offset - (j + 1) * self.size + 1
        farthest = nearest + 2 * (self.size - 1)
        seen = (j + 1) * self.size <= self.key_length
        if self.rule.is_causal:
            seen &= nearest >= 0
        if self.rule.window is not None:
            seen &= (farthest < self.rule.window) & (-nearest < self.rule.window)
        return seen

    @property
    def pairs(self) -> int:
        """About how many pairs of a query and a key the blocks of one head have that meet, for estimates of cost."""
        keys = self.key_length
        if self.rule.is_causal:
            keys = max(keys - self.query_length // 2, keys // 2)
        if self.reach is not None:
            keys = min(keys, self.reach if self.rule.is_causal else 2 * self.reach)
        return self.query_length * min(keys + self.size // 2, self.key_blocks * self.size)


class Operands(NamedTuple):
    """The differentiable arguments, heads first and filled up to whole blocks."""

    query: Shaped[Array, "B N T H"]
    factor: Float[Array, "B N 1 T"]
    key: Shaped[Array, "B K S H"]
    value: Shaped[Array, "B K S H2"]
    table: Float[Array, "#N 1 distances"] | None
    """The logit by distance, in pieces of q entries: number i - j + (blocks of keys) begins with the distance of the
    first query of block i from the first key of block j."""


class Tokens(NamedTuple):
    """What visibility depends on besides the indices of a query and a key."""

    offset: Int[Array, "1"]
    """What is added to the index of a query to give its distance from the key of index 0."""
    of_queries: tuple[Int[Array, "#B 1 T"], ...]
    """Positions, unless they are consecutive; then the numbers, segments and chunks, that a query has in common with
    the keys that it sees."""
    of_keys: tuple[Int[Array, "#B 1 S"], ...]


def tokens_of(call: Call, mask_spec: MaskSpec, offset: Int[Array, "1"]) -> Tokens:
    """What a `MaskSpec` says of each token."""
    positions = mask_spec.positions(call.query_length, call.key_length)
    pairs: list[tuple[Any, Any]] = [] if call.contiguous else [positions]
    if mask_spec.query_segments is not None:
        pairs.append((mask_spec.query_segments, mask_spec.key_segments))
    if mask_spec.chunk_size is not None:
        pairs.append((positions[0] // mask_spec.chunk_size, positions[1] // mask_spec.chunk_size))

    def rows(x: Array, blocks: int) -> Array:
        return call.padded(x.astype(jnp.int32)[:, None], 2, blocks)

    return Tokens(
        offset,
        tuple(rows(of_query, call.query_blocks) for of_query, _ in pairs),
        tuple(rows(of_key, call.key_blocks) for _, of_key in pairs),
    )
