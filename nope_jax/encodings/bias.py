"""Biases of the attention logit that depend on distance: ALiBi (Press et al. 2022), T5 (Raffel et al. 2020).

Shapes: N query heads, B batch, T query length, S key length.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nope_jax.encodings.encoding import DistanceLogit, Encoding, Params, Sizes


def alibi_slopes(num_heads: int) -> Float[Array, "{num_heads}"]:
    """Slopes of ALiBi, float32: 2^(-8h/N) for h = 1..N when N is a power of two.

    For other N: those of the power of two below, then every second one of the power of two above
    (Press et al. 2022, arXiv 2108.12409, and its code).

    Raises:
        ValueError: num_heads is not positive.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, not {num_heads}")
    below = 2 ** int(math.log2(num_heads))
    slopes = [2 ** (-8 * h / below) for h in range(1, below + 1)]
    slopes += [2 ** (-4 * h / below) for h in range(1, 2 * (num_heads - below), 2)]
    return jnp.array(slopes, jnp.float32)


@dataclasses.dataclass(frozen=True)
class ALiBi(Encoding):
    """q·k/√H - slope_h · distance: the bias is added after the division by √H and carries a slope per head.

    Press et al. 2022, arXiv 2108.12409. Without a causal mask it is symmetric in distance.
    """

    def logit(self, params: Params, query, key, query_features=None, key_features=None):
        slopes = params["slopes"] if "slopes" in params else alibi_slopes(query.shape[2])
        return DistanceLogit(_alibi, slopes)


def _alibi(slopes: Float[Array, "N"], distance: Int[Array, "*shape"]) -> Float[Array, "N *shape"]:
    return -slopes.astype(jnp.float32).reshape(-1, *[1] * distance.ndim) * jnp.abs(distance)


def t5_bucket(
    relative_position: Int[Array, "*shape"], *, bidirectional: bool, num_buckets: int = 32, max_distance: int = 128
) -> Int[Array, "*shape"]:
    """Bucket of each relative position: exact near, logarithmic far, one for all the farthest (Raffel et al. 2020).

    Args:
        relative_position: Key position minus query position: the past is negative.
        bidirectional: Half of the buckets are for the future. A decoder does not need them: with the default 32 it has
            16 exact buckets in the past, where the table often shown (8 exact ones) is the bidirectional one.
        num_buckets: Buckets in all.
        max_distance: The distance that uses up the logarithmic buckets; all farther ones share the last.

    Raises:
        ValueError: num_buckets or max_distance leave no room for exact and logarithmic buckets.
    """
    _check_buckets(bidirectional, num_buckets, max_distance)
    future = jnp.zeros_like(relative_position)
    distance = jnp.maximum(-relative_position, 0)
    if bidirectional:
        num_buckets //= 2
        future = jnp.where(relative_position > 0, num_buckets, 0)
        distance = jnp.abs(relative_position)
    return future + jnp.array(_past_buckets(num_buckets, max_distance))[jnp.minimum(distance, max_distance)]


def _past_buckets(num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of the distances 0..max_distance. In float64, so that no device's logarithm moves a border."""
    exact = num_buckets // 2
    distance = np.arange(1, max_distance + 1)
    log = np.log(distance / exact) / np.log(max_distance / exact) * (num_buckets - exact)
    bucket = np.where(distance < exact, distance, exact + np.floor(log + 1e-9))
    return np.concatenate([[0], np.minimum(bucket, num_buckets - 1)]).astype(np.int32)


def _check_buckets(bidirectional: bool, num_buckets: int, max_distance: int) -> None:
    least = 4 if bidirectional else 2
    if num_buckets < least or num_buckets % least:
        raise ValueError(f"num_buckets must be a positive multiple of {least}, not {num_buckets}")
    if max_distance <= num_buckets // least:
        raise ValueError(f"max_distance must be above {num_buckets // least} (the exact buckets), not {max_distance}")


@dataclasses.dataclass(frozen=True)
class T5(Encoding):
    """q·k/√H + table[bucket(distance), h], one table for all layers (Raffel et al. 2020, arXiv 1910.10683).

    T5 itself leaves out the 1/√H, which its initialisation absorbs; here it stays. Where both directions are seen the
    bias tells them apart.
    """

    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = False

    def __post_init__(self):
        _check_buckets(self.bidirectional, self.num_buckets, self.max_distance)

    def init_shared(self, key, sizes: Sizes) -> Params:
        return {"table": 0.02 * jax.random.normal(key, (self.num_buckets, sizes.num_heads))}

    def logit(self, params: Params, query, key, query_features=None, key_features=None):
        return DistanceLogit(self._bias, params["table"])

    def _bias(self, table: Float[Array, "buckets N"], distance: Int[Array, "*shape"]) -> Float[Array, "N *shape"]:
        bucket = t5_bucket(
            -distance,
            bidirectional=self.bidirectional,
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
        )
        return jnp.moveaxis(table.astype(jnp.float32)[bucket], -1, 0)
