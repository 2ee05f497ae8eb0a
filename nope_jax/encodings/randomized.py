"""Randomized positions: any encoding, trained on positions it will only see at longer lengths (Ruoss et al. 2023).

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
    """`length` different numbers from 0 to maximum - 1, ascending; every such set is as likely as any other.

    To be given as positions of queries and keys to any attention function (Ruoss et al. 2023, arXiv 2305.16843).

    Raises:
        ValueError: More positions than maximum.
    """
    if not 0 <= length <= maximum:
        raise ValueError(f"length must be at most maximum, {maximum}, not {length}")
    return jnp.sort(jax.random.choice(key, maximum, (length,), replace=False))


@dataclasses.dataclass(frozen=True)
class Randomized(Wrapper):
    """The encoding within, told a random ascending sample from 0 .. maximum - 1 in place of 0 .. length - 1.

    Ruoss et al. 2023 (arXiv 2305.16843): the order of positions is learned, not their values, so that lengths up to
    maximum bring nothing new. Each training step draws one sample for its whole batch. Outside of training the draw is
    always the same, so that evaluation and decoding are reproducible; but it depends on `length`, of which a longer
    text has another, and while decoding that is the cache's room. What counts positions (a window, a logit scale)
    counts those of the sample.
    """

    encoding: Encoding = _ROPE
    maximum: int = 2048
    """Positions are below it; the paper's, whose texts are up to 500 tokens."""

    def __post_init__(self):
        super().__post_init__()
        integer_at_least(1, maximum=self.maximum)

    def _told(self, dims: ModelDims) -> ModelDims:
        """Sizes for the encoding within, whose tables have to reach maximum."""
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
        # Those outside, which only jit can hide, keep their order and are outside of every table.
        drawn = jnp.where(positions < length, drawn, self.maximum + positions - length)
        return self.encoding.positions(jnp.where(positions < 0, positions, drawn), self.maximum, key)

    def input(self, params: Params, embeddings, tokens: TokenInputs) -> Any:
        return self.encoding.input(params, embeddings, tokens._replace(length=self.maximum))
