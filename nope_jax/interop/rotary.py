"""RoPE as config.json says it (`rope_type`), in and out, and patterns over the layers.

`rope_parameters` of transformers 5 and `rope_theta` with `rope_scaling` of earlier versions are both read. What is
written is the latter, which all versions read.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from nope_jax.config import ModelConfig
from nope_jax.encodings import (
    DynamicNTKScaling,
    Encoding,
    LinearScaling,
    Llama3Scaling,
    LongRoPEScaling,
    NTKScaling,
    ProportionalScaling,
    RoPE,
    RotaryScaling,
    Windowed,
    YaRNScaling,
    resolve,
)
from nope_jax.interop.settings import Settings


def read_rope(
    settings: Settings,
    head_dim: int,
    *,
    base: float = 10_000.0,
    share: float = 1.0,
    interleaved: bool = False,
    layer_type: str | None = None,
) -> RoPE:
    """The rotary encoding of a config.json.

    Args:
        settings: The config.json; `max_position_embeddings` is the original length where no other is given.
        head_dim: H.
        base: The family's default of rope_theta.
        share: The family's default of partial_rotary_factor.
        interleaved: Whether the family pairs neighbouring dimensions.
        layer_type: Of the layers, if the family's rope_parameters differ between types of layers.

    Raises:
        ValueError: a rope_type, or a setting of one, is not supported.
    """
    base = settings.number("rope_theta", base)
    share = settings.number("partial_rotary_factor", share)
    given = {name: settings.get(name) for name in ("rope_scaling", "rope_parameters")}
    absent: tuple[str, dict[str, Any]] = "rope_parameters", {}
    name, values = next(((name, values) for name, values in given.items() if values), absent)
    if layer_type is not None and layer_type in values:
        name, values = f"{name}.{layer_type}", values[layer_type]
    rope = Settings(values, f"{settings.where}: {name}")
    base = rope.number("rope_theta", base)
    share = rope.number("partial_rotary_factor", share)
    kind = rope.get("rope_type", rope.get("type", "default"))
    rope.ignore("type")
    if kind not in _READERS:
        raise ValueError(f"{rope.where}: rope_type {kind!r} is not supported, only {', '.join(_READERS)}")
    longest = settings.integer("max_position_embeddings", 2048)
    original = settings.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    try:
        scaling = _READERS[kind](rope, longest, original or longest)
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(rope.where) else f"{rope.where}: {error}") from error
    rope.refuse_rest(frozenset())
    if isinstance(scaling, ProportionalScaling):
        return RoPE(base=base, interleaved=interleaved, scaling=dataclasses.replace(scaling, fraction=share))
    dim = int(head_dim * share)
    return RoPE(base=base, rotary_dim=None if dim == head_dim else dim, interleaved=interleaved, scaling=scaling)


def _read_yarn(rope: Settings, longest: int, original: int) -> RotaryScaling:
    factor = rope.number("factor", longest / original)
    attention = rope.get("attention_factor")
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if attention is None and mscale and all_dim:
        attention = (0.1 * mscale * math.log(factor) + 1) / (0.1 * all_dim * math.log(factor) + 1)
    return YaRNScaling(
        factor,
        original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=attention,
        truncate=rope.choice("truncate", True, {True: True, False: False, None: True}),
    )


def _read_longrope(rope: Settings, longest: int, original: int) -> RotaryScaling:
    attention, factor = rope.get("attention_factor"), rope.number("factor", longest / original)
    if attention is None and factor <= 1:
        attention = 1.0
    factors = rope["short_factor"], rope["long_factor"]
    return LongRoPEScaling(*factors, original, factor=max(1.0, factor), attention_factor=attention)


_READERS: dict[str, Callable[[Settings, int, int], RotaryScaling | None]] = {
    "default": lambda rope, longest, original: None,
    "linear": lambda rope, longest, original: LinearScaling(rope.number("factor")),
    "dynamic": lambda rope, longest, original: DynamicNTKScaling(rope.number("factor"), longest),
    "yarn": _read_yarn,
    "longrope": _read_longrope,
    "su": _read_longrope,  # Phi-3's first name of it
    "proportional": lambda rope, longest, original: ProportionalScaling(factor=rope.number("factor", 1.0)),
    "llama3": lambda rope, longest, original: Llama3Scaling(
        rope.number("factor"),
        original,
        rope.number("low_freq_factor"),
        rope.number("high_freq_factor"),
    ),
}


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of the rotary encoding of a model: rope_theta and, if it is scaled, rope_scaling.

    Nothing if it has none; the first if it has several. `save_pretrained` finds what is left unsaid.
    """
    inner = (split_window(encoding)[0] for encoding in per_layer(config))
    rope = next((encoding for encoding in inner if isinstance(encoding, RoPE)), None)
    if rope is None:
        return {}
    scaling = _write_scaling(rope.scaling)
    return _write_base(rope, head_dim(config)) | ({"rope_scaling": scaling} if scaling else {})


def _write_base(rope: RoPE, head_dim: int) -> dict[str, Any]:
    base: dict[str, Any] = {"rope_theta": plain(rope, head_dim).base}
    return base | ({} if rope.rotary_dim is None else {"partial_rotary_factor": rope.rotary_dim / head_dim})


def _write_scaling(scaling: RotaryScaling | None) -> dict[str, Any]:
    """`rope_scaling`, without what it cannot express."""
    written: dict[str, Any] = {}
    match scaling:
        case LinearScaling():
            written = {"rope_type": "linear", "factor": scaling.factor}
        case DynamicNTKScaling():
            written = {"rope_type": "dynamic", "factor": scaling.factor}
        case ProportionalScaling():
            written = {
                "rope_type": "proportional",
                "factor": scaling.factor,
                "partial_rotary_factor": scaling.fraction,
            }
        case YaRNScaling():
            written = {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_length,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "attention_factor": scaling.attention_factor,
                "truncate": scaling.truncate,
            }
        case LongRoPEScaling():
            written = {
                "rope_type": "longrope",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_length,
                "short_factor": list(scaling.short_factors),
                "long_factor": list(scaling.long_factors),
                "attention_factor": scaling.attention_factor,
            }
        case Llama3Scaling():
            written = {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_length,
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
            }
    return {name: value for name, value in written.items() if value is not None}


def rope_parameters(rope: RoPE, head_dim: int) -> dict[str, Any]:
    """`rope_parameters` of transformers 5, for families whose earlier settings cannot say as much."""
    return {"rope_type": "default", **_write_scaling(rope.scaling), **_write_base(rope, head_dim)}


def plain(encoding: Any, head_dim: int) -> Any:
    """The same encoding without NTK-aware scaling, which is a larger base."""
    if isinstance(encoding, Windowed):
        return dataclasses.replace(encoding, encoding=plain(encoding.encoding, head_dim))
    if not isinstance(encoding, RoPE):
        return encoding
    base, scaling = float(encoding.base), encoding.scaling
    if isinstance(scaling, NTKScaling):
        dim = encoding.rotary_dim or head_dim
        base, scaling = base * scaling.factor ** (dim / (dim - 2)), None
    return dataclasses.replace(encoding, base=base, scaling=scaling)


def head_dim(config: ModelConfig) -> int:
    """H."""
    return config.head_dim or config.model_dim // config.num_heads


def per_layer(config: ModelConfig) -> list[Encoding]:
    """The encoding of every layer."""
    period = resolve(config.encoding)
    return [period[layer % len(period)] for layer in range(config.num_layers)]


def shortest_period(encodings: Sequence[Encoding]) -> Encoding | tuple[Encoding, ...]:
    """The encodings of all layers as `model.encoding`: the shortest tuple that repeats to them, or the only one."""
    for length in range(1, len(encodings) + 1):
        if all(encoding == encodings[layer % length] for layer, encoding in enumerate(encodings)):
            return encodings[0] if length == 1 else tuple(encodings[:length])
    raise ValueError("a model needs at least one layer")


def read_windows(
    settings: Settings, layers: int, default: Callable[[int], bool], window: int | None
) -> list[int | None]:
    """The window of each layer, by `layer_types` or, where that is absent, by the family's rule.

    Raises:
        ValueError: layer_types has another number of layers, or a type other than full and sliding attention.
    """
    kinds = settings.get("layer_types")
    if kinds is None:
        return [window if default(layer) else None for layer in range(layers)]
    if len(kinds) < layers:
        raise ValueError(f"{settings.where}: layer_types has {len(kinds)} entries for {layers} layers")
    known = {"full_attention": None, "sliding_attention": window}
    if unknown := [kind for kind in kinds if kind not in known]:
        raise ValueError(
            f"{settings.where}: layer_types {unknown[0]!r} is not supported, only full_attention and sliding_attention"
        )
    return [known[kind] for kind in kinds[:layers]]


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """The reverse of `read_windows`: `layer_types` and `sliding_window`."""
    windows = [split_window(encoding)[1] for encoding in per_layer(config)]
    return {
        "sliding_window": next((window for window in windows if window is not None), None),
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }


def windowed(encoding: Encoding, window: int | None) -> Encoding:
    """The encoding, limited to a window if there is one."""
    return encoding if window is None else Windowed(encoding, window)


def split_window(encoding: Encoding) -> tuple[Encoding, int | None]:
    """The reverse of `windowed`."""
    return (encoding.encoding, encoding.window) if isinstance(encoding, Windowed) else (encoding, None)
