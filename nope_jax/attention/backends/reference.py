"""Reference attention: the definition, with materialized weights. Every other backend must agree with it.

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, H head dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from nope_jax.attention.blocks import CachedLayer, whole
from nope_jax.attention.mask_spec import MaskSpec
from nope_jax.attention.nonfinite import content_logits, finite, weighted_sum
from nope_jax.attention.softcap import softcapped
from nope_jax.encodings import BlockLogit, BlockValue, ScanLogit, Tile
from nope_jax.encodings.encoding import MASKED, Logit


def reference_attention(
    query: Shaped[Array, "B T N H"],
    factor: Float[Array, "#B #N T"],
    key: Shaped[Array, "B S K H"] | CachedLayer,
    value: Shaped[Array, "B S K H2"] | CachedLayer,
    logit: Logit | None,
    value_term: BlockValue | None,
    mask_spec: MaskSpec,
    precision: jax.lax.PrecisionLike = None,
    with_entropy: bool = True,
    softcap: float | None = None,
) -> tuple[Shaped[Array, "B T N H2"], Float[Array, "B N T"], Float[Array, "B N T"]]:
    """Compute softmax(cap(factor · q·k) + logit) · value, and the entropy and logsumexp of each row, in float32."""
    key, value = whole(key), whole(value)
    softmax, tile = reference_softmax(query, factor, key, logit, mask_spec, precision, softcap)
    value = jnp.repeat(value, query.shape[2] // value.shape[2], axis=2)
    out = jnp.swapaxes(weighted_sum("bnts,bsnh->bnth", softmax.weights, value, precision), 1, 2)
    if value_term is not None:
        out += jnp.swapaxes(value_term.block(softmax.weights, tile), 1, 2)
    return out.astype(value.dtype), *softmax.statistics()


class Softmax(NamedTuple):
    """Attention weights, the logits relative to the largest in their row, and the normalizer."""

    weights: Float[Array, "B N T S"]
    relative: Float[Array, "B N T S"]
    largest: Float[Array, "B N T 1"]
    normaliser: Float[Array, "B N T 1"]
    some: Bool[Array, "B N T 1"]
    """Whether the row sees a key."""

    def statistics(self) -> tuple[Float[Array, "B N T"], Float[Array, "B N T"]]:
        """Entropy and logsumexp."""
        logsumexp = jnp.where(self.some, self.largest + jnp.log(self.normaliser), -jnp.inf)
        # Both terms are relative to the largest logit, since a difference of two large numbers would lose precision.
        spread = jnp.log(self.normaliser) - jnp.sum(self.weights * self.relative, axis=-1, keepdims=True)
        entropy = jnp.where(self.some, spread, 0.0)
        return entropy[..., 0], logsumexp[..., 0]


def reference_softmax(
    query: Shaped[Array, "B T N H"],
    factor: Float[Array, "#B #N T"],
    key: Shaped[Array, "B S K H"],
    logit: Logit | None,
    mask_spec: MaskSpec,
    precision: jax.lax.PrecisionLike = None,
    softcap: float | None = None,
) -> tuple[Softmax, Tile]:
    """Return softmax(cap(factor · q·k) + logit), and all queries and keys as one tile."""
    key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
    query, key = (jnp.swapaxes(x, 1, 2) for x in (query, key))
    query_length, key_length = query.shape[2], key.shape[2]
    visible = mask_spec.matrix(query_length, key_length)
    query_positions, key_positions = mask_spec.positions(query_length, key_length)
    # Scaled before the product: XLA would fuse a later factor into its consumers and round it in two ways.
    scaled = query.astype(jnp.float32) * factor[..., None]
    tile = Tile(
        query=finite(scaled),
        factor=jnp.broadcast_to(factor, (factor.shape[0], *query.shape[1:3])),
        key=finite(key),
        query_positions=query_positions,
        key_positions=key_positions,
        query_features=getattr(logit, "query_features", None),
        key_features=getattr(logit, "key_features", None),
        distances=jnp.arange(1 - query_length, key_length, dtype=jnp.int32) if mask_spec.contiguous else None,
    )
    if isinstance(logit, BlockLogit) and logit.by_distance is not None and mask_spec.contiguous:
        tile = tile._replace(by_distance=logit.by_distance(logit.parameters, tile.distances))

    logits = content_logits("bnth,bnsh->bnts", scaled, key.astype(jnp.float32), precision)
    if softcap is not None:
        logits = softcapped(jnp.where(visible, logits, 0.0), softcap)
    if isinstance(logit, ScanLogit):
        logits, _ = logit.block(tile, logits, visible, jnp.zeros(logits.shape[:-1], jnp.float32))
    elif logit is not None:
        logits += logit.block(tile)
    logits = jnp.where(visible, logits, MASKED)
    largest = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    relative = logits - largest
    normaliser = jnp.exp(relative).sum(-1, keepdims=True)
    seen = ~(logits <= MASKED / 2)  # true for NaN, which must propagate
    some = seen.any(-1, keepdims=True)
    weights = jnp.where(seen, jnp.exp(relative) / normaliser, 0.0)
    return Softmax(weights, relative, largest, normaliser, some), tile
