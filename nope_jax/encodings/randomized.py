"""Randomized positions: train any encoding on the positions of longer sequences (Ruoss et al. 2023).

Shapes: B batch, T length.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from nope_jax.encodings.checks import integer_at_least
from nope_jax.encodings.encoding import Encoding, ModelDims, Params, TokenInputs
from nope_jax.encodings.rotary import RoPE
from nope_jax.encodings.wrapper import Wrapper

_ROPE = RoPE()


def randomized_positions(key: Array, length: int, maximum: int) -> Int[Array, "{length}"]:
    """`length` distinct integers from 0 to maximum - 1 in ascending order, drawn uniformly.

    Pass them as the positions of queries and keys to any attention function (Ruoss et al. 2023, arXiv 2305.16843).

    Raises:
        ValueError: More positions than maximum.
    """
    if not 0 <= length <= maximum:
        raise ValueError(f"length must be at most maximum, {maximum}, not {length}")
    return jnp.sort(jax.random.choice(key, maximum, (length,), replace=False))


@dataclasses.dataclass(frozen=True)
class Randomized(Wrapper):
    """The inner encoding with a random ascending sample of 0 .. maximum - 1 as positions, not 0 .. length - 1.

    Ruoss et al. 2023 (arXiv 2305.16843): the model learns the order of positions rather than their values, so lengths
    up to maximum have no unseen positions. Each training step draws one sample for the whole batch. Outside training
    the sample is fixed, which makes evaluation and decoding reproducible, but it depends on `length`: a longer text
    gets another sample, and in decoding `length` is the capacity of the KV cache. A window or a logit scale counts the
    sampled positions.
    """

    encoding: Encoding = _ROPE
    maximum: int = 2048
    """Upper bound of the positions (exclusive). The default is the paper's, whose texts have up to 500 tokens."""

    def __post_init__(self):
        super().__post_init__()
        integer_at_least(1, maximum=self.maximum)

    def _told(self, dims: ModelDims) -> ModelDims:
        """Dimensions for the inner encoding, whose tables need `maximum` rows."""
        return dataclasses.replace(dims, train_length=self.maximum)

    def bind(self, dims: ModelDims) -> Encoding:
        return super().bind(self._told(dims))

    @property
    def unwrapped(self) -> Encoding:
        return self

    def max_length(self, dims: ModelDims) -> int:
        limit = self.encoding.max_length(self._told(dims))
        if limit is not None and limit < self.maximum:
            raise ValueError(
                f"maximum must be at most {limit}, all the positions that {self.encoding!r} has, not {self.maximum}"
            )
        return self.maximum

    def init_shared(self, key, dims: ModelDims) -> Params:
        return self.encoding.init_shared(key, self._told(dims))

    def init_layer(self, key, dims: ModelDims) -> Params:
        return self.encoding.init_layer(key, self._told(dims))

    def positions(self, positions, length: int, key):
        sample = randomized_positions(jax.random.key(0) if key is None else key, length, self.maximum)
        drawn = sample.at[positions].get(mode="clip", wrap_negative_indices=False)
        # Positions out of range, possible only under jit, keep their order and stay outside every table.
        drawn = jnp.where(positions < length, drawn, self.maximum + positions - length)
        return self.encoding.positions(jnp.where(positions < 0, positions, drawn), self.maximum, key)

    def input(self, params: Params, embeddings, tokens: TokenInputs) -> Any:
        return self.encoding.input(params, embeddings, tokens._replace(length=self.maximum))
