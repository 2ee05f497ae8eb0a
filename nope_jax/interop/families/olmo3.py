"""OLMo 3: OLMo 2 with a window in three of four layers, which alone are not scaled (transformers: models/olmo3)."""

import dataclasses
from typing import Any

from nope_jax.config import ModelConfig
from nope_jax.encodings import RoPE
from nope_jax.interop.families.family import Family, write_shape
from nope_jax.interop.families.olmo2 import WEIGHTS, read_without_encoding
from nope_jax.interop.rotary import (
    head_dim,
    per_layer,
    read_rope,
    read_windows,
    rope_parameters,
    shortest_period,
    split_window,
    windowed,
    write_windows,
)
from nope_jax.interop.settings import Settings

_BASE = 500_000.0
_KINDS = dict.fromkeys(("full_attention", "sliding_attention"))


def read(settings: Settings) -> ModelConfig:
    fields = read_without_encoding(settings)
    nested = settings.get("rope_parameters") or {}
    if nested.keys() - _KINDS:
        raise ValueError(f"{settings.where}: rope_parameters must be given for {' and '.join(_KINDS)}")
    full, sliding = (read_rope(settings, fields["head_dim"], base=_BASE, layer_type=kind) for kind in _KINDS)
    if not nested:  # rope_scaling is that of the layers without a window
        sliding = dataclasses.replace(full, scaling=None)
    windows = read_windows(
        settings, fields["num_layers"], lambda layer: (layer + 1) % 4 != 0, settings.get("sliding_window", 4096)
    )
    return ModelConfig(
        **fields, encoding=shortest_period([windowed(sliding, window) if window else full for window in windows])
    )


def write(config: ModelConfig) -> dict[str, Any]:
    both: dict[str, RoPE] = {}
    for encoding in per_layer(config):
        inner, window = split_window(encoding)
        if isinstance(inner, RoPE):
            both.setdefault("full_attention" if window is None else "sliding_attention", inner)
    rope = {name: rope_parameters(inner, head_dim(config)) for name, inner in both.items()}
    rope = {name: rope.get(name, next(iter(rope.values()))) for name in _KINDS} if rope else {}
    return (
        write_shape(config)
        | write_windows(config)
        | {"rope_parameters": rope, "attention_bias": "qkv" in config.biases}
    )


FAMILY = Family(name="olmo3", architecture="Olmo3ForCausalLM", weights=WEIGHTS, read=read, write=write)
