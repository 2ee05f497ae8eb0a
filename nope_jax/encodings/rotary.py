"""RoPE (Su et al. 2021, arXiv 2104.09864), its scalings for context extension, and xPos.

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, H head dim; "half" is half of the
rotated dimensions, the number of pairs.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Sequence
from numbers import Real

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Integer, Shaped

from nope_jax.encodings.checks import as_array, at_least, integer_at_least, positive
from nope_jax.encodings.encoding import Encoding, ModelDims, Params, tokenwise

Frequencies = Float[np.ndarray, "half"] | Float[Array, "half"]
"""Radians per position: float64 in NumPy when known in advance, otherwise float32 in JAX."""


@dataclasses.dataclass(frozen=True)
class RotaryScaling(abc.ABC):
    """Base of the scalings that extend RoPE past its training length by changing its frequencies."""

    @abc.abstractmethod
    def frequencies(
        self, frequencies: Frequencies, *, base: float, length: Integer[ArrayLike, ""] | None
    ) -> Frequencies:
        """Scale the frequencies, given the unscaled ones, their base and the number of positions in use."""

    @property
    def amplitude(self) -> float:
        """Factor of the cosines and sines; q·k is multiplied by its square ("attention factor")."""
        return 1.0

    @property
    def depends_on_length(self) -> bool:
        """Whether the frequencies depend on the number of positions in use."""
        return True


@dataclasses.dataclass(frozen=True)
class LinearScaling(RotaryScaling):
    """Position interpolation: divide every angle by factor, so factor·L positions fit into the trained range.

    Chen et al. 2023, arXiv 2306.15595. Not to be confused with NTK-aware scaling, which changes the base.
    """

    factor: float

    def __post_init__(self):
        at_least(1, factor=self.factor)

    @property
    def depends_on_length(self) -> bool:
        return False

    def frequencies(self, frequencies, *, base, length):
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class NTKScaling(RotaryScaling):
    """NTK-aware scaling: replace the base by base · factor^(d/(d-2)), with d the number of rotated dimensions.

    The fastest pair keeps its frequency, the slowest is divided by factor, and those between by powers of it. The
    method came from a post by bloc97 (2023), not from a paper; Peng et al. 2023 (arXiv 2309.00071) give the formula.

    A position can be read as a number and each pair of dimensions as one of its digits, in base base^(2/d): neighbours
    differ in the fast digits, distant positions in the slow ones. Position interpolation divides the numbers, which
    leaves neighbours a fraction of a digit apart. Here the numbers are converted to a larger base: the same number of
    digits reaches factor times as far, and neighbours still differ by a whole digit.
    """

    factor: float

    def __post_init__(self):
        at_least(1, factor=self.factor)

    @property
    def depends_on_length(self) -> bool:
        return False

    def frequencies(self, frequencies, *, base, length):
        return frequencies * self.factor ** -_ntk_exponents(len(frequencies))


@dataclasses.dataclass(frozen=True)
class DynamicNTKScaling(RotaryScaling):
    """NTK-aware scaling only as strong as the length requires: base · (s·n/L - (s-1))^(d/(d-2)) for n > L positions.

    s is factor, L is original_length, d the number of rotated dimensions; up to L positions RoPE is unchanged. Like
    `NTKScaling` it was posted, not published (bloc97 and emozilla 2023); see Peng et al. 2023, arXiv 2309.00071.

    The frequencies depend on n, the number of positions in use, so the first tokens of a longer sequence are rotated
    differently. In decoding, n is the capacity of the KV cache.
    """

    factor: float
    original_length: int

    def __post_init__(self):
        at_least(1, factor=self.factor)
        integer_at_least(1, original_length=self.original_length)

    def frequencies(self, frequencies, *, base, length):
        excess = jnp.maximum(_known(length, self) - self.original_length, 0)
        # The growth of the base, s·n/L - (s-1), computed without subtracting two large numbers.
        growth = jnp.log1p(excess * (self.factor / self.original_length))
        return frequencies * jnp.exp(-_ntk_exponents(len(frequencies)) * growth)


@dataclasses.dataclass(frozen=True)
class YaRNScaling(RotaryScaling):
    """YaRN: keep fast pairs, interpolate slow ones, with a ramp between; cosines and sines times 0.1·ln(factor) + 1.

    A pair is fast if it rotates more than beta_fast times within original_length positions, slow if fewer than
    beta_slow times. The ramp is linear in the pair's index, as in the authors' code and the models trained with it; the
    paper's text makes it linear in the number of rotations. With attention_factor=1 this is "NTK-by-parts".

    Peng et al. 2023, arXiv 2309.00071.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """Factor of the cosines and sines. None: 0.1·ln(factor) + 1."""
    truncate: bool = True
    """Round the ends of the ramp outwards to whole pairs, as the authors' code does. gpt-oss does not."""

    def __post_init__(self):
        at_least(1, factor=self.factor)
        integer_at_least(1, original_length=self.original_length)
        positive(beta_fast=self.beta_fast, beta_slow=self.beta_slow, attention_factor=self.attention_factor)
        if not self.beta_fast > self.beta_slow:
            raise ValueError(f"beta_fast must be above beta_slow, {self.beta_slow}, not {self.beta_fast}")

    @property
    def amplitude(self) -> float:
        return 0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor

    @property
    def depends_on_length(self) -> bool:
        return False

    def frequencies(self, frequencies, *, base, length):
        if not base > 1:
            raise ValueError(f"base must be above 1 for YaRNScaling, not {base}")
        dim = 2 * len(frequencies)
        # The fractional index of the pair that rotates this many times within original_length.
        first, last = (
            dim * math.log(self.original_length / (2 * math.pi * turns)) / (2 * math.log(base))
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        ramp = np.clip((np.arange(dim // 2) - first) / max(last - first, 0.001), 0, 1)
        return frequencies * (1 - ramp) + frequencies / self.factor * ramp


@dataclasses.dataclass(frozen=True)
class LongRoPEScaling(RotaryScaling):
    """LongRoPE: divide each pair's frequency by its own factor, with separate factors for short and long sequences.

    The factors come from a search by the model's authors. Cosines and sines are multiplied by √(1 + ln s / ln L) at
    every length, with s = factor and L = original_length. Ding et al. 2024, arXiv 2402.13753.

    The frequencies depend on the number of positions in use, so the first tokens of a sequence beyond original_length
    are rotated differently. In decoding, that number is the capacity of the KV cache.
    """

    short_factors: Sequence[float] | np.ndarray
    """One per pair, for up to original_length positions in use."""
    long_factors: Sequence[float] | np.ndarray
    """One per pair, for more positions."""
    original_length: int
    factor: float | None = None
    """The longest length divided by original_length; required unless attention_factor is given."""
    attention_factor: float | None = None
    """Factor of the cosines and sines. None: √(1 + ln(factor) / ln(original_length))."""

    def __post_init__(self):
        for name in ("short_factors", "long_factors"):
            factors = tuple(getattr(self, name))  # also accepts a list
            if not factors or not all(isinstance(x, Real) and 0 < x < math.inf for x in factors):
                raise ValueError(f"{name} must be positive numbers, one per pair, not {factors}")
            object.__setattr__(self, name, tuple(map(float, factors)))
        if len(self.short_factors) != len(self.long_factors):
            raise ValueError(
                f"long_factors must have as many entries as short_factors, {len(self.short_factors)}, "
                f"not {len(self.long_factors)}"
            )
        integer_at_least(1, original_length=self.original_length)
        positive(attention_factor=self.attention_factor)
        at_least(1, factor=self.factor)
        if self.attention_factor is None:
            if self.factor is None:
                raise ValueError("factor must be given if attention_factor is not")
            integer_at_least(2, original_length=self.original_length)  # amplitude divides by its logarithm

    @property
    def amplitude(self) -> float:
        return self.attention_factor or math.sqrt(1 + math.log(self.factor or 1) / math.log(self.original_length))

    def frequencies(self, frequencies, *, base, length):
        if len(self.short_factors) != len(frequencies):
            raise ValueError(
                f"short_factors and long_factors must have {len(frequencies)} entries, one per rotated pair of "
                f"dimensions, not {len(self.short_factors)}"
            )
        short, long = frequencies / np.array(self.short_factors), frequencies / np.array(self.long_factors)
        return jnp.where(_known(length, self) > self.original_length, long, short)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling(RotaryScaling):
    """Llama 3.1's scaling: keep fast pairs, interpolate slow ones, with a ramp linear in rotations between.

    A pair is slow if it rotates fewer than low_frequency_factor times within original_length positions, fast if more
    than high_frequency_factor times. There is no attention factor. Llama team 2024, arXiv 2407.21783, and its code.
    """

    factor: float = 8.0
    original_length: int = 8192
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0

    def __post_init__(self):
        at_least(1, factor=self.factor)
        integer_at_least(1, original_length=self.original_length)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        positive(low_frequency_factor=low)
        if not high > low:
            raise ValueError(f"high_frequency_factor must be above low_frequency_factor, {low}, not {high}")

    @property
    def depends_on_length(self) -> bool:
        return False

    def frequencies(self, frequencies, *, base, length):
        turns = self.original_length * frequencies / (2 * math.pi)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return kept * frequencies + (1 - kept) * frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class ProportionalScaling(RotaryScaling):
    """Rotate only a fraction of the pairs, the fastest ones, and divide their frequencies by factor; the rest stand.

    The full-attention layers of Gemma 4 and LFM 3 ("proportional" in transformers). With `RoPE(rotary_dim=...)`, the
    frequencies of a fraction of the pairs span all wavelengths up to base; here each pair keeps the frequency that it
    has when all pairs rotate.
    """

    fraction: float = 0.25
    factor: float = 1.0

    def __post_init__(self):
        positive(fraction=self.fraction)
        if self.fraction > 1:
            raise ValueError(f"fraction must be at most 1, not {self.fraction}")
        at_least(1, factor=self.factor)

    def frequencies(self, frequencies, *, base, length):
        rotated = np.arange(len(frequencies)) < math.floor(self.fraction * len(frequencies))
        return np.where(rotated, frequencies / self.factor, 0.0)


def _ntk_exponents(half: int) -> Float[np.ndarray, "{half}"]:
    """2m/(d-2): multiplying the base by g^(d/(d-2)) divides the frequency of pair m by g to this power."""
    if half < 2:
        raise ValueError("dim must be at least 4 for NTK-aware scaling, which divides by dim - 2, not 2")
    return np.arange(half) / (half - 1)


def _known(length: Integer[ArrayLike, ""] | None, scaling: RotaryScaling) -> Integer[ArrayLike, ""]:
    if length is None:
        raise ValueError(f"length, the number of positions in use, must be given: {type(scaling).__name__} needs it")
    return length


def rope_frequencies(
    dim: int,
    *,
    base: float = 10_000.0,
    scaling: RotaryScaling | None = None,
    length: Integer[ArrayLike, ""] | None = None,
) -> Float[Array, "{dim}//2"]:
    """Radians per position of each pair of dimensions: base^(-2m/dim), float32.

    Args:
        dim: Number of rotated dimensions; must be even.
        base: Wavelengths grow from 2π to base·2π.
        scaling: Scales the frequencies for context extension. They do not include its `amplitude`.
        length: Number of positions in use; `DynamicNTKScaling` and `LongRoPEScaling` need it. May be traced.

    Raises:
        ValueError: dim is odd or not positive, base is not positive, or the scaling needs length and it is None.
    """
    return jnp.asarray(_frequencies(dim, base, scaling, length), jnp.float32)


def _frequencies(dim: int, base: float, scaling=None, length=None) -> Frequencies:
    if dim < 2 or dim % 2:
        raise ValueError(f"dim must be a positive even number, not {dim}")
    positive(base=base)
    frequencies = base ** (-np.arange(0, dim, 2) / dim)
    return frequencies if scaling is None else scaling.frequencies(frequencies, base=base, length=length)


def apply_rope(
    x: Shaped[Array | np.ndarray, "B T N H"],
    positions: Integer[ArrayLike, "T"] | Integer[ArrayLike, "#B T"],
    *,
    base: float = 10_000.0,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    scaling: RotaryScaling | None = None,
    length: Integer[ArrayLike, ""] | None = None,
) -> Shaped[Array, "B T N H"]:
    """Rotate each pair of dimensions of x by position times its frequency; angles are float32 for any dtype of x.

    Args:
        x: Queries or keys.
        positions: Their positions.
        base: See `rope_frequencies`.
        rotary_dim: Number of leading dimensions to rotate; None for all. Kazemnejad et al. 2023 rotate a quarter.
        interleaved: Pair neighbouring dimensions (2m, 2m+1), as in the paper and GPT-J; otherwise pair
            (m, m + rotary_dim/2), as in GPT-NeoX and Llama. The two differ by a permutation of dimensions, so
            checkpoints are not interchangeable.
        scaling: See `rope_frequencies`; rotated dimensions are also multiplied by its `amplitude`.
        length: See `rope_frequencies`; None for the largest position in use plus 1.

    Raises:
        ValueError: rotary_dim is odd, not positive or larger than the head dim; base is not positive; or the scaling
            does not fit.
    """
    x, positions = as_array("x", x), as_array("positions", positions)
    head_dim = x.shape[-1]
    dim = head_dim if rotary_dim is None else rotary_dim
    if rotary_dim is None and dim % 2:
        raise ValueError(f"rotary_dim must be given for a head dim that is odd, {dim}")
    if not 2 <= dim <= head_dim or dim % 2:
        raise ValueError(f"rotary_dim must be even and between 2 and the head dim {head_dim}, not {dim}")
    if length is None and scaling is not None:
        length = positions.max() + 1
    frequencies = rope_frequencies(dim, base=base, scaling=scaling, length=length)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return _turn(x, angles, 1.0 if scaling is None else scaling.amplitude, interleaved)


def _turn(
    x: Shaped[Array, "B T N H"],
    angles: Float[Array, "*#B T half"],
    amplitude: Float[Array, "*#B T half"] | float,
    interleaved: bool,
) -> Shaped[Array, "B T N H"]:
    """Rotate the leading pairs of dimensions by their angles and multiply them by amplitude, in the dtype of x."""
    dim = 2 * angles.shape[-1]
    cos, sin = ((f(angles) * amplitude)[..., None, :] for f in (jnp.cos, jnp.sin))
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
    """Rotary position embedding: q and k rotated by position, so that q·k depends on distance.

    Su et al. 2021, arXiv 2104.09864. RoPE alone does not extrapolate: perplexity rises within about a tenth past the
    training length (Wang et al. 2024, arXiv 2404.12224). Context extension takes a scaling: position interpolation
    divides the angles (`LinearScaling`), NTK-aware scaling changes the base (`NTKScaling`).
    """

    base: float = 10_000.0
    rotary_dim: int | None = None
    """Number of leading dimensions of a head to rotate; None for all."""
    interleaved: bool = False
    scaling: RotaryScaling | None = None
    """`DynamicNTKScaling` and `LongRoPEScaling` depend on the number of positions in use: the largest one plus 1."""

    def __post_init__(self):
        positive(base=self.base)
        integer_at_least(2, rotary_dim=self.rotary_dim)
        if self.rotary_dim is not None and self.rotary_dim % 2:
            raise ValueError(f"rotary_dim must be a positive even number, not {self.rotary_dim}")
        if not isinstance(self.scaling, RotaryScaling | None):
            raise ValueError(f"scaling must be a RotaryScaling, such as LinearScaling(2.0), not {self.scaling!r}")

    @property
    def depends_on_length(self) -> bool:
        return super().depends_on_length or (self.scaling is not None and self.scaling.depends_on_length)

    @tokenwise
    def query_key(self, params: Params, query, key, query_positions, key_positions):
        # Queries and keys use the same frequencies, so a scaling that depends on length gets the larger of the two.
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


XPOS_RANGE = 80
"""log2 of the largest ratio xPos allows between the nearest and farthest product; float32 has 127, logits need some."""


@dataclasses.dataclass(frozen=True)
class XPos(Encoding):
    """RoPE with pairs that decay with distance: q times ζ_m^(i/scale_base), k times ζ_m^(-j/scale_base).

    ζ_m = (2m + 0.4H) / (1.4H) for pair m of a head. Its product is multiplied by ζ_m^((i-j)/scale_base), so fast pairs
    decay most. Products grow towards the future, which is why xPos is for causal attention. Sun et al. 2022, arXiv
    2212.10554, and its code (torchscale).

    Only distance matters, so positions are measured from the middle of those in use, which halves the exponents. The
    remaining range limits the span of positions in float32 to 22,663 at scale_base 512, proportional to scale_base. A
    wider span gives NaN if the check of `max_length` cannot see it.
    """

    base: float = 10_000.0
    scale_base: float = 512.0
    """The distance, in positions, over which the first pair decays to 0.4/1.4."""
    interleaved: bool = True
    """Pair neighbouring dimensions (2m, 2m+1), as in the authors' code; otherwise (m, m + H/2), as in Llama."""

    def __post_init__(self):
        positive(base=self.base, scale_base=self.scale_base)

    def max_length(self, dims: ModelDims | None = None) -> int:
        """The largest difference of two positions plus 1, which is the number of positions counted from 0."""
        span = XPOS_RANGE * math.log(2) * self.scale_base / math.log(1.4 / 0.4)
        return 1 + math.floor(min(span, 2**31 - 2))  # positions are 32-bit integers

    @tokenwise
    def query_key(self, params: Params, query, key, query_positions, key_positions):
        dim = query.shape[-1]
        if dim % 2:
            raise ValueError(f"the head dim must be even for xPos, not {dim}")
        ends = [(x.min(-1, keepdims=True), x.max(-1, keepdims=True)) for x in (query_positions, key_positions)]
        least, most = jnp.minimum(ends[0][0], ends[1][0]), jnp.maximum(ends[0][1], ends[1][1])
        span = most - least
        middle = least + span // 2
        frequencies = rope_frequencies(dim, base=self.base)
        fading = jnp.asarray(np.log((np.arange(0, dim, 2) + 0.4 * dim) / (1.4 * dim)) / self.scale_base, jnp.float32)

        def turn(x, positions, sign):
            offset = (positions - middle)[..., None].astype(jnp.float32)
            scale = jnp.exp(sign * jnp.where(span[..., None] < self.max_length(), offset, jnp.nan) * fading)
            # float16 overflows here, so it is promoted to float32.
            x = x.astype(jnp.promote_types(x.dtype, jnp.bfloat16))
            return _turn(x, offset * frequencies, scale, self.interleaved)

        return turn(query, query_positions, 1), turn(key, key_positions, -1)
