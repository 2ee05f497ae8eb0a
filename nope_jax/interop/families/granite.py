"""Granite 3, dense: Llama with factors of embeddings, attention, residual stream and logits (transformers:
models/granite)."""

import dataclasses
from typing import Any

from nope_jax.config import ModelConfig
from nope_jax.data.gguf import GGUFHeader
from nope_jax.interop.families import llama
from nope_jax.interop.families.family import GGUF, Family
from nope_jax.interop.rotary import head_dim
from nope_jax.interop.settings import Settings


def read(settings: Settings) -> ModelConfig:
    return dataclasses.replace(
        llama.read(settings),
        embedding_scale=settings.number("embedding_multiplier", 1.0),
        attention_scale=settings.number("attention_multiplier", 1.0),
        residual_scale=settings.number("residual_multiplier", 1.0),
        logits_scale=1 / settings.number("logits_scaling", 1.0),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    return llama.write(config) | {
        "embedding_multiplier": config.model_dim**0.5 if config.embedding_scale is None else config.embedding_scale,
        "attention_multiplier": head_dim(config) ** -0.5 if config.attention_scale is None else config.attention_scale,
        "residual_multiplier": config.residual_scale,
        "logits_scaling": 1 / config.logits_scale,
    }


def gguf_settings(metadata: Settings, header: GGUFHeader) -> dict[str, Any]:
    return llama.gguf_settings(metadata, header) | {
        "embedding_multiplier": metadata.number("embedding_scale", 1.0),
        "attention_multiplier": metadata.number("attention.scale", 1.0),
        "residual_multiplier": metadata.number("residual_scale", 1.0),
        "logits_scaling": metadata.number("logit_scale", 1.0),
    }


FAMILY = Family(
    name="granite",
    architecture="GraniteForCausalLM",
    weights=llama.WEIGHTS,
    read=read,
    write=write,
    gguf=GGUF("granite", llama.gguf_weights(*llama.PRE_NORMS, pairs=True), gguf_settings),
)
