"""Attention of a few queries against more keys, as in decoding.

The last axis of the grid runs over the blocks of keys of a key/value head; past the last visible block nothing is
fetched or computed. Unlike elsewhere in this package, a block of logits is [rows, keys], as there are few rows.

Shapes as in `decoding` of `pallas`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

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
from nope_jax.attention.backends.pallas.served import LANES, SUBLANES
from nope_jax.attention.backends.pallas.tpu.inputs import not_all_finite
from nope_jax.attention.blocks import CachedLayer, from_storage
from nope_jax.attention.softmax_state import SoftmaxState
from nope_jax.encodings.encoding import MASKED

MAX_KEYS = 2048
"""Keys per block, fewer with many rows or large heads. Not yet tuned on a TPU."""

MAX_LOGITS = 2**17
"""Logits per block."""

MAX_BYTES = 2**22
"""Of the keys and values of a block."""


def _key_size(operands: FewQueries) -> int:
    """Keys per block."""
    (_, length, heads, _), (_, _, kv_heads, _) = operands.query.shape, operands.key.shape
    per_key = sum(max(x.shape[-1], LANES) * x.dtype.itemsize for x in (operands.key, operands.value))
    most = min(MAX_KEYS, MAX_BYTES // per_key, MAX_LOGITS // (heads // kv_heads * length))
    longest = pl.next_power_of_2(operands.key.shape[1])
    return max(LANES, min(longest, 1 << (most.bit_length() - 1) if most else 0))


def _forward(options: Options, operands: FewQueries) -> tuple[Array, Array, Array]:
    (batch, length, heads, _), (key_length, kv_heads) = operands.query.shape, operands.key.shape[1:3]
    size = options.blocks or _key_size(operands)
    call, inputs = inputs_of(options, operands, SUBLANES, size)
    arrays = _laid_out(call, inputs)._replace(layer=None, reach=None)
    leaves, structure = jax.tree.flatten(arrays)
    *shape, _ = arrays.query.shape
    results = [jax.ShapeDtypeStruct((*shape, dim), jnp.float32) for dim in (operands.value.shape[-1], 1, 1)]

    def attention_decoding(layer, reach, *references):
        own, references = jax.tree.unflatten(structure, references[: len(leaves)]), references[len(leaves) :]
        out, sums = references[:3], references[3:]
        j, seen = _block_of(pl.program_id(0), pl.program_id(2), reach)

        @pl.when(pl.program_id(2) == 0)
        def _():
            for reference in sums:
                reference[...] = jnp.zeros(reference.shape, jnp.float32)
            sums[0][...] = jnp.full(sums[0].shape, MASKED / 2, jnp.float32)

        @pl.when(seen)
        def _():
            _visit(call, _block(call, operands, own, j), sums)

        @pl.when(pl.program_id(2) == call.key_blocks - 1)
        def _():
            largest, normaliser, weighted, total = (reference[...] for reference in sums)
            state = SoftmaxState(largest, normaliser, weighted if call.with_entropy else None)
            normaliser, entropy, logsumexp = state.end()
            for reference, x in zip(out, (total / normaliser, entropy, logsumexp), strict=True):
                reference[0, 0] = x

    operations, moved = cost(operands)
    output, entropy, logsumexp = pl.pallas_call(
        attention_decoding,
        out_shape=results,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, kv_heads, call.key_blocks),
            in_specs=jax.tree.leaves(_specs(call, arrays)),
            out_specs=[_of_rows(x) for x in results],
            scratch_shapes=[pltpu.VMEM((shape[2], dim), jnp.float32) for dim in (1, 1, 1, operands.value.shape[-1])],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=["parallel", "parallel", "arbitrary"]),
        cost_estimate=pl.CostEstimate(
            flops=operations, transcendentals=batch * length * heads * key_length, bytes_accessed=moved
        ),
        interpret=call.interpret,
        name="attention_decoding",
    )(inputs.layer, inputs.reach.reshape(-1), *leaves)
    return results_of(operands, output, entropy[..., 0], logsumexp[..., 0])


few_queries_attention = differentiable(_forward)


def _laid_out(call: Call, inputs: Inputs) -> Inputs:
    """Keys and values [L, B, K, S, H]; what belongs to rows as columns, [B, K, R, 1] and [#B, R, 1], what to keys as
    rows, [#B, 1, S]; the logit of each pair [#B, K, R, S]."""
    _, kv_heads, rows, _ = inputs.query.shape
    table = inputs.table
    if table is not None:
        table = jnp.broadcast_to(table, (len(table), kv_heads * call.groups, *table.shape[2:]))
        table = table.reshape(len(table), kv_heads, -1, table.shape[-1])
        table = jnp.pad(table, [(0, 0), (0, 0), (0, rows - table.shape[2]), (0, 0)])
    return inputs._replace(
        key=inputs.key if inputs.key.ndim == 5 else inputs.key.swapaxes(1, 2)[None],
        value=inputs.value if inputs.value.ndim == 5 else inputs.value.swapaxes(1, 2)[None],
        factor=inputs.factor[..., None],
        of_queries=tuple(x[:, :, None] for x in inputs.of_queries),
        of_keys=tuple(x[:, None] for x in inputs.of_keys),
        table=table,
    )


def _block_of(b: Any, step: Any, reach: Any) -> tuple[Any, Any]:
    """The block of keys of a step, and whether some query sees it. If none does, the last: so nothing is fetched."""
    first, stop = (reach[2 * jnp.minimum(b, reach.shape[0] // 2 - 1) + end] for end in (0, 1))
    return jnp.clip(first + step, 0, jnp.maximum(stop - 1, 0)), first + step < stop


def _specs(call: Call, arrays: Inputs) -> Inputs:
    def of_tokens(x: Array) -> pl.BlockSpec:  # [L, B, K, S, H]
        def place(b, c, step, layer, reach):
            return layer[0], b, c, _block_of(b, step, reach)[0], 0

        return pl.BlockSpec((1, 1, 1, call.key_size, x.shape[-1]), place)

    def of_queries(x: Array) -> pl.BlockSpec:  # [#B, R, 1]
        return pl.BlockSpec((1, *x.shape[1:]), lambda b, c, step, *_: (row_of(x, b), 0, 0))

    def of_keys(x: Array) -> pl.BlockSpec:  # [#B, 1, S]
        def place(b, c, step, layer, reach):
            return row_of(x, b), 0, _block_of(b, step, reach)[0]

        return pl.BlockSpec((1, 1, call.key_size), place)

    def of_table(x: Array) -> pl.BlockSpec:  # [#B, K, R, S]
        def place(b, c, step, layer, reach):
            return row_of(x, b), c, 0, _block_of(b, step, reach)[0]

        return pl.BlockSpec((1, 1, x.shape[2], call.key_size), place)

    return Inputs(
        query=_of_rows(arrays.query),
        key=of_tokens(arrays.key),
        value=of_tokens(arrays.value),
        factor=_of_rows(arrays.factor),
        layer=None,
        reach=None,
        of_queries=tuple(map(of_queries, arrays.of_queries)),
        of_keys=tuple(map(of_keys, arrays.of_keys)),
        table=None if arrays.table is None else of_table(arrays.table),
    )


def _of_rows(x: Any) -> pl.BlockSpec:
    """All rows of a key/value head, of an array [B, K, R, ...]."""
    return pl.BlockSpec((1, 1, *x.shape[2:]), lambda b, c, step, *_: (b, c, 0, 0))


def _block(call: Call, operands: FewQueries, own: Inputs, j: Any) -> Block:
    rows = own.query.shape[2]
    index = j * call.key_size + lax.broadcasted_iota(jnp.int32, (1, call.key_size), 1)
    of_queries, of_keys = (tuple(x[0] for x in tokens) for tokens in (own.of_queries, own.of_keys))

    def tokens(reference: Any, x: Any) -> Any:
        found = reference[0, 0, 0]
        return from_storage(found, x.dtype) if isinstance(x, CachedLayer) else found

    return Block(
        call,
        keys_first=False,
        query=own.query[0, 0],
        key=tokens(own.key, operands.key),
        value=tokens(own.value, operands.value),
        factor=own.factor[0, 0],
        visible=call.visible(jnp.zeros((rows, 1), jnp.int32), index, 0, of_queries, of_keys),
        careful=True,
        term=None if own.table is None else own.table[0, 0],
    )


def _visit(call: Call, block: Block, sums: Any) -> None:
    """Add a block of keys to the largest logit, the normaliser, the weighted sum of logits, and that of values."""
    largest, normaliser, weighted, total = sums
    state = SoftmaxState(largest[...], normaliser[...], weighted[...] if call.with_entropy else None)
    state, weights, decay = block.softmax(state)
    largest[...], normaliser[...] = state.largest, state.normaliser
    if state.weighted is not None:
        weighted[...] = state.weighted
    weights = weights.astype(block.value.dtype)
    kept, added = decay * total[...], block.over_keys(block.value, weights)
    total[...] = kept + added

    @pl.when(not_all_finite(added))
    def _():
        total[...] = kept + block.with_care(added, weights)
