"""Position by convolution: zeros in front of the first token tell where it is (Islam et al. 2020, arXiv 2001.08248).

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

    Islam et al. found that convolutional networks know positions from the zeros around the image: one near the border
    sums fewer terms. Over many layers that spreads to the whole image; this one layer tells the first kernel_size - 1
    tokens from the rest, and everywhere the order of near neighbours. It is added to x, as other encodings are at the
    input place, so that no weights can hide a token from attention, and weights of 0 are NoPE. Neighbours are those of
    the array, whatever their positions; a token of another segment counts as padding.
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
                # What is shifted in from before the first token is 0, whatever its segment.
                back = jnp.where((_shift(tokens.segments, j) == tokens.segments)[..., None], back, 0)
            out = out + weights * back
        return out.astype(embeddings.dtype)


def _shift(x, steps: int):
    """x[:, t - steps], 0 before the first."""
    length = x.shape[1]
    return jnp.pad(x, [(0, 0), (steps, 0), *[(0, 0)] * (x.ndim - 2)])[:, :length]
