"""Attention with logits that sum over keys (`ScanLogit`), in memory that grows with T.

For each block of queries, the blocks of keys are visited from last to first, the order of the sums. The state of a row
is that of `softmax_state.py`, its output and the logit's carry. Gradients come from JAX's automatic differentiation:
the inner and the outer loop are rematerialized in the backward pass, so only one block of queries at a time keeps its
states, of [S / block, block] numbers.

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, H head dim;
n and m the numbers of query and key blocks of q queries and k keys.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from nope_jax.attention.blocks import BLOCK_SIZE, CachedLayer, cut, cut_mask, mask_at, whole
from nope_jax.attention.mask_spec import MaskSpec
from nope_jax.attention.nonfinite import content_logits, finite, weighted_sum
from nope_jax.attention.softcap import softcapped
from nope_jax.attention.softmax_state import SoftmaxState
from nope_jax.encodings import BlockValue, ScanLogit, Tile


def scanning_attention(
    query: Shaped[Array, "B T N H"],
    factor: Float[Array, "#B #N T"],
    key: Shaped[Array, "B S K H"] | CachedLayer,
    value: Shaped[Array, "B S K H2"] | CachedLayer,
    logit: ScanLogit,
    value_term: BlockValue | None,
    mask_spec: MaskSpec,
    precision: jax.lax.PrecisionLike = None,
    with_entropy: bool = True,
    softcap: float | None = None,
    *,
    block_size: int = BLOCK_SIZE,
    carry: Float[Array, "B N T"] | None = None,
) -> tuple[Array, ...]:
    """The `attend` of a backend with `in_parts`, for a `ScanLogit`; reverse-mode differentiable."""
    key, value = whole(key), whole(value)
    (batch, query_length, num_heads, _), (key_length, kv_heads) = query.shape, key.shape[1:3]
    groups = num_heads // kv_heads
    query_size, key_size = min(block_size, query_length), min(block_size, key_length)
    query_positions, key_positions = mask_spec.positions(query_length, key_length)
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    per_query, per_key = (
        functools.partial(jax.tree.map, lambda x, size=size: cut(x, size, 1)) for size in (query_size, key_size)
    )
    mask = None if mask_spec.mask is None else cut_mask(mask_spec.mask, query_size, key_size)
    factor = jnp.broadcast_to(factor, (factor.shape[0], num_heads, query_length))
    queries = {
        "query": per_query(query),
        "factor": cut(factor, query_size, 2),
        "positions": per_query(query_positions),
        "segments": per_query(mask_spec.query_segments),
        "features": per_query(logit.query_features),
        "carry": cut(zeros((batch, num_heads, query_length)) if carry is None else carry, query_size, 2),
        "index": jnp.arange(-(-query_length // query_size), dtype=jnp.int32),
    }
    keys = {
        "key": per_key(key),
        "value": per_key(value),
        "positions": per_key(key_positions),
        "segments": per_key(mask_spec.key_segments),
        "features": per_key(logit.key_features),
        "index": jnp.arange(-(-key_length // key_size), dtype=jnp.int32),
    }

    def visible(rows, columns):
        rule = dataclasses.replace(
            mask_spec,
            query_positions=rows["positions"],
            key_positions=columns["positions"],
            query_segments=rows["segments"],
            key_segments=columns["segments"],
            mask=None if mask is None else mask_at(mask, rows["index"], columns["index"]),
        )
        index = columns["index"] * key_size + jnp.arange(key_size, dtype=jnp.int32)
        return rule.matrix(query_size, key_size) & (index < key_length)

    def query_block(rows):
        scaled = jnp.swapaxes(rows["query"], 1, 2).astype(jnp.float32) * rows["factor"][..., None]

        def grouped(x):
            """The queries of all heads that share a key head, as rows of one product."""
            return x.reshape(batch, kv_heads, groups * query_size, x.shape[-1])

        def visit(columns, seen, state):
            softmax, output, carry = state
            key, value = (jnp.swapaxes(columns[x], 1, 2) for x in ("key", "value"))
            block = Tile(
                query=finite(scaled),
                factor=jnp.broadcast_to(rows["factor"], (rows["factor"].shape[0], num_heads, query_size)),
                key=jnp.repeat(finite(key), groups, axis=1),
                query_positions=rows["positions"],
                key_positions=columns["positions"],
                query_features=rows["features"],
                key_features=columns["features"],
            )
            content = content_logits("bkqh,bksh->bkqs", grouped(scaled), key.astype(jnp.float32), precision)
            content = content.reshape(batch, num_heads, query_size, key_size)
            if softcap is not None:
                content = softcapped(jnp.where(seen, content, 0.0), softcap)
            logits, carry = logit.block(block, content, seen, carry)
            softmax, weights, decay = softmax.over_more(logits, seen)
            added = weighted_sum("bkqs,bksh->bkqh", grouped(weights), value, precision)
            output = decay[..., None] * output + added.reshape(output.shape)
            if value_term is not None:
                output += value_term.block(weights, block)
            return softmax, output, carry

        @jax.checkpoint
        def key_block(state, columns):
            seen = visible(rows, columns)
            state = lax.cond(seen.any(), lambda s: visit(columns, seen, s), lambda s: s, state)
            return state, None

        shape = (batch, num_heads, query_size)
        state = SoftmaxState.over_no_keys(shape, with_entropy), zeros((*shape, value.shape[-1])), rows["carry"]
        (softmax, output, handed_on), _ = lax.scan(key_block, state, keys, reverse=True)
        normaliser, entropy, logsumexp = softmax.end()
        return output / normaliser[..., None], entropy, logsumexp, handed_on

    _, (output, *of_rows) = lax.scan(jax.checkpoint(lambda _, rows: (None, query_block(rows))), None, queries)
    output = output.transpose(1, 0, 3, 2, 4).reshape(batch, -1, num_heads, value.shape[-1])[:, :query_length]
    entropy, logsumexp, handed_on = (
        jnp.moveaxis(x, 0, 2).reshape(batch, num_heads, -1)[..., :query_length] for x in of_rows
    )
    results = output.astype(value.dtype), entropy, logsumexp
    return results if carry is None else (*results, handed_on)
