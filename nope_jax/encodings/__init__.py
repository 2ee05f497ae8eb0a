"""Positional encodings: frozen dataclasses that act at the places of `Encoding`, and the functions they are made of."""

from nope_jax.encodings import former_names
from nope_jax.encodings.absolute import (
    ComplexOrder,
    Hierarchical,
    Learned,
    Multiplicative,
    Sinusoidal,
    sinusoidal_positions,
)
from nope_jax.encodings.bias import FIRE, KERPLE, T5, ALiBi, alibi_slopes, t5_bucket
from nope_jax.encodings.contextual import CoPE, Forgetting, RunningSum, forget_sums
from nope_jax.encodings.convolution import Convolution
from nope_jax.encodings.encoding import (
    AttentionSpan,
    BlockLogit,
    BlockValue,
    DistanceLogit,
    DistanceVectors,
    Encoding,
    ModelDims,
    Params,
    ScanLogit,
    Tile,
    TokenInputs,
    skew,
    tokenwise,
    unskew,
)
from nope_jax.encodings.logit_scale import (
    HeadScale,
    Llama4Scale,
    LogN,
    SSMax,
    SwanScale,
    UniformScale,
    keys_seen,
    logit_scale_product,
)
from nope_jax.encodings.nope import NoPE
from nope_jax.encodings.randomized import Randomized, randomized_positions
from nope_jax.encodings.recurrent import FLOATER, Recursive
from nope_jax.encodings.registry import ENCODINGS, SCHEDULES, resolve
from nope_jax.encodings.relative import NEZHA, TUPE, DeBERTa, Shaw, TransformerXL, deberta_bucket
from nope_jax.encodings.rotary import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRoPEScaling,
    NTKScaling,
    ProportionalScaling,
    RoPE,
    RotaryScaling,
    XPos,
    YaRNScaling,
    apply_rope,
    rope_frequencies,
)
from nope_jax.encodings.schedules import Chunked, Windowed
from nope_jax.encodings.sink import AttentionSink
from nope_jax.encodings.wrapper import Wrapper

__all__ = [
    "ENCODINGS",
    "FIRE",
    "FLOATER",
    "KERPLE",
    "NEZHA",
    "SCHEDULES",
    "T5",
    "TUPE",
    "ALiBi",
    "AttentionSink",
    "AttentionSpan",
    "BlockLogit",
    "BlockValue",
    "Chunked",
    "CoPE",
    "ComplexOrder",
    "Convolution",
    "DeBERTa",
    "DistanceLogit",
    "DistanceVectors",
    "DynamicNTKScaling",
    "Encoding",
    "Forgetting",
    "HeadScale",
    "Hierarchical",
    "Learned",
    "LinearScaling",
    "Llama3Scaling",
    "Llama4Scale",
    "LogN",
    "LongRoPEScaling",
    "ModelDims",
    "Multiplicative",
    "NTKScaling",
    "NoPE",
    "Params",
    "ProportionalScaling",
    "Randomized",
    "Recursive",
    "RoPE",
    "RotaryScaling",
    "RunningSum",
    "SSMax",
    "ScanLogit",
    "Shaw",
    "Sinusoidal",
    "SwanScale",
    "Tile",
    "TokenInputs",
    "TransformerXL",
    "UniformScale",
    "Windowed",
    "Wrapper",
    "XPos",
    "YaRNScaling",
    "alibi_slopes",
    "apply_rope",
    "deberta_bucket",
    "forget_sums",
    "keys_seen",
    "logit_scale_product",
    "randomized_positions",
    "resolve",
    "rope_frequencies",
    "sinusoidal_positions",
    "skew",
    "t5_bucket",
    "tokenwise",
    "unskew",
]


def __getattr__(name: str) -> object:
    return former_names.public(name, globals())
