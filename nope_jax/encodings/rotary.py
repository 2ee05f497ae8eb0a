"""RoPE: queries and keys turned by an angle that grows with position (Su et al. 2021, arXiv 2104.09864).

Shapes: B batch, T length, N heads, H head dim.
"""

import abc
import dataclasses
import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from nope_jax.encodings.encoding import Encoding, Params


@dataclasses.dataclass(frozen=True)
class RotaryScaling(abc.ABC):
    """Base of the scalings that stretch RoPE past its training length: what becomes of the frequencies."""

    @abc.abstractmethod
    def frequencies(
        self, frequencies: Float[Array, "half"], *, base: float, length: Int[Array, ""] | int | None
    ) -> Float[Array, "half"]:
        """The scaled frequencies, given the plain ones, their base and the number of positions in use."""


@dataclasses.dataclass(frozen=True)
class LinearScaling(RotaryScaling):
    """Position interpolation: every angle divided by factor, so that factor·L positions fit in the trained range.

    Chen et al. 2023, arXiv 2306.15595. NTK-aware scaling is another thing: it changes the base instead.
    """

    factor: float

    def __post_init__(self):
        if not self.factor >= 1:
            raise ValueError(f"factor must be at least 1, not {self.factor}")

    def frequencies(self, frequencies, *, base, length):
        return frequencies / self.factor


def rope_frequencies(
    dim: int,
    *,
    base: float = 10_000.0,
    scaling: RotaryScaling | None = None,
    length: Int[Array, ""] | int | None = None,
) -> Float[Array, "{dim}//2"]:
    """Angle per position of each pair of dimensions: base^(-2i/dim), float32, radians.

    Args:
        dim: Dimensions that are rotated; even.
        base: Wavelengths grow from 2π to base·2π.
        scaling: Stretches the frequencies past the training length.
        length: Number of positions in use, which dynamic scalings depend on.

    Raises:
        ValueError: dim is odd or not positive, or base is not positive.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim must be a positive even number, not {dim}")
    if not base > 0:
        raise ValueError(f"base must be positive, not {base}")
    frequencies = base ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    return frequencies if scaling is None else scaling.frequencies(frequencies, base=base, length=length)


def apply_rope(
    x: Shaped[Array, "B T N H"],
    positions: Int[Array, "T"] | Int[Array, "#B T"],
    *,
    base: float = 10_000.0,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    scaling: RotaryScaling | None = None,
    length: Int[Array, ""] | int | None = None,
) -> Shaped[Array, "B T N H"]:
    """Turn each pair of dimensions of x by position times its frequency; angles in float32 whatever x's dtype.

    Args:
        x: Queries or keys.
        positions: Their positions.
        base: See `rope_frequencies`.
        rotary_dim: How many leading dimensions turn; None for all of them. Kazemnejad et al. 2023 turn a quarter.
        interleaved: Pairs are neighbours (2i, 2i+1) as in the paper and GPT-J; otherwise (i, i + rotary_dim/2), as in
            GPT-NeoX and Llama. The two differ by a permutation of dimensions, so checkpoints do not mix.
        scaling: See `rope_frequencies`.
        length: See `rope_frequencies`; None for the largest position in use, plus 1.

    Raises:
        ValueError: rotary_dim is odd, not positive or larger than the head dim; base is not positive.
    """
    head_dim = x.shape[-1]
    dim = head_dim if rotary_dim is None else rotary_dim
    if not 2 <= dim <= head_dim or dim % 2:
        raise ValueError(f"rotary_dim must be even and between 2 and the head dim {head_dim}, not {dim}")
    if length is None and scaling is not None:
        length = positions.max() + 1
    frequencies = rope_frequencies(dim, base=base, scaling=scaling, length=length)
    angles = (positions[..., None].astype(jnp.float32) * frequencies)[..., None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)

    turned = x[..., :dim].astype(jnp.float32)
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = jnp.split(turned, 2, axis=-1)
    pair = first * cos - second * sin, second * cos + first * sin
    turned = jnp.stack(pair, axis=-1).reshape(turned.shape) if interleaved else jnp.concatenate(pair, axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), x[..., dim:]], axis=-1)


@dataclasses.dataclass(frozen=True)
class RoPE(Encoding):
    """Rotary position embedding: q and k turned by position, so that q·k depends on their distance.

    Alone it does not extrapolate: perplexity rises within about a tenth past the training length (Wang et al. 2024).
    """

    base: float = 10_000.0
    rotary_dim: int | None = None
    """How many leading dimensions of a head turn; None for all."""
    interleaved: bool = False
    scaling: RotaryScaling | None = None

    def __post_init__(self):
        if not self.base > 0:
            raise ValueError(f"base must be positive, not {self.base}")
        if self.rotary_dim is not None and (self.rotary_dim < 2 or self.rotary_dim % 2):
            raise ValueError(f"rotary_dim must be a positive even number, not {self.rotary_dim}")

    def query_key(self, params: Params, query, key, query_positions, key_positions):
        # Queries and keys turn by the same frequencies: a scaling that depends on length is told the longer of the two.
        length = None if self.scaling is None else jnp.maximum(query_positions.max(), key_positions.max()) + 1
        turn = functools.partial(
            apply_rope,
            base=self.base,
            rotary_dim=self.rotary_dim,
            interleaved=self.interleaved,
            scaling=self.scaling,
            length=length,
        )
        return turn(query, query_positions), turn(key, key_positions)
