"""What backends have in common that call a kernel which is not ours: for encodings without a term, no statistics.

Shapes: B batch, T query length, N query heads, H head dim.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from nope_jax.attention.blocks import CachedLayer
from nope_jax.attention.mask_spec import MaskSpec
from nope_jax.attention.mesh import ring_size, unused_axes


def unserved(key: Any, logit: Any, value_term: Any, mask_spec: MaskSpec) -> str | None:
    """Why none of them can serve a call; None if one may."""
    if isinstance(key, CachedLayer):
        return "keys of a KV cache are read by another backend"
    if logit is not None or value_term is not None:
        return "the encoding has a logit or a value place"
    if not mask_spec.contiguous:
        return "positions must be consecutive (no query_positions or key_positions)"
    if ring_size() > 1:
        return "it needs all keys, and the sequence is sharded"
    if unused_axes():
        return f"XLA cannot shard it over the mesh axes {', '.join(unused_axes())}; call it within jax.shard_map"
    return None


def with_factor(query: Shaped[Array, "B T N H"], factor: Float[Array, "#B #N T"]) -> Shaped[Array, "B T N H"]:
    """The queries times their factors, rounded to their dtype."""
    return (query.astype(jnp.float32) * jnp.swapaxes(factor, 1, 2)[..., None]).astype(query.dtype)


def without_statistics(output: Shaped[Array, "B T N H2"]) -> tuple[Array, Array, Array]:
    """The results of a backend: the output, and NaN for entropy and logsumexp."""
    batch, length, heads, _ = output.shape
    unknown = jnp.full((batch, heads, length), jnp.nan, jnp.float32)
    return output, unknown, unknown
