"""Attention of a few queries against more keys, as in decoding: what the kernels for it have in common.

The queries of all heads of a key/value head's group are the rows of one product. The keys are read from the first block
that some query sees to the last, so the time depends on the tokens in a KV cache, not on its capacity; a cache is read
where it lies.

The gradient, which decoding does not need, is that of `streaming.py`.

Shapes as in `pallas`; G = N/K, R = G·T rows, filled up.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from nope_jax.attention.backends.pallas.call import Call, tokens_of
from nope_jax.attention.backends.pallas.pairwise import Member, features_of
from nope_jax.attention.backends.streaming import streaming_attention
from nope_jax.attention.blocks import CachedLayer
from nope_jax.attention.mask_spec import MaskSpec
from nope_jax.attention.softmax_state import named
from nope_jax.encodings import DistanceLogit
from nope_jax.encodings.encoding import Logit
from nope_jax.jax_settings import in_32_bits, with_implicit_promotion


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
    blocks: Any = None
    """The sizes of blocks, as a kernel has them."""


def differentiable(forward: Callable) -> Callable[[Options, FewQueries], tuple[Array, Array, Array]]:
    """The `attend` of a backend, for a few queries: a kernel, and the gradient."""
    forward = in_32_bits(with_implicit_promotion(forward))

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
    def attend(options: Options, operands: FewQueries) -> tuple[Array, Array, Array]:
        return forward(options, operands)

    def with_residuals(options: Options, operands: FewQueries):
        results = named(forward(options, operands))
        return results, (operands, results)

    @with_implicit_promotion
    def gradient(options: Options, residuals, cotangents):
        operands, results = residuals

        def by_streaming(operands):
            *arrays, logit, mask_spec = operands
            settings = options.precision, options.with_entropy, options.softcap
            return streaming_attention(*arrays, logit, None, mask_spec, *settings, final_rows=results)

        return jax.vjp(by_streaming, operands)[1](cotangents)

    attend.defvjp(with_residuals, gradient)
    return attend


class Inputs(NamedTuple):
    """What a kernel reads: arrays or, within it, references to them."""

    query: Any
    """[B, K, R, H]."""
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
    """The logit of each pair, [#B, #N, T, S]."""


def inputs_of(options: Options, operands: FewQueries, query_size: int, key_size: int) -> tuple[Call, Inputs]:
    """The call, with explicit positions, and its arrays, with R filled up to whole blocks of rows."""
    query, factor, key, value, logit, mask_spec = operands
    (batch, length, heads, _), (key_length, kv_heads) = query.shape, key.shape[1:3]
    rows = heads // kv_heads * length
    filled = rows + -rows % query_size

    query_positions, key_positions = mask_spec.positions(length, key_length)
    mask_spec = dataclasses.replace(mask_spec, query_positions=query_positions, key_positions=key_positions)
    sizes = {"query_size": query_size, "key_size": key_size}
    call = Call.of(query, key, mask_spec, options.precision, options.with_entropy, options.softcap, logit, **sizes)
    tokens = tokens_of(call, mask_spec)

    def of_rows(x: Shaped[Array, "B N T *rest"]) -> Shaped[Array, "B K R *rest"]:
        x = x.reshape(batch, kv_heads, rows, *x.shape[3:])
        return jnp.pad(x, [(0, 0), (0, 0), (0, filled - rows)] + [(0, 0)] * (x.ndim - 3))

    return call, Inputs(
        query=of_rows(query.swapaxes(1, 2)),
        factor=of_rows(jnp.broadcast_to(factor, (batch, heads, length))),
        key=key.stack if isinstance(key, CachedLayer) else key,
        value=value.stack if isinstance(value, CachedLayer) else value,
        layer=jnp.asarray(key.index if isinstance(key, CachedLayer) else 0, jnp.int32).reshape(1),
        reach=_reach(mask_spec, length, key_length, key_size),
        of_queries=tuple(x[:, jnp.arange(filled) % length] for x in tokens.of_queries),
        of_keys=tokens.of_keys,
        table=_table(call, logit, query_positions, key_positions, batch, heads),
    )


def _table(
    call: Call, logit: Logit | None, query_positions: Array, key_positions: Array, batch: int, heads: int
) -> Float[Array, "#B #N T S"] | None:
    """The logit of each pair, by distance or pair by pair."""
    if isinstance(logit, DistanceLogit):
        return logit.values(query_positions[:, :, None] - key_positions[:, None, :]).swapaxes(0, 1)
    if call.pairwise is None:
        return None
    parameters = call.pairwise.numbers(logit, heads)
    numbers = [] if parameters is None else [parameters[:, p, None, None] for p in range(call.pairwise.size)]
    of_queries, of_keys = features_of(logit, batch, heads)
    queries = Member(query_positions[:, None, :, None], tuple(x[..., :, None] for x in of_queries))
    keys = Member(key_positions[:, None, None], tuple(x[..., None, :] for x in of_keys))
    return call.pairwise(numbers, queries, keys)


def _reach(mask_spec: MaskSpec, length: int, key_length: int, key_size: int) -> Int[Array, "#B 2"]:
    some = mask_spec.matrix(length, key_length).any((1, 2))
    index = jnp.arange(key_length, dtype=jnp.int32)
    first = jnp.where(some, index, key_length).min(1) // key_size
    stop = (jnp.where(some, index + 1, 0).max(1) + key_size - 1) // key_size
    return jnp.stack([first, stop], axis=1)


def results_of(operands: FewQueries, *of_rows: Shaped[Array, "B K R ..."]) -> tuple[Array, Array, Array]:
    """Output, entropy and logsumexp as an `attend` returns them, from those of rows."""
    (batch, length, heads, _), kv_heads = operands.query.shape, operands.key.shape[2]
    rows = heads // kv_heads * length
    output, entropy, logsumexp = (x[:, :, :rows].reshape(batch, heads, length, *x.shape[3:]) for x in of_rows)
    return output.swapaxes(1, 2).astype(operands.value.dtype), entropy, logsumexp


def row_of(reference: Any, b: Any) -> Any:
    """The index of batch row b in an array [#B, ...]."""
    return jnp.minimum(b, reference.shape[0] - 1)


def cost(operands: FewQueries) -> tuple[int, int]:
    """Operations and bytes, with the cache full."""
    (batch, length, heads, dim), key, value = operands.query.shape, operands.key, operands.value
    products = (dim + value.shape[-1]) * heads * length
    per_key = key.shape[2] * sum(x.shape[-1] * x.dtype.itemsize for x in (key, value))
    return 2 * products * batch * key.shape[1], batch * key.shape[1] * per_key
