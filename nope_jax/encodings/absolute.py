"""Absolute positions at the input: learned or sinusoidal; added, multiplied, or applied as a phase.

Shapes: B batch, T length, D model width, V vocabulary.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Integer

from nope_jax.encodings.checks import as_array, integer_at_least, positive
from nope_jax.encodings.encoding import Encoding, ModelDims, Params, TokenInputs

Layout = Literal["interleaved", "halves"]


def sinusoidal_positions(
    positions: Integer[ArrayLike, "*shape"], features: int, *, base: float = 10_000.0, layout: Layout = "interleaved"
) -> Float[Array, "*shape features"]:
    """Sines and cosines of positions at geometric frequencies, float32 (Vaswani et al. 2017, section 3.5).

    Args:
        positions: Token positions, of any shape.
        features: Width of the vectors; must be even.
        base: Wavelengths grow from 2π to base·2π.
        layout: "interleaved" as in the paper (sin, cos, sin, cos, ...), or "halves" (all sines, then all cosines) as in
            tensor2tensor and Kazemnejad et al. 2023.

    Raises:
        ValueError: features is odd or not positive, base is not positive, or layout is unknown.
    """
    if features < 2 or features % 2:
        raise ValueError(f"features must be a positive even number, not {features}")
    _check_waves(base, layout)
    frequencies = base ** (-jnp.arange(0, features, 2, dtype=jnp.float32) / features)
    positions = as_array("positions", positions)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    if layout == "halves":
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions.shape, features)


def rows_at(table: Float[Array, "length D"], positions: Int[Array, "*shape"]) -> Float[Array, "*shape D"]:
    """Look up rows of a position table. Positions outside the table give NaN rather than a wrong row."""
    return table.at[positions].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def table_length(length: int | None, dims: ModelDims) -> int:
    """Number of rows of a position table: `length`, else the training length, else 1,024."""
    return length or dims.train_length or 1024


def _check_waves(base: float, layout: str) -> None:
    positive(base=base)
    if layout not in get_args(Layout):
        raise ValueError(f'layout must be "interleaved" or "halves", not {layout!r}')


@dataclasses.dataclass(frozen=True)
class Sinusoidal(Encoding):
    """x + sin/cos(position / base^(2i/D)). Defined at every position, but trained only up to the training length."""

    base: float = 10_000.0
    layout: Layout = "interleaved"

    def __post_init__(self):
        _check_waves(self.base, self.layout)

    def input(self, params: Params, embeddings, tokens: TokenInputs):
        table = sinusoidal_positions(tokens.positions, embeddings.shape[-1], base=self.base, layout=self.layout)
        return embeddings + table.astype(embeddings.dtype)


@dataclasses.dataclass(frozen=True)
class _Table(Encoding):
    """Base of the encodings with a learned table of positions."""

    length: int | None = None
    """Rows of the table. None: the model's training length, or 1,024 if that is unknown."""

    def __post_init__(self):
        integer_at_least(1, length=self.length)

    def rows(self, dims: ModelDims) -> int:
        """Number of rows of the table."""
        return table_length(self.length, dims)

    def init_shared(self, key, dims: ModelDims) -> Params:
        return {"positions": 0.02 * jax.random.normal(key, (self.rows(dims), dims.model_dim))}


@dataclasses.dataclass(frozen=True)
class Learned(_Table):
    """x + P[position], P a learned table (Gehring et al. 2017, arXiv 1705.03122).

    Positions past the last row are untrained: a decoder raises, and a position traced under jit gives NaN.
    `Hierarchical` trains the same table and extends past it.
    """

    def max_length(self, dims: ModelDims) -> int:
        return self.rows(dims)

    def input(self, params: Params, embeddings, tokens: TokenInputs):
        return embeddings + rows_at(params["positions"], tokens.positions).astype(embeddings.dtype)


@dataclasses.dataclass(frozen=True)
class Hierarchical(_Table):
    """A learned table of n rows for n² positions, read as two-digit numbers (Su 2020, kexue.fm/archives/7947).

    Position (i-1)·n + j, with i and j from 1 to n, gets q = α·u_i + (1-α)·u_j. Setting u = (p - α·p_1) / (1-α) makes q
    equal to the table for positions up to n. It is computed as q = p_j + α/(1-α) · (p_i - p_1), so the first n rows
    match `Learned` bit for bit, in value and gradient, and training within them trains the same table.
    """

    alpha: float = 0.4
    """Weight of the leading digit, between 0 and 1. Not 1/2, for which (i, j) and (j, i) would be the same."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.alpha < 1 or self.alpha == 0.5:
            raise ValueError(f"alpha must lie between 0 and 1 and not be 0.5, not {self.alpha}")

    def max_length(self, dims: ModelDims) -> int:
        return self.rows(dims) ** 2

    def input(self, params: Params, embeddings, tokens: TokenInputs):
        table = params["positions"]
        leading, last = jnp.divmod(tokens.positions, table.shape[0])
        further = rows_at(table, leading) - table[0]
        rows = rows_at(table, last) + self.alpha / (1 - self.alpha) * jnp.where(leading[..., None] == 0, 0, further)
        return embeddings + rows.astype(embeddings.dtype)


@dataclasses.dataclass(frozen=True)
class Multiplicative(_Table):
    """x · P[position]: a learned table initialized near 1, or the sinusoids of Vaswani et al. 2017."""

    sinusoidal: bool = False
    """Multiply by sinusoids, which support any length; low frequencies suppress half of x at early positions."""

    def max_length(self, dims: ModelDims) -> int | None:
        return None if self.sinusoidal else self.rows(dims)

    def init_shared(self, key, dims: ModelDims) -> Params:
        return {} if self.sinusoidal else {"positions": 1 + super().init_shared(key, dims)["positions"]}

    def input(self, params: Params, embeddings, tokens: TokenInputs):
        if self.sinusoidal:
            rows = sinusoidal_positions(tokens.positions, embeddings.shape[-1])
        else:
            rows = rows_at(params["positions"], tokens.positions)
        return (embeddings.astype(jnp.float32) * rows).astype(embeddings.dtype)


@dataclasses.dataclass(frozen=True)
class ComplexOrder(Encoding):
    """r_j · exp(i·(ω_j·k + θ_j)): token j at position k as complex numbers (Wang et al. 2020, arXiv 1912.12333).

    In this real-valued model, the first half of an embedding is the real part of r_j·exp(i·θ_j) and the second half its
    imaginary part; the input place rotates them by ω_j·k radians. The layers stay real; the paper's are complex.
    """

    per_token: bool = True
    """Whether each token learns its own frequencies; otherwise all tokens share one set, as in the paper's ablation."""
    base: float = 10_000.0
    """Base of the initial frequencies, base^(-2m/D), those of the sinusoids."""

    def __post_init__(self):
        positive(base=self.base)

    def init_shared(self, key, dims: ModelDims) -> Params:
        width = _even(dims.model_dim)
        if self.per_token and dims.vocab_size is None:
            raise ValueError("vocab_size must be known for frequencies per token")
        start = self.base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
        return {"frequencies": jnp.tile(start, (dims.vocab_size if self.per_token else 1, 1))}

    def input(self, params: Params, embeddings, tokens: TokenInputs):
        _even(embeddings.shape[-1])
        ids = tokens.ids if self.per_token else jnp.zeros_like(tokens.ids)
        angles = tokens.positions[..., None].astype(jnp.float32) * rows_at(params["frequencies"], ids)
        real, imaginary = jnp.split(embeddings.astype(jnp.float32), 2, axis=-1)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        turned = jnp.concatenate([real * cos - imaginary * sin, real * sin + imaginary * cos], axis=-1)
        return turned.astype(embeddings.dtype)


def _even(width: int) -> int:
    if width % 2:
        raise ValueError(f"model_dim must be even, half of it real and half imaginary, not {width}")
    return width
