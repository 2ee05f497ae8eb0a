"""The kernels of the forward and the backward pass.

Shapes as in `pallas`, with q = k.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Shaped

from nope_jax.attention.backends.pallas.block import Block
from nope_jax.attention.backends.pallas.call import Call, Operands, Tokens, tokens_of
from nope_jax.attention.backends.pallas.decoding import FewQueries, Options
from nope_jax.attention.backends.pallas.gradient import differentiable
from nope_jax.attention.backends.pallas.pairwise import features_of
from nope_jax.attention.backends.pallas.served import LANES, has_vectors, is_decoding
from nope_jax.attention.backends.pallas.tpu.decoding import few_queries_attention
from nope_jax.attention.backends.pallas.tpu.inputs import filled, filled_tokens, not_all_finite
from nope_jax.attention.backends.pallas.tpu.terms import Totals, table_of
from nope_jax.attention.backends.pallas.tpu.vectors import of_tables
from nope_jax.attention.backends.pallas.tpu.walk import (
    Output,
    along_diagonals,
    along_keys,
    along_queries,
    of_keys,
    of_queries,
    run,
)
from nope_jax.attention.backends.pallas.vectors import ASCENDING, Vectors, VectorTerm, tables_of, vector_products
from nope_jax.attention.blocks import CachedLayer, whole
from nope_jax.attention.mask_spec import MaskSpec
from nope_jax.attention.nonfinite import finite
from nope_jax.attention.softmax_state import SoftmaxState, row_terms
from nope_jax.encodings import BlockValue
from nope_jax.encodings.encoding import MASKED, Logit

BLOCK_SIZE = 512
"""Queries and keys per block, fewer for short sequences. From the compiler's memory limits: not yet tuned on a TPU."""

WIDE_VECTORS = 128
"""The head dim above which blocks are half as large, for terms of one vector per distance."""


def pallas_tpu_attention(
    query: Shaped[Array, "B T N H"],
    factor: Float[Array, "#B #N T"],
    key: Shaped[Array, "B S K H"] | CachedLayer,
    value: Shaped[Array, "B S K H2"] | CachedLayer,
    logit: Logit | None,
    value_term: BlockValue | None,
    mask_spec: MaskSpec,
    precision: jax.lax.PrecisionLike = None,
    with_entropy: bool = True,
    softcap: float | None = None,
    *,
    block_size: int | None = None,
    final_rows: tuple[Array, Array, Array] | None = None,
) -> tuple[Array, Array, Array]:
    """The `attend` of a backend with `in_parts`; reverse-mode differentiable.

    Args:
        key, value: Arrays or, where `is_decoding`, layers of a KV cache.
        block_size: Queries and keys per block: a power of two, on a TPU at least 128. None: `BLOCK_SIZE`, or the
            smallest that holds the whole sequence, and half of it at most for wide vectors per distance; in decoding,
            as many keys as fit.
    """
    if final_rows is None and is_decoding(query.shape[1], key.shape[1]):
        options = Options(precision, with_entropy, softcap, block_size)
        return few_queries_attention(options, FewQueries(query, factor, key, value, logit, mask_spec))
    key, value = whole(key), whole(value)
    (batch, query_length, num_heads, _), key_length = query.shape, key.shape[1]
    if block_size is None:
        longest, vectors = max(query_length, key_length), has_vectors(logit) or value_term is not None
        largest = BLOCK_SIZE // 2 if vectors and max(query.shape[3], value.shape[3]) > WIDE_VECTORS else BLOCK_SIZE
        block_size = min(largest, max(LANES, 1 << (longest - 1).bit_length()))
    sizes = {"query_size": block_size, "key_size": block_size}
    call = Call.of(query, key, mask_spec, precision, with_entropy, softcap, logit, **sizes)
    tokens = filled_tokens(call, tokens_of(call, mask_spec))

    def heads_first(x: Array) -> Array:
        return filled(x.swapaxes(1, 2), 2, block_size)

    def of_rows(x: Array, fill: float = 0) -> Array:
        return filled(x[:, :, None], 3, block_size, fill)

    query_features, key_features = features_of(logit, batch, num_heads)
    span = call.key_blocks * block_size, call.query_blocks * block_size
    operands = Operands(
        query=heads_first(query),
        factor=of_rows(jnp.broadcast_to(factor, (batch, num_heads, query_length))),
        key=heads_first(key),
        value=heads_first(value),
        table=table_of(call, logit, tokens, num_heads),
        query_features=tuple(map(of_rows, query_features)),
        key_features=tuple(map(of_rows, key_features)),
        vectors=tables_of(call, query, value, logit, value_term, tokens, *span),
    )
    if final_rows is None:
        out, entropy, logsumexp = _attend(call, operands, tokens)
    else:
        out, entropy, logsumexp = final_rows
        rows = heads_first(out), of_rows(entropy), of_rows(logsumexp, -jnp.inf)  # padding sees no key
        out, entropy, logsumexp = _attend_part(call, operands, tokens, rows)
    out = out.swapaxes(1, 2)[:, :query_length]
    return out, entropy[:, :, 0, :query_length], logsumexp[:, :, 0, :query_length]


def _forward(call: Call, operands: Operands, tokens: Tokens) -> tuple[Array, Array, Array]:
    (batch, heads, length, dim), value_dim = operands.query.shape, operands.value.shape[-1]

    def begin(indices, results, sums):
        sums[0][...] = jnp.full(sums[0].shape, MASKED / 2, jnp.float32)

    def visit(block: Block, term, results, sums):
        largest, normaliser, weighted, output = sums
        state, weights, decay = block.softmax(
            SoftmaxState(largest[...], normaliser[...], weighted[...] if call.with_entropy else None)
        )
        largest[...], normaliser[...] = state.largest, state.normaliser
        if state.weighted is not None:
            weighted[...] = state.weighted
        kept = decay * output[...]
        if block.value_term is not None:
            kept += block.value_term.output(weights)
        weights = weights.astype(block.value.dtype)
        added = block.over_keys(block.value, weights)
        output[...] = kept + added
        if block.careful:

            @pl.when(not_all_finite(added))
            def _():
                output[...] = kept + block.with_care(added, weights)

    def end(results, sums):
        largest, normaliser, weighted, output = (reference[...] for reference in sums)
        state = SoftmaxState(largest, normaliser, weighted if call.with_entropy else None)
        normaliser, entropy, logsumexp = state.end()
        results[0][0, 0] = (output / normaliser).T.astype(results[0].dtype)
        results[1][0, 0], results[2][0, 0] = entropy, logsumexp

    of_rows = of_queries(call, (batch, heads, 1, length), jnp.float32)
    output, entropy, logsumexp = run(
        "attention_forward",
        call,
        along_keys(call, batch, heads),
        operands,
        tokens,
        (),
        (of_queries(call, (batch, heads, length, value_dim), operands.value.dtype), of_rows, of_rows),
        ((1, call.query_size),) * 3 + ((value_dim, call.query_size),),
        begin=begin,
        visit=visit,
        end=end,
        products=dim + value_dim + call.logit_products() + vector_products(operands.vectors),
    )
    return output, entropy, logsumexp


def _backward(call: Call, operands: Operands, tokens: Tokens, results, cotangents) -> Operands:
    (output, entropy, logsumexp), (d_output, d_entropy, d_logsumexp) = results, cotangents
    projected = (output.astype(jnp.float32) * d_output.astype(jnp.float32)).sum(-1)[:, :, None]
    row_term, logsumexp = row_terms(projected, entropy, logsumexp, d_entropy, d_logsumexp, call.with_entropy)
    rows = d_output, row_term, logsumexp, d_entropy
    d_scaled, d_factor, d_table, d_query_features, d_key_features = _query_gradient(call, operands, tokens, rows)
    d_key, d_value = _key_gradients(call, operands, tokens, rows)
    return Operands(
        query=(d_scaled * operands.factor.swapaxes(2, 3)).astype(operands.query.dtype),
        factor=d_factor + (d_scaled * finite(operands.query)).sum(-1)[:, :, None],
        key=d_key,
        value=d_value,
        table=d_table,
        query_features=d_query_features,
        key_features=d_key_features,
        vectors=None if operands.vectors is None else _vector_gradients(call, operands, tokens, rows),
    )


_attend, _attend_part = differentiable(_forward, _backward)


def _query_gradient(call: Call, operands: Operands, tokens: Tokens, rows: tuple[Array, ...]) -> tuple[Any, ...]:
    """Gradients of the queries times their factor, of a factor of more than queries, of the table and the features."""
    (batch, heads, _, dim), value_dim = operands.query.shape, operands.value.shape[-1]
    table, product_dtype = operands.table, jnp.promote_types(operands.query.dtype, operands.key.dtype)

    def whole_head(*shape: int) -> Output:  # which stays in memory for all queries, and a table for all batch rows
        if len(shape) == 3:
            return Output(shape, jnp.float32, (1, *shape[1:]), lambda b, n, i, j: (n, 0, 0))
        return Output(shape, jnp.float32, (1, 1, *shape[2:]), lambda b, n, i, j: (b, n, 0, 0))

    gradients = Totals(
        table=None if table is None else whole_head(heads, *table.shape[1:]),
        query_features=tuple(of_queries(call, x.shape, x.dtype) for x in operands.query_features),
        key_features=tuple(whole_head(*x.shape) for x in operands.key_features),
    )
    outputs, structure = jax.tree.flatten(gradients)
    has_factor = operands.vectors is not None and operands.vectors.has_factor
    own = 1 + has_factor

    def begin(indices, results, sums):
        totals = jax.tree.unflatten(structure, results[own:])
        first_query = indices[2] == 0
        for of_term, first in (
            (totals.table, first_query & (indices[1] == 0)),
            (totals.key_features, first_query),
            (totals.query_features, True),
        ):

            @pl.when(first)
            def _(of_term=of_term):
                for reference in jax.tree.leaves(of_term):
                    reference[...] = jnp.zeros(reference.shape, jnp.float32)

    def visit(block: Block, term, results, sums):
        _, d_logits, d_product = block.gradients()
        sums[0][...] += block.over_keys(block.finite(block.key), d_product.astype(product_dtype))
        if isinstance(term, VectorTerm):
            sums[0][...] += term.query_gradient(d_logits)
            if has_factor:
                sums[1][...] += term.factor_gradient(d_logits)
        elif term is not None:
            term.add_gradient(d_logits, jax.tree.unflatten(structure, results[own:]))

    def end(results, sums):
        results[0][0, 0] = sums[0][...].T
        if has_factor:
            results[1][0, 0] = sums[1][...]

    d_factor = (of_queries(call, operands.factor.shape, jnp.float32),) * has_factor
    d_scaled, *found = run(
        "attention_query_gradient",
        call,
        along_keys(call, batch, heads, heads_first=bool(outputs)),
        operands,
        tokens,
        rows,
        (of_queries(call, operands.query.shape, jnp.float32), *d_factor, *outputs),
        ((dim, call.query_size), *((1, call.query_size),) * has_factor),
        begin=begin,
        visit=visit,
        end=end,
        products=2 * dim + value_dim + call.logit_products(gradient=True) + vector_products(operands.vectors, "query"),
    )
    totals = jax.tree.unflatten(structure, found[has_factor:])
    if table is not None and len(table) == 1:
        totals = totals._replace(table=totals.table.sum(0, keepdims=True))
    return d_scaled, found[0] if has_factor else 0.0, *totals


def _key_gradients(
    call: Call, operands: Operands, tokens: Tokens, rows: tuple[Array, ...]
) -> tuple[Shaped[Array, "B K S H"], Shaped[Array, "B K S H2"]]:
    """Gradients of keys and values."""
    (batch, kv_heads, _, dim), value_dim = operands.key.shape, operands.value.shape[-1]
    product_dtype = jnp.promote_types(operands.query.dtype, operands.key.dtype)

    def visit(block: Block, term, results, sums):
        weights, d_logits, d_product = block.gradients()
        d_output = block.rows[0]
        d_product = (d_product * block.factor).astype(product_dtype)
        sums[0][...] += block.over_queries(block.finite(block.query), d_product)
        sums[1][...] += block.over_queries(d_output, weights.astype(d_output.dtype))
        if isinstance(term, VectorTerm) and term.vectors.tables.key is not None:
            sums[0][...] += term.key_gradient(d_logits)

    def end(results, sums):
        for result, total in zip(results, sums, strict=True):
            result[0, 0] = total[...].astype(result.dtype)

    d_key, d_value = run(
        "attention_key_gradients",
        call,
        along_queries(call, batch, kv_heads),
        operands,
        tokens,
        rows,
        tuple(of_keys(call, x.shape, x.dtype) for x in (operands.key, operands.value)),
        ((call.key_size, dim), (call.key_size, value_dim)),
        visit=visit,
        end=end,
        products=2 * dim + 2 * value_dim + call.logit_products() + vector_products(operands.vectors, "key"),
    )
    return d_key, d_value


def _vector_gradients(call: Call, operands: Operands, tokens: Tokens, rows: tuple[Array, ...]) -> Vectors:
    """Gradients of the tables of vectors."""
    (batch, heads, _, dim), value_dim, size = operands.query.shape, operands.value.shape[-1], 2 * call.key_size
    tables, shared = operands.vectors, all(len(x) == 1 for x in jax.tree.leaves(operands.vectors))
    diagonals = call.query_blocks + call.key_blocks - 1

    def output(table: Array, ascending: bool) -> Output:
        block = (1, size) if table.shape[1] == 1 else (size, table.shape[2])

        def place(b, n, i, j):
            return 0 if shared else n, i - j + call.key_blocks - 1 if ascending else call.query_blocks - 1 - i + j, 0, 0

        return Output((1 if shared else heads, diagonals, *block), jnp.float32, (1, 1, *block), place)

    outputs = Vectors(*(None if x is None else output(x, up) for x, up in zip(tables, ASCENDING, strict=True)))
    wanted, structure = jax.tree.flatten(outputs)

    def visit(block: Block, term, results, sums):
        weights, d_logits, _ = block.gradients()
        names = (name for name, x in tables._asdict().items() if x is not None)
        for name, total in zip(names, sums, strict=True):
            if name == "value":
                total[...] += block.value_term.vector_gradient(weights, block.rows[0])
            else:
                total[...] += term.vector_gradient(name, d_logits)

    def end(results, sums):
        for result, total in zip(results, sums, strict=True):
            result[0, 0] = total[...]

    found = run(
        "attention_vector_gradients",
        call,
        along_diagonals(call, batch, heads, add_heads=shared),
        operands,
        tokens,
        rows,
        tuple(wanted),
        tuple(x.block[2:] for x in wanted),
        visit=visit,
        end=end,
        products=dim + value_dim + vector_products(tables, "query", "key", "value"),
    )
    return of_tables(jax.tree.unflatten(structure, found), tables)
