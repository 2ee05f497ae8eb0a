"""Position by causal convolution: zero padding marks the first tokens (Islam et al. 2020, arXiv 2001.08248).

Shapes: B batch, T length, D model width.
"""

import dataclasses

import jax
import jax.numpy as jnp

from nope_jax.encodings.checks import integer_at_least
from nope_jax.encodings.encoding import Encoding, ModelDims, Params, TokenInputs


@dataclasses.dataclass(frozen=True)
class Convolution(Encoding):
    """x_t + Σ_j w_j · x_{t-j}, j = 0 .. kernel_size - 1, per dimension: a causal convolution padded with zeros.

    Islam et al. found that convolutional networks learn positions from zero padding: fewer terms are summed near the
    border. Over many layers that spreads to the whole image; this single layer distinguishes the first
    kernel_size - 1 tokens from the rest, and gives the order of nearby tokens everywhere. It is added to x, as other
    encodings at the input are, so no weights can hide a token from attention, and zero weights give NoPE. The
    convolution runs in array order, whatever the positions; a token of another segment counts as padding.
    """

    kernel_size: int = 4

    def __post_init__(self):
        integer_at_least(2, kernel_size=self.kernel_size)

    def input_context(self) -> int:
        return self.kernel_size - 1

    def init_shared(self, key, dims: ModelDims) -> Params:
        bound = self.kernel_size**-0.5
        shape = (self.kernel_size, dims.model_dim)
        return {"kernel": jax.random.uniform(key, shape, minval=-bound, maxval=bound)}

    def input(self, params: Params, embeddings, tokens: TokenInputs):
        out = wide = embeddings.astype(jnp.float32)
        for j, weights in enumerate(params["kernel"]):
            back = _shift(wide, j)
            if tokens.segments is not None:
                # Padding before the first token is 0, whatever its segment.
                back = jnp.where((_shift(tokens.segments, j) == tokens.segments)[..., None], back, 0)
            out = out + weights * back
        return out.astype(embeddings.dtype)


def _shift(x, steps: int):
    """x[:, t - steps], 0 before the first."""
    length = x.shape[1]
    return jnp.pad(x, [(0, 0), (steps, 0), *[(0, 0)] * (x.ndim - 2)])[:, :length]
