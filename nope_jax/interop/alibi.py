"""ALiBi's slopes as families choose them."""

from collections.abc import Sequence

import numpy as np

from nope_jax.config import ModelConfig
from nope_jax.encodings import ALiBi, alibi_slopes
from nope_jax.interop.rotary import per_layer


def alibi(slopes: Sequence[float]) -> ALiBi:
    """ALiBi with these slopes, one per head; they are left out if they are those of the paper."""
    own = np.asarray(slopes, np.float32)
    return ALiBi() if np.array_equal(own, np.asarray(alibi_slopes(len(own)))) else ALiBi(slopes=own.tolist())


def slopes_of(config: ModelConfig) -> list[float] | None:
    """The slopes of a model's first layer; None if it has no fixed ones. `save_pretrained` finds other layers."""
    encoding = per_layer(config)[0]
    if not isinstance(encoding, ALiBi) or encoding.learned:
        return None
    return np.asarray(alibi_slopes(config.num_heads)).tolist() if encoding.slopes is None else list(encoding.slopes)
