"""Gemma 2: norms before and after attention and MLP, soft caps, and a window in every second layer
(transformers: models/gemma2)."""

from typing import Any

from nope_jax.config import ModelConfig
from nope_jax.data.gguf import GGUFHeader
from nope_jax.interop.families.family import GGUF, Family, gguf_shape, write_shape
from nope_jax.interop.families.gemma import gguf_table, read_common
from nope_jax.interop.families.llama import ATTENTION_AND_MLP, EMBEDDING_AND_HEAD, POST_NORMS
from nope_jax.interop.rotary import (
    head_dim,
    read_rope,
    read_windows,
    shortest_period,
    windowed,
    write_rope,
    write_windows,
)
from nope_jax.interop.settings import Settings
from nope_jax.interop.weights import Weight

WEIGHTS = (
    *EMBEDDING_AND_HEAD,
    *ATTENTION_AND_MLP,
    Weight("model.layers.{}.input_layernorm.weight", "D", "attention_norm"),
    Weight("model.layers.{}.post_attention_layernorm.weight", "D", "attention_post_norm"),
    Weight("model.layers.{}.pre_feedforward_layernorm.weight", "D", "mlp_norm"),
    Weight("model.layers.{}.post_feedforward_layernorm.weight", "D", "mlp_post_norm"),
)


GGUF_NORMS = (
    Weight("blk.{}.attn_norm.weight", "D", "attention_norm"),
    Weight("blk.{}.ffn_norm.weight", "D", "mlp_norm"),
    *POST_NORMS,
)


def read_common_2(settings: Settings, *, logits_softcap: float | None, length: int) -> dict[str, Any]:
    """The fields that Gemma 2 and 3 read alike, but the encoding, given two defaults."""
    fields = read_common(settings, activation="hidden_activation", length=length)
    settings.ignore("hidden_act")  # never read
    return fields | {
        "norm_place": "sandwich",
        "attention_scale": settings.number("query_pre_attn_scalar", 256) ** -0.5,
        "logits_softcap": settings.get("final_logit_softcapping", logits_softcap),
    }


def read(settings: Settings) -> ModelConfig:
    fields = read_common_2(settings, logits_softcap=30.0, length=8192)
    rope, window = read_rope(settings, fields["head_dim"]), settings.get("sliding_window", 4096)
    windows = read_windows(settings, fields["num_layers"], lambda layer: layer % 2 == 0, window)
    return ModelConfig(
        **fields,
        attention_softcap=settings.get("attn_logit_softcapping", 50.0),
        encoding=shortest_period([windowed(rope, own) for own in windows]),
    )


def write_common_2(config: ModelConfig) -> dict[str, Any]:
    """The reverse of `read_common_2`."""
    scale = config.attention_scale
    return write_shape(config, activation="hidden_activation") | {
        "attention_bias": "qkv" in config.biases,
        "query_pre_attn_scalar": _squared(head_dim(config) if scale is None else scale**-2),
        "final_logit_softcapping": config.logits_softcap,
    }


def _squared(value: float) -> float:
    """transformers wants an integer, which 256^-0.5 squared is not to the last bit."""
    return round(value) if abs(value - round(value)) < 1e-9 * value else value


def write(config: ModelConfig) -> dict[str, Any]:
    return (
        write_common_2(config)
        | write_rope(config)
        | {name: value for name, value in write_windows(config).items() if value is not None}
        | {"attn_logit_softcapping": config.attention_softcap}
    )


def gguf_settings_2(metadata: Settings, header: GGUFHeader, *, largest: int) -> dict[str, Any]:
    """What Gemma 2 and 3 say alike in GGUF, given the number of layers of the largest model.

    It alone divides by √(D/N), not √H. llama.cpp knows it by that number: the file does not tell.
    """
    shape, caps = gguf_shape(metadata, header), {}
    width, heads = shape["hidden_size"], shape["num_attention_heads"]
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if name in metadata:
            caps[name] = metadata.number(name)
    return (
        shape
        | caps
        | {
            "query_pre_attn_scalar": width // heads if shape["num_hidden_layers"] == largest else shape["head_dim"],
            "sliding_window": metadata.integer("attention.sliding_window", 4096),
        }
    )


def gguf_settings(metadata: Settings, header: GGUFHeader) -> dict[str, Any]:
    return gguf_settings_2(metadata, header, largest=46)


FAMILY = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    weights=WEIGHTS,
    read=read,
    write=write,
    gguf=GGUF("gemma2", gguf_table(*GGUF_NORMS), gguf_settings),
)
