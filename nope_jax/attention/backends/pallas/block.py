"""One block of queries and keys within a kernel: logits, weights, and their gradients.

Shapes as in `pallas`; [block] is [k, q] or [q, k], and [row] is [1, q] or [q, 1].
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped

from nope_jax.attention.backends.pallas.call import Call
from nope_jax.attention.softcap import softcapped
from nope_jax.attention.softmax_state import SoftmaxState
from nope_jax.encodings.encoding import MASKED


@dataclasses.dataclass(frozen=True)
class Block:
    """The arrays of a block, and what the forward and the backward pass compute of them."""

    call: Call
    keys_first: bool
    """Whether [block] is [k, q] rather than [q, k]."""
    query: Shaped[Array, "q H"]
    key: Shaped[Array, "k H"]
    value: Shaped[Array, "k H2"]
    factor: Float[Array, "..."]
    """[row]."""
    visible: Bool[Array, "..."] | None
    """[block]; None: every query sees every key."""
    careful: bool
    """Whether a key that is not finite may be hidden from a query."""
    term: Float[Array, "..."] | None = None
    """[block]: the logit of the encoding."""
    value_term: Any = None
    """What the encoding adds to the output, as a `ValueTerm`; None: nothing."""
    rows: tuple[Any, ...] = ()
    """For gradients: d_output [q, H2], and of each row [row] the term, the logsumexp and d_entropy."""

    def logits(self) -> tuple[Float[Array, "..."], Float[Array, "..."] | None]:
        """The logits, and the derivative of their capped part with respect to the scaled q·k (None: 1)."""
        content = self._pairs(self.query, self.key) * self.factor
        slope = None
        if self.call.softcap is not None:
            content = softcapped(content, self.call.softcap)
            slope = 1 - jnp.square(content / self.call.softcap)
        if self.term is not None:
            content += self.term
        return (content if self.visible is None else jnp.where(self.visible, content, MASKED)), slope

    def softmax(self, state: SoftmaxState) -> tuple[SoftmaxState, Float[Array, "..."], Float[Array, "..."]]:
        """Update the state [row] of the softmax: return it, the weights of the keys, and the decay of earlier sums."""
        logits, _ = self.logits()
        over_keys = 0 if self.keys_first else 1
        largest = jnp.maximum(state.largest, logits.max(over_keys, keepdims=True))
        weights = jnp.exp(logits - largest)
        moved = state.largest - largest
        decay = jnp.exp(moved)
        weighted = state.weighted
        if weighted is not None:
            relative = (weights * (logits - largest)).sum(over_keys, keepdims=True)
            weighted = decay * (weighted + moved * state.normaliser) + relative
        normaliser = decay * state.normaliser + weights.sum(over_keys, keepdims=True)
        return SoftmaxState(largest, normaliser, weighted), weights, decay

    def weights(self) -> Float[Array, "..."]:
        """The weights, given `rows`."""
        return self._weights(self.logits()[0])

    def _weights(self, logits: Float[Array, "..."]) -> Float[Array, "..."]:
        return self._hidden_is_zero(jnp.exp(logits - self.rows[2]))

    def gradients(self) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
        """Weights, and the gradients of the logits and of the scaled q·k."""
        d_output, row_term, _, d_entropy = self.rows
        logits, slope = self.logits()
        weights = self._weights(logits)
        d_logits = self._pairs(d_output, self.finite(self.value)) + row_term
        if self.value_term is not None:
            d_logits += self.value_term.weight_gradient(d_output)
        if self.call.with_entropy:
            d_logits -= d_entropy * logits
        d_logits = self._hidden_is_zero(d_logits * weights)
        return weights, d_logits, d_logits if slope is None else self._hidden_is_zero(d_logits * slope)

    def over_keys(self, of_keys: Shaped[Array, "k H"], x: Shaped[Array, "..."]) -> Float[Array, "..."]:
        """The sum of x · keys over keys: [H, q] if keys come first, else [q, H]."""
        return self._product(of_keys, x, (0, 0)) if self.keys_first else self._product(x, of_keys, (1, 0))

    def with_care(self, summed: Float[Array, "..."], weights: Shaped[Array, "..."]) -> Float[Array, "..."]:
        """As `weighted_sum`: values that are not finite reach the queries that see them, and no others.

        Args:
            summed: The sum of weights · value.
        """
        strange = jnp.where(jnp.isfinite(self.value.astype(jnp.float32)), 0.0, 1.0).astype(weights.dtype)
        reached = self.over_keys(strange, jnp.where(weights != 0, 1.0, 0.0).astype(weights.dtype)) > 0
        return jnp.where(reached, summed, self.over_keys(self.finite(self.value), weights))

    def over_queries(self, of_queries: Shaped[Array, "q H"], x: Shaped[Array, "k q"]) -> Float[Array, "k H"]:
        """The sum of x · queries over queries, where keys come first."""
        return self._product(x, of_queries, (1, 0))

    def finite(self, x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
        """`finite` of `nonfinite.py`, if it matters."""
        return only_finite(x) if self.careful else x

    def _hidden_is_zero(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Replace entries of hidden keys by 0, whatever they are."""
        return x if self.visible is None else jnp.where(self.visible, x, 0.0)

    def _pairs(self, of_queries: Shaped[Array, "q H"], of_keys: Shaped[Array, "k H"]) -> Float[Array, "..."]:
        """The product of every query and every key, [block]."""
        return self._product(*((of_keys, of_queries) if self.keys_first else (of_queries, of_keys)), (1, 1))

    def _product(self, x: Shaped[Array, "a b"], y: Shaped[Array, "c d"], axes: tuple[int, int]) -> Float[Array, "e f"]:
        return product(x, y, axes, self.call.precision)


def only_finite(x: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """`finite` of `nonfinite.py`, within a kernel."""
    wide = x.astype(jnp.float32)  # in which a TPU has the test
    return jnp.where(jnp.isfinite(wide), wide, 0.0).astype(x.dtype)


def product(
    x: Shaped[Array, "a b"], y: Shaped[Array, "c d"], axes: tuple[int, int], precision: Any
) -> Float[Array, "e f"]:
    """The product of two matrices over one axis of each, in float32."""
    dtype = jnp.promote_types(x.dtype, y.dtype)
    return lax.dot_general(
        x.astype(dtype),
        y.astype(dtype),
        (((axes[0],), (axes[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
