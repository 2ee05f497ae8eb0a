"""Attention of a few queries against more keys, as in decoding.

A program has one part of the keys of a key/value head; the queries of all heads of its group are the rows of one
product. The parts, which are merged by their logsumexp, are as many as fill a GPU. They divide the blocks between the
first and the last visible key, so the time depends on the tokens in a KV cache, not on its capacity. The cache is read
where it lies.

A single query reads a key that is hidden from it as zero. Several may differ in what they see, so their products leave
out what is not finite, and add it to the rows that see it.

The gradient, which decoding does not need, is that of `streaming.py`.

Shapes as in `pallas`; G = N/K, R = G·T rows.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int, Shaped

from nope_jax.attention.backends.pallas.block import Block
from nope_jax.attention.backends.pallas.call import Call, tokens_of
from nope_jax.attention.backends.pallas.gpu.sizes import Blocks
from nope_jax.attention.backends.pallas.gpu.tiles import SMALLEST_DIM, all_masks, padded_dim
from nope_jax.attention.backends.streaming import streaming_attention
from nope_jax.attention.blocks import CachedLayer, from_storage
from nope_jax.attention.mask_spec import MaskSpec
from nope_jax.attention.softmax_state import Rows, SoftmaxState, merged_parts, named
from nope_jax.encodings import DistanceLogit
from nope_jax.encodings.encoding import MASKED, Logit

PROGRAMS = 512
"""About as many fill a GPU: some for each of its 100 to 150 multiprocessors."""


class FewQueries(NamedTuple):
    """The arrays of a call."""

    query: Shaped[Array, "B T N H"]
    factor: Float[Array, "#B #N T"]
    key: Shaped[Array, "B S K H"] | CachedLayer
    value: Shaped[Array, "B S K H2"] | CachedLayer
    logit: Logit | None
    mask_spec: MaskSpec


class Options(NamedTuple):
    """What is static in a call."""

    precision: Any
    with_entropy: bool
    softcap: float | None
    blocks: Blocks


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def few_queries_attention(options: Options, operands: FewQueries) -> tuple[Array, Array, Array]:
    """The `attend` of a backend, for a few queries."""
    return _forward(options, operands)


def _with_residuals(options: Options, operands: FewQueries):
    results = named(_forward(options, operands))
    return results, (operands, results)


def _gradient(options: Options, residuals, cotangents):
    operands, results = residuals

    def attend(operands):
        *arrays, logit, mask_spec = operands
        settings = options.precision, options.with_entropy, options.softcap
        return streaming_attention(*arrays, logit, None, mask_spec, *settings, final_rows=results)

    return jax.vjp(attend, operands)[1](cotangents)


few_queries_attention.defvjp(_with_residuals, _gradient)


class _Inputs(NamedTuple):
    """What the kernel reads: arrays or, within it, references to them."""

    query: Any
    """[B, K, R, H], with R filled up to whole blocks, as everywhere here."""
    key: Any
    """[B, S, K, H] or, of a cache, [L, B, K, S, H]."""
    value: Any
    factor: Any
    """[B, K, R]."""
    layer: Any
    """[1]: the layer of a cache."""
    reach: Any
    """[#B, 2]: the first block of keys that some query sees, and the one after the last."""
    of_queries: Any
    """[#B, R] each: positions, and what else a query has in common with the keys that it sees."""
    of_keys: Any
    """[#B, S] each."""
    table: Any
    """The logit by distance of each pair, [#N, #B, T, S]; or the parameters of one by positions, [N, P]."""


def _forward(options: Options, operands: FewQueries) -> tuple[Array, Array, Array]:
    query, factor, key, value, logit, mask_spec = operands
    (batch, length, heads, dim), (key_length, kv_heads), value_dim = query.shape, key.shape[1:3], value.shape[-1]
    rows, key_size = heads // kv_heads * length, options.blocks.keys
    size = min(options.blocks.queries, max(SMALLEST_DIM, pl.next_power_of_2(rows)))
    row_blocks, key_blocks = -(-rows // size), -(-key_length // key_size)
    parts = min(-(-PROGRAMS // (batch * kv_heads * row_blocks)), key_blocks)

    query_positions, key_positions = mask_spec.positions(length, key_length)
    mask_spec = dataclasses.replace(mask_spec, query_positions=query_positions, key_positions=key_positions)
    sizes = {"query_size": size, "key_size": key_size}
    call = Call.of(query, key, mask_spec, options.precision, options.with_entropy, options.softcap, logit, **sizes)
    tokens = tokens_of(call, mask_spec)

    def of_rows(x: Shaped[Array, "B N T *rest"]) -> Shaped[Array, "B K R *rest"]:
        x = x.reshape(batch, kv_heads, rows, *x.shape[3:])
        return jnp.pad(x, [(0, 0), (0, 0), (0, row_blocks * size - rows)] + [(0, 0)] * (x.ndim - 3))

    table = None
    if isinstance(logit, DistanceLogit):
        table = logit.values(query_positions[:, :, None] - key_positions[:, None, :])
    elif call.positional is not None:
        table = call.positional.numbers(logit, heads)
    inputs = _Inputs(
        query=of_rows(query.swapaxes(1, 2)),
        factor=of_rows(jnp.broadcast_to(factor, (batch, heads, length))),
        key=key.stack if isinstance(key, CachedLayer) else key,
        value=value.stack if isinstance(value, CachedLayer) else value,
        layer=jnp.asarray(key.index if isinstance(key, CachedLayer) else 0, jnp.int32).reshape(1),
        reach=_reach(mask_spec, length, key_length, key_size),
        of_queries=tuple(x[:, jnp.arange(row_blocks * size) % length] for x in tokens.of_queries),
        of_keys=tokens.of_keys,
        table=table,
    )
    arrays, structure = jax.tree.flatten(inputs)
    shape = parts, batch, kv_heads, row_blocks * size
    results = [jax.ShapeDtypeStruct(of, jnp.float32) for of in ((*shape, value_dim), shape, shape)]

    def attention_decoding(*references):
        program = _Program(call, operands, inputs, jax.tree.unflatten(structure, references[: len(arrays)]))
        program.run(parts, row_blocks, references[len(arrays) :])

    products = (dim + value_dim + call.logit_products()) * heads * length
    found = pl.pallas_call(
        attention_decoding,
        out_shape=results,
        grid=(parts, kv_heads * row_blocks, batch),
        in_specs=[_whole(x, any(x is matrix for matrix in inputs[:3])) for x in arrays],
        out_specs=[_whole(results[0], True), *map(_whole, results[1:])],
        compiler_params=plgpu.CompilerParams(num_warps=options.blocks.warps, num_stages=options.blocks.stages),
        interpret=call.interpret,
        name="attention_decoding",
        metadata={
            "flops": str(2 * products * batch * key_length),
            "bytes": str(batch * kv_heads * key_length * sum(x.shape[-1] * x.dtype.itemsize for x in (key, value))),
        },
    )(*arrays)
    merged = merged_parts(Rows(*found), options.with_entropy)
    output, entropy, logsumexp = (
        x[:, :, :rows].reshape(batch, heads, length, *x.shape[3:])
        for x in (merged.output, merged.entropy, merged.logsumexp)
    )
    return output.swapaxes(1, 2).astype(value.dtype), entropy, logsumexp


def _reach(mask_spec: MaskSpec, length: int, key_length: int, key_size: int) -> Int[Array, "#B 2"]:
    some = mask_spec.matrix(length, key_length).any((1, 2))
    index = jnp.arange(key_length, dtype=jnp.int32)
    first = jnp.where(some, index, key_length).min(1) // key_size
    stop = (jnp.where(some, index + 1, 0).max(1) + key_size - 1) // key_size
    return jnp.stack([first, stop], axis=1)


@dataclasses.dataclass(frozen=True)
class _Program:
    """One part of the keys, and a block of rows of one key/value head."""

    call: Call
    operands: FewQueries
    arrays: _Inputs
    own: _Inputs
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
        parameters = range(call.positional.size if call.positional else 0)
        numbers = [plgpu.load(own.table.at[head, p])[:, None] for p in parameters]  # not in a loop: see `Program.head`
        rows = lax.rem(row, call.query_length), head, numbers, [x[_row(x, b), at] for x in own.of_queries]
        factor = own.factor[b, c, at]

        def visit(j, sums):
            state, total = sums
            block = self._block(b, c, j, query, factor, rows)
            state, weights, decay = block.softmax(state)
            weights = weights.astype(block.value.dtype)
            added = block.over_keys(block.value, weights)
            if block.careful:  # as `weighted_sum`
                strange = jnp.where(jnp.isfinite(block.value.astype(jnp.float32)), 0.0, 1.0).astype(weights.dtype)
                reached = block.over_keys(strange, jnp.where(weights != 0, 1.0, 0.0).astype(weights.dtype)) > 0
                added = jnp.where(reached, added, block.over_keys(block.finite(block.value), weights))
            return state, decay * total + added

        zeros = jnp.zeros((call.query_size, 1), jnp.float32)
        state = SoftmaxState(zeros + MASKED / 2, zeros, zeros if call.with_entropy else None)
        total = jnp.zeros((call.query_size, padded_dim(self.operands.value.shape[-1])), jnp.float32)
        first, stop = (own.reach[_row(own.reach, b), end] for end in (0, 1))
        blocks = lax.div(stop - first + parts - 1, parts)
        low = first + part * blocks
        state, total = lax.fori_loop(low, jnp.minimum(low + blocks, stop), visit, (state, total))
        unknown = jnp.isnan(state.normaliser)  # on a GPU the maximum of a number and NaN is the number
        state = state._replace(largest=jnp.where(unknown, state.normaliser, state.largest))
        normaliser, entropy, logsumexp = state.end()
        mask = all_masks([_within(self.operands.value.shape[-1])], total.shape)
        plgpu.store(results[0].at[part, b, c, at, pl.ds(0, total.shape[1])], total / normaliser, mask=mask)
        results[1][part, b, c, at], results[2][part, b, c, at] = entropy[:, 0], logsumexp[:, 0]

    def _block(self, b: Any, c: Any, j: Any, query: Any, factor: Any, rows: Any) -> Block:
        call, own, (time, head, numbers, of_queries) = self.call, self.own, rows
        index = j * call.key_size + lax.iota(jnp.int32, call.key_size)
        within = index < call.key_length
        at = pl.ds(j * call.key_size, call.key_size)
        of_keys = [plgpu.load(x.at[_row(x, b), at], mask=within, other=0) for x in own.of_keys]
        alone, read = call.query_length == 1, within
        if alone:
            of_query = [x[_row(x, b), 0] for x in own.of_queries]
            read = call.visible(jnp.int32(0), index, 0, tuple(of_query), tuple(of_keys))
        query_side, key_side = tuple(x[:, None] for x in of_queries), tuple(x[None] for x in of_keys)
        visible = call.visible(time[:, None], index[None], 0, query_side, key_side)
        term = None
        if call.positional is not None:
            term = call.positional(numbers, query_side[0], key_side[0])
        elif own.table is not None:
            heads, batch = self.arrays.table.shape[:2]
            place = jnp.minimum(head, heads - 1)[:, None], jnp.minimum(b, batch - 1), time[:, None], index[None]
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
    return plgpu.load(reference[*place, pl.ds(0, padded_dim(dim))], mask=mask, other=None if mask is None else 0)


def _within(dim: int) -> Any:
    return None if dim == padded_dim(dim) else (lax.iota(jnp.int32, padded_dim(dim)) < dim)[None]


def _row(reference: Any, b: Any) -> Any:
    """The row of an array [#B, ...]."""
    return jnp.minimum(b, reference.shape[0] - 1)


def _whole(x: Any, is_matrix: bool = False) -> pl.BlockSpec:
    """All of an array, a matrix with its head dim filled up."""
    shape = (*x.shape[:-1], padded_dim(x.shape[-1])) if is_matrix else x.shape
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))
