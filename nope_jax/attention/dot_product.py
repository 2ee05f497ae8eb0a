"""Scaled dot-product attention with everything an encoding may ask of it, and its statistics.

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
from nope_jax.attention.flax_layer import for_flax_layers
from nope_jax.attention.mask_spec import MaskSpec, make_mask_spec
from nope_jax.attention.mesh import with_auto_axes
from nope_jax.attention.sharded import spread_attention
from nope_jax.encodings import BlockValue, DistanceLogit
from nope_jax.encodings.encoding import Logit


class AttentionStats(NamedTuple):
    """What the weights of each row look like."""

    entropy: Float[Array, "B N T"]
    """-Σ a·ln a in nats: 0 on one key, ln n when spread evenly over n keys."""
    logsumexp: Float[Array, "B N T"]
    """ln Σ e^logit; -inf in a row that sees no key."""


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
    implementation: str | Sequence[str] | None = None,
    return_stats: bool = False,
    precision: jax.lax.PrecisionLike = None,
) -> Any:
    """softmax(logit_scale · q·k/√H + logit) · v over the keys that each query may see; softmax in float32.

    Queries, keys and values may differ in dtype. All is computed from them as they are, in float32 where two differ;
    float64 ones are rounded to float32 first. It can be given as `attention_fn` to `nnx.MultiHeadAttention` and
    `nn.MultiHeadDotProductAttention`, as `nope_jax.attention.flax_layer` says.

    Under a mesh in context (`jax.set_mesh`), or with arrays on one of Explicit axes, it is spread over the mesh's
    devices, as `nope_jax.attention.sharded` says.

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
            rather than T·S (differentiable in reverse mode only). Of several names the first that can serve the call.
            None: streaming, unless all weights of a head fit one block of one device.
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
    implementation: str | Sequence[str] | None = None,
    return_stats: bool = False,
    precision: jax.lax.PrecisionLike = None,
) -> Any:
    """`dot_product_attention` of arrays and a rule that have been checked."""
    factor, logit = _factor_and_logit(query, key, logit, mask_spec, logit_scale)
    call = query, factor, key, value, logit, value_term, mask_spec, precision, return_stats
    backend = choose(implementation, *call)
    if query.shape[1] and key.shape[1]:
        output, *of_rows = _attend(backend, *call)
    else:
        output = jnp.zeros((*query.shape[:3], value.shape[-1]), value.dtype)
        entropy = jnp.zeros((query.shape[0], query.shape[2], query.shape[1]), jnp.float32)
        of_rows = entropy, jnp.full_like(entropy, -jnp.inf)
    return (output, AttentionStats(*of_rows)) if return_stats else output


def attend_weights(
    query,
    key,
    logit: Logit | None,
    mask_spec: MaskSpec,
    *,
    logit_scale: Any = None,
    return_stats: bool = False,
    precision: jax.lax.PrecisionLike = None,
) -> Any:
    """The weights of `attend`, written out: [B, N, T, S], float32."""
    factor, logit = _factor_and_logit(query, key, logit, mask_spec, logit_scale)
    weights, *of_rows = _weights(query, factor, key, logit, mask_spec, precision)
    return (weights, AttentionStats(*of_rows)) if return_stats else weights


def _factor_and_logit(query, key, logit, mask_spec, logit_scale):
    """logit_scale/√H as an array, and the logit as a backend evaluates it."""
    (batch, query_length, num_heads, head_dim), key_length = query.shape, key.shape[1]
    if mask_spec.is_causal and isinstance(logit, DistanceLogit):
        logit = dataclasses.replace(logit, function=_Past(logit.function))
    if isinstance(logit, DistanceLogit) and mask_spec.contiguous and not isinstance(query, jax.core.Tracer):
        # Outside of jit the function may be a new one in every call, and what it is part of be compiled as often.
        values = logit.function(logit.parameters, jnp.arange(1 - query_length, key_length))
        logit = DistanceLogit(_Tabulated(1 - query_length), values)
    return _logit_scale(logit_scale, batch, num_heads, query_length) / math.sqrt(head_dim), logit


# Compiled as one, so that calling it outside of jit costs no compilation per operation.
@functools.partial(jax.jit, static_argnames=("backend", "precision", "with_entropy"))
def _attend(backend, query, factor, key, value, logit, value_term, mask_spec, precision, with_entropy):
    query, key, wide = (_at_most_float32(x) for x in (query, key, value))
    call = query, factor, key, wide, logit, value_term, mask_spec, precision, with_entropy
    output, entropy, logsumexp = spread_attention(backend, *call)
    return output.astype(value.dtype), entropy, logsumexp


@functools.partial(jax.jit, static_argnames="precision")
def _weights(query, factor, key, logit, mask_spec, precision):
    query, key = _at_most_float32(query), _at_most_float32(key)
    softmax, _ = reference_softmax(query, factor, key, logit, mask_spec, precision)
    return softmax.weights, *softmax.statistics()


def _at_most_float32(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    return x.astype(jnp.float32) if x.dtype == jnp.float64 else x


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


def _logit_scale(logit_scale, batch: int, num_heads: int, length: int) -> Float[Array, "#B #N T"]:
    if logit_scale is None:
        return jnp.ones((1, 1, length), jnp.float32)
    logit_scale = jnp.asarray(logit_scale, jnp.float32)
    shape = logit_scale.shape
    if shape in ((), (num_heads,)):
        logit_scale = logit_scale.reshape(1, -1, 1)
    elif len(shape) != 3 or any(t not in (1, s) for t, s in zip(shape, (batch, num_heads, length), strict=True)):
        raise ValueError(
            f"logit_scale must be a number or have shape [{num_heads}] or [{batch} or 1, {num_heads} or 1, {length}], "
            f"not {list(shape)}"
        )
    return jnp.broadcast_to(logit_scale, (*logit_scale.shape[:2], length))
