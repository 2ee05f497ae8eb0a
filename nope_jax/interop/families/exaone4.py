"""EXAONE 4: norms after attention and MLP, QK norm over each head; with windows, the layers without one have no
positions (transformers: models/exaone4)."""

from typing import Any

from nope_jax.config import ModelConfig
from nope_jax.encodings import NoPE
from nope_jax.interop.families.family import Family, read_shape, write_shape
from nope_jax.interop.families.olmo2 import WEIGHTS
from nope_jax.interop.rotary import (
    read_rope,
    read_windows,
    shortest_period,
    windowed,
    write_rope,
    write_windows,
)
from nope_jax.interop.settings import Settings


def read(settings: Settings) -> ModelConfig:
    shape = read_shape(settings, norm=("rms_norm_eps", 1e-5))
    rope, window = read_rope(settings, shape["head_dim"]), settings.get("sliding_window", 4096)
    settings.ignore("sliding_window_pattern")  # layer_types goes before it
    pattern = 4 if settings.get("layer_types") else settings.integer("sliding_window_pattern", 4)
    windows = read_windows(settings, shape["num_layers"], lambda layer: (layer + 1) % pattern != 0, window)
    encodings = [windowed(rope, own) if own or window is None else NoPE() for own in windows]
    return ModelConfig(**shape, norm_place="post", qk_norm="head", encoding=shortest_period(encodings))


def write(config: ModelConfig) -> dict[str, Any]:
    return write_shape(config) | write_rope(config) | write_windows(config)


FAMILY = Family(name="exaone4", architecture="Exaone4ForCausalLM", weights=WEIGHTS, read=read, write=write)
