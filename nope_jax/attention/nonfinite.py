"""Products in which what is not finite reaches the rows that see it, and no others.

A weight of 0 hides a token from a row, but 0 · NaN is NaN: a key or value that only later rows see, or that none does
(padding, what a cache held before), would reach others through the products, forward or backward.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped


def finite(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """With 0 for what is not finite."""
    return jnp.where(jnp.isfinite(x), x, 0)


def _product(subscripts: str, precision: jax.lax.PrecisionLike, *operands: Array) -> Array:
    return jnp.einsum(subscripts, *operands, precision=precision, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 3))
def content_logits(
    subscripts: str, query: Float[Array, "..."], key: Float[Array, "..."], precision: jax.lax.PrecisionLike
) -> Float[Array, "..."]:
    """q·k, to be replaced where it is not seen; backward, a gradient of 0 gives 0 whatever the query and key."""
    return _product(subscripts, precision, query, key)


@content_logits.defjvp
def _content_logits_jvp(subscripts, precision, primals, tangents):
    (query, key), (d_query, d_key) = primals, tangents
    product = functools.partial(_product, subscripts, precision)
    moved = product(d_query, finite(key)) + product(finite(query), d_key)
    return content_logits(subscripts, query, key, precision), moved


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 3))
def weighted_sum(
    subscripts: str, weights: Float[Array, "..."], value: Shaped[Array, "..."], precision: jax.lax.PrecisionLike
) -> Float[Array, "..."]:
    """Σ weights · value, float32, in which a value of weight 0 has no part; backward as well."""
    product = functools.partial(_product, subscripts, precision)
    weights = weights.astype(value.dtype)
    out = product(weights, value)

    def parted(out):
        reached = product((weights != 0).astype(value.dtype), (~jnp.isfinite(value)).astype(value.dtype)) > 0
        return jnp.where(reached, out, product(weights, finite(value)))

    # What has come out finite has met nothing else: the rule costs nothing where it is not needed.
    return lax.cond(jnp.isfinite(out).all(), lambda out: out, parted, out)


@weighted_sum.defjvp
def _weighted_sum_jvp(subscripts, precision, primals, tangents):
    (weights, value), (d_weights, d_value) = primals, tangents
    product = functools.partial(_product, subscripts, precision)
    moved = product(d_weights.astype(value.dtype), finite(value)) + product(weights.astype(value.dtype), d_value)
    return weighted_sum(subscripts, weights, value, precision), moved
