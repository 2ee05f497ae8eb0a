"""Attention as it is defined, with the weights written out: what every other implementation must agree with.

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, H head dim.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from nope_jax.attention.visibility import Visibility
from nope_jax.encodings import Block, BlockLogit, BlockValue, ScanLogit
from nope_jax.encodings.encoding import Logit

MASKED = -1e30
"""Logit of a key that is not seen: far below any other, yet finite, so that no inf - inf arises."""


def reference_attention(
    query: Shaped[Array, "B T N H"],
    factor: Float[Array, "#B #N T"],
    key: Shaped[Array, "B S K H"],
    value: Shaped[Array, "B S K H2"],
    logit: Logit | None,
    value_term: BlockValue | None,
    visibility: Visibility,
    precision: jax.lax.PrecisionLike = None,
) -> tuple[Shaped[Array, "B T N H2"], Float[Array, "B N T"], Float[Array, "B N T"]]:
    """softmax(factor · q·k + logit) · value, with entropy and logsumexp of each row, in float32 inside.

    Args as in `dot_product_attention`; factor is temperature/√H.
    """
    groups = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    visible = visibility.matrix(query.shape[1], key.shape[1])
    query_positions, key_positions = visibility.positions(query.shape[1], key.shape[1])
    block = Block(
        query=jnp.swapaxes(query, 1, 2).astype(jnp.float32) * factor[..., None],
        factor=jnp.broadcast_to(factor, (factor.shape[0], query.shape[2], query.shape[1])),
        key=jnp.swapaxes(key, 1, 2),
        query_positions=query_positions,
        key_positions=key_positions,
        query_features=getattr(logit, "query_features", None),
        key_features=getattr(logit, "key_features", None),
        distances=jnp.arange(1 - query.shape[1], key.shape[1]) if visibility.contiguous else None,
    )
    if isinstance(logit, BlockLogit) and logit.by_distance is not None and visibility.contiguous:
        block = block._replace(by_distance=logit.by_distance(logit.parameters, block.distances))

    # Scaled before the product: a factor after it would be fused into what follows, rounded in two ways.
    logits = jnp.einsum("bnth,bnsh->bnts", block.query, block.key.astype(jnp.float32), precision=precision)
    if isinstance(logit, ScanLogit):
        added, _ = logit.function(logit.parameters, block, logits, visible, jnp.zeros(logits.shape[:-1]))
        logits += added
    elif logit is not None:
        logits += logit.block(block)
    logits = jnp.where(visible, logits, MASKED)
    largest = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    relative = logits - largest
    normaliser = jnp.exp(relative).sum(-1, keepdims=True)
    some = jnp.broadcast_to(visible.any(-1, keepdims=True), normaliser.shape)
    weights = jnp.where(some, jnp.exp(relative) / normaliser, 0.0)

    out = jnp.einsum(
        "bnts,bsnh->btnh", weights.astype(value.dtype), value, precision=precision, preferred_element_type=jnp.float32
    )
    if value_term is not None:
        out += jnp.swapaxes(value_term.block(weights, block), 1, 2)
    logsumexp = jnp.where(some, largest + jnp.log(normaliser), -jnp.inf)
    # Both terms are relative to the largest logit: the difference of two large numbers would lose the entropy.
    spread = jnp.log(normaliser) - jnp.sum(weights * jnp.where(visible, relative, 0.0), axis=-1, keepdims=True)
    entropy = jnp.where(some, spread, 0.0)
    return out.astype(value.dtype), entropy[..., 0], logsumexp[..., 0]
