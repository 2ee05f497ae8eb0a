"""Cohere's Command R7B and A: Command R with windows in three of four layers, of which the fourth has no positions
(transformers: models/cohere2)."""

import dataclasses
from typing import Any

from nope_jax.config import ModelConfig
from nope_jax.encodings import NoPE
from nope_jax.interop.families import cohere
from nope_jax.interop.families.family import Family
from nope_jax.interop.rotary import read_windows, shortest_period, windowed, write_windows
from nope_jax.interop.settings import Settings


def read(settings: Settings) -> ModelConfig:
    model, rope = cohere.read_all_layers(settings, base=10_000.0)
    window, pattern = settings.integer("sliding_window", 4096), settings.integer("sliding_window_pattern", 4)
    windows = read_windows(settings, model.num_layers, lambda layer: (layer + 1) % pattern != 0, window)
    # What the models on the hub say besides, of their first code.
    settings.only("layer_switch", pattern)
    settings.only("order_of_interleaved_layers", "local_attn_first")
    settings.only("position_embedding_type", "rope_gptj")
    settings.only("rotary_pct", 1.0)
    settings.only("use_embedding_sharing", True)
    settings.only("use_gated_activation", True)
    settings.only("use_parallel_block", True)
    settings.only("use_parallel_embedding", False)
    encodings = [NoPE() if own is None else windowed(rope, own) for own in windows]
    return dataclasses.replace(model, encoding=shortest_period(encodings))


def write(config: ModelConfig) -> dict[str, Any]:
    windows = write_windows(config)
    return {**cohere.write(config), **{name: value for name, value in windows.items() if value is not None}}


FAMILY = Family(name="cohere2", architecture="Cohere2ForCausalLM", weights=cohere.WEIGHTS, read=read, write=write)
