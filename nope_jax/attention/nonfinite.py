"""Products in which non-finite keys and values affect only the queries that see them.

A weight of 0 hides a token from a query, but 0 · NaN is NaN. Without these products, a key or value that only later
queries see, or that no query sees (padding, stale cache entries), would affect other queries, forward or backward.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from nope_jax.jax_settings import with_implicit_promotion


def finite(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """Replace non-finite entries by 0."""
    return jnp.where(jnp.isfinite(x), x, 0)


def _product(subscripts: str, precision: jax.lax.PrecisionLike, *operands: Array) -> Array:
    return jnp.einsum(subscripts, *operands, precision=precision, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 3))
def content_logits(
    subscripts: str, query: Float[Array, "..."], key: Float[Array, "..."], precision: jax.lax.PrecisionLike
) -> Float[Array, "..."]:
    """q·k; the caller masks hidden pairs. In the backward pass, a gradient of 0 gives 0 for any query and key."""
    return _product(subscripts, precision, query, key)


@content_logits.defjvp
@with_implicit_promotion
def _content_logits_jvp(subscripts, precision, primals, tangents):
    (query, key), (d_query, d_key) = primals, tangents
    product = functools.partial(_product, subscripts, precision)
    moved = product(d_query, finite(key)) + product(finite(query), d_key)
    return content_logits(subscripts, query, key, precision), moved


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 3))
def weighted_sum(
    subscripts: str, weights: Float[Array, "..."], value: Shaped[Array, "..."], precision: jax.lax.PrecisionLike
) -> Float[Array, "..."]:
    """Σ weights · value in float32, ignoring values of weight 0, also in the backward pass."""
    product = functools.partial(_product, subscripts, precision)
    weights = weights.astype(value.dtype)
    out = product(weights, value)

    def parted(out):
        reached = product((weights != 0).astype(value.dtype), (~jnp.isfinite(value)).astype(value.dtype)) > 0
        return jnp.where(reached, out, product(weights, finite(value)))

    # A finite output has no non-finite terms, so the correction costs nothing when it is not needed.
    return lax.cond(jnp.isfinite(out).all(), lambda out: out, parted, out)


@weighted_sum.defjvp
@with_implicit_promotion
def _weighted_sum_jvp(subscripts, precision, primals, tangents):
    (weights, value), (d_weights, d_value) = primals, tangents
    product = functools.partial(_product, subscripts, precision)
    moved = product(d_weights.astype(value.dtype), finite(value)) + product(weights.astype(value.dtype), d_value)
    return weighted_sum(subscripts, weights, value, precision), moved
