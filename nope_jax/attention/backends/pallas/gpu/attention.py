"""The kernels of the forward and the backward pass.

Shapes as in `pallas`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from nope_jax.attention.backends.diagonals import unshear
from nope_jax.attention.backends.pallas.call import Call, Operands, Tokens, tokens_of
from nope_jax.attention.backends.pallas.decoding import FewQueries, Options
from nope_jax.attention.backends.pallas.gpu.decoding import few_queries_attention
from nope_jax.attention.backends.pallas.gpu.sizes import Blocks, Sizes, sizes_for
from nope_jax.attention.backends.pallas.gpu.spans import Span, padded_dim, padded_length
from nope_jax.attention.backends.pallas.gpu.tiles import PROGRAMS, Kernel, Program, run
from nope_jax.attention.backends.pallas.gradient import differentiable
from nope_jax.attention.backends.pallas.pairwise import Pairwise, features_of
from nope_jax.attention.backends.pallas.served import has_vectors, is_decoding
from nope_jax.attention.backends.pallas.vectors import ASCENDING, Vectors, of_diagonals, tables_of, vector_products
from nope_jax.attention.blocks import CachedLayer, whole
from nope_jax.attention.mask_spec import MaskSpec
from nope_jax.attention.nonfinite import finite
from nope_jax.attention.softmax_state import SoftmaxState, row_terms
from nope_jax.encodings import BlockValue, DistanceLogit
from nope_jax.encodings.encoding import MASKED, Logit


class Kernels(NamedTuple):
    """The kernels of a call."""

    forward: Kernel
    query_gradient: Kernel
    key_gradients: Kernel
    table_gradient: Kernel
    parameter_gradient: Kernel
    vector_gradients: Vectors
    """A kernel for each table."""


def pallas_gpu_attention(
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
    sizes: Sizes | None = None,
    final_rows: tuple[Array, Array, Array] | None = None,
) -> tuple[Array, Array, Array]:
    """The `attend` of a backend with `in_parts`; reverse-mode differentiable.

    Args:
        key, value: Arrays or, where `is_decoding`, layers of a KV cache.
        sizes: The sizes of blocks: powers of two, on a GPU at least 16, as many queries as keys for the table's
            gradient and with vectors per distance. None: `sizes_for` the head dim.
    """
    if sizes is None:
        widest, itemsize = max(query.shape[-1], value.shape[-1]), max(x.dtype.itemsize for x in (query, key, value))
        sizes = sizes_for(padded_dim(widest), itemsize)
    if final_rows is None and is_decoding(query.shape[1], key.shape[1]):
        options = Options(precision, with_entropy, softcap, sizes.decoding)
        return few_queries_attention(options, FewQueries(query, factor, key, value, logit, mask_spec))
    key, value = whole(key), whole(value)
    if value_term is not None or has_vectors(logit):
        sizes = sizes.of_vectors

    def kernel(name: str, blocks: Blocks, keys_first: bool = False) -> Kernel:
        size = {"query_size": blocks.queries, "key_size": blocks.keys}
        call = Call.of(query, key, mask_spec, precision, with_entropy, softcap, logit, **size)
        return Kernel(name, call, blocks, keys_first)

    kernels = Kernels(
        kernel("attention_forward", sizes.forward),
        kernel("attention_query_gradient", sizes.query_gradient),
        kernel("attention_key_gradients", sizes.key_gradients, keys_first=True),
        kernel("attention_table_gradient", sizes.table_gradient),
        kernel("attention_parameter_gradient", sizes.table_gradient),
        Vectors(*(kernel("attention_vector_gradient", sizes.table_gradient, keys_first=up) for up in ASCENDING)),
    )
    call = kernels.forward.call
    tokens = tokens_of(call, mask_spec)
    table, (before, after) = None, (padded_length(call.key_length), padded_length(call.query_length))
    if isinstance(logit, DistanceLogit):
        table = logit.values(tokens.offset[0] + jnp.arange(-before, after, dtype=jnp.int32))
    elif call.pairwise is not None:
        table = call.pairwise.numbers(logit, query.shape[2])
    factor = jnp.broadcast_to(factor, (len(query), query.shape[2], query.shape[1]))
    features = features_of(logit, len(query), query.shape[2])
    vectors = tables_of(call, query, value, logit, value_term, tokens, before, after)
    operands = Operands(query, factor, key, value, table, *features, vectors)
    if final_rows is not None:
        return _attend_part(kernels, operands, tokens, final_rows)
    return _attend(kernels, operands, tokens)


def _forward(kernels: Kernels, operands: Operands, tokens: Tokens) -> tuple[Array, Array, Array]:
    kernel, call = kernels.forward, kernels.forward.call
    (batch, length, heads, dim), value_dim = operands.query.shape, operands.value.shape[-1]
    output = jax.ShapeDtypeStruct((batch, length, heads, value_dim), operands.value.dtype)
    of_rows = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)

    def body(program: Program, results):
        i, n, b = program.indices
        queries, head = program.queries(b, n, i), program.head(n)

        def visit(j, masked, sums):
            block = program.block(queries, program.keys(b, n, j), head, masked)
            state, total, reached = sums
            state, weights, decay = block.softmax(state)
            if program.careful:
                strange = jnp.where(jnp.isfinite(block.value.astype(jnp.float32)), 0, 1).max(1)
                reached = jnp.maximum(reached, jnp.where(weights > 0, strange[None], 0).max(1))
            total *= decay
            if block.value_term is not None:
                total += block.value_term.output(weights)
            added = block.over_keys(block.finite(block.value), weights.astype(block.value.dtype))
            return state, total + added, reached

        zeros = jnp.zeros((call.query_size, 1), jnp.float32)
        state = SoftmaxState(zeros + MASKED / 2, zeros, zeros if call.with_entropy else None)
        total = jnp.zeros((call.query_size, padded_dim(value_dim)), jnp.float32)
        reached = jnp.zeros(call.query_size, jnp.int32) if program.careful else None
        state, total, reached = program.fold_keys(i, visit, (state, total, reached))
        program.check(total)
        # On a GPU the maximum of a number and NaN is the number; the normaliser tells.
        unknown = jnp.isnan(state.normaliser)
        state = state._replace(largest=jnp.where(unknown, state.normaliser, state.largest))
        normaliser, entropy, logsumexp = state.end()
        at = Span(i * call.query_size, call.query_size, call.query_length)
        # As `weighted_sum`: values that are not finite reach the queries that see them, and no others.
        kept = None if reached is None else reached == 0
        program.store_matrix(at, output, results[0], b, n, total / normaliser, rows=kept)
        program.store_vector(at, results[1], b, n, entropy[:, 0])
        program.store_vector(at, results[2], b, n, logsumexp[:, 0])

    grid, outputs = (call.query_blocks, heads, batch), (output, of_rows, of_rows)
    products = dim + value_dim + call.logit_products() + vector_products(operands.vectors)
    found, entropy, logsumexp = run(kernel, grid, body, operands, tokens, (), outputs, products=products)
    return found, entropy, logsumexp


def _backward(kernels: Kernels, operands: Operands, tokens: Tokens, results, cotangents) -> Operands:
    (output, entropy, logsumexp), (d_output, d_entropy, d_logsumexp) = results, cotangents
    projected = jnp.einsum("btnh,btnh->bnt", *(x.astype(jnp.float32) for x in (output, d_output)))
    call = kernels.forward.call
    row_term, logsumexp = row_terms(projected, entropy, logsumexp, d_entropy, d_logsumexp, call.with_entropy)
    rows = d_output, row_term, logsumexp, d_entropy
    d_query, d_factor, *d_query_features = _query_gradient(kernels.query_gradient, operands, tokens, rows)
    d_key, d_value, *d_key_features = _key_gradients(kernels.key_gradients, operands, tokens, rows)
    d_table, table = None, operands.table
    if table is not None and call.pairwise is not None:
        d_table = _parameter_gradient(kernels.parameter_gradient, call.pairwise, operands, tokens, rows)
    elif table is not None:
        d_table = _table_gradient(kernels.table_gradient, table, operands, tokens, rows)
    d_vectors = None
    if operands.vectors is not None:
        d_vectors = _vector_gradients(kernels.vector_gradients, operands, tokens, rows)
    d_features = tuple(d_query_features), tuple(d_key_features)
    return Operands(d_query, d_factor, d_key, d_value, d_table, *d_features, d_vectors)


def _query_gradient(kernel: Kernel, operands: Operands, tokens: Tokens, rows: tuple[Array, ...]) -> list[Array]:
    """Gradients of the queries, of their factor and of their features."""
    call, (query, factor, key, value, _, features, _, vectors) = kernel.call, operands
    (batch, _, heads, dim), value_dim = query.shape, value.shape[-1]
    product_dtype = jnp.promote_types(query.dtype, key.dtype)
    has_term = vectors is not None and vectors.in_logit
    has_factor = vectors is not None and vectors.has_factor

    def body(program: Program, results):
        i, n, b = program.indices
        queries, head = program.queries(b, n, i), program.head(n)

        def visit(j, masked, sums):
            d_scaled, d_own, d_features = sums
            keys = program.keys(b, n, j)
            block = program.block(queries, keys, head, masked)
            _, d_logits, d_product = block.gradients()
            if has_term:
                term = program.vector_term(queries, keys, head, careful=program.careful)
                d_scaled += term.query_gradient(d_logits)
                d_own = d_own + term.factor_gradient(d_logits) if has_factor else None
            if features:
                _, found, _ = program.term_gradient(queries, keys, head, d_logits)
                d_features = tuple(total + x for total, x in zip(d_features, found, strict=True))
            d_scaled += block.over_keys(block.finite(block.key), d_product.astype(product_dtype))
            return d_scaled, d_own, d_features

        zeros = jnp.zeros((call.query_size, padded_dim(dim)), jnp.float32)
        of_rows = jnp.zeros((call.query_size, 1), jnp.float32)
        sums = zeros, of_rows if has_factor else None, (of_rows,) * len(features)
        d_scaled, d_own, d_features = sums = program.fold_keys(i, visit, sums)
        program.check(sums)
        at = Span(i * call.query_size, call.query_size, call.query_length)
        program.store_matrix(at, query, results[0], b, n, d_scaled * queries.vectors[0][:, None])
        of_query = queries.matrices[0].astype(jnp.float32)
        d_factor = (d_scaled * finite(of_query)).sum(1)
        program.store_vector(at, results[1], b, n, d_factor + d_own[:, 0] if has_factor else d_factor)
        for result, d_feature in zip(results[2:], d_features, strict=False):
            program.store_vector(at, result, b, n, d_feature[:, 0])

    grid, outputs = (call.query_blocks, heads, batch), tuple(map(_like, (query, factor, *features)))
    products = 2 * dim + value_dim + call.logit_products(gradient=bool(features)) + vector_products(vectors, "query")
    return run(kernel, grid, body, operands, tokens, rows, outputs, products=products)


def _key_gradients(kernel: Kernel, operands: Operands, tokens: Tokens, rows: tuple[Array, ...]) -> list[Array]:
    """Gradients of keys and values, and of the features of keys."""
    call, (query, _, key, value, _, _, features, vectors) = kernel.call, operands
    (batch, _, kv_heads, dim), value_dim = key.shape, value.shape[-1]
    product_dtype = jnp.promote_types(query.dtype, key.dtype)

    def body(program: Program, results):
        j, c, b = program.indices
        of_group = program.keys(b, c * call.groups, j)
        at = Span(j * call.key_size, call.key_size, call.key_length)

        def of_head(group, sums):
            n = c * call.groups + group
            head, keys = program.head(n), program.of_head(of_group, b, n, j)

            def visit(i, masked, sums):
                d_key, d_value, d_features = sums
                queries = program.queries(b, n, i)
                block = program.block(queries, keys, head, masked)
                weights, d_logits, d_product = block.gradients()
                if features:
                    _, _, found = program.term_gradient(queries, keys, head, d_logits)
                    d_features = tuple(total + x for total, x in zip(d_features, found, strict=True))
                d_output = block.rows[0]
                d_product = (d_product * block.factor).astype(product_dtype)
                d_key += block.over_queries(block.finite(block.query), d_product)
                if vectors is not None and vectors.key is not None:
                    d_key += program.vector_term(queries, keys, head, careful=program.careful).key_gradient(d_logits)
                d_value += block.over_queries(d_output, weights.astype(d_output.dtype))
                return d_key, d_value, d_features

            zeros = tuple(jnp.zeros((call.key_size, 1), jnp.float32) for _ in features)
            *sums, d_features = program.fold_queries(j, visit, (*sums, zeros))
            for result, d_feature in zip(results[2:], d_features, strict=False):
                program.store_vector(at, result, b, n, d_feature[:, 0])
            return tuple(sums)

        sums = tuple(jnp.zeros((call.key_size, padded_dim(size)), jnp.float32) for size in (dim, value_dim))
        sums = lax.fori_loop(0, call.groups, of_head, sums) if call.groups > 1 else of_head(0, sums)
        program.check(sums)
        program.store_matrix(at, key, results[0], b, c, sums[0])
        program.store_matrix(at, value, results[1], b, c, sums[1])

    grid, outputs = (call.key_blocks, kv_heads, batch), tuple(map(_like, (key, value, *features)))
    products = 2 * dim + 2 * value_dim + call.logit_products(gradient=bool(features)) + vector_products(vectors, "key")
    return run(kernel, grid, body, operands, tokens, rows, outputs, products=products)


def _table_gradient(
    kernel: Kernel, table: Array, operands: Operands, tokens: Tokens, rows: tuple[Array, ...]
) -> Float[Array, "#N distances"]:
    """Gradient of the table, by diagonals: of all blocks with the same i - j, the sum over them and then along it."""
    call, query, value = kernel.call, operands.query, operands.value
    size, diagonals = call.query_size, call.query_blocks + call.key_blocks - 1
    (batch, _, heads, dim), value_dim = query.shape, value.shape[-1]
    parts = min(batch, -(-PROGRAMS // (heads * diagonals)))

    def body(program: Program, results):
        place, n, part = program.indices
        diagonal, head = place - (call.key_blocks - 1), program.head(n)

        def visit_row(step, total):
            b = part + step * parts

            def visit(i, total):
                block = program.block(program.queries(b, n, i), program.keys(b, n, i - diagonal), head, masked=True)
                return total + block.gradients()[1]

            return lax.fori_loop(*_blocks_on(call, diagonal, program.offset), visit, total)

        rows_of_part = lax.div(batch - part + parts - 1, parts)
        total = lax.fori_loop(0, rows_of_part, visit_row, jnp.zeros((size, size), jnp.float32))
        results[0][part, n, place] = total

    sums = jax.ShapeDtypeStruct((parts, heads, diagonals, size, size), jnp.float32)
    grid, products = (diagonals, heads, parts), dim + value_dim
    (found,) = run(kernel, grid, body, operands, tokens, rows, (sums,), products=products, checked=False)
    # Along a diagonal lie distances -(size - 1)..size - 1 from that of its first pair; each overlaps the next by half.
    by_key = found.sum(0).reshape(-1, size, size).swapaxes(1, 2)
    along = unshear(by_key).reshape(heads, diagonals, 2 * size - 1)
    below, above = jnp.split(jnp.pad(along, ((0, 0), (0, 0), (1, 0))), 2, axis=2)
    by_distance = jnp.pad(below, ((0, 0), (0, 1), (0, 0))) + jnp.pad(above, ((0, 0), (1, 0), (0, 0)))
    before = padded_length(call.key_length) - call.key_blocks * size
    after = padded_length(call.query_length) - call.query_blocks * size
    by_distance = jnp.pad(by_distance.reshape(heads, -1), ((0, 0), (before, after)))
    return by_distance.sum(0, keepdims=True) if len(table) == 1 else by_distance


def _vector_gradients(kernels: Vectors, operands: Operands, tokens: Tokens, rows: tuple[Array, ...]) -> Vectors:
    """Gradients of the tables of vectors, each by a kernel that is dropped where nobody asks for it."""
    found = {
        name: _vector_gradient(getattr(kernels, name), name, table, operands, tokens, rows)
        for name, table in operands.vectors._asdict().items()
        if table is not None
    }
    return Vectors(**found)


def _vector_gradient(
    kernel: Kernel, name: str, table: Array, operands: Operands, tokens: Tokens, rows: tuple[Array, ...]
) -> Float[Array, "#N rows columns"]:
    """Gradient of one table, by diagonals: all blocks with the same i - j meet the same vectors."""
    call, query, value, size = kernel.call, operands.query, operands.value, 2 * kernel.call.key_size
    (batch, _, heads, dim), value_dim = query.shape, value.shape[-1]
    diagonals, in_row = call.query_blocks + call.key_blocks - 1, table.shape[1] == 1
    width = size if in_row else table.shape[2]
    # What is added up before it is written: the rows of a batch, and the heads that share a table.
    tables, added = (1, heads * batch) if len(table) == 1 else (heads, batch)
    parts = min(added, -(-PROGRAMS // (tables * diagonals)))
    block = (1, size) if in_row else (size, padded_dim(width))

    def body(program: Program, results):
        place, own, part = program.indices
        diagonal = place - (call.key_blocks - 1)

        def visit_row(step, total):
            row = part + step * parts
            b, n = lax.rem(row, batch), own + lax.div(row, batch)
            head = program.head(n)

            def visit(i, total):
                queries, keys = program.queries(b, n, i), program.keys(b, n, i - diagonal)
                block = program.block(queries, keys, head, masked=True)
                if name == "value":
                    return total + block.value_term.vector_gradient(block.weights(), block.rows[0])
                term = program.vector_term(queries, keys, head, careful=True)
                return total + term.vector_gradient(name, block.gradients()[1])

            return lax.fori_loop(*_blocks_on(call, diagonal, program.offset), visit, total)

        rows_of_part = lax.div(added - part + parts - 1, parts)
        total = lax.fori_loop(0, rows_of_part, visit_row, jnp.zeros(block, jnp.float32))
        results[0][part, own, place] = total

    sums = jax.ShapeDtypeStruct((parts, tables, diagonals, *block), jnp.float32)
    products = dim + value_dim + vector_products(operands.vectors, name)
    grid = diagonals, tables, parts
    (found,) = run(kernel, grid, body, operands, tokens, rows, (sums,), products=products, checked=False)
    before = padded_length(call.key_length) - call.key_blocks * call.key_size
    after = padded_length(call.query_length) - call.query_blocks * call.query_size
    found = found.sum(0)[..., :width]
    if not getattr(ASCENDING, name):
        found, before, after = found[:, ::-1], after, before
    axis = 2 if in_row else 1
    lower, upper = jnp.split(found, 2, axis=axis + 1)
    padding = [(before, after) if each == axis else (0, 0) for each in range(3)]
    return jnp.pad(of_diagonals(lower, upper, table), padding)


def _blocks_on(call: Call, diagonal: Any, offset: Any) -> tuple[Any, Any]:
    """The first block of queries on a diagonal and the last plus 1; none where no key is seen, as then on all of it."""
    first, stop = jnp.maximum(diagonal, 0), jnp.minimum(call.query_blocks, call.key_blocks + diagonal)
    low, high = call.keys_of(first, offset)
    meets = (low <= first - diagonal) & (first - diagonal <= high)
    return first, jnp.where(meets, stop, first)


def _parameter_gradient(
    kernel: Kernel, pairwise: Pairwise, operands: Operands, tokens: Tokens, rows: tuple[Array, ...]
) -> Float[Array, "N filled"]:
    """Gradient of the parameters of a logit of pairs: a program sums those of one block of queries."""
    call, query, value = kernel.call, operands.query, operands.value
    (batch, _, heads, dim), value_dim, size = query.shape, value.shape[-1], pairwise.filled_size

    def body(program: Program, results):
        i, n, b = program.indices
        head, index = program.head(n), lax.iota(jnp.int32, size)
        queries = program.queries(b, n, i)

        def visit(j, total):
            keys = program.keys(b, n, j)
            d_logits = program.block(queries, keys, head, masked=True).gradients()[1]
            d_numbers, _, _ = program.term_gradient(queries, keys, head, d_logits)
            for p, d_number in enumerate(d_numbers):
                total += jnp.where(index == p, d_number, 0.0)
            return total

        low, high = call.keys_of(i, program.offset)
        results[0][b * call.query_blocks + i, n] = lax.fori_loop(low, high + 1, visit, jnp.zeros(size, jnp.float32))

    sums = jax.ShapeDtypeStruct((batch * call.query_blocks, heads, size), jnp.float32)
    grid, products = (call.query_blocks, heads, batch), dim + value_dim + call.logit_products(gradient=True)
    (found,) = run(kernel, grid, body, operands, tokens, rows, (sums,), products=products, checked=False)
    return found.sum(0)


_attend, _attend_part = differentiable(_forward, _backward)


def _like(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
