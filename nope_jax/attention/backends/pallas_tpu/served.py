"""Which calls the kernels serve."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from nope_jax.attention.blocks import CachedLayer
from nope_jax.attention.mesh import platform, unused_axes
from nope_jax.encodings import DistanceLogit


def supports(query, factor, key, value, logit, value_term, mask_spec, precision, *_: Any) -> str | None:
    """Why the kernels cannot serve a call; None if they can."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if isinstance(x, CachedLayer):
            return "keys of a KV cache are read by another backend"
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} must be float32 or bfloat16, not {x.dtype}"
    if logit is not None and not isinstance(logit, DistanceLogit):
        return f"the logit must be a DistanceLogit or None, not a {type(logit).__name__}"
    if logit is not None and not mask_spec.contiguous:
        return "with a logit, positions must be consecutive (no query_positions or key_positions)"
    if value_term is not None:
        return "the encoding has a value place"
    if mask_spec.mask is not None:
        return "there is a mask; is_causal, window, chunk_size and segment_ids are served"
    if kernel_precision(precision) is None:
        return f"precision must be None, a jax.lax.Precision or its name, not {precision!r}"
    if platform() not in ("tpu", "cpu"):
        return f"it needs a TPU (on a CPU it runs in interpret mode), not a {platform()}"
    if platform() == "tpu" and unused_axes():
        return f"XLA cannot shard it over the mesh axes {', '.join(unused_axes())}; call it within jax.shard_map"
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
