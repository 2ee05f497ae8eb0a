"""Attention in one pass over blocks of keys: output, entropy and logsumexp together, in memory that grows with T.

The forward pass keeps the state of each row (`softmax_state.py`) and its output. The backward pass recomputes each
block from the logsumexp (Dao et al. 2022, arXiv 2205.14135); the gradient of the entropy with respect to a logit is
-p·(s - logsumexp + entropy). Blocks are visited diagonal by diagonal (`diagonals.py`).

Matrix products are fastest if neither operand needs a transpose and the right one is small. The forward pass therefore
stores a block's logits as [queries, keys], for weights · values. The backward pass stores them as [keys, queries], for
the gradients of keys and values, and stores the query gradient transposed.

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, G = N/K, H head dim;
n and m the numbers of query and key blocks, q = k the size of both.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from nope_jax.attention.backends.diagonals import Tiling, along, merge_heads, shear, split_heads, sweep, unshear
from nope_jax.attention.backends.few_queries import few_queries_forward
from nope_jax.attention.backends.scanning import scanning_attention
from nope_jax.attention.blocks import (
    BLOCK_SIZE,
    CachedLayer,
    at,
    cut,
    few_queries,
    put,
    summed,
    whole,
    zero_sums,
)
from nope_jax.attention.mask_spec import MaskSpec
from nope_jax.attention.nonfinite import finite, weighted_sum
from nope_jax.attention.softcap import softcapped
from nope_jax.attention.softmax_state import SoftmaxState, named, row_terms
from nope_jax.encodings import BlockLogit, BlockValue, DistanceLogit, ScanLogit, Tile
from nope_jax.encodings.encoding import MASKED, Logit
from nope_jax.jax_settings import with_implicit_promotion


def streaming_attention(
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
    block_size: int = BLOCK_SIZE,
    final_rows: tuple[Array, Array, Array] | None = None,
    carry: Float[Array, "B N T"] | None = None,
) -> tuple[Array, ...]:
    """The `attend` of a backend with `in_parts`; reverse-mode differentiable.

    Args:
        block_size: Maximum number of queries and of keys per block.
    """
    if isinstance(logit, ScanLogit):
        call = query, factor, key, value, logit, value_term, mask_spec, precision, with_entropy, softcap
        return scanning_attention(*call, block_size=block_size, carry=carry)
    if final_rows is None and few_queries(query.shape[1], key.shape[1], block_size):
        fixed = lax.stop_gradient((query, factor, key, value, logit, value_term, mask_spec))
        final_rows = few_queries_forward(*fixed, precision, with_entropy, softcap, block_size=block_size)
    key, value = whole(key), whole(value)
    batch, query_length, num_heads, _ = query.shape
    key_length, kv_heads = key.shape[1:3]
    largest = max(query_length, key_length)
    size = -(-largest // -(-largest // block_size))  # the fewest blocks, and the smallest size for that number
    size = min(-(-size // 8) * 8, max(block_size, 1))

    contiguous = mask_spec.contiguous
    tiling = Tiling(
        query_length=query_length,
        key_length=key_length,
        size=size,
        groups=num_heads // kv_heads,
        contiguous=contiguous,
        per_block=not contiguous
        or mask_spec.query_segments is not None
        or mask_spec.mask is not None
        or mask_spec.chunk_size is not None
        or (not mask_spec.is_causal and key_length % size != 0)
        or (mask_spec.query_offset is not None and (mask_spec.is_causal or mask_spec.window is not None)),
        with_entropy=with_entropy,
        precision=precision,
        softcap=softcap,
    )
    distance_values = by_distance = None
    if isinstance(logit, DistanceLogit):
        if contiguous:
            distance_values = logit.values(tiling.distances(mask_spec))
            logit = None
        else:
            logit = BlockLogit(_distance_block, logit)
    elif logit is not None and logit.by_distance is not None and contiguous:
        by_distance = logit.by_distance(logit.parameters, tiling.distances(mask_spec))

    per_token = functools.partial(jax.tree.map, lambda x: cut(x, size, 1))
    mask_spec = mask_spec.in_blocks(query_length, key_length, size, size)
    if logit is not None:
        features = {"query_features": per_token(logit.query_features), "key_features": per_token(logit.key_features)}
        logit = dataclasses.replace(logit, **features)
    factor = jnp.broadcast_to(factor, (factor.shape[0], num_heads, query_length))
    operands = _Operands(
        query=_heads_first(query, kv_heads, size),
        factor=cut(factor.reshape(factor.shape[0], kv_heads, tiling.groups, -1), size, 3),
        key=_heads_first(key, kv_heads, size)[:, :, :, 0],
        value=_heads_first(value, kv_heads, size)[:, :, :, 0],
        distance_values=distance_values,
        logit=logit,
        by_distance=by_distance,
        value_term=value_term,
    )
    if final_rows is None:
        out, entropy, logsumexp = _attend(tiling, operands, mask_spec)
    else:
        out, entropy, logsumexp = _attend_part(
            tiling, operands, mask_spec, _cut_final_rows(tiling, kv_heads, *final_rows)
        )
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, num_heads, out.shape[-1])[:, :query_length]
    entropy, logsumexp = (
        jnp.moveaxis(x, 0, 3).reshape(batch, num_heads, -1)[..., :query_length] for x in (entropy, logsumexp)
    )
    return out, entropy, logsumexp


class _Operands(NamedTuple):
    """The differentiable arguments of a call, split into blocks."""

    query: Shaped[Array, "n B K G q H"]
    factor: Float[Array, "n #B K G q"]
    key: Shaped[Array, "m B K k H"]
    value: Shaped[Array, "m B K k H2"]
    distance_values: Float[Array, "#N distances"] | None
    logit: BlockLogit | None
    by_distance: Any
    """Results of the logit's `by_distance`, [distances, ...], indexed like `distance_values`."""
    value_term: BlockValue | None

    @property
    def scaled_first(self) -> bool:
        """Whether to scale the queries rather than the product q·k: scaling bfloat16 or float16 queries would round
        them once more.
        """
        return self.query.dtype == jnp.float32

    @property
    def product_dtype(self) -> Any:
        """The dtype in which queries are multiplied with keys."""
        return jnp.promote_types(self.query.dtype, self.key.dtype)

    def scaled(self) -> Float[Array, "n B K G q H"]:
        """Queries times logit_scale/√H."""
        return self.query.astype(jnp.float32) * self.factor[..., None]


def _distance_block(logit: DistanceLogit, block: Tile) -> Array:
    return logit.block(block)


def _tile(tiling: Tiling, operands: _Operands, diagonal):
    """Term added to the logits of all blocks of a diagonal, [K, G, q, k] or [1, 1, q, k]; None if there is none."""
    if operands.distance_values is None:
        return None
    start, size = tiling.distance_start(diagonal), tiling.size
    tile = shear(lax.dynamic_slice_in_dim(operands.distance_values, start, 2 * size - 1, axis=1))
    return tile[None] if len(tile) == 1 else tile.reshape(-1, tiling.groups, size, size)


def _heads_first(x: Shaped[Array, "B T N H"], kv_heads: int, size: int) -> Shaped[Array, "n B K G q H"]:
    x = cut(x, size, 1)
    n, batch, c, heads, dim = x.shape
    return x.reshape(n, batch, c, kv_heads, heads // kv_heads, dim).transpose(0, 1, 3, 4, 2, 5)


class _LogitArrays(NamedTuple):
    """The arrays of a `BlockLogit`: in full, or sliced for a pair of blocks."""

    parameters: Any
    query_features: Any
    key_features: Any
    by_distance: Any

    @classmethod
    def of(cls, operands: _Operands) -> "_LogitArrays | None":
        logit = operands.logit
        if logit is None:
            return None
        return cls(logit.parameters, logit.query_features, logit.key_features, operands.by_distance)

    def at(self, tiling: Tiling, i, j) -> "_LogitArrays":
        """Slice for query block i and key block j."""
        start, span = tiling.distance_start(i - j), 2 * tiling.size - 1
        here = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, span), self.by_distance)
        return _LogitArrays(self.parameters, at(self.query_features, i), at(self.key_features, j), here)

    def put(self, tiling: Tiling, entry: "_LogitArrays", i, j) -> "_LogitArrays":
        """Replace the slices that `at` returned."""
        start = tiling.distance_start(i - j)
        by_distance = jax.tree.map(
            lambda x, new: lax.dynamic_update_slice_in_dim(x, new, start, 0), self.by_distance, entry.by_distance
        )
        features = put(self.query_features, entry.query_features, i), put(self.key_features, entry.key_features, j)
        return _LogitArrays(entry.parameters, *features, by_distance)


def _keys_first(x: Shaped[Array, "*B K G q k"]) -> Shaped[Array, "*B K k G q"]:
    return jnp.moveaxis(x, -1, -3)


def _queries_first(x: Shaped[Array, "*B K k G q"]) -> Shaped[Array, "*B K G q k"]:
    return jnp.moveaxis(x, -3, -1)


class _Pair:
    """Query block i and key block j, with the computations shared by the forward and the backward pass."""

    def __init__(self, tiling: Tiling, operands: _Operands, mask_spec: MaskSpec, scaled, i, j, visible):
        self.tiling, self.operands, self.mask_spec, self.i, self.j = tiling, operands, mask_spec, i, j
        # Without a mask, every query and key of the block takes part in all its rows and columns, finite or not.
        self.seen_only = finite if visible is not None else lambda x: x
        self.scaled, self.factor = self.seen_only(at(scaled, i)), at(operands.factor, i)
        self.key, self.value = self.seen_only(at(operands.key, j)), at(operands.value, j)
        arrays = _LogitArrays.of(operands)
        # Those of `added` and, after its own, of `value_added`: made once, so that XLA sees that they are the same.
        self.arguments = arrays and arrays.at(tiling, i, j), self.scaled, self.key, self.factor

    def product(self, subscripts: str, *arrays):
        return jnp.einsum(subscripts, *arrays, precision=self.tiling.precision, preferred_element_type=jnp.float32)

    def content_logits(self, product, layout=lambda x: x):
        """Content logits of the block from its q·k, and their derivative with respect to the scaled q·k (None: 1).

        `layout` converts from [B, K, G, q, k] to the layout of q·k.
        """
        if not self.operands.scaled_first:
            product *= layout(self.factor[..., None])
        cap = self.tiling.softcap
        if cap is None:
            return product, None
        content = softcapped(product, cap)
        return content, 1 - jnp.square(content / cap)

    def added(self, arrays: _LogitArrays, query, key, factor) -> Float[Array, "#B K G q k"]:
        """The term added by a `BlockLogit`."""
        logit = self.operands.logit
        assert logit is not None  # since its arrays exist
        added = dataclasses.replace(logit, parameters=arrays.parameters).block(self.block(arrays, query, key, factor))
        added = jnp.broadcast_to(added, (added.shape[0], self.tiling.groups * key.shape[1], *added.shape[2:]))
        return split_heads(added, self.tiling.groups)

    def value_added(self, term: BlockValue, weights, arrays, query, key, factor) -> Float[Array, "B K G q H2"]:
        """The term added by a `BlockValue`."""
        return split_heads(term.block(merge_heads(weights), self.block(arrays, query, key, factor)), self.tiling.groups)

    def block(self, arrays: _LogitArrays | None, query, key, factor) -> Tile:
        """The pair as a `Tile` for an encoding's function."""
        first, _ = self.tiling.distance_range(self.i - self.j)
        distances = first + self.mask_spec.query_offset_or_0 + jnp.arange(2 * self.tiling.size - 1, dtype=jnp.int32)
        return Tile(
            query=merge_heads(query),
            factor=merge_heads(factor),
            key=jnp.repeat(key, self.tiling.groups, axis=1),
            query_positions=at(self.mask_spec.query_positions, self.i),
            key_positions=at(self.mask_spec.key_positions, self.j),
            query_features=arrays and arrays.query_features,
            key_features=arrays and arrays.key_features,
            distances=distances if self.tiling.contiguous else None,
            by_distance=arrays and arrays.by_distance,
        )


@with_implicit_promotion
def _forward(tiling: Tiling, operands: _Operands, mask_spec: MaskSpec):
    scaled = operands.scaled()
    queries = scaled if operands.scaled_first else operands.query
    keys_t = lax.optimization_barrier(jnp.moveaxis(operands.key, -1, -2))  # transposed once, outside the loop

    def update(tile, i, j, visible, rows):
        softmax, output = rows
        pair = _Pair(tiling, operands, mask_spec, scaled, i, j, visible)
        logits, _ = pair.content_logits(pair.product("bkgqh,bkhs->bkgqs", at(queries, i), at(keys_t, j)))
        if tile is not None:
            logits += tile
        if operands.logit is not None:
            # Otherwise XLA would compute the term in every loop that reads the logits, and so below with its gradient.
            logits = lax.optimization_barrier(logits + pair.added(*pair.arguments))
        if visible is not None:
            logits = jnp.where(visible, logits, MASKED)
        softmax, weights, decay = softmax.over_more(logits)
        output = decay[..., None] * output
        if visible is None:
            output += pair.product("bkgqs,bksh->bkgqh", weights.astype(pair.value.dtype), pair.value)
        else:
            output += weighted_sum("bkgqs,bksh->bkgqh", weights, pair.value, tiling.precision)
        if operands.value_term is not None:
            output += pair.value_added(operands.value_term, weights, *pair.arguments)
        return softmax, output

    def visit_diagonal(diagonal, masked, rows):
        return along(
            tiling,
            mask_spec,
            diagonal,
            masked,
            rows,
            take=lambda rows, i, j: (lax.optimization_barrier(at(rows[0], i)), at(rows[1], i)),
            update=functools.partial(update, _tile(tiling, operands, diagonal)),
            put=lambda rows, entry, i, j: put(rows, entry, i),
        )

    shape = operands.query.shape[:-1]
    output = jnp.zeros((*shape, operands.value.shape[-1]), jnp.float32)
    rows = SoftmaxState.over_no_keys(shape, tiling.with_entropy), output
    softmax, output = sweep(tiling, mask_spec, visit_diagonal, rows)
    normaliser, entropy, logsumexp = softmax.end()
    output = (1 / normaliser)[..., None] * output
    return output.astype(operands.value.dtype), entropy, logsumexp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(tiling: Tiling, operands: _Operands, mask_spec: MaskSpec):
    return _forward(tiling, operands, mask_spec)


def _attend_forward(tiling: Tiling, operands: _Operands, mask_spec: MaskSpec):
    results = named(_forward(tiling, operands, mask_spec))
    return results, (operands, mask_spec, results)


class _Gradients(NamedTuple):
    """Sums over the blocks visited so far, float32."""

    query_t: Float[Array, "*n B K H G q"]
    factor: Float[Array, "*n #B K G q"]
    """Gradient of the factor itself, excluding its effect through the scaled query."""
    key: Float[Array, "*m B K k H"]
    value: Float[Array, "*m B K k H2"]
    tile: Float[Array, "K k G q"] | None
    logit: _LogitArrays | None
    value_term: Any


@with_implicit_promotion
def _attend_backward(tiling: Tiling, residuals, cotangents):
    operands, mask_spec, (output, entropy, logsumexp) = residuals
    d_output, d_entropy, d_logsumexp = cotangents
    scaled = operands.scaled()
    queries = scaled if operands.scaled_first else operands.query
    queries_t, d_output_t = _keys_first(queries), _keys_first(d_output)
    keys_t, low_scaled = jnp.moveaxis(operands.key, -1, -2), scaled.astype(operands.product_dtype)
    # Transposed in memory once, outside the loop.
    queries_t, d_output_t, keys_t, low_scaled = lax.optimization_barrier((queries_t, d_output_t, keys_t, low_scaled))

    projected = (output.astype(jnp.float32) * d_output.astype(jnp.float32)).sum(-1)
    row_term, logsumexp = row_terms(projected, entropy, logsumexp, d_entropy, d_logsumexp, tiling.with_entropy)

    def update(tile, i, j, visible, sums: _Gradients) -> _Gradients:
        pair = _Pair(tiling, operands, mask_spec, scaled, i, j, visible)
        d_out, d_out_t, row, lse = at((d_output, d_output_t, row_term, logsumexp), i)
        d_query_t, d_factor, d_key, d_value, d_tile, d_logit, d_value_term = sums

        def hidden(x):
            """Replace hidden entries by 0, whatever their logits."""
            return x if visible is None else jnp.where(_keys_first(visible), x, 0.0)

        product = pair.product("bksh,bkhgq->bksgq", at(operands.key, j), at(queries_t, i))
        logits, slope = pair.content_logits(product, layout=_keys_first)
        if tile is not None:
            logits += _keys_first(tile)
        if operands.logit is not None:
            added, pull_added = jax.vjp(pair.added, *pair.arguments)
            # Otherwise XLA would compute the term in the order of keys, in which nothing that it reads lies in memory.
            logits += _keys_first(lax.optimization_barrier(added))
        weights = hidden(jnp.exp(logits - lse[:, :, None]))
        d_weights = pair.product("bksh,bkhgq->bksgq", pair.value, d_out_t)
        if operands.value_term is not None:
            natural = _queries_first(weights)
            _, pull = jax.vjp(pair.value_added, operands.value_term, natural, *pair.arguments)
            d_term, d_weights_added, *rest = pull(d_out.astype(jnp.float32))
            d_value_term = summed(d_value_term, d_term)
            d_weights += _keys_first(d_weights_added)
            d_logit, d_query_t, d_key, d_factor = _add(d_logit, d_query_t, d_key, d_factor, rest)
        d_logits = d_weights + row[:, :, None]
        if tiling.with_entropy:
            d_logits -= at(d_entropy, i)[:, :, None] * logits
        d_logits = hidden(d_logits * weights)

        d_product = d_logits if slope is None else hidden(d_logits * slope)
        low = d_product.astype(operands.product_dtype)
        d_query_t += pair.product("bkhs,bksgq->bkhgq", pair.seen_only(at(keys_t, j)), low)
        d_key += pair.product("bksgq,bkgqh->bksh", low, pair.seen_only(at(low_scaled, i)))
        d_value += pair.product("bksgq,bkgqh->bksh", weights.astype(d_out.dtype), d_out)
        if d_tile is not None:
            d_tile += d_logits.sum(0)
        if operands.logit is not None:
            rest = pull_added(lax.optimization_barrier(_sum_to(_queries_first(d_logits), added.shape)))
            d_logit, d_query_t, d_key, d_factor = _add(d_logit, d_query_t, d_key, d_factor, rest)
        return _Gradients(d_query_t, d_factor, d_key, d_value, d_tile, d_logit, d_value_term)

    def take(sums: _Gradients, i, j) -> _Gradients:
        logit = sums.logit and sums.logit.at(tiling, i, j)
        (query_t, factor), (key, value) = at((sums.query_t, sums.factor), i), at((sums.key, sums.value), j)
        return sums._replace(query_t=query_t, factor=factor, key=key, value=value, logit=logit)

    def put_back(sums: _Gradients, entry: _Gradients, i, j) -> _Gradients:
        logit = entry.logit and sums.logit and sums.logit.put(tiling, entry.logit, i, j)
        query_t, factor = put((sums.query_t, sums.factor), (entry.query_t, entry.factor), i)
        key, value = put((sums.key, sums.value), (entry.key, entry.value), j)
        return entry._replace(query_t=query_t, factor=factor, key=key, value=value, logit=logit)

    def visit_diagonal(diagonal, masked, state):
        sums, d_values = state
        if d_values is not None:
            shape = scaled.shape[2], tiling.size, tiling.groups, tiling.size
            sums = sums._replace(tile=jnp.zeros(shape, jnp.float32))
        sums = along(
            tiling,
            mask_spec,
            diagonal,
            masked,
            sums,
            take=take,
            update=functools.partial(update, _tile(tiling, operands, diagonal)),
            put=put_back,
        )
        if d_values is not None:
            start = tiling.distance_start(diagonal)
            added = unshear(jnp.moveaxis(sums.tile, 1, 2).reshape(-1, tiling.size, tiling.size))
            here = lax.dynamic_slice_in_dim(d_values, start, added.shape[1], axis=1)
            d_values = lax.dynamic_update_slice_in_dim(d_values, here + _sum_to(added, here.shape), start, axis=1)
        return sums._replace(tile=None), d_values

    sums = _Gradients(
        query_t=queries_t,
        factor=operands.factor,
        key=operands.key,
        value=operands.value,
        tile=None,
        logit=_LogitArrays.of(operands),
        value_term=operands.value_term,
    )
    nothing = zero_sums((sums, operands.distance_values))
    sums, d_values = sweep(tiling, mask_spec, visit_diagonal, nothing)

    d_scaled, logit = _queries_first(sums.query_t), operands.logit
    if logit is not None:
        parameters, query_features, key_features, _ = sums.logit
        logit = dataclasses.replace(
            logit, parameters=parameters, query_features=query_features, key_features=key_features
        )
    gradients = _Operands(
        query=d_scaled * operands.factor[..., None],
        factor=sums.factor + _sum_to((d_scaled * finite(operands.query)).sum(-1), operands.factor.shape),
        key=sums.key,
        value=sums.value,
        distance_values=d_values,
        logit=logit,
        by_distance=sums.logit and sums.logit.by_distance,
        value_term=sums.value_term,
    )
    return jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), gradients, operands), None


_attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_part(tiling: Tiling, operands: _Operands, mask_spec: MaskSpec, final_rows):
    """Return the given results over all keys; the backward pass computes the gradient contribution of these keys.

    The final results suffice: a key's gradient follows from its logit and the row's logsumexp, entropy and output.
    """
    return final_rows


_attend_part.defvjp(
    lambda tiling, operands, mask_spec, final_rows: (final_rows, (operands, mask_spec, final_rows)),
    lambda tiling, residuals, cotangents: (*_attend_backward(tiling, residuals, cotangents), None),
)


def _cut_final_rows(tiling: Tiling, kv_heads: int, output, entropy, logsumexp):
    """Split results in the layout of `streaming_attention` into blocks in the layout of `_attend`."""
    padding = [(0, 0), (0, 0), (0, -output.shape[1] % tiling.size)]
    logsumexp = jnp.pad(logsumexp, padding, constant_values=-jnp.inf)  # padding rows see no key
    entropy, logsumexp = (
        cut(x.reshape(x.shape[0], kv_heads, tiling.groups, -1), tiling.size, 3) for x in (entropy, logsumexp)
    )
    return _heads_first(output, kv_heads, tiling.size), entropy, logsumexp


def _add(d_logit, d_query_t, d_key, d_factor, more):
    """Add the gradients that an encoding's function contributes to its arrays, queries, keys and factor."""
    of_arrays, of_query, of_key, of_factor = more
    d_logit = summed(d_logit, of_arrays)
    return d_logit, d_query_t + _keys_first(of_query), d_key + of_key, d_factor + of_factor


def _sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """Sum x over the axes along which an array of this shape was broadcast to x."""
    axes = tuple(axis for axis, (wide, narrow) in enumerate(zip(x.shape, shape, strict=True)) if wide != narrow)
    return x.sum(axes, keepdims=True)
