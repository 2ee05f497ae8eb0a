"""Online softmax: the state of each row after some of its keys, its update with more keys, and its final results.

The state of a row is m (the largest logit s), l (Σ e^(s-m)) and w (Σ (s-m)·e^(s-m)). An update with more keys
multiplies l and the sums weighted by e^(s-m) by a = e^(m_old - m_new) and adds the new terms; w also changes by
(m_old - m_new)·l. At the end, the sum of values is divided by l, logsumexp = m + ln l, entropy = ln l - w/l.

A sink is a key of logit z without a value, which takes the share 1 - p = e^(z - lse') of a row: p = e^(lse - lse') with
lse' = ln(e^lse + e^z), output p·output, entropy p·(entropy - ln p) - (1 - p)·ln(1 - p).

Final results over disjoint sets of keys are merged: p = e^(lse_part - lse), output Σ p·output_part,
entropy Σ p·(entropy_part + lse - lse_part).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax, nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Shaped

from nope_jax.encodings.encoding import MASKED

RESULTS = "attention"
"""The name of output, entropy and logsumexp among what a gradient keeps, for policies of rematerialization."""


def named(results: Any) -> Any:
    """Name the results that a custom gradient keeps: where a policy saves them, the forward pass is not run again."""
    return checkpoint_name(results, RESULTS)


class SoftmaxState(NamedTuple):
    """The state of rows [...] after the keys so far: m, l and w; w is None if no entropy is requested."""

    largest: Float[Array, "*rows"]
    normaliser: Float[Array, "*rows"]
    weighted: Float[Array, "*rows"] | None

    @classmethod
    def over_no_keys(cls, shape: tuple[int, ...], with_entropy: bool) -> "SoftmaxState":
        """The initial state. m is above the masked logits, so their weight is 0 in every row."""
        zeros = jnp.zeros(shape, jnp.float32)
        return cls(jnp.full(shape, MASKED / 2, jnp.float32), zeros, zeros if with_entropy else None)

    def over_more(
        self, logits: Float[Array, "*rows k"]
    ) -> tuple["SoftmaxState", Float[Array, "*rows k"], Float[Array, "*rows"]]:
        """Update with k more keys; return the new state, the keys' weights, and the decay of earlier weighted sums.

        The logits of hidden keys are MASKED.
        """
        largest = jnp.maximum(self.largest, logits.max(-1))
        weights = jnp.exp(logits - largest[..., None])
        moved = self.largest - largest
        decay = jnp.exp(moved)
        weighted = self.weighted
        if weighted is not None:
            # The barrier makes XLA recompute the difference, which is cheaper than keeping it for both uses.
            relative = lax.optimization_barrier(logits) - largest[..., None]
            # As a product of vectors: jax 0.10's sums of a product of two arrays are not vectorized on a CPU.
            more = jnp.einsum("...k,...k->...", weights, relative, precision="highest")
            weighted = decay * (weighted + moved * self.normaliser) + more
        return SoftmaxState(largest, decay * self.normaliser + weights.sum(-1), weighted), weights, decay

    def end(self) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"], Float[Array, "*rows"]]:
        """Return the normalizer of the weighted sums, entropy and logsumexp; 1, 0 and -inf for rows that see no key."""
        seen = ~(self.largest <= MASKED / 2)  # true for NaN, which must propagate
        normaliser = jnp.where(seen, self.normaliser, 1.0)
        logsumexp = jnp.where(seen, self.largest + jnp.log(normaliser), -jnp.inf)
        if self.weighted is None:
            return normaliser, jnp.zeros_like(normaliser), logsumexp
        return normaliser, jnp.where(seen, jnp.log(normaliser) - self.weighted / normaliser, 0.0), logsumexp


def row_terms(
    projected: Float[Array, "*rows"],
    entropy: Float[Array, "*rows"],
    logsumexp: Float[Array, "*rows"],
    d_entropy: Float[Array, "*rows"],
    d_logsumexp: Float[Array, "*rows"],
    with_entropy: bool,
) -> tuple[Float[Array, "*rows"], Float[Array, "*rows"]]:
    """What a row adds to the gradient of each of its logits, over its weight; and a finite logsumexp.

    The gradient of a logit s of weight p is p·(d_output·v - d_entropy·s + one number per row).

    Args:
        projected: output·d_output, summed over the head dim.
    """
    seen = logsumexp != -jnp.inf
    row_term = d_logsumexp - projected
    if with_entropy:
        row_term -= d_entropy * (entropy - logsumexp)
    # With a logsumexp of -MASKED, the weights of a row that sees no key are e^(s + MASKED) = 0.
    return jnp.where(seen, row_term, 0.0), jnp.where(seen, logsumexp, -MASKED)


def with_sink(
    entropy: Float[Array, "B N T"], logsumexp: Float[Array, "B N T"], sink: Float[Array, "N"]
) -> tuple[Float[Array, "B N T"], Float[Array, "B N T"], Float[Array, "B N T"]]:
    """Add a sink to the final results of rows: return the share of the keys, entropy and logsumexp."""
    sink = jnp.broadcast_to(sink.astype(jnp.float32)[:, None], logsumexp.shape)
    seen = logsumexp != -jnp.inf
    above = jnp.where(seen, sink - logsumexp, 0.0)
    share, log_keys, log_sink = nn.sigmoid(-above), -nn.softplus(above), -nn.softplus(-above)
    entropy = share * (entropy - log_keys) - nn.sigmoid(above) * log_sink
    logsumexp = jnp.where(seen, logsumexp - log_keys, sink)
    return jnp.where(seen, share, 0.0), jnp.where(seen, entropy, 0.0), logsumexp


class Rows(NamedTuple):
    """The final results of rows over some keys."""

    output: Shaped[Array, "*rows H"]
    entropy: Float[Array, "*rows"]
    logsumexp: Float[Array, "*rows"]

    @classmethod
    def over_no_keys(cls, shape: tuple[int, ...], width: int) -> "Rows":
        """The initial results, with a float32 output to accumulate in."""
        zeros = jnp.zeros(shape, jnp.float32)
        return cls(jnp.zeros((*shape, width), jnp.float32), zeros, jnp.full(shape, -jnp.inf, jnp.float32))

    def merged(self, part: "Rows", with_entropy: bool) -> "Rows":
        """Merge with the results over more keys."""
        logsumexp = jnp.logaddexp(self.logsumexp, part.logsumexp)
        (old, old_moved), (new, new_moved) = _share(self, logsumexp), _share(part, logsumexp)
        entropy = self.entropy
        if with_entropy:
            entropy = old * (self.entropy + old_moved) + new * (part.entropy + new_moved)
        output = old[..., None] * self.output + new[..., None] * part.output.astype(jnp.float32)
        return Rows(output, entropy, logsumexp)

    def gradient_of(self, part: "Rows", d_rows: "Rows") -> "Rows":
        """Gradient with respect to a part's results, given that of these results over all keys: the VJP of `merged`."""
        share, moved = _share(part, self.logsumexp)
        d_output, of_part, of_all = (x.astype(jnp.float32) for x in (d_rows.output, part.output, self.output))
        d_logsumexp = (d_output * (of_part - of_all)).sum(-1) + d_rows.logsumexp
        d_logsumexp += d_rows.entropy * (part.entropy + moved - self.entropy)
        d_output = (share[..., None] * d_output).astype(part.output.dtype)
        seen = part.logsumexp != -jnp.inf
        return Rows(d_output, share * d_rows.entropy, jnp.where(seen, share * d_logsumexp, 0.0))


def merged_parts(parts: Rows, with_entropy: bool) -> Rows:
    """Merge the results over disjoint sets of keys, which lie along the first axis."""
    logsumexp = nn.logsumexp(parts.logsumexp, axis=0)
    share, moved = _share(parts, logsumexp)
    entropy = (share * (parts.entropy + moved)).sum(0) if with_entropy else jnp.zeros_like(logsumexp)
    share = share[..., None]
    return Rows(jnp.where(share == 0, 0.0, share * parts.output).sum(0), entropy, logsumexp)


def _share(part: Rows, logsumexp: Float[Array, "..."]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """A part's share of the total weight, and the total logsumexp minus the part's; both 0 if the part sees no key."""
    seen = part.logsumexp != -jnp.inf
    moved = jnp.where(seen, logsumexp - part.logsumexp, 0.0)
    return jnp.where(seen, jnp.exp(-moved), 0.0), moved
