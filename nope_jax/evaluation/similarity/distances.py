"""Distances between the attention of heads, and how far back they attend.

Shapes: T length (queries and keys), N heads of one layer, M heads of another. Distances in nats.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nope_jax.encodings import unskew


@jax.jit
def head_distances(
    p: Float[Array, "N T T"], q: Float[Array, "M T T"], queries: Int[Array, ""] | None = None
) -> Float[Array, "N M"]:
    """Distances between the heads of two layers, in nats: 0 for equal weights, at most ln 2.

    D(P, Q) is the Jensen-Shannon divergence of two heads' attention rows, (KL(P || M) + KL(Q || M)) / 2 with
    M = (P + Q) / 2, averaged over the queries (Kazemnejad et al. 2023, arXiv 2305.19466, Figure 4). Their code
    swaps the arguments of the Kullback-Leibler divergence, KL(M || P), which is unbounded, and omits pairs of heads
    with the same number. This function implements the definition, over all pairs, so its numbers differ from those of
    their figure.

    Args:
        p: attention weights, query by key. Rows sum to 1; of rows with a sink, the term of the sink is left out.
        q: attention weights of the other layer.
        queries: number of queries to average over, the first ones. None: all.
    """

    def from_all(head: Float[Array, "T T"]) -> Float[Array, "M"]:
        both = (_relative_to_mean(head, q) + _relative_to_mean(q, head)).sum(-1)
        if queries is None:
            mean = both.mean(-1)
        else:
            mean = jnp.where(jnp.arange(both.shape[-1]) < queries, both, 0).sum(-1) / queries
        return jnp.clip(mean / 2, 0, math.log(2))

    return jax.lax.map(from_all, p)  # one head at a time: the peak memory is a few [M, T, T]


def _relative_to_mean(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """x ln(x / mean of x and y), 0 where x is 0."""
    some = x >= jnp.finfo(x.dtype).tiny
    x = jnp.where(some, x, 1.0)
    # Rounding ruins the logarithm of the ratio where x and y are close, and log1p of the difference where they are not.
    close = x > y / 3
    near = jnp.log1p(jnp.where(close, (x - y) / (x + y), 0.0))
    return jnp.where(some, x * jnp.where(close, near, jnp.log(2 * x / (x + y))), 0.0)


@jax.jit
def weight_by_distance(weights: Float[Array, "N T T"]) -> Float[Array, "N T"]:
    """Mean weight of the key d tokens before the query, over the queries that have such a key."""
    length = weights.shape[-1]
    return unskew(weights).sum(-2)[:, length - 1 :] / (length - jnp.arange(length))
