"""Cohere's Command R: attention and MLP in parallel after one norm, RoPE for neighbouring dimensions
(transformers: models/cohere)."""

from typing import Any

from nope_jax.config import ModelConfig
from nope_jax.encodings import RoPE
from nope_jax.interop.families.family import Family, read_biases, read_shape, write_shape
from nope_jax.interop.families.llama import ATTENTION_AND_MLP, EMBEDDING_AND_HEAD
from nope_jax.interop.rotary import read_rope, write_rope
from nope_jax.interop.settings import Settings
from nope_jax.interop.weights import Weight

WEIGHTS = (
    *EMBEDDING_AND_HEAD,
    *ATTENTION_AND_MLP,
    Weight("model.layers.{}.input_layernorm.weight", "D", "attention_norm"),
)


def read_all_layers(settings: Settings, *, base: float) -> tuple[ModelConfig, RoPE]:
    """The model with RoPE in all layers, and this RoPE, given the default of rope_theta."""
    shape = read_shape(settings, tied=True, norm=("layer_norm_eps", 1e-5), length=8192)
    settings.only("head_dim", shape["model_dim"] // shape["num_heads"])
    settings.only("use_qk_norm", False)  # theirs has scales for every head
    rope = read_rope(settings, shape["head_dim"], base=base, interleaved=True)
    model = ModelConfig(
        **shape,
        norm="layer",
        block="parallel_shared_norm",
        biases=read_biases(settings, attention_bias=("qkv", "out")),
        logits_scale=settings.number("logit_scale", 0.0625),
        encoding=rope,
    )
    return model, rope


def read(settings: Settings) -> ModelConfig:
    return read_all_layers(settings, base=500_000.0)[0]


def write(config: ModelConfig) -> dict[str, Any]:
    return {
        **write_shape(config, norm="layer_norm_eps"),
        "attention_bias": "qkv" in config.biases,
        "logit_scale": config.logits_scale,
        **write_rope(config),
    }


FAMILY = Family(name="cohere", architecture="CohereForCausalLM", weights=WEIGHTS, read=read, write=write)
