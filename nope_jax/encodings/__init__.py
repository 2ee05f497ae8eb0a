"""Positional encodings: frozen dataclasses that act at the places of `Encoding`, and the functions they are made of."""

from nope_jax.encodings.absolute import Learned, Sinusoidal, sinusoidal_positions
from nope_jax.encodings.bias import T5, ALiBi, alibi_slopes, t5_bucket
from nope_jax.encodings.encoding import (
    Block,
    BlockLogit,
    BlockValue,
    DistanceLogit,
    Encoding,
    Params,
    Reach,
    ScanLogit,
    Sizes,
    Tokens,
    skew,
    unskew,
)
from nope_jax.encodings.nope import NoPE
from nope_jax.encodings.registry import ENCODINGS, SCHEDULES, resolve
from nope_jax.encodings.rotary import LinearScaling, RoPE, RotaryScaling, apply_rope, rope_frequencies
from nope_jax.encodings.wrapper import Wrapper

__all__ = [
    "ENCODINGS",
    "SCHEDULES",
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
    "Reach",
    "RoPE",
    "RotaryScaling",
    "ScanLogit",
    "Sinusoidal",
    "Sizes",
    "Tokens",
    "Wrapper",
    "alibi_slopes",
    "apply_rope",
    "resolve",
    "rope_frequencies",
    "sinusoidal_positions",
    "skew",
    "t5_bucket",
    "unskew",
]
