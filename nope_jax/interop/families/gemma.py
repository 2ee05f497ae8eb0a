"""Gemma 1: Llama with norms around 1, embeddings times √D and a gated GELU (transformers: models/gemma)."""

from typing import Any

from nope_jax.config import ModelConfig
from nope_jax.interop.families.family import GGUF, Family, gguf_shape, read_biases, read_shape, write_shape
from nope_jax.interop.families.llama import PRE_NORMS, WEIGHTS, gguf_weights
from nope_jax.interop.rotary import read_rope, write_rope
from nope_jax.interop.settings import Settings
from nope_jax.interop.weights import Weight

GELU = "gelu_pytorch_tanh"


def read_common(settings: Settings, *, activation: str, length: int = 8192) -> dict[str, Any]:
    """The fields that all Gemmas read alike, but the encoding, given the name of the activation."""
    shape = read_shape(settings, tied=True, default_head_dim=256, activation=(activation, GELU), length=length)
    settings.only("use_bidirectional_attention", False, None)
    return shape | {
        "norm": "rms_plus_one",
        "biases": read_biases(settings, attention_bias=("qkv", "out")),
        "embedding_scale": None,
    }


def read(settings: Settings) -> ModelConfig:
    fields = read_common(settings, activation="hidden_act")
    settings.only("hidden_activation", None, GELU, "gelu")  # never read
    if fields["activation"] == "gelu":  # what the first releases said, and did not mean
        fields["activation"] = "gelu_tanh"
    return ModelConfig(**fields, encoding=read_rope(settings, fields["head_dim"]))


def write(config: ModelConfig) -> dict[str, Any]:
    return write_shape(config) | write_rope(config) | {"attention_bias": "qkv" in config.biases}


def gguf_table(*norms: Weight) -> tuple[Weight, ...]:
    """The table of a Gemma in GGUF, whose scales of norms have been increased by 1."""
    return tuple(
        weight.increased(1.0) if "norm" in weight.name else weight for weight in gguf_weights(*norms, pairs=False)
    )


FAMILY = Family(
    name="gemma",
    architecture="GemmaForCausalLM",
    weights=WEIGHTS,
    read=read,
    write=write,
    gguf=GGUF("gemma", gguf_table(*PRE_NORMS), gguf_shape),
)
