"""Scaled dot-product attention with the terms that encodings add, and its statistics.

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, H head dim.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Integer, Shaped

from nope_jax.attention.backends import choose
from nope_jax.attention.backends.reference import reference_softmax
from nope_jax.attention.blocks import CachedLayer, whole
from nope_jax.attention.flax_layer import for_flax_layers
from nope_jax.attention.mask_spec import MaskSpec, make_mask_spec
from nope_jax.attention.mesh import with_auto_axes
from nope_jax.attention.sharded import spread_attention
from nope_jax.attention.softmax_state import with_sink
from nope_jax.encodings import BlockValue, DistanceLogit
from nope_jax.encodings.checks import as_array, boolean, positive
from nope_jax.encodings.encoding import Logit
from nope_jax.jax_settings import with_implicit_promotion


class AttentionStats(NamedTuple):
    """Statistics of the attention weights of each query."""

    entropy: Float[Array, "B N T"]
    """-Σ a·ln a in nats: 0 if all weight is on one key, ln n for uniform weights over n keys."""
    logsumexp: Float[Array, "B N T"]
    """ln Σ e^logit; -inf for a query that sees no key."""


@with_implicit_promotion
@with_auto_axes
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
    qk_scale: float | None = None,
    softcap: float | None = None,
    implementation: str | Sequence[str] | None = None,
    return_stats: bool = False,
    precision: jax.lax.PrecisionLike = None,
) -> Any:
    """Compute softmax(logit_scale · q·k/√H + logit) · v over the keys visible to each query, with a float32 softmax.

    Queries, keys and values may have different dtypes and are used as given; a product of two different dtypes is
    computed in float32. Only float64 inputs are first rounded to float32. The function can be passed as `attention_fn`
    to `nnx.MultiHeadAttention` and `nn.MultiHeadDotProductAttention`; see `nope_jax.attention.flax_layer`.

    With a mesh in context (`jax.set_mesh`), or with arrays on a mesh with Explicit axes, the computation is sharded
    over the devices of the mesh; see `nope_jax.attention.sharded`.

    Args:
        query: Queries.
        key: Keys; K must divide N, and query head n attends to key head n // (N/K).
        value: Values.
        logit: Term added to the scaled content logits, computed block by block (`nope_jax.encodings.DistanceLogit`,
            `BlockLogit`, `ScanLogit`).
        value_term: Term added to the output (`nope_jax.encodings.BlockValue`).
        query_positions: Positions of the queries. Default: S-T..S-1, aligned with the end of the keys, so a single
            query against a KV cache is its last token. Required for a partially filled cache.
        key_positions: Positions of the keys. Default: 0..S-1.
        mask: Boolean mask, True where a query may attend; integers 0 and 1 are also accepted. Additive floating-point
            masks (0 and -inf) are refused: pass them as a `logit`. Within jit, any integer other than 0 is True.
        is_causal: Mask keys at later positions than the query.
        window: Mask keys at a distance of `window` positions or more; with 1, a query sees only itself.
        chunk_size: Mask keys outside the query's chunk of `chunk_size` positions; chunks start at position 0.
        segment_ids: Mask keys of other segments than the query's; a pair if queries and keys have different segments.
        logit_scale: Factor of the content logits.
        qk_scale: Factor of q·k in place of 1/√H.
        softcap: Cap of the scaled content logits: softcap · tanh(logit / softcap), before `logit` is added (Gemma 2).
        implementation: "reference" materializes the weights. "streaming" does not: its memory grows with T rather than
            T·S (differentiable once, in reverse mode; jvp and second derivatives need "reference"). "pallas_tpu" and
            "pallas_gpu" do the same in kernels for TPUs and for NVIDIA GPUs, for terms by distance, of pairs, or none,
            without a mask; "splash" is JAX's own for TPUs, "cudnn" NVIDIA's, without terms and statistics. Of several
            names, the first that supports the call is used. None: on a TPU or GPU its kernels, where they serve;
            otherwise streaming, unless all weights of a head fit in one block on one device. docs/performance.md says
            more.
        return_stats: Also return `AttentionStats`.
        precision: Precision of the products with queries, keys and values, as in `jax.lax.dot`; products within an
            encoding's terms follow `jax.default_matmul_precision`.

    Returns:
        The output [B, T, N, H2] in value's dtype; with return_stats, a pair (output, AttentionStats). For a query that
        sees no key, output and entropy are 0.

    Raises:
        ValueError: An argument is invalid; the message names it and what it should be.
        TypeError: A keyword is unknown.
    """
    check_arrays(query, key, value)
    mask_spec = make_mask_spec(
        query,
        key,
        query_positions=query_positions,
        key_positions=key_positions,
        mask=mask,
        is_causal=is_causal,
        window=window,
        chunk_size=chunk_size,
        segment_ids=segment_ids,
    )
    return attend(
        query,
        key,
        value,
        logit,
        value_term,
        mask_spec,
        logit_scale=logit_scale,
        qk_scale=qk_scale,
        softcap=softcap,
        implementation=implementation,
        return_stats=return_stats,
        precision=precision,
    )


def attend(
    query,
    key,
    value,
    logit: Logit | None,
    value_term: BlockValue | None,
    mask_spec: MaskSpec,
    *,
    logit_scale: Any = None,
    qk_scale: float | None = None,
    softcap: float | None = None,
    sink: Float[Array, "N"] | None = None,
    implementation: str | Sequence[str] | None = None,
    return_stats: bool = False,
    precision: jax.lax.PrecisionLike = None,
) -> Any:
    """`dot_product_attention` on validated arrays and a `MaskSpec`, with an encoding's sink."""
    positive(qk_scale=qk_scale, softcap=softcap)
    boolean(return_stats=return_stats)
    factor, logit = _factor_and_logit(query, key, logit, mask_spec, logit_scale, qk_scale)
    call = query, factor, key, value, logit, value_term, mask_spec, precision, return_stats, softcap
    backend = choose(implementation, *call, statistics=return_stats or sink is not None)
    if query.shape[1] and key.shape[1]:
        output, *of_rows = _attend(backend, *call)
    else:
        output = jnp.zeros((*query.shape[:3], value.shape[-1]), value.dtype)
        entropy = jnp.zeros((query.shape[0], query.shape[2], query.shape[1]), jnp.float32)
        of_rows = entropy, jnp.full_like(entropy, -jnp.inf)
    if sink is not None:
        output, *of_rows = _with_sink(output, *of_rows, sink)
    return (output, AttentionStats(*of_rows)) if return_stats else output


def attend_weights(
    query,
    key,
    logit: Logit | None,
    mask_spec: MaskSpec,
    *,
    logit_scale: Any = None,
    qk_scale: float | None = None,
    softcap: float | None = None,
    sink: Float[Array, "N"] | None = None,
    return_stats: bool = False,
    precision: jax.lax.PrecisionLike = None,
) -> Any:
    """The attention weights of `attend`: [B, N, T, S], float32."""
    positive(qk_scale=qk_scale, softcap=softcap)
    factor, logit = _factor_and_logit(query, key, logit, mask_spec, logit_scale, qk_scale)
    weights, entropy, logsumexp = _weights(query, factor, key, logit, mask_spec, precision, softcap)
    if sink is not None:
        share, entropy, logsumexp = with_sink(entropy, logsumexp, sink)
        weights *= share[..., None]
    return (weights, AttentionStats(entropy, logsumexp)) if return_stats else weights


def _factor_and_logit(query, key, logit, mask_spec, logit_scale, qk_scale):
    """Return the factor of q·k as an array, and the logit in the form that backends evaluate."""
    (batch, query_length, num_heads, head_dim), key_length = query.shape, key.shape[1]
    if not isinstance(logit, Logit | None):
        raise ValueError(f"logit must be a DistanceLogit, BlockLogit, ScanLogit or None, not a {type(logit).__name__}")
    if mask_spec.is_causal and isinstance(logit, DistanceLogit):
        logit = dataclasses.replace(logit, function=_Past(logit.function))
    if isinstance(logit, DistanceLogit):
        distances, values_of = jnp.arange(1 - query_length, key_length), logit.values
        tabulates = mask_spec.contiguous and not isinstance(query, jax.core.Tracer)
        values = values_of(distances) if tabulates else jax.eval_shape(values_of, distances)
        if len(values) not in (1, num_heads):
            raise ValueError(f"logit must have a row for each of {num_heads} heads, or one for all, not {len(values)}")
        if tabulates:
            # The function may be a new object in every call, which would trigger a recompilation each time.
            logit = DistanceLogit(_Tabulated(1 - query_length), values)
    factor = _logit_scale(logit_scale, batch, num_heads, query_length)
    return factor / math.sqrt(head_dim) if qk_scale is None else factor * qk_scale, logit


# Jitted as a whole, so a call outside jit does not compile operation by operation.
@functools.partial(jax.jit, static_argnames=("backend", "precision", "with_entropy", "softcap"))
def _attend(backend, query, factor, key, value, logit, value_term, mask_spec, precision, with_entropy, softcap):
    query, key, wide = (_at_most_float32(x) for x in (query, key, value))
    call = query, factor, key, wide, logit, value_term, mask_spec, precision, with_entropy, softcap
    output, entropy, logsumexp = spread_attention(backend, *call)
    return output.astype(value.dtype), entropy, logsumexp


@functools.partial(jax.jit, static_argnames=("precision", "softcap"))
def _weights(query, factor, key, logit, mask_spec, precision, softcap):
    query, key = _at_most_float32(query), _at_most_float32(key)
    softmax, _ = reference_softmax(query, factor, key, logit, mask_spec, precision, softcap)
    return softmax.weights, *softmax.statistics()


@jax.jit
def _with_sink(output, entropy, logsumexp, sink):
    share, *of_rows = with_sink(entropy, logsumexp, sink)
    scaled = output.astype(jnp.float32) * jnp.swapaxes(share, 1, 2)[..., None]
    return scaled.astype(output.dtype), *of_rows


def _at_most_float32(x: Shaped[Array, "*shape"] | CachedLayer) -> Shaped[Array, "*shape"] | CachedLayer:
    return whole(x).astype(jnp.float32) if x.dtype == jnp.float64 else x


@dataclasses.dataclass(frozen=True)
class _Past:
    """A function of distance, with negative distances (future keys) clipped to 0: it may not be finite there."""

    function: Callable

    def __call__(self, parameters, distance):
        return self.function(parameters, jnp.maximum(distance, 0))


@dataclasses.dataclass(frozen=True)
class _Tabulated:
    """A function of distance given by a table: its parameters are its values [N, distances]."""

    first: int
    """The smallest distance. Distances outside the table, which occur in padding, are clipped to its ends."""

    def __call__(self, values, distance):
        return values[:, jnp.clip(distance - self.first, 0, values.shape[1] - 1)]


def check_arrays(query, key, value) -> None:
    """Refuse queries, keys and values with incompatible shapes or invalid dtypes."""
    for name, array in {"query": query, "key": key, "value": value}.items():
        if not hasattr(array, "ndim"):
            raise ValueError(f"{name} must be an array, not a {type(array).__name__}")
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


def _logit_scale(logit_scale, batch: int, num_heads: int, length: int) -> Float[Array, "#B #N T"]:
    if logit_scale is None:
        return jnp.ones((1, 1, length), jnp.float32)
    logit_scale = as_array("logit_scale", logit_scale).astype(jnp.float32)
    shape = logit_scale.shape
    if shape in ((), (num_heads,)):
        logit_scale = logit_scale.reshape(1, -1, 1)
    elif len(shape) != 3 or any(t not in (1, s) for t, s in zip(shape, (batch, num_heads, length), strict=True)):
        raise ValueError(
            f"logit_scale must be a number or have shape [{num_heads}] or [{batch} or 1, {num_heads} or 1, {length}], "
            f"not {list(shape)}"
        )
    return jnp.broadcast_to(logit_scale, (*logit_scale.shape[:2], length))
