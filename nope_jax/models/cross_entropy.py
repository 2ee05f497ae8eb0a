"""Softmax cross-entropy over a large vocabulary, computed in chunks so that the full logits are never materialized.

A training step sums the losses of its tokens (`total_in_chunks`); the gradient of a chunk is then known as soon as its
logits are, and is computed with them. Where each token has its own loss (`nll_in_chunks`), what follows decides its
part in the gradient, so the backward pass computes the logits of each chunk again.

B batch, T length, D model width, V vocabulary; R x S devices that shard rows and sequences, n chunks of C tokens each.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Shaped

from nope_jax.sharding import num_shards, with_logical_constraint

CHUNK = "batch", "length", None
"""Logical axes of one chunk, [R, S, C]: each device processes its own tokens."""

SUMS = "batch", "length", None, "vocab"
"""Logical axes of the gradient of the weights, [R, S, D, V], while each device sums its own."""

Finish = Callable[[Array, Array | None], Array]
"""Function from products [..., V], float32, and the bias to logits."""


class _Chunks(NamedTuple):
    """How the tokens of a batch are divided into chunks."""

    batch: int
    length: int
    rows: int
    spans: int
    chunks: int

    @classmethod
    def of(cls, targets: Integer[Array | np.ndarray, "B T"], chunks: int) -> "_Chunks":
        batch, length = targets.shape
        return cls(batch, length, num_shards("batch", batch), num_shards("length", length), chunks)

    @property
    def tokens(self) -> int:
        """Tokens of a device."""
        return self.batch // self.rows * (self.length // self.spans)

    def cut(self, x: Shaped[Array | np.ndarray, "B T *features"]) -> Shaped[Array, "n R S C *features"]:
        """Divide tokens into chunks; the last one is padded with zeros."""
        batch, length, rows, spans, chunks = self
        features, size = x.shape[2:], -(-self.tokens // chunks)
        x = jnp.moveaxis(x.reshape(rows, batch // rows, spans, length // spans, *features), 2, 1)
        x = x.reshape(rows, spans, self.tokens, *features)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, chunks * size - self.tokens), *[(0, 0)] * len(features)))
        x = jnp.moveaxis(x.reshape(rows, spans, chunks, size, *features), 2, 0)
        return with_logical_constraint(x, (None, *CHUNK, *[None] * len(features)))

    def join(self, x: Shaped[Array, "n R S C"]) -> Shaped[Array, "B T"]:
        """The inverse of `cut`."""
        batch, length, rows, spans, _ = self
        x = jnp.moveaxis(x, 0, 2).reshape(rows, spans, -1)[:, :, : self.tokens]
        x = jnp.moveaxis(x.reshape(rows, spans, batch // rows, length // spans), 1, 2)
        return with_logical_constraint(x.reshape(batch, length), ("batch", "length"))


def nll_in_chunks(
    hidden: Shaped[Array, "B T D"],
    weights: Shaped[Array, "D V"],
    targets: Integer[Array | np.ndarray, "B T"],
    chunks: int,
    bias: Float[Array, "V"] | None = None,
    finish: Finish = lambda products, bias: products,
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
        finish: From products to logits.
    """
    into = _Chunks.of(targets, chunks)
    nll, logsumexp = _nll(finish, into.cut(hidden), weights, bias, into.cut(targets))
    return into.join(nll), into.join(logsumexp)


def total_in_chunks(
    hidden: Shaped[Array, "B T D"],
    weights: Shaped[Array, "D V"],
    targets: Integer[Array | np.ndarray, "B T"],
    counted: Bool[Array | np.ndarray, "B T"] | None,
    z_loss: float,
    chunks: int,
    bias: Float[Array, "V"] | None = None,
    finish: Finish = lambda products, bias: products,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The sums over tokens of nll + z_loss · logsumexp², and of nll alone, which has no gradient.

    Differentiable: the gradient is computed in the forward pass, so the logits of each chunk are computed once.

    Args:
        hidden: As `nll_in_chunks`, like all that is not here.
        weights: Those of the head.
        targets: The tokens to predict.
        counted: Which targets count; None for all.
        z_loss: Weight of the squared logsumexp.
        chunks: Number of chunks.
        bias: Second argument of `finish`.
        finish: From products to logits.
    """
    into = _Chunks.of(targets, chunks)
    counts = into.cut(jnp.ones(targets.shape, bool) if counted is None else counted)
    return _total(finish, z_loss, into.cut(hidden), weights, bias, into.cut(targets), counts)


class _Sums(NamedTuple):
    """Gradients of weights and bias, summed over the chunks so far."""

    weights: Float[Array, "R S D V"]
    bias: Float[Array, "V"] | None

    @classmethod
    def zeros(cls, hidden: Shaped[Array, "n R S C D"], weights, bias) -> "_Sums":
        zeros = jnp.zeros((*hidden.shape[1:3], *weights.shape), jnp.float32)
        return cls(with_logical_constraint(zeros, SUMS), jax.tree.map(jnp.zeros_like, bias))

    def total(self) -> tuple[Float[Array, "D V"], Float[Array, "V"] | None]:
        """The sums over devices, of which each keeps its own shard."""
        return with_logical_constraint(self.weights.sum((0, 1)), ("embed", "vocab")), self.bias


class _Logits(NamedTuple):
    """The logits of a chunk and what follows from them."""

    logits: Float[Array, "R S C V"]
    pull: Callable[[Array], Any]
    """From the gradient of the logits to those of products and bias."""
    is_target: Bool[Array, "R S C V"]

    @classmethod
    def of(cls, finish: Finish, hidden, weights, bias, targets) -> "_Logits":
        products = jnp.einsum("rscd,dv->rscv", hidden, weights, preferred_element_type=jnp.float32)
        logits, pull = jax.vjp(finish, with_logical_constraint(products, (*CHUNK, "vocab")), bias)
        # A comparison, not a gather: devices that shard the vocabulary then only sum one number per token.
        index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
        return cls(logits, pull, index == targets[..., None])

    def nll(self) -> tuple[Float[Array, "R S C"], Float[Array, "R S C"]]:
        """Negative log-likelihood and logsumexp."""
        logsumexp = jax.nn.logsumexp(self.logits, axis=-1)
        return logsumexp - jnp.where(self.is_target, self.logits, 0).sum(-1), logsumexp

    def gradient(self, sums: "_Sums", hidden, weights, logsumexp, of_nll, of_logsumexp) -> tuple["_Sums", Array]:
        """Add the chunk to the gradients of weights and bias; return them, and the gradient of its hidden states."""
        softmax = jnp.exp(self.logits - logsumexp[..., None])
        of_logits = of_nll[..., None] * (softmax - self.is_target) + of_logsumexp[..., None] * softmax
        of_products, more_bias = self.pull(of_logits)
        of_products = of_products.astype(hidden.dtype)
        more = jnp.einsum("rscd,rscv->rsdv", hidden, of_products, preferred_element_type=jnp.float32)
        of_hidden = jnp.einsum("rscv,dv->rscd", of_products, weights, preferred_element_type=jnp.float32)
        of_weights = with_logical_constraint(sums.weights + more, SUMS)
        of_hidden = with_logical_constraint(of_hidden.astype(hidden.dtype), (*CHUNK, None))
        return _Sums(of_weights, jax.tree.map(jnp.add, sums.bias, more_bias)), of_hidden


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll(
    finish: Finish,
    hidden: Shaped[Array, "n R S C D"],
    weights: Shaped[Array, "D V"],
    bias: Float[Array, "V"] | None,
    targets: Int[Array, "n R S C"],
) -> tuple[Float[Array, "n R S C"], Float[Array, "n R S C"]]:
    def chunk(_, of_chunk):
        hidden, targets = of_chunk
        return None, _Logits.of(finish, hidden, weights, bias, targets).nll()

    return jax.lax.scan(chunk, None, (hidden, targets))[1]


def _nll_forward(finish, hidden, weights, bias, targets):
    nll, logsumexp = _nll(finish, hidden, weights, bias, targets)
    return (nll, logsumexp), (hidden, weights, bias, targets, logsumexp)


def _nll_backward(finish, kept, gradients):
    hidden, weights, bias, targets, logsumexp = kept

    def chunk(sums, of_chunk):
        hidden, targets, logsumexp, of_nll, of_logsumexp = of_chunk
        logits = _Logits.of(finish, hidden, weights, bias, targets)
        return logits.gradient(sums, hidden, weights, logsumexp, of_nll, of_logsumexp)

    sums, of_hidden = jax.lax.scan(chunk, _Sums.zeros(hidden, weights, bias), (hidden, targets, logsumexp, *gradients))
    of_weights, of_bias = sums.total()
    return of_hidden, of_weights.astype(weights.dtype), of_bias, None


_nll.defvjp(_nll_forward, _nll_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _total(
    finish: Finish,
    z_loss: float,
    hidden: Shaped[Array, "n R S C D"],
    weights: Shaped[Array, "D V"],
    bias: Float[Array, "V"] | None,
    targets: Int[Array, "n R S C"],
    counts: Bool[Array, "n R S C"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    return _totals(z_loss, *_nll(finish, hidden, weights, bias, targets), counts)


def _totals(z_loss: float, nll, logsumexp, counts):
    total = jnp.where(counts, nll, 0).sum()
    return (total + z_loss * jnp.where(counts, logsumexp**2, 0).sum() if z_loss else total), total


def _total_forward(finish, z_loss, hidden, weights, bias, targets, counts):
    def chunk(sums, of_chunk):
        hidden, targets, counts = of_chunk
        logits = _Logits.of(finish, hidden, weights, bias, targets)
        nll, logsumexp = logits.nll()
        of_nll = counts.astype(jnp.float32)
        sums, of_hidden = logits.gradient(sums, hidden, weights, logsumexp, of_nll, 2 * z_loss * logsumexp * of_nll)
        return sums, (nll, logsumexp, of_hidden)

    sums, (nll, logsumexp, of_hidden) = jax.lax.scan(
        chunk, _Sums.zeros(hidden, weights, bias), (hidden, targets, counts)
    )
    of_weights, of_bias = sums.total()
    return _totals(z_loss, nll, logsumexp, counts), (of_hidden, of_weights.astype(weights.dtype), of_bias)


def _total_backward(finish, z_loss, kept, gradients):
    of_total, _ = gradients
    return *jax.tree.map(lambda x: of_total.astype(x.dtype) * x, kept), None, None


_total.defvjp(_total_forward, _total_backward)
