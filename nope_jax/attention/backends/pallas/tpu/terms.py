"""The logit of an encoding within a kernel: the term of one block, and what the block adds to its gradient.

A term by distance is sheared from a vector. One by positions is computed in strips of a few keys, whose numbers fit in
registers: as one block, every operation of its function would go through memory. Each of its parameters is a row of
equal numbers, so its gradient is summed over keys within the kernel, and over queries after it.

Shapes as in `pallas`, with q = k.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from nope_jax.attention.backends.pallas.call import Call, Tokens
from nope_jax.attention.backends.pallas.positional import Positional
from nope_jax.attention.backends.pallas.tpu.inputs import SUBLANES, Inputs, column
from nope_jax.encodings import DistanceLogit
from nope_jax.encodings.encoding import Logit

STRIP = 16
"""Keys that a term by positions is computed for at a time."""


def table_of(call: Call, logit: Logit | None, tokens: Tokens, num_heads: int) -> Float[Array, "#N rows columns"] | None:
    """What a kernel reads of a logit: a vector of distances, or the parameters of a function of positions as rows."""
    if isinstance(logit, DistanceLogit):
        size = call.key_size
        pieces = jnp.arange(-call.key_blocks * size, call.query_blocks * size, dtype=jnp.int32)
        return logit.values(tokens.offset[0] + pieces)[:, None]
    if call.positional is not None:
        numbers = call.positional.numbers(logit, num_heads)[..., None]
        return jnp.broadcast_to(numbers, (*numbers.shape[:2], call.query_size))
    return None


def table_blocks(call: Call, table: Array | None, spec: Any) -> tuple[Any, ...]:
    """The BlockSpecs of `Inputs.table`, made by a function of a block and its place."""
    if table is None:
        return ()
    heads = len(table)
    if call.positional is not None:
        return (spec((1, *table.shape[1:]), lambda b, n, i, j: (jnp.minimum(n, heads - 1), 0, 0)),)

    def piece(back: int) -> Any:
        def place(b, n, i, j):
            return jnp.minimum(n, heads - 1), 0, i - j + call.key_blocks - back

        return spec((1, 1, call.key_size), place)

    return piece(0), piece(1)


def memory_of(call: Call) -> tuple[Any, ...]:
    """What a `PositionalTerm` needs besides its inputs."""
    if call.positional is None:
        return ()
    shapes = ((call.key_size, call.query_size), jnp.float32), ((call.key_size, 1), jnp.int32)
    return tuple(pltpu.VMEM(*shape) for shape in shapes)


def term_at(call: Call, inputs: Inputs, memory: tuple[Any, ...], offset: Any, i: Any, j: Any) -> Any:
    """The term of query block i and key block j, from references to inputs, memory and offset, or None."""
    if not inputs.table:
        return None
    if call.positional is None:
        start = pl.multiple_of((i - j + call.key_blocks - 1) * call.key_size, call.key_size)
        near, far = inputs.table
        return DistanceTerm(near, far, start)
    if call.contiguous:
        query_positions = lax.broadcasted_iota(jnp.int32, (1, call.query_size), 1) + i * call.query_size
        query_positions += offset[0] + offset[1]
        key_positions = lax.broadcasted_iota(jnp.int32, (call.key_size, 1), 0) + j * call.key_size + offset[1]
    else:
        query_positions, key_positions = inputs.of_queries[0][0], column(inputs.of_keys[0][0])
    return PositionalTerm(call.positional, inputs.table[0], query_positions, key_positions, memory)


@dataclasses.dataclass(frozen=True)
class DistanceTerm:
    """That of a `DistanceLogit`."""

    near: Any
    """A reference to a piece of the vector, [1, 1, q]; see `Inputs.table`."""
    far: Any
    """The piece before it."""
    start: Any
    """Index in the vector of the first distance of the piece before."""

    def logits(self) -> Float[Array, "k q"]:
        return sheared(self.near[0], self.far[0])

    def add_gradient(self, d_logits: Float[Array, "k q"], total: Any) -> None:
        """Add to a reference to the gradient of the table of a head."""
        total[0, :, pl.ds(self.start, 2 * len(d_logits))] += unsheared(d_logits)


@dataclasses.dataclass(frozen=True)
class PositionalTerm:
    """That of a `Positional`."""

    positional: Positional
    parameters: Any
    """A reference to the rows, [1, P, q], of which the last may be filling."""
    query_positions: Int[Array, "1 q"]
    key_positions: Int[Array, "k 1"]
    memory: tuple[Any, ...]
    """For a block, and for key positions."""

    def logits(self) -> Float[Array, "k q"]:
        block, _ = self.memory

        def compute(strip, rows, key_positions):
            block[strip, :] = self.positional(rows, self.query_positions, key_positions)

        self._for_each_strip(compute)
        return block[...]

    def add_gradient(self, d_logits: Float[Array, "k q"], total: Any) -> None:
        """Add to a reference to the gradient of the rows of a head."""
        block, _ = self.memory
        block[...] = d_logits

        def add(strip, rows, key_positions):
            gradient = self.positional.gradient(rows, self.query_positions, key_positions, block[strip, :])
            for p, d_row in enumerate(gradient):
                total[0, p : p + 1] += d_row

        self._for_each_strip(add)

    def _for_each_strip(self, visit: Any) -> None:
        block, key_positions = self.memory
        key_positions[...] = self.key_positions
        size = min(STRIP, block.shape[0])

        def at(index, _):
            strip = pl.ds(pl.multiple_of(index * size, size), size)
            rows = [self.parameters[0, p : p + 1] for p in range(self.positional.size)]
            visit(strip, rows, key_positions[strip, :])

        lax.fori_loop(0, block.shape[0] // size, at, None)


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
