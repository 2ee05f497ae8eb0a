"""Attention with an encoding applied within a layer, and its attention weights.

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, H head dim.
"""

import dataclasses
import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from nope_jax.attention.blocks import whole
from nope_jax.attention.dot_product import attend, attend_weights, check_arrays, dot_product_attention
from nope_jax.attention.flax_layer import for_flax_layers
from nope_jax.attention.mask_spec import make_mask_spec
from nope_jax.attention.mesh import with_auto_axes
from nope_jax.encodings import Encoding, Params
from nope_jax.encodings.logit_scale import logit_scale_product
from nope_jax.jax_settings import with_implicit_promotion


class Encoded(NamedTuple):
    """An encoding with its parameters and features."""

    encoding: Encoding
    params: Params
    query_features: Any = None
    key_features: Any = None
    transformed: bool = False
    """Whether queries and keys are already those after the query/key place."""


@with_implicit_promotion
@with_auto_axes
@functools.partial(for_flax_layers, common=dot_product_attention)
def encoded_attention(
    encoding: Encoding,
    params: Params,
    query: Shaped[Array | np.ndarray, "B T N H"],
    key: Shaped[Array | np.ndarray, "B S K H"],
    value: Shaped[Array | np.ndarray, "B S K H2"],
    *,
    query_features: Any = None,
    key_features: Any = None,
    **common: Any,
) -> Any:
    """`dot_product_attention` with an encoding applied within the layer.

    The caller must already have applied the encoding's input place and its `positions`.

    Args:
        encoding: The encoding; may be user-defined.
        params: Its parameters: the merged results of its `init_shared` and `init_layer`.
        query: Queries, before the query/key place.
        key: Keys, likewise.
        value: Values.
        query_features: `encoding.features` of the query tokens, if the encoding has features.
        key_features: The same for the key tokens.
        **common: Keywords of `dot_product_attention`, whose result is returned. A logit_scale multiplies the encoding's
            own.

    Raises:
        ValueError: As for `dot_product_attention`, or chunk_size is incompatible with the encoding's own.
    """
    check_arrays(query, key, value)
    return attend_encoded(Encoded(encoding, params, query_features, key_features), query, key, value, **common)


@with_implicit_promotion
@functools.partial(with_auto_axes, heads_first=True)
@functools.partial(for_flax_layers, common=dot_product_attention)
def attention_weights(
    encoding: Encoding,
    params: Params,
    query: Shaped[Array | np.ndarray, "B T N H"],
    key: Shaped[Array | np.ndarray, "B S K H"],
    *,
    query_features: Any = None,
    key_features: Any = None,
    **common: Any,
) -> Any:
    """Return the attention weights of `encoded_attention`, [B, N, T, S] in float32.

    The weights of a query sum to 1, or to 0 if it sees no key, or to less than 1 with an encoding that has a sink.

    Args:
        encoding: As `encoded_attention`.
        params: As `encoded_attention`.
        query: As `encoded_attention`.
        key: As `encoded_attention`.
        query_features: As `encoded_attention`.
        key_features: As `encoded_attention`.
        **common: As `encoded_attention`, except `implementation`: weights are always computed by the definition.

    Returns:
        The weights; with return_stats, a pair (weights, AttentionStats).
    """
    check_arrays(query, key, key)
    encoded = Encoded(encoding, params, query_features, key_features)
    query, key, logit, _, mask_spec, options = _places(encoded, query, key, common)
    return attend_weights(query, key, logit, mask_spec, **options)


def attend_encoded(encoded: Encoded, query, key, value, **common: Any) -> Any:
    """`encoded_attention` on validated arrays; in decoding, keys and values may be a `CachedLayer`."""
    query, key, *places, options = _places(encoded, query, key, common)
    return attend(query, key, value, *places, **options)


_VISIBILITY = inspect.signature(make_mask_spec).parameters


def _places(encoded: Encoded, query, key, common: dict[str, Any]):
    """Apply an encoding; return its queries, keys, logit, value term and `MaskSpec`, and the keywords of `attend`."""
    encoding, params, *features, transformed = encoded
    if not isinstance(encoding, Encoding):
        raise ValueError(f"encoding must be an Encoding, such as RoPE() or resolve('rope')[0], not {encoding!r}")
    options = {name: x for name, x in common.items() if name not in _VISIBILITY}
    mask_spec = make_mask_spec(query, key, **{name: x for name, x in common.items() if name in _VISIBILITY})
    span = encoding.span()
    chunks = [n for n in (span.chunk_size, mask_spec.chunk_size) if n is not None]
    if chunks and max(chunks) % min(chunks):
        raise ValueError(f"chunk_size must divide the encoding's own, {chunks[0]}, or be a multiple of it: {chunks[1]}")
    windows = [n for n in (span.window, mask_spec.window) if n is not None]
    mask_spec = dataclasses.replace(mask_spec, chunk_size=min(chunks, default=None), window=min(windows, default=None))
    params = jax.tree.map(jnp.asarray, params)
    options["sink"] = encoding.sink(params)
    if not (query.shape[1] and key.shape[1]):  # nothing to encode
        return query, key, None, None, mask_spec, options
    positions = mask_spec.positions(query.shape[1], key.shape[1])
    scale = logit_scale_product(encoding.logit_scale(params, *positions), options.get("logit_scale"))
    if not transformed:
        query, key = encoding.query_key(params, jnp.asarray(query), jnp.asarray(key), *positions)
    logit = encoding.logit(params, query, whole(key), *features)
    return query, key, logit, encoding.value(params), mask_spec, options | {"logit_scale": scale}
