"""Attention of a few queries against more keys, as in decoding.

A program has one part of the keys of a key/value head. The parts, which are merged by their logsumexp, are as many as
fill a GPU, and divide the visible blocks between them.

A single query reads a key that is hidden from it as zero. Several may differ in what they see, so their products leave
out what is not finite, and add it to the rows that see it.

Shapes as in `decoding` of `pallas`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Shaped

from nope_jax.attention.backends.pallas.block import Block
from nope_jax.attention.backends.pallas.call import Call
from nope_jax.attention.backends.pallas.decoding import (
    FewQueries,
    Inputs,
    Options,
    cost,
    differentiable,
    inputs_of,
    results_of,
    row_of,
)
from nope_jax.attention.backends.pallas.gpu.spans import SMALLEST_DIM, all_masks, of_dim, padded_dim
from nope_jax.attention.blocks import CachedLayer, from_storage
from nope_jax.attention.softmax_state import Rows, SoftmaxState, merged_parts
from nope_jax.encodings.encoding import MASKED

PROGRAMS = 512
"""About as many fill a GPU: some for each of its 100 to 150 multiprocessors."""


def _forward(options: Options, operands: FewQueries) -> tuple[Array, Array, Array]:
    (batch, length, heads, _), (key_length, kv_heads) = operands.query.shape, operands.key.shape[1:3]
    blocks, rows = options.blocks, heads // kv_heads * length
    size = min(blocks.queries, max(SMALLEST_DIM, pl.next_power_of_2(rows)))
    row_blocks, key_blocks = -(-rows // size), -(-key_length // blocks.keys)
    parts = min(-(-PROGRAMS // (batch * kv_heads * row_blocks)), key_blocks)
    call, inputs = inputs_of(options, operands, size, blocks.keys)
    arrays, structure = jax.tree.flatten(inputs)
    shape = parts, batch, kv_heads, row_blocks * size
    results = [jax.ShapeDtypeStruct(of, jnp.float32) for of in ((*shape, operands.value.shape[-1]), shape, shape)]

    def attention_decoding(*references):
        program = _Program(call, operands, inputs, jax.tree.unflatten(structure, references[: len(arrays)]))
        program.run(parts, row_blocks, references[len(arrays) :])

    operations, moved = cost(operands)
    found = pl.pallas_call(
        attention_decoding,
        out_shape=results,
        grid=(parts, kv_heads * row_blocks, batch),
        in_specs=[_whole(x, any(x is matrix for matrix in inputs[:3])) for x in arrays],
        out_specs=[_whole(results[0], True), *map(_whole, results[1:])],
        compiler_params=plgpu.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=call.interpret,
        name="attention_decoding",
        metadata={"flops": str(operations), "bytes": str(moved)},
    )(*arrays)
    return results_of(operands, *merged_parts(Rows(*found), options.with_entropy))


few_queries_attention = differentiable(_forward)


@dataclasses.dataclass(frozen=True)
class _Program:
    """One part of the keys, and a block of rows of one key/value head."""

    call: Call
    operands: FewQueries
    arrays: Inputs
    own: Inputs
    """References to them."""

    def run(self, parts: int, row_blocks: int, results: Any) -> None:
        """Write the results of the part: output, entropy and logsumexp."""
        call, own = self.call, self.own
        part, c, b = (pl.program_id(axis) for axis in range(3))
        c, block = lax.div(c, row_blocks), lax.rem(c, row_blocks)
        at = pl.ds(block * call.query_size, call.query_size)
        row = block * call.query_size + lax.iota(jnp.int32, call.query_size)
        head = c * call.groups + jnp.minimum(lax.div(row, call.query_length), call.groups - 1)
        query = _load(own.query.at, (b, c, at), None, self.arrays.query.shape[-1])
        rows = lax.rem(row, call.query_length), head, [x[row_of(x, b), at] for x in own.of_queries]
        factor = own.factor[b, c, at]

        def visit(j, sums):
            state, total = sums
            block = self._block(b, c, j, query, factor, rows)
            state, weights, decay = block.softmax(state)
            weights = weights.astype(block.value.dtype)
            added = block.over_keys(block.value, weights)
            if block.careful:
                added = block.with_care(added, weights)
            return state, decay * total + added

        zeros = jnp.zeros((call.query_size, 1), jnp.float32)
        state = SoftmaxState(zeros + MASKED / 2, zeros, zeros if call.with_entropy else None)
        total = jnp.zeros((call.query_size, padded_dim(self.operands.value.shape[-1])), jnp.float32)
        first, stop = (own.reach[row_of(own.reach, b), end] for end in (0, 1))
        blocks = lax.div(stop - first + parts - 1, parts)
        low = first + part * blocks
        state, total = lax.fori_loop(low, jnp.minimum(low + blocks, stop), visit, (state, total))
        unknown = jnp.isnan(state.normaliser)  # on a GPU the maximum of a number and NaN is the number
        state = state._replace(largest=jnp.where(unknown, state.normaliser, state.largest))
        normaliser, entropy, logsumexp = state.end()
        mask = all_masks([_within(self.operands.value.shape[-1])], total.shape)
        plgpu.store(results[0].at[part, b, c, at, of_dim(total.shape[1])], total / normaliser, mask=mask)
        results[1][part, b, c, at], results[2][part, b, c, at] = entropy[:, 0], logsumexp[:, 0]

    def _block(self, b: Any, c: Any, j: Any, query: Any, factor: Any, rows: Any) -> Block:
        call, own, (time, head, of_queries) = self.call, self.own, rows
        index = j * call.key_size + lax.iota(jnp.int32, call.key_size)
        within = index < call.key_length
        at = pl.ds(j * call.key_size, call.key_size)
        of_keys = [plgpu.load(x.at[row_of(x, b), at], mask=within, other=0) for x in own.of_keys]
        alone, read = call.query_length == 1, within
        if alone:
            of_query = [x[row_of(x, b), 0] for x in own.of_queries]
            read = call.visible(jnp.int32(0), index, 0, tuple(of_query), tuple(of_keys))
        query_side, key_side = tuple(x[:, None] for x in of_queries), tuple(x[None] for x in of_keys)
        visible = call.visible(time[:, None], index[None], 0, query_side, key_side)
        term = None
        if own.table is not None:
            batch, heads = self.arrays.table.shape[:2]
            place = jnp.minimum(b, batch - 1), jnp.minimum(head, heads - 1)[:, None], time[:, None], index[None]
            term = plgpu.load(own.table.at[place], mask=jnp.broadcast_to(within[None], visible.shape), other=0)
        return Block(
            call,
            keys_first=False,
            query=query,
            key=self._tokens(own.key, self.operands.key, b, c, at, read),
            value=self._tokens(own.value, self.operands.value, b, c, at, read),
            factor=factor[:, None],
            visible=visible,
            careful=not alone,
            term=term,
        )

    def _tokens(self, reference: Any, x: Any, b: Any, c: Any, at: Any, read: Any) -> Shaped[Array, "k H"]:
        """A block of keys or values, zero where they are not read."""
        if isinstance(x, CachedLayer):
            return from_storage(_load(reference.at, (self.own.layer[0], b, c, at), read, x.shape[-1]), x.dtype)
        return _load(reference.at, (b, at, c), read, x.shape[-1])


def _load(reference: Any, place: tuple[Any, ...], tokens: Any, dim: int) -> Shaped[Array, "size filled"]:
    """Some tokens of a matrix, with the head dim filled up; zero where there is nothing."""
    (size,) = (int(index.size) for index in place if isinstance(index, pl.Slice))
    mask = all_masks([None if tokens is None else tokens[:, None], _within(dim)], (size, padded_dim(dim)))
    return plgpu.load(reference[*place, of_dim(padded_dim(dim))], mask=mask, other=None if mask is None else 0)


def _within(dim: int) -> Any:
    return None if dim == padded_dim(dim) else (lax.iota(jnp.int32, padded_dim(dim)) < dim)[None]


def _whole(x: Any, is_matrix: bool = False) -> pl.BlockSpec:
    """All of an array, a matrix with its head dim filled up."""
    shape = (*x.shape[:-1], padded_dim(x.shape[-1])) if is_matrix else x.shape
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))
