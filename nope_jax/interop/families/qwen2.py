"""Qwen 2 and 2.5: Llama with biases of queries, keys and values, and windows in the upper layers if switched on
(transformers: models/qwen2)."""

from typing import Any

from nope_jax.config import ModelConfig
from nope_jax.interop.families.family import GGUF, Family, gguf_shape, read_shape, write_shape
from nope_jax.interop.families.llama import PRE_NORMS, WEIGHTS, gguf_weights
from nope_jax.interop.rotary import (
    read_rope,
    read_windows,
    shortest_period,
    windowed,
    write_rope,
    write_windows,
)
from nope_jax.interop.settings import Settings


def read_encoding(settings: Settings, shape: dict[str, Any]) -> Any:
    """RoPE, in layers from `max_window_layers` on, or as `layer_types` says, with a window if it is switched on."""
    rope = read_rope(settings, shape["head_dim"])
    switched_on = settings.choice("use_sliding_window", False, {True: True, False: False})
    window = settings.get("sliding_window", 4096) if switched_on else None
    settings.ignore("sliding_window")
    first = settings.get("max_window_layers", 28)
    windows = read_windows(settings, shape["num_layers"], lambda layer: layer >= first, window)
    return shortest_period([windowed(rope, window) for window in windows])


def write_encoding(config: ModelConfig) -> dict[str, Any]:
    """The reverse of `read_encoding`."""
    windows = write_windows(config)
    return write_rope(config) | windows | {"use_sliding_window": windows["sliding_window"] is not None}


def read(settings: Settings) -> ModelConfig:
    shape = read_shape(settings)
    return ModelConfig(**shape, biases=("qkv",), encoding=read_encoding(settings, shape))


def write(config: ModelConfig) -> dict[str, Any]:
    return write_shape(config) | write_encoding(config)


FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    weights=WEIGHTS,
    read=read,
    write=write,
    gguf=GGUF("qwen2", gguf_weights(*PRE_NORMS, pairs=False), gguf_shape),
)
