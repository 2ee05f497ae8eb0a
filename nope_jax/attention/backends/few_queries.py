"""The forward pass for a few queries against many keys, as in decoding: all queries in one block, keys in large blocks.

Only the blocks between the first and the last visible key are read, so the time depends on the tokens in a KV cache,
not on its capacity. Query heads that share a key head are the rows of one product. Terms of the logit place are
computed for the pairs of a block: with so few queries, tables per distance would cost more.

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, G = N/K, H head dim; k keys of a block.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from nope_jax.attention.blocks import BLOCK_SIZE, CachedLayer, key_block
from nope_jax.attention.mask_spec import MaskSpec
from nope_jax.attention.nonfinite import finite, weighted_sum
from nope_jax.attention.softcap import softcapped
from nope_jax.attention.softmax_state import SoftmaxState
from nope_jax.encodings import BlockLogit, BlockValue, DistanceLogit, Tile
from nope_jax.encodings.encoding import MASKED


def few_queries_forward(
    query: Shaped[Array, "B T N H"],
    factor: Float[Array, "#B #N T"],
    key: Shaped[Array, "B S K H"] | CachedLayer,
    value: Shaped[Array, "B S K H2"] | CachedLayer,
    logit: DistanceLogit | BlockLogit | None,
    value_term: BlockValue | None,
    mask_spec: MaskSpec,
    precision: jax.lax.PrecisionLike = None,
    with_entropy: bool = True,
    softcap: float | None = None,
    *,
    block_size: int = BLOCK_SIZE,
) -> tuple[Shaped[Array, "B T N H2"], Float[Array, "B N T"], Float[Array, "B N T"]]:
    """The `attend` of a backend, without a gradient.

    Args:
        block_size: That of `streaming_attention`.
    """
    (batch, length, num_heads, _), (key_length, kv_heads) = query.shape, key.shape[1:3]
    size = min(4 * block_size, key_length)  # on a CPU, faster than a block of keys, or 16
    query_positions, key_positions = mask_spec.positions(length, key_length)
    factor = jnp.broadcast_to(factor, (factor.shape[0], num_heads, length))
    query = jnp.swapaxes(query, 1, 2)
    scaled = query.astype(jnp.float32) * factor[..., None]
    scaled_first = query.dtype == jnp.float32  # scaling queries of 16 bits would round them once more

    def rows(x: Shaped[Array, "B N T *rest"]) -> Shaped[Array, "B K rows *rest"]:
        return x.reshape(x.shape[0], kv_heads, -1, *x.shape[3:])

    def heads(x: Shaped[Array, "B K rows *rest"]) -> Shaped[Array, "B N T *rest"]:
        return x.reshape(x.shape[0], num_heads, length, *x.shape[3:])

    left = rows(scaled if scaled_first else query)

    def slice_of(x, start, axis=1):
        """The keys of a block in an array with one entry per key, or one for all keys."""
        return x if x.shape[axis] == 1 else lax.dynamic_slice_in_dim(x, start, size, axis)

    def visit(first, state):
        """Add the keys from `first` on."""
        softmax, output = state
        start = jnp.minimum(first, key_length - size)  # the last block overlaps the one before it
        # Without the barrier, XLA would convert all keys of 16 bits to float32 before the loop, on a CPU.
        all_keys, all_values, start = lax.optimization_barrier((key, value, start))
        keys, values = (key_block(x, start, size) for x in (all_keys, all_values))
        rule = dataclasses.replace(
            mask_spec,
            query_positions=query_positions,
            key_positions=slice_of(key_positions, start),
            key_segments=None if mask_spec.key_segments is None else slice_of(mask_spec.key_segments, start),
            mask=None if mask_spec.mask is None else slice_of(mask_spec.mask, start, axis=3),
        )
        visible = rule.matrix(length, size) & (start + jnp.arange(size, dtype=jnp.int32) >= first)
        product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
        logits = heads(product("bkrh,bksh->bkrs", left, keys))
        if not scaled_first:
            logits *= factor[..., None]
        logits = softcapped(logits, softcap)
        features = getattr(logit, "key_features", None)
        block = Tile(
            query=finite(scaled),
            factor=factor,
            key=jnp.repeat(finite(keys), num_heads // kv_heads, axis=1),
            query_positions=query_positions,
            key_positions=rule.key_positions,
            query_features=getattr(logit, "query_features", None),
            key_features=jax.tree.map(lambda x: slice_of(x, start), features),
        )
        if logit is not None:
            logits += logit.block(block)
        softmax, weights, decay = softmax.over_more(jnp.where(visible, logits, MASKED))
        added = heads(weighted_sum("bkrs,bksh->bkrh", rows(weights), values, precision))
        if value_term is not None:
            added += value_term.block(weights, block)
        return softmax, decay[..., None] * output + added

    shape = batch, num_heads, length
    state = SoftmaxState.over_no_keys(shape, with_entropy), jnp.zeros((*shape, value.shape[-1]), jnp.float32)
    if size == key_length:
        state = visit(jnp.int32(0), state)
    else:
        visible = dataclasses.replace(mask_spec, query_positions=query_positions, key_positions=key_positions)
        some = visible.matrix(length, key_length).any((0, 1, 2))
        first, last = jnp.argmax(some), key_length - jnp.argmax(some[::-1])
        first, last = (x.astype(jnp.int32) for x in (first, jnp.where(some.any(), last, first)))
        blocks = (last - first + size - 1) // size
        state = lax.fori_loop(0, blocks, lambda j, state: visit(first + j * size, state), state)
    softmax, output = state
    normaliser, entropy, logsumexp = softmax.end()
    output = jnp.swapaxes(output / normaliser[..., None], 1, 2)
    return output.astype(value.dtype), entropy, logsumexp
