"""The logit of an encoding within a kernel: the term of one block, and what the block adds to its gradient.

A term by distance is sheared from a vector; for one of vectors per distance see `vectors.py`. One of pairs is computed
in strips of a few keys, whose numbers fit in registers: as one block, every operation of its function would go through
memory. Each of its parameters is a row of equal numbers, so its gradient is summed over keys within the kernel, and
over queries after it.

Shapes as in `pallas`, with q = k.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from nope_jax.attention.backends.pallas.block import only_finite
from nope_jax.attention.backends.pallas.call import Call, Tokens
from nope_jax.attention.backends.pallas.pairwise import Member, Pairwise
from nope_jax.attention.backends.pallas.tpu.inputs import Inputs, column, row
from nope_jax.attention.backends.pallas.tpu.shear import diagonal_sums, sheared
from nope_jax.attention.backends.pallas.tpu.vectors import RotatedVectors
from nope_jax.attention.backends.pallas.vectors import ValueTerm, VectorTerm
from nope_jax.encodings import DistanceLogit
from nope_jax.encodings.encoding import Logit

STRIP = 16
"""Keys that a term is computed for at a time, pair by pair."""


class Totals(NamedTuple):
    """References to the gradient of the term of a head."""

    table: Any
    """[1, rows, columns]; None: there is no table."""
    query_features: tuple[Any, ...] = ()
    """[1, 1, 1, q] each, of the queries of the block."""
    key_features: tuple[Any, ...] = ()
    """[1, 1, 1, S] each."""


class Memory(NamedTuple):
    """What a `PairwiseTerm` needs besides its inputs, which the kernel can read in strips of keys."""

    block: Any
    """[k, q]."""
    key_positions: Any
    """[k, 1]."""
    key_features: tuple[Any, ...]
    """[k, 1] each, and so are their gradients."""
    d_key_features: tuple[Any, ...]


def table_of(call: Call, logit: Logit | None, tokens: Tokens, num_heads: int) -> Float[Array, "#N rows columns"] | None:
    """What a kernel reads of a logit: a vector of distances, or the parameters of a function of pairs as rows."""
    if isinstance(logit, DistanceLogit):
        size = call.key_size
        pieces = jnp.arange(-call.key_blocks * size, call.query_blocks * size, dtype=jnp.int32)
        return logit.values(tokens.offset[0] + pieces)[:, None]
    if call.pairwise is not None:
        numbers = call.pairwise.numbers(logit, num_heads)
        return None if numbers is None else jnp.broadcast_to(numbers[..., None], (*numbers.shape, call.query_size))
    return None


def table_blocks(call: Call, table: Array | None, spec: Any) -> tuple[Any, ...]:
    """The BlockSpecs of `Inputs.table`, made by a function of a block and its place."""
    if table is None:
        return ()
    heads = len(table)
    if call.pairwise is not None:
        return (spec((1, *table.shape[1:]), lambda b, n, i, j: (jnp.minimum(n, heads - 1), 0, 0)),)

    def piece(back: int) -> Any:
        def place(b, n, i, j):
            return jnp.minimum(n, heads - 1), 0, i - j + call.key_blocks - back

        return spec((1, 1, call.key_size), place)

    return piece(0), piece(1)


def memory_of(call: Call, inputs: Inputs) -> Memory | None:
    """What a kernel has for a `PairwiseTerm`."""
    if call.pairwise is None:
        return None
    columns = tuple(pltpu.VMEM((call.key_size, 1), jnp.float32) for _ in inputs.key_features)
    block = pltpu.VMEM((call.key_size, call.query_size), jnp.float32)
    return Memory(block, pltpu.VMEM((call.key_size, 1), jnp.int32), columns, columns)


def term_at(call: Call, inputs: Inputs, memory: Any, offset: Any, i: Any, j: Any, masked: bool) -> Any:
    """The term of query block i and key block j, from references to inputs, memory and offset, or None."""
    if call.pairwise is None:
        if inputs.vectors is not None and inputs.vectors.in_logit:
            query, key = (reference[0, 0] for reference in (inputs.query, inputs.key))
            query, key = (only_finite(x) if masked else x for x in (query, key))
            return VectorTerm(_vectors_at(call, inputs), query, key, inputs.factor[0, 0])
        if not inputs.table:
            return None
        near, far = inputs.table
        return DistanceTerm(near, far, pl.multiple_of((i - j + call.key_blocks - 1) * call.key_size, call.key_size))
    if call.contiguous:
        query_positions = lax.broadcasted_iota(jnp.int32, (1, call.query_size), 1) + i * call.query_size
        query_positions += offset[0] + offset[1]
        key_positions = lax.broadcasted_iota(jnp.int32, (call.key_size, 1), 0) + j * call.key_size + offset[1]
    else:
        query_positions, key_positions = inputs.of_queries[0][0], column(inputs.of_keys[0][0])
    queries = Member(query_positions, tuple(reference[0, 0] for reference in inputs.query_features))
    keys = Member(key_positions, tuple(column(reference[0, 0]) for reference in inputs.key_features))
    at = pl.ds(pl.multiple_of(j * call.key_size, call.key_size), call.key_size)
    return PairwiseTerm(call.pairwise, inputs.table, queries, keys, at, memory)


def value_term_at(call: Call, inputs: Inputs) -> ValueTerm | None:
    """What is added to the output of a block, likewise."""
    if inputs.vectors is None or inputs.vectors.value is None:
        return None
    return ValueTerm(_vectors_at(call, inputs))


def _vectors_at(call: Call, inputs: Inputs) -> RotatedVectors:
    return RotatedVectors(inputs.vectors, keys_first=True, dtype=jnp.float32, precision=call.precision)


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
        values = jnp.concatenate([self.near[0], self.far[0]], axis=1)
        return sheared(jnp.broadcast_to(values, (self.near.shape[2], values.shape[1])))

    def add_gradient(self, d_logits: Float[Array, "k q"], totals: Totals) -> None:
        """Add to the gradient of the table of a head."""
        totals.table[0, :, pl.ds(self.start, 2 * len(d_logits))] += diagonal_sums(d_logits)


@dataclasses.dataclass(frozen=True)
class PairwiseTerm:
    """That of a `Pairwise`."""

    pairwise: Pairwise
    table: tuple[Any, ...]
    """A reference to the parameters as rows, [1, P, q], of which the last may be filling; if there are any."""
    queries: Member
    """[1, q] each."""
    keys: Member
    """[k, 1] each."""
    key_slice: Any
    """The keys of the block."""
    memory: Memory

    def logits(self) -> Float[Array, "k q"]:
        block = self.memory.block

        def compute(strip, rows, keys):
            block[strip, :] = self.pairwise(rows, self.queries, keys)

        self._for_each_strip(compute)
        return block[...]

    def add_gradient(self, d_logits: Float[Array, "k q"], totals: Totals) -> None:
        """Add to the gradients of the parameters of a head, and of the features."""
        block, d_columns = self.memory.block, self.memory.d_key_features
        block[...] = d_logits

        def add(strip, rows, keys):
            d_rows, d_queries, d_keys = self.pairwise.gradient(rows, self.queries, keys, block[strip, :])
            for p, d_row in enumerate(d_rows):
                totals.table[0, p : p + 1] += d_row
            for total, d_query in zip(totals.query_features, d_queries, strict=True):
                total[0, 0] += d_query
            for d_column, d_key in zip(d_columns, d_keys, strict=True):
                d_column[strip, :] = d_key

        self._for_each_strip(add)
        for total, d_column in zip(totals.key_features, d_columns, strict=True):
            total[0, 0, :, self.key_slice] += row(d_column[...])

    def _for_each_strip(self, visit: Any) -> None:
        memory, size = self.memory, min(STRIP, self.memory.block.shape[0])
        memory.key_positions[...] = self.keys.positions
        for reference, feature in zip(memory.key_features, self.keys.features, strict=True):
            reference[...] = feature

        def at(index, _):
            strip = pl.ds(pl.multiple_of(index * size, size), size)
            rows = [self.table[0][0, p : p + 1] for p in range(self.pairwise.size)]
            features = tuple(reference[strip, :] for reference in memory.key_features)
            visit(strip, rows, Member(memory.key_positions[strip, :], features))

        lax.fori_loop(0, memory.block.shape[0] // size, at, None)
