"""Llama 1 to 3, and what was published as Llama: SmolLM 1 and 2, TinyLlama (transformers: models/llama).

With `nope` in config.json it has no positions, as in AntNLP's code for TinyLlama-NoPE; each layer's `scale_param` are
then HeadScale's factors (Wang et al. 2024, arXiv 2404.12224). transformers knows neither: what is saved is a SmolLM 3
without positions, whose queries have the factors.
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from nope_jax.config import ModelConfig
from nope_jax.data.gguf import GGUFHeader
from nope_jax.encodings import Encoding, HeadScale, NoPE
from nope_jax.interop.families.family import GGUF, Family, gguf_shape, read_biases, read_shape, write_shape
from nope_jax.interop.rotary import read_rope, write_rope
from nope_jax.interop.settings import Settings
from nope_jax.interop.weights import Weight

ATTENTION_AND_MLP = (
    Weight("model.layers.{}.self_attn.q_proj.weight", "(N H) D", "attention/query"),
    Weight("model.layers.{}.self_attn.q_proj.bias", "(N H)", "attention/query_bias"),
    Weight("model.layers.{}.self_attn.q_norm.weight", "=", "attention/query_norm"),
    Weight("model.layers.{}.self_attn.k_proj.weight", "(K H) D", "attention/key"),
    Weight("model.layers.{}.self_attn.k_proj.bias", "(K H)", "attention/key_bias"),
    Weight("model.layers.{}.self_attn.k_norm.weight", "=", "attention/key_norm"),
    Weight("model.layers.{}.self_attn.v_proj.weight", "(K H) D", "attention/value"),
    Weight("model.layers.{}.self_attn.v_proj.bias", "(K H)", "attention/value_bias"),
    Weight("model.layers.{}.self_attn.o_proj.weight", "D (N H)", "attention/out"),
    Weight("model.layers.{}.self_attn.o_proj.bias", "D", "attention/out_bias"),
    Weight("model.layers.{}.mlp.gate_proj.weight", "F D", "mlp/gate"),
    Weight("model.layers.{}.mlp.gate_proj.bias", "F", "mlp/gate_bias"),
    Weight("model.layers.{}.mlp.up_proj.weight", "F D", "mlp/up"),
    Weight("model.layers.{}.mlp.up_proj.bias", "F", "mlp/up_bias"),
    Weight("model.layers.{}.mlp.down_proj.weight", "D F", "mlp/down"),
    Weight("model.layers.{}.mlp.down_proj.bias", "D", "mlp/down_bias"),
)
"""The parts of a layer that most families since Llama call by the same names; QK norm is Qwen 3's and OLMo 2's."""

EMBEDDING_AND_HEAD = (
    Weight("model.embed_tokens.weight", "V D", "embedding"),
    Weight("model.norm.weight", "D", "norm"),
    Weight("lm_head.weight", "V D", "head"),
)

WEIGHTS = (
    *EMBEDDING_AND_HEAD,
    *ATTENTION_AND_MLP,
    Weight("model.layers.{}.input_layernorm.weight", "D", "attention_norm"),
    Weight("model.layers.{}.post_attention_layernorm.weight", "D", "mlp_norm"),
    Weight("model.layers.{}.self_attn.scale_param", "=", "attention/position/head_scale"),
)


def gguf_weights(*norms: Weight, pairs: bool) -> tuple[Weight, ...]:
    """The table of a family in GGUF. `pairs`: its queries and keys are stored for interleaved rotary embeddings."""
    head = "h c" if pairs else "H"
    return (
        Weight("token_embd.weight", "V D", "embedding"),
        Weight("output_norm.weight", "D", "norm"),
        Weight("output.weight", "V D", "head"),
        Weight("blk.{}.attn_q.weight", f"(N {head}) D", "attention/query"),
        Weight("blk.{}.attn_q.bias", f"(N {head})", "attention/query_bias"),
        Weight("blk.{}.attn_q_norm.weight", "=", "attention/query_norm"),
        Weight("blk.{}.attn_k.weight", f"(K {head}) D", "attention/key"),
        Weight("blk.{}.attn_k.bias", f"(K {head})", "attention/key_bias"),
        Weight("blk.{}.attn_k_norm.weight", "=", "attention/key_norm"),
        Weight("blk.{}.attn_v.weight", "(K H) D", "attention/value"),
        Weight("blk.{}.attn_v.bias", "(K H)", "attention/value_bias"),
        Weight("blk.{}.attn_output.weight", "D (N H)", "attention/out"),
        Weight("blk.{}.attn_output.bias", "D", "attention/out_bias"),
        Weight("blk.{}.ffn_gate.weight", "F D", "mlp/gate"),
        Weight("blk.{}.ffn_gate.bias", "F", "mlp/gate_bias"),
        Weight("blk.{}.ffn_up.weight", "F D", "mlp/up"),
        Weight("blk.{}.ffn_up.bias", "F", "mlp/up_bias"),
        Weight("blk.{}.ffn_down.weight", "D F", "mlp/down"),
        Weight("blk.{}.ffn_down.bias", "D", "mlp/down_bias"),
        *norms,
    )


PRE_NORMS = (
    Weight("blk.{}.attn_norm.weight", "D", "attention_norm"),
    Weight("blk.{}.ffn_norm.weight", "D", "mlp_norm"),
)
POST_NORMS = (
    Weight("blk.{}.post_attention_norm.weight", "D", "attention_post_norm"),
    Weight("blk.{}.post_ffw_norm.weight", "D", "mlp_post_norm"),
)
"""The norms of a layer in GGUF, by `model.norm_place`."""


def gguf_settings(metadata: Settings, header: GGUFHeader) -> dict[str, Any]:
    """As `gguf_shape`, with the switches of biases."""
    return gguf_shape(metadata, header) | {
        "attention_bias": "blk.0.attn_output.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
    }


def read(settings: Settings) -> ModelConfig:
    shape = read_shape(settings)
    return ModelConfig(
        **shape,
        biases=read_biases(settings, attention_bias=("qkv", "out"), mlp_bias=("mlp",)),
        encoding=_read_encoding(settings, shape["head_dim"]),
    )


def _read_encoding(settings: Settings, head_dim: int) -> Encoding:
    rope = read_rope(settings, head_dim)
    return settings.choice("nope", False, {False: rope, True: NoPE()})


def with_head_scale(config: ModelConfig, names: Callable[[], Collection[str]]) -> ModelConfig:
    """HeadScale, which config.json does not tell, if a model without positions has its factors."""
    if config.encoding == NoPE() and any(name.endswith(".self_attn.scale_param") for name in names()):
        return dataclasses.replace(config, encoding=HeadScale(NoPE()))
    return config


def write(config: ModelConfig) -> dict[str, Any]:
    return (
        write_shape(config)
        | write_rope(config)
        | {"attention_bias": "qkv" in config.biases, "mlp_bias": "mlp" in config.biases}
    )


FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    weights=WEIGHTS,
    read=read,
    write=write,
    told_by_tensors=with_head_scale,
    gguf=GGUF("llama", gguf_weights(*PRE_NORMS, pairs=True), gguf_settings),
)
