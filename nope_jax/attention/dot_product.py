"""Scaled dot-product attention with everything an encoding may ask of it, and its statistics.

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, H head dim.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Integer, Shaped

from nope_jax.attention.flax_layer import for_flax_layers
from nope_jax.attention.mask_spec import MaskSpec
from nope_jax.attention.reference import reference_attention
from nope_jax.attention.ring import ring_size, spread_attention, with_explicit_axes
from nope_jax.attention.scanning import scanning_attention
from nope_jax.attention.streaming import BLOCK_SIZE, streaming_attention
from nope_jax.encodings import BlockValue, DistanceLogit, ScanLogit
from nope_jax.encodings.checks import known_values
from nope_jax.encodings.encoding import Logit

Implementation = Literal["reference", "streaming"]


class AttentionStats(NamedTuple):
    """What the weights of each row look like."""

    entropy: Float[Array, "B N T"]
    """-Σ a·ln a in nats: 0 on one key, ln n when spread evenly over n keys."""
    logsumexp: Float[Array, "B N T"]
    """ln Σ e^logit; -inf in a row that sees no key."""


@with_explicit_axes
@for_flax_layers
def dot_product_attention(
    query: Shaped[Array | np.ndarray, "B T N H"],
    key: Shaped[Array | np.ndarray, "B S K H"],
    value: Shaped[Array | np.ndarray, "B S K H2"],
    *,
    logit: Logit | None = None,
    value_term: BlockValue | None = None,
    query_positions: Integer[ArrayLike, "T"] | Integer[ArrayLike, "#B T"] | None = None,
    key_positions: Integer[ArrayLike, "S"] | Integer[ArrayLike, "#B S"] | None = None,
    mask: Shaped[ArrayLike, "..."] | None = None,
    is_causal: bool = True,
    window: int | None = None,
    chunk_size: int | None = None,
    segment_ids: Integer[ArrayLike, "B T"] | tuple[Integer[ArrayLike, "B T"], Integer[ArrayLike, "B S"]] | None = None,
    logit_scale: Float[ArrayLike, ""] | Float[ArrayLike, "N"] | Float[ArrayLike, "#B #N T"] | None = None,
    implementation: Implementation | None = None,
    return_stats: bool = False,
    precision: jax.lax.PrecisionLike = None,
) -> Any:
    """softmax(logit_scale · q·k/√H + logit) · v over the keys that each query may see; softmax in float32.

    Queries, keys and values may differ in dtype. All is computed from them as they are, in float32 where two differ;
    float64 ones are rounded to float32 first. It can be given as `attention_fn` to `nnx.MultiHeadAttention` and
    `nn.MultiHeadDotProductAttention`, as `nope_jax.attention.flax_layer` says.

    Under a mesh in context (`jax.set_mesh`), or with arrays on one of Explicit axes, it is spread over the mesh's
    devices, as `nope_jax.attention.ring` says.

    Args:
        query: Queries.
        key: Keys; K divides N, and query head n reads key head n // (N/K).
        value: Values.
        logit: What is added to the scaled content logit, computed block by block (`nope_jax.encodings.DistanceLogit`,
            `BlockLogit`, `ScanLogit`).
        value_term: What is added to the output (`nope_jax.encodings.BlockValue`).
        query_positions: Positions of the queries. Default: aligned at the end of the keys, S-T..S-1, so that a single
            query against a long cache is its last token. In a cache that is not full yet, give them.
        key_positions: Positions of the keys. Default: 0..S-1.
        mask: True where a query may attend; integers 0 and 1 are taken too. What is to be added to the logits (floating
            point, 0 and -inf) is a `logit`, not a mask, and refused.
        is_causal: A query sees no key at a later position than its own.
        window: A query sees only the keys fewer than so many positions away: 1 is itself alone.
        chunk_size: A query sees only the keys of its own chunk of so many positions, the first from 0 on.
        segment_ids: A query sees only the keys of its own segment; a pair when queries and keys differ.
        logit_scale: Factor of the content logit.
        implementation: "reference" writes the weights out; "streaming" never does, and needs memory that grows with T
            rather than T·S (differentiable in reverse mode only). None: streaming, unless all weights of a head fit
            one block of one device.
        return_stats: Also return `AttentionStats`.
        precision: Of the products with queries, keys and values, as in `jax.lax.dot`; those within an encoding's terms
            follow `jax.default_matmul_precision`.

    Returns:
        The output [B, T, N, H2] in value's dtype; with return_stats a pair (output, AttentionStats). A row that sees no
        key gives zeros and entropy 0.

    Raises:
        ValueError: An argument that cannot be right, named with what it should be.
        TypeError: A keyword that nobody knows.
    """
    if implementation not in (None, "reference", "streaming"):
        raise ValueError(f'implementation must be "reference", "streaming" or None, not {implementation!r}')
    check_arrays(query, key, value)
    batch, query_length, num_heads, head_dim = query.shape
    key_length = key.shape[1]
    window, chunk_size = check_span(window, chunk_size)
    query_segments, key_segments = _segments(segment_ids, batch, query_length, key_length)
    mask_spec = MaskSpec(
        query_positions=per_token("query_positions", query_positions, batch, query_length),
        key_positions=per_token("key_positions", key_positions, batch, key_length),
        query_segments=query_segments,
        key_segments=key_segments,
        mask=_mask(mask, (batch, num_heads, query_length, key_length)),
        is_causal=is_causal,
        window=window,
        chunk_size=chunk_size,
    )
    if is_causal and isinstance(logit, DistanceLogit):
        logit = dataclasses.replace(logit, function=_Past(logit.function))
    if isinstance(logit, DistanceLogit) and mask_spec.contiguous and not isinstance(query, jax.core.Tracer):
        # Outside of jit the function may be a new one in every call, and what it is part of be compiled as often.
        values = logit.function(logit.parameters, jnp.arange(1 - query_length, key_length))
        logit = DistanceLogit(_Tabulated(1 - query_length), values)
    factor = _logit_scale(logit_scale, batch, num_heads, query_length) / math.sqrt(head_dim)
    if implementation is None:
        small = query_length * key_length <= BLOCK_SIZE**2 and ring_size() == 1
        implementation = "reference" if small else "streaming"
    if not (query_length and key_length):
        output = jnp.zeros((batch, query_length, num_heads, value.shape[-1]), value.dtype)
        entropy = jnp.zeros((batch, num_heads, query_length), jnp.float32)
        return (output, AttentionStats(entropy, jnp.full_like(entropy, -jnp.inf))) if return_stats else output
    output, entropy, logsumexp = _attention(
        query, factor, key, value, logit, value_term, mask_spec, precision, implementation, return_stats
    )
    return (output, AttentionStats(entropy, logsumexp)) if return_stats else output


@functools.partial(jax.jit, static_argnames=("precision", "implementation", "with_entropy"))
def _attention(query, factor, key, value, logit, value_term, mask_spec, precision, implementation, with_entropy):
    # Compiled as one, so that calling it outside of jit costs no compilation per operation.
    dtype = value.dtype
    query, key, value = (x.astype(jnp.float32) if x.dtype == jnp.float64 else x for x in (query, key, value))
    attend: Callable = functools.partial(streaming_attention, with_entropy=with_entropy)
    if implementation == "reference":
        attend = reference_attention
    elif isinstance(logit, ScanLogit):
        attend = scanning_attention
    output, entropy, logsumexp = spread_attention(
        attend,
        query,
        factor,
        key,
        value,
        logit,
        value_term,
        mask_spec,
        precision,
        in_parts=implementation == "streaming",
        with_entropy=with_entropy,
    )
    return output.astype(dtype), entropy, logsumexp


@dataclasses.dataclass(frozen=True)
class _Past:
    """A function of distance that is never asked about the future, where it may have no finite value."""

    function: Callable

    def __call__(self, parameters, distance):
        return self.function(parameters, jnp.maximum(distance, 0))


@dataclasses.dataclass(frozen=True)
class _Tabulated:
    """A function of distance whose values [N, distances] are its parameters."""

    first: int
    """The smallest distance; those that padding asks for beside the values have that of the nearest."""

    def __call__(self, values, distance):
        return values[:, jnp.clip(distance - self.first, 0, values.shape[1] - 1)]


def check_arrays(query, key, value) -> None:
    """Refuse queries, keys and values whose shapes do not go together."""
    for name, array in {"query": query, "key": key, "value": value}.items():
        if array.ndim != 4:
            raise ValueError(f"{name} must have four axes [batch, length, heads, head dim], not shape {array.shape}")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} must be a floating-point array, not {array.dtype}")
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(f"value must have the batch, length and heads of key {key.shape[:3]}, not {value.shape[:3]}")
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(f"key must have the batch and head dim of query {query.shape}, not shape {key.shape}")
    if query.shape[2] % key.shape[2]:
        raise ValueError(f"key heads must divide the query heads: {key.shape[2]} does not divide {query.shape[2]}")


def check_span(window: Any, chunk_size: Any) -> tuple[int | None, int | None]:
    """A window and chunks as Python's integers; refused where they would not hold the query itself."""
    span = {"window": window, "chunk_size": chunk_size}
    for name, number in span.items():
        if number is None:
            continue
        try:
            span[name] = operator.index(number)
        except TypeError:
            span[name] = 0
        if span[name] < 1 or isinstance(number, bool):
            raise ValueError(f"{name} must be an integer of at least 1 (the query itself), not {number!r}")
    return span["window"], span["chunk_size"]


def per_token(name: str, x, batch: int, length: int) -> Array | None:
    """Integers [T] or [B, T] as [1, T] or [B, T]."""
    if x is None:
        return None
    x = jnp.asarray(x)
    if x.shape not in ((length,), (1, length), (batch, length)):
        raise ValueError(f"{name} must have shape [{length}] or [{batch}, {length}], not {list(x.shape)}")
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, not {x.dtype}")
    return x.astype(jnp.int32).reshape(-1, length)  # unsigned ones would wrap around when subtracted


def _segments(segment_ids, batch: int, query_length: int, key_length: int):
    if segment_ids is None:
        return None, None
    if not isinstance(segment_ids, tuple):
        if query_length != key_length:
            lengths = f"{query_length} and {key_length}"
            raise ValueError(f"segment_ids must be a pair (of queries, of keys) when their lengths differ: {lengths}")
        segment_ids = segment_ids, segment_ids
    query_segments, key_segments = segment_ids
    return (
        per_token("segment_ids", query_segments, batch, query_length),
        per_token("segment_ids", key_segments, batch, key_length),
    )


def _mask(mask, shape: tuple[int, ...]) -> Array | None:
    if mask is None:
        return None
    if not hasattr(mask, "dtype"):
        mask = np.asarray(mask)
    if jnp.issubdtype(mask.dtype, jnp.inexact):
        raise ValueError(
            f"mask must be boolean, True where a query may attend, not {mask.dtype}: of zeros and ones, mask != 0 is "
            "one; what is to be added to the logits is given as logit= to dot_product_attention (a DistanceLogit or "
            "BlockLogit)"
        )
    if mask.dtype != bool:
        known_values("booleans, or zeros and ones", lambda x: (x == 0) | (x == 1), mask=mask)
    mask = jnp.asarray(mask)
    if mask.ndim > 4 or any(m not in (1, s) for m, s in zip(mask.shape[::-1], shape[::-1], strict=False)):
        raise ValueError(f"mask must broadcast to [B, N, T, S] = {list(shape)}, not shape {list(mask.shape)}")
    return mask.astype(bool).reshape((1,) * (4 - mask.ndim) + mask.shape)


def _logit_scale(logit_scale, batch: int, num_heads: int, length: int) -> Float[Array, "#B #N T"]:
    logit_scale = jnp.asarray(1.0 if logit_scale is None else logit_scale, jnp.float32)
    shape = logit_scale.shape
    if shape in ((), (num_heads,)):
        logit_scale = logit_scale.reshape(1, -1, 1)
    elif len(shape) != 3 or any(t not in (1, s) for t, s in zip(shape, (batch, num_heads, length), strict=True)):
        raise ValueError(
            f"logit_scale must be a number or have shape [{num_heads}] or [{batch} or 1, {num_heads} or 1, {length}], "
            f"not {list(shape)}"
        )
    return jnp.broadcast_to(logit_scale, (*logit_scale.shape[:2], length))
