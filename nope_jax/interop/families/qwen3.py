"""Qwen 3, dense: QK norm over each head (transformers: models/qwen3)."""

from typing import Any

from nope_jax.config import ModelConfig
from nope_jax.data.gguf import GGUFHeader
from nope_jax.interop.families.family import GGUF, Family, gguf_shape, read_biases, read_shape, write_shape
from nope_jax.interop.families.llama import PRE_NORMS, WEIGHTS, gguf_weights
from nope_jax.interop.families.qwen2 import read_encoding, write_encoding
from nope_jax.interop.settings import Settings


def read(settings: Settings) -> ModelConfig:
    shape = read_shape(settings, default_head_dim=128)
    return ModelConfig(
        **shape,
        qk_norm="head",
        biases=read_biases(settings, attention_bias=("qkv", "out")),
        encoding=read_encoding(settings, shape),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    return write_shape(config) | write_encoding(config) | {"attention_bias": "qkv" in config.biases}


def gguf_settings(metadata: Settings, header: GGUFHeader) -> dict[str, Any]:
    return gguf_shape(metadata, header) | {"attention_bias": "blk.0.attn_output.bias" in header.tensors}


FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    weights=WEIGHTS,
    read=read,
    write=write,
    gguf=GGUF("qwen3", gguf_weights(*PRE_NORMS, pairs=False), gguf_settings),
)
