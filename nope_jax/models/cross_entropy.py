"""Softmax cross-entropy over a large vocabulary, computed in chunks so that the full logits are never materialized.

B batch, T length, D model width, V vocabulary; R x S devices that shard rows and sequences, n chunks of C tokens each.
"""

import functools
from collections.abc import Callable

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
    bias: Float[Array, "V"] | None = None,
    finish: Callable[[Array, Array | None], Array] = lambda products, bias: products,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Negative log-likelihood of each target, nats, and logsumexp of its logits, in `chunks` sequential chunks.

    Differentiable: the backward pass recomputes the logits of each chunk. The gradient of the weights is accumulated in
    float32 on each device and summed over devices once.

    Args:
        hidden: What the weights are multiplied with.
        weights: Those of the head.
        targets: The tokens to predict.
        chunks: Number of chunks.
        bias: Second argument of `finish`.
        finish: Function from products [..., V], float32, and bias to logits.
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

    def join(x):
        """From [n, R, S, C] to [B, T]."""
        x = jnp.moveaxis(x, 0, 2).reshape(rows, spans, -1)[:, :, :tokens]
        x = jnp.moveaxis(x.reshape(rows, spans, batch // rows, length // spans), 1, 2)
        return with_logical_constraint(x.reshape(batch, length), ("batch", "length"))

    nll, logsumexp = _nll(finish, cut(hidden), weights, bias, cut(targets))
    return join(nll), join(logsumexp)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll(
    finish: Callable[[Array, Array | None], Array],
    hidden: Shaped[Array, "n R S C D"],
    weights: Shaped[Array, "D V"],
    bias: Float[Array, "V"] | None,
    targets: Int[Array, "n R S C"],
) -> tuple[Float[Array, "n R S C"], Float[Array, "n R S C"]]:
    return _forward(finish, hidden, weights, bias, targets)[0]


def _products(hidden: Shaped[Array, "R S C D"], weights: Shaped[Array, "D V"]) -> Float[Array, "R S C V"]:
    products = jnp.einsum("rscd,dv->rscv", hidden, weights, preferred_element_type=jnp.float32)
    return with_logical_constraint(products, (*CHUNK, "vocab"))


def _is_target(logits: Float[Array, "R S C V"], targets: Int[Array, "R S C"]) -> Bool[Array, "R S C V"]:
    # A comparison, not a gather: devices that shard the vocabulary then only sum one number per token.
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]


def _forward(finish, hidden, weights, bias, targets):
    def chunk(_, of_chunk):
        hidden, targets = of_chunk
        logits = finish(_products(hidden, weights), bias)
        logsumexp = jax.nn.logsumexp(logits, axis=-1)
        return None, (logsumexp, jnp.where(_is_target(logits, targets), logits, 0).sum(-1))

    _, (logsumexp, of_targets) = jax.lax.scan(chunk, None, (hidden, targets))
    return (logsumexp - of_targets, logsumexp), (hidden, weights, bias, targets, logsumexp)


def _backward(finish, kept, gradients):
    hidden, weights, bias, targets, logsumexp = kept

    def chunk(sums, of_chunk):
        of_weights, of_bias = sums
        hidden, targets, logsumexp, of_nll, of_logsumexp = of_chunk
        logits, pull = jax.vjp(finish, _products(hidden, weights), bias)
        softmax = jnp.exp(logits - logsumexp[..., None])
        of_logits = of_nll[..., None] * (softmax - _is_target(logits, targets)) + of_logsumexp[..., None] * softmax
        of_products, more_bias = pull(of_logits)
        of_products = of_products.astype(hidden.dtype)
        more = jnp.einsum("rscd,rscv->rsdv", hidden, of_products, preferred_element_type=jnp.float32)
        of_hidden = jnp.einsum("rscv,dv->rscd", of_products, weights, preferred_element_type=jnp.float32)
        of_weights = with_logical_constraint(of_weights + more, ("batch", "length", None, "vocab"))
        of_bias = jax.tree.map(jnp.add, of_bias, more_bias)
        return (of_weights, of_bias), with_logical_constraint(of_hidden.astype(hidden.dtype), (*CHUNK, None))

    zeros = jnp.zeros((*hidden.shape[1:3], *weights.shape), jnp.float32)
    zeros = with_logical_constraint(zeros, ("batch", "length", None, "vocab"))
    sums = zeros, jax.tree.map(jnp.zeros_like, bias)
    (of_weights, of_bias), of_hidden = jax.lax.scan(chunk, sums, (hidden, targets, logsumexp, *gradients))
    of_weights = with_logical_constraint(
        of_weights.sum((0, 1)), ("embed", "vocab")
    )  # each device keeps the sum of its own shard
    return of_hidden, of_weights.astype(weights.dtype), of_bias, None


_nll.defvjp(_forward, _backward)
