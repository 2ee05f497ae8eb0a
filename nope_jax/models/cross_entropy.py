"""Softmax cross-entropy over a large vocabulary, computed in chunks so that the full logits are never materialized.

B batch, T length, D model width, V vocabulary; R x S devices that shard rows and sequences, n chunks of C tokens each.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Shaped

from nope_jax.sharding import num_shards, with_logical_constraint

CHUNK = "batch", "length", None
"""Logical axes of one chunk, [R, S, C]: each device processes its own tokens."""


def nll_in_chunks(
    hidden: Shaped[Array, "B T D"],
    weights: Shaped[Array, "D V"],
    targets: Integer[Array | np.ndarray, "B T"],
    chunks: int,
) -> Float[Array, "B T"]:
    """Negative log-likelihood of each target, nats, computed in `chunks` sequential chunks of tokens.

    Differentiable: the backward pass recomputes the logits of each chunk. The gradient of the weights is accumulated in
    float32 on each device and summed over devices once.
    """
    batch, length = targets.shape
    rows, spans = num_shards("batch", batch), num_shards("length", length)
    tokens = batch // rows * (length // spans)
    size = -(-tokens // chunks)

    def cut(x):
        """From [B, T, ...] to [n, R, S, C, ...]."""
        features = x.shape[2:]
        x = jnp.moveaxis(x.reshape(rows, batch // rows, spans, length // spans, *features), 2, 1)
        x = x.reshape(rows, spans, tokens, *features)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, chunks * size - tokens), *[(0, 0)] * len(features)))
        x = jnp.moveaxis(x.reshape(rows, spans, chunks, size, *features), 2, 0)
        return with_logical_constraint(x, (None, *CHUNK, *[None] * len(features)))

    nll = jnp.moveaxis(_nll(cut(hidden), weights, cut(targets)), 0, 2).reshape(rows, spans, -1)[:, :, :tokens]
    nll = jnp.moveaxis(nll.reshape(rows, spans, batch // rows, length // spans), 1, 2)
    return with_logical_constraint(nll.reshape(batch, length), ("batch", "length"))


@jax.custom_vjp
def _nll(
    hidden: Shaped[Array, "n R S C D"], weights: Shaped[Array, "D V"], targets: Int[Array, "n R S C"]
) -> Float[Array, "n R S C"]:
    return _forward(hidden, weights, targets)[0]


def _logits(hidden: Shaped[Array, "R S C D"], weights: Shaped[Array, "D V"]) -> Float[Array, "R S C V"]:
    logits = jnp.einsum("rscd,dv->rscv", hidden, weights, preferred_element_type=jnp.float32)
    return with_logical_constraint(logits, (*CHUNK, "vocab"))


def _is_target(logits: Float[Array, "R S C V"], targets: Int[Array, "R S C"]) -> Bool[Array, "R S C V"]:
    # A comparison, not a gather: devices that shard the vocabulary then only sum one number per token.
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]


def _forward(hidden, weights, targets):
    def chunk(_, of_chunk):
        hidden, targets = of_chunk
        logits = _logits(hidden, weights)
        logsumexp = jax.nn.logsumexp(logits, axis=-1)
        return None, (logsumexp, jnp.where(_is_target(logits, targets), logits, 0).sum(-1))

    _, (logsumexp, of_targets) = jax.lax.scan(chunk, None, (hidden, targets))
    return logsumexp - of_targets, (hidden, weights, targets, logsumexp)


def _backward(kept, gradient):
    hidden, weights, targets, logsumexp = kept

    def chunk(of_weights, of_chunk):
        hidden, targets, logsumexp, gradient = of_chunk
        logits = _logits(hidden, weights)
        of_logits = jnp.exp(logits - logsumexp[..., None]) - _is_target(logits, targets)
        of_logits = (gradient[..., None] * of_logits).astype(hidden.dtype)
        more = jnp.einsum("rscd,rscv->rsdv", hidden, of_logits, preferred_element_type=jnp.float32)
        of_hidden = jnp.einsum("rscv,dv->rscd", of_logits, weights, preferred_element_type=jnp.float32)
        of_weights = with_logical_constraint(of_weights + more, ("batch", "length", None, "vocab"))
        return of_weights, with_logical_constraint(of_hidden.astype(hidden.dtype), (*CHUNK, None))

    zeros = jnp.zeros((*hidden.shape[1:3], *weights.shape), jnp.float32)
    zeros = with_logical_constraint(zeros, ("batch", "length", None, "vocab"))
    of_weights, of_hidden = jax.lax.scan(chunk, zeros, (hidden, targets, logsumexp, gradient))
    of_weights = with_logical_constraint(
        of_weights.sum((0, 1)), ("embed", "vocab")
    )  # each device keeps the sum of its own shard
    return of_hidden, of_weights.astype(weights.dtype), None


_nll.defvjp(_forward, _backward)
