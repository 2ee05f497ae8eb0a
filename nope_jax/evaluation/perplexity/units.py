"""Units of the curves, shared by the tables, the figures and the report.

Shapes: P position buckets.
"""

import dataclasses
import math
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from nope_jax.evaluation.common.documents import protocol_name
from nope_jax.evaluation.common.uncertainty import Estimate
from nope_jax.evaluation.perplexity.measure import Curve


@dataclasses.dataclass(frozen=True)
class Units:
    """Protocol and units of the output."""

    stride: int | None = None
    """Stride of the protocol (see `nope_jax.evaluation.common.documents`)."""
    bits_per_byte: bool = False
    """Whether to show bits per byte of text, for runs with different tokenizers, instead of perplexity per token."""
    entropy_unit: Literal["nats", "bits"] = "nats"

    @property
    def protocol(self) -> str:
        return protocol_name(self.stride)

    @property
    def score_name(self) -> str:
        return "Bits per byte" if self.bits_per_byte else "Perplexity"

    @property
    def ceiling_name(self) -> str:
        """Formula of the maximum attention entropy at a position."""
        return "log2(position + 1)" if self.entropy_unit == "bits" else "ln(position + 1)"

    @property
    def position_name(self) -> str:
        whose = "tokens of each run's own tokenizer" if self.bits_per_byte else "tokens"
        return f"Position in the {'document' if self.stride is None else 'window'} ({whose})"

    @property
    def loss_unit(self) -> str:
        return "bits per byte" if self.bits_per_byte else "nats per token"

    def span(self, length: int) -> tuple[int, int]:
        """The positions scored at a length: its second half, or with a stride all of them."""
        return (length // 2 if self.stride is None else 0), length

    def loss(self, curve: Curve) -> Estimate:
        """Loss of every bucket in `loss_unit`; bits per byte are NaN in a bucket without text."""
        return curve.bits_per_byte if self.bits_per_byte else curve.nll

    def score(self, curve: Curve) -> Estimate:
        """Perplexity, or bits per byte, of every bucket."""
        return self.loss(curve) if self.bits_per_byte else self.loss(curve).exp()

    def score_band(self, curve: Curve) -> tuple[Float[np.ndarray, "P"], Float[np.ndarray, "P"]]:
        """`score` at the loss minus and plus one standard error; equal to `score` for a single document."""
        loss = self.loss(curve)
        error = np.nan_to_num(loss.stderr)
        low, high = loss.value - error, loss.value + error
        with np.errstate(over="ignore"):
            return (low, high) if self.bits_per_byte else (np.exp(low), np.exp(high))

    def entropy_band(self, curve: Curve) -> tuple[Float[np.ndarray, "P"], Float[np.ndarray, "P"]]:
        """The mean entropy minus and plus one standard error."""
        entropy = curve.entropy
        error = np.nan_to_num(entropy.stderr)
        return self.entropy(entropy.value - error), self.entropy(entropy.value + error)

    def difference(self, curve: Curve, reference: Curve) -> Estimate:
        """The loss of one run minus that of another on the same documents, over the `span` of a length.

        Raises:
            ValueError: the lengths of the curves differ.
        """
        if curve.length != reference.length:
            raise ValueError(f"only curves of one length are compared, not of {curve.length} and {reference.length}")
        first, second = (self.loss(one.between(*self.span(one.length))) for one in (curve, reference))
        return (first - second)[0]

    def entropy(self, nats: Any) -> Any:
        """Converts an entropy, or an array of entropies, from nats to `entropy_unit`."""
        return nats / math.log(2) if self.entropy_unit == "bits" else nats
