"""Mistral: Llama with a sliding window (transformers: models/mistral)."""

from typing import Any

from nope_jax.config import ModelConfig
from nope_jax.interop.families.family import Family, read_shape, write_shape
from nope_jax.interop.families.llama import WEIGHTS
from nope_jax.interop.rotary import per_layer, read_rope, split_window, windowed, write_rope
from nope_jax.interop.settings import Settings


def read(settings: Settings) -> ModelConfig:
    shape = read_shape(settings)
    window = settings.get("sliding_window", 4096)
    return ModelConfig(**shape, encoding=windowed(read_rope(settings, shape["head_dim"]), window))


def write(config: ModelConfig) -> dict[str, Any]:
    _, window = split_window(per_layer(config)[0])
    return write_shape(config) | write_rope(config) | {"sliding_window": window}


FAMILY = Family(name="mistral", architecture="MistralForCausalLM", weights=WEIGHTS, read=read, write=write)
