"""Positional encodings: frozen dataclasses that act at the places of `Encoding`, and the functions they are made of."""

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from nope_jax.encodings.absolute import Learned, Sinusoidal, sinusoidal_positions
from nope_jax.encodings.bias import T5, ALiBi, alibi_slopes, t5_bucket
from nope_jax.encodings.encoding import Block, BlockLogit, BlockValue, DistanceLogit, Encoding, Params, Sizes
from nope_jax.encodings.nope import NoPE
from nope_jax.encodings.rotary import LinearScaling, RoPE, RotaryScaling, apply_rope, rope_frequencies

ENCODINGS: Mapping[str, type[Encoding]] = MappingProxyType(
    {
        "nope": NoPE,
        "learned": Learned,
        "sinusoidal": Sinusoidal,
        "rope": RoPE,
        "alibi": ALiBi,
        "t5": T5,
    }
)
"""Every encoding that a name stands for; called without arguments it has its paper's settings."""


def resolve(spec: str | Encoding | tuple[str | Encoding, ...]) -> tuple[Encoding, ...]:
    """The encodings of one period of layers: what a name, an encoding, or a tuple of them stands for.

    Raises:
        ValueError: A name that is not in ENCODINGS, or an empty tuple.
    """
    if isinstance(spec, Encoding):
        return (spec,)
    if isinstance(spec, str):
        if spec not in ENCODINGS:
            near = difflib.get_close_matches(spec, ENCODINGS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown encoding {spec!r}: {hint}choose from {', '.join(ENCODINGS)}")
        return (ENCODINGS[spec](),)
    if not isinstance(spec, tuple | list) or not spec:
        raise ValueError(f"encoding must be a name, an Encoding or a non-empty tuple of them, not {spec!r}")
    return tuple(encoding for part in spec for encoding in resolve(part))


__all__ = [
    "ENCODINGS",
    "T5",
    "ALiBi",
    "Block",
    "BlockLogit",
    "BlockValue",
    "DistanceLogit",
    "Encoding",
    "Learned",
    "LinearScaling",
    "NoPE",
    "Params",
    "RoPE",
    "RotaryScaling",
    "Sinusoidal",
    "Sizes",
    "alibi_slopes",
    "apply_rope",
    "resolve",
    "rope_frequencies",
    "sinusoidal_positions",
    "t5_bucket",
]
