"""Terms of one vector per distance: products are sheared through memory.

Triton can move no entry of a block to another row or column, but it can read memory at any index. So each program has a
slot of global memory, small enough to stay in a cache, into which it writes a block and out of which it reads what the
block becomes.

Shapes as in `pallas`, with q = k; d distances of a table, a multiple of q; W head dim of the vectors.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from nope_jax.attention.backends.pallas.call import Call
from nope_jax.attention.backends.pallas.gpu.spans import Span, of_dim, padded_length
from nope_jax.attention.backends.pallas.vectors import ASCENDING, BlockVectors, Vectors


@dataclasses.dataclass(frozen=True)
class Slot:
    """The memory of a program."""

    reference: Any
    """To that of all programs, [slots, q, 2*q]."""
    index: Any
    interpret: bool

    def moved(self, x: Float[Array, "q columns"], row: Any, column: Any, within: Any = None) -> Float[Array, "..."]:
        """The entries of a block at indices that broadcast, and 0 where there is none."""
        row, column = jnp.broadcast_arrays(row, column)
        rows, columns = map(of_dim, x.shape)
        plgpu.store(self.reference.at[self.index, rows, columns], x)
        self._wait()
        found = plgpu.load(self.reference.at[self.index, row, column], mask=within, other=None if within is None else 0)
        self._wait()
        return found

    def _wait(self) -> None:
        """Until all threads of the program have come here: what they wrote can be read, what they read overwritten."""
        if not self.interpret:
            plgpu.debug_barrier()


@dataclasses.dataclass(frozen=True)
class ShearedVectors(BlockVectors):
    """Those of a block of a query head. Vectors are in the order of their table."""

    call: Call
    arrays: Vectors
    """The tables themselves."""
    head: Any
    diagonal: Any
    """The block of queries minus that of keys."""
    slot: Slot

    @property
    def size(self) -> int:
        return self.call.key_size

    def _first(self, name: str) -> tuple[Any, Any]:
        """The head of a table, and the index of the first vector."""
        if getattr(ASCENDING, name):
            start = padded_length(self.call.key_length) + (self.diagonal - 1) * self.size
        else:
            start = padded_length(self.call.query_length) - (self.diagonal + 1) * self.size
        return jnp.minimum(self.head, len(getattr(self.arrays, name)) - 1), start

    def vectors(self, name: str) -> Float[Array, "distances W"]:
        array, reference = getattr(self.arrays, name), getattr(self.tables, name)
        head, start = self._first(name)
        return Span(start, 2 * self.size, array.shape[1]).matrix(array, reference, head, jnp.int32(0))

    def constant(self) -> Float[Array, "..."]:
        head, start = self._first("constant")
        x, y = self._pairs
        return plgpu.load(self.tables.constant.at[head, jnp.int32(0), start + self.size + x - y])

    def from_queries(self, rows: Float[Array, "q distances"]) -> Float[Array, "..."]:
        x, y = self._pairs
        return self.slot.moved(rows, x, self.size + y - x)

    def from_keys(self, rows: Float[Array, "k distances"]) -> Float[Array, "..."]:
        x, y = self._pairs
        return self.slot.moved(rows, y, self.size + x - y)

    def to_queries(self, block: Float[Array, "..."]) -> Float[Array, "q distances"]:
        x, y = self._of_rows
        return self.slot.moved(block, *((y, x) if self.keys_first else (x, y)), within=(y >= 0) & (y < self.size))

    def to_keys(self, block: Float[Array, "..."]) -> Float[Array, "k distances"]:
        y, x = self._of_rows
        return self.slot.moved(block, *((y, x) if self.keys_first else (x, y)), within=(x >= 0) & (x < self.size))

    @property
    def _pairs(self) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
        """The indices of the query and the key of each pair, [block]."""
        first, last = (lax.broadcasted_iota(jnp.int32, (self.size, self.size), axis) for axis in (0, 1))
        return (last, first) if self.keys_first else (first, last)

    @property
    def _of_rows(self) -> tuple[Int[Array, "q distances"], Int[Array, "q distances"]]:
        """The index of each row, and for each of its distances that of the other member of the pair, if any."""
        row, column = (lax.broadcasted_iota(jnp.int32, (self.size, 2 * self.size), axis) for axis in (0, 1))
        return row, row + column - self.size
