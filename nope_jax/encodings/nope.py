"""No positional encoding: position comes from the causal mask alone."""

import dataclasses

from nope_jax.encodings.encoding import Encoding


@dataclasses.dataclass(frozen=True)
class NoPE(Encoding):
    """softmax(q·k/√H) under the causal mask, and nothing else.

    The first layer can recover absolute positions from the number of tokens each query sees, and later layers relative
    ones (Kazemnejad et al. 2023, arXiv 2305.19466, theorems 1 and 2). Without the mask the model is
    permutation-equivariant.
    """
