"""Absolute positions, added to the token embeddings: learned (Gehring et al. 2017), sinusoidal (Vaswani et al. 2017).

Shapes: B batch, T length, D model width.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nope_jax.encodings.encoding import Encoding, Params, Sizes, Tokens

Layout = Literal["interleaved", "halves"]


def sinusoidal_positions(
    positions: Int[Array, "*shape"], features: int, *, base: float = 10_000.0, layout: Layout = "interleaved"
) -> Float[Array, "*shape features"]:
    """Sines and cosines of positions at geometrically falling frequencies, float32 (Vaswani et al. 2017, section 3.5).

    Args:
        positions: Token positions, of any shape.
        features: Width of the vectors; even.
        base: Wavelengths grow from 2π to base·2π.
        layout: "interleaved" as in the paper (sin, cos, sin, cos, ...), or "halves" (all sines, then all cosines) as in
            tensor2tensor and Kazemnejad et al. 2023.

    Raises:
        ValueError: features is odd or not positive, base is not positive, or layout is another.
    """
    if features < 2 or features % 2:
        raise ValueError(f"features must be a positive even number, not {features}")
    _check_waves(base, layout)
    frequencies = base ** (-jnp.arange(0, features, 2, dtype=jnp.float32) / features)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    if layout == "halves":
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions.shape, features)


def rows_at(table: Float[Array, "length D"], positions: Int[Array, "*shape"]) -> Float[Array, "*shape D"]:
    """Rows of a table of positions. One that it does not have gives NaN, which no one mistakes for an answer."""
    return table.at[positions].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def _check_waves(base: float, layout: str) -> None:
    if not base > 0:
        raise ValueError(f"base must be positive, not {base}")
    if layout not in get_args(Layout):
        raise ValueError(f'layout must be "interleaved" or "halves", not {layout!r}')


@dataclasses.dataclass(frozen=True)
class Sinusoidal(Encoding):
    """x + sin/cos(position / base^(2i/D)). Defined at every position, but trained only at those it has seen."""

    base: float = 10_000.0
    layout: Layout = "interleaved"

    def __post_init__(self):
        _check_waves(self.base, self.layout)

    def input(self, params: Params, embeddings, tokens: Tokens):
        table = sinusoidal_positions(tokens.positions, embeddings.shape[-1], base=self.base, layout=self.layout)
        return embeddings + table.astype(embeddings.dtype)


@dataclasses.dataclass(frozen=True)
class Learned(Encoding):
    """x + P[position], P a learned table. It has no row past its length, and refuses to go there."""

    length: int | None = None
    """Rows of the table. None: the model's training length, or 1,024 where that is not known."""

    def __post_init__(self):
        if self.length is not None and self.length < 1:
            raise ValueError(f"length must be at least 1, not {self.length}")

    def max_length(self, sizes: Sizes) -> int:
        return self.length or sizes.train_length or 1024

    def init_shared(self, key, sizes: Sizes) -> Params:
        return {"positions": 0.02 * jax.random.normal(key, (self.max_length(sizes), sizes.model_dim))}

    def input(self, params: Params, embeddings, tokens: Tokens):
        return embeddings + rows_at(params["positions"], tokens.positions).astype(embeddings.dtype)
