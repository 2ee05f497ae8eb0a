"""Which calls the kernels serve."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nope_jax.attention.backends.pallas.pairwise import MAX_NUMBERS, Pairwise
from nope_jax.attention.blocks import CachedLayer, few_queries
from nope_jax.attention.mesh import compute_capability, platform, unused_axes
from nope_jax.encodings import BlockLogit, DistanceLogit, DistanceVectors

DTYPES: dict[str, tuple[Any, ...]] = {
    "tpu": (jnp.float32, jnp.bfloat16),
    "gpu": (jnp.float32, jnp.bfloat16, jnp.float16),
}
"""Of queries, keys and values, by the platform of the kernels."""

MAX_HEAD_DIM = 256
"""On a GPU, where a program keeps whole rows of a block in registers and shared memory."""

SUBLANES, LANES = 8, 128
"""Of a TPU's tiles. XLA lays arrays that do not fill them out as no kernel reads them."""

CAPABILITIES = ("8.0", "9.0", "10.0")
"""The GPUs whose compilers have been asked. Most others have less shared memory."""

DECODING_QUERIES = 8
"""The most queries that the kernel for decoding serves."""


def is_decoding(query_length: int, key_length: int) -> bool:
    """Whether a call gets the kernel for a few queries, which also reads KV caches."""
    return query_length <= DECODING_QUERIES and few_queries(query_length, key_length)


def supports(chip, query, factor, key, value, logit, value_term, mask_spec, precision, *_: Any) -> str | None:
    """Why the kernels for a platform, "tpu" or "gpu", cannot serve a call; None if they can."""
    decoding = is_decoding(query.shape[1], key.shape[1])
    for name, x in (("query", query), ("key", key), ("value", value)):
        if isinstance(x, CachedLayer) and not decoding:
            return f"keys of a KV cache are read by another backend for more than {DECODING_QUERIES} queries"
        if isinstance(x, CachedLayer) and platform() == chip == "tpu" and (x.shape[1] % SUBLANES or x.shape[3] % LANES):
            return (
                f"a KV cache must have a multiple of {SUBLANES} slots and head dims that are multiples of {LANES}, "
                f"not {x.shape[1]} and {x.shape[3]}: it would be copied"
            )
        if x.dtype not in DTYPES[chip]:
            *others, last = (jnp.dtype(dtype).name for dtype in DTYPES[chip])
            return f"{name} must be {', '.join(others)} or {last}, not {x.dtype}"
        if chip == "gpu" and x.shape[-1] > MAX_HEAD_DIM:
            return f"head dims must be at most {MAX_HEAD_DIM}, not {x.shape[-1]} of {name}"
    if value_term is not None and value_term.by_distance is None:
        return "the encoding has a value place, without by_distance"
    if value_term is not None or has_vectors(logit):
        reason = _unserved_vectors(decoding, mask_spec.contiguous)
        if reason is not None:
            return f"{reason} (name another implementation after this one)"
    reason = _unserved_logit(logit, mask_spec.contiguous or decoding)
    if reason is not None:
        return reason
    if mask_spec.mask is not None:
        return "there is a mask; is_causal, window, chunk_size and segment_ids are served"
    if kernel_precision(precision) is None:
        return f"precision must be None, a jax.lax.Precision or its name, not {precision!r}"
    if platform() not in (chip, "cpu"):
        return f"it needs a {chip.upper()} (on a CPU it runs in interpret mode), not a {platform().upper()}"
    if platform() == "gpu" and (compute_capability() or CAPABILITIES[0]) not in CAPABILITIES:
        return f"it needs a GPU of compute capability {', '.join(CAPABILITIES)}, not {compute_capability()}"
    if platform() == chip and unused_axes():
        return f"XLA cannot shard it over the mesh axes {', '.join(unused_axes())}; call it within jax.shard_map"
    return None


def vectors_of(logit: Any, distances: Any) -> DistanceVectors | None:
    """What a logit consists of at each distance, if that is one vector per distance."""
    if not isinstance(logit, BlockLogit) or logit.by_distance is None:
        return None
    found = logit.by_distance(wide(logit.parameters), distances)
    return found if isinstance(found, DistanceVectors) else None


def has_vectors(logit: Any) -> bool:
    return jax.eval_shape(vectors_of, logit, jax.ShapeDtypeStruct((1,), jnp.int32)) is not None


def wide(parameters: Any) -> Any:
    """The parameters in float32, in which the gradients of one row for many distances add up."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, parameters)


def _unserved_vectors(decoding: bool, contiguous: bool) -> str | None:
    if decoding:
        return "terms of one vector per distance are not served in decoding"
    if not contiguous:
        return "with one vector per distance, positions must be consecutive, without query_positions or key_positions"
    return None


def _unserved_logit(logit: Any, any_by_distance: bool) -> str | None:
    """Why the kernels cannot compute a logit; None if they can."""
    if has_vectors(logit):
        return None
    if isinstance(logit, DistanceLogit) and not any_by_distance:
        return "with a DistanceLogit, positions must be consecutive (no query_positions or key_positions)"
    if logit is None or isinstance(logit, DistanceLogit):
        return None
    pairwise = Pairwise.of(logit)
    if pairwise is None:
        wanted = "None, a DistanceLogit, or a BlockLogit with by_pair and heads"
        return f"the logit must be {wanted}, not a {type(logit).__name__} without"
    features = jax.tree.leaves((logit.query_features, logit.key_features))
    for x, axis in zip(features, logit.heads[len(pairwise.shapes) :], strict=True):
        if (x.ndim, axis) not in ((2, None), (3, 2)) or not jnp.issubdtype(x.dtype, jnp.floating):
            return f"features must be floats [B, T], or [B, T, N] with 2 in heads, not {x.dtype} {x.shape} with {axis}"
    if pairwise.size + len(features) > MAX_NUMBERS:
        found = pairwise.size + len(features)
        return f"the logit must have at most {MAX_NUMBERS} parameters per head and features, not {found}"
    return None


_PRECISIONS: dict[Any, lax.Precision] = {
    **dict.fromkeys((None, lax.Precision.DEFAULT, "default", "fastest", "bfloat16"), lax.Precision.DEFAULT),
    **dict.fromkeys((lax.Precision.HIGH, "high", "bfloat16_3x", "tensorfloat32"), lax.Precision.HIGHEST),
    **dict.fromkeys((lax.Precision.HIGHEST, "highest", "float32"), lax.Precision.HIGHEST),
}
"""Of products in a kernel, by what they are called elsewhere. Not every compiler of kernels has one in between."""


def kernel_precision(precision: Any) -> lax.Precision | None:
    """The precision of products in a kernel; None if there is no such."""
    if precision is None:
        precision = getattr(jax.config, "jax_default_matmul_precision", None)
    names = precision if isinstance(precision, tuple) else (precision,)
    found = [_PRECISIONS[name] for name in names if name in _PRECISIONS]
    return max(found, key=lambda each: each.value) if len(found) == len(names) else None
