"""OLMo 2: norms after attention and MLP, QK norm over all heads (transformers: models/olmo2)."""

from typing import Any

from nope_jax.config import ModelConfig
from nope_jax.interop.families.family import GGUF, Family, gguf_shape, read_biases, read_shape, write_shape
from nope_jax.interop.families.llama import ATTENTION_AND_MLP, EMBEDDING_AND_HEAD, POST_NORMS, gguf_weights
from nope_jax.interop.rotary import read_rope, write_rope
from nope_jax.interop.settings import Settings
from nope_jax.interop.weights import Weight

WEIGHTS = (
    *EMBEDDING_AND_HEAD,
    *ATTENTION_AND_MLP,
    Weight("model.layers.{}.post_attention_layernorm.weight", "D", "attention_post_norm"),
    Weight("model.layers.{}.post_feedforward_layernorm.weight", "D", "mlp_post_norm"),
)


def read_without_encoding(settings: Settings) -> dict[str, Any]:
    """All fields but the encoding."""
    return read_shape(settings, norm=("rms_norm_eps", 1e-5)) | {
        "norm_place": "post",
        "qk_norm": "all",
        "biases": read_biases(settings, attention_bias=("qkv", "out")),
    }


def read(settings: Settings) -> ModelConfig:
    fields = read_without_encoding(settings)
    return ModelConfig(**fields, encoding=read_rope(settings, fields["head_dim"]))


def write(config: ModelConfig) -> dict[str, Any]:
    return write_shape(config) | write_rope(config) | {"attention_bias": "qkv" in config.biases}


FAMILY = Family(
    name="olmo2",
    architecture="Olmo2ForCausalLM",
    weights=WEIGHTS,
    read=read,
    write=write,
    gguf=GGUF("olmo2", gguf_weights(*POST_NORMS, pairs=False), gguf_shape),
)
