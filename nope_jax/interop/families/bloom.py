"""BLOOM: ALiBi, and a norm after the embedding (transformers: models/bloom)."""

from typing import Any

from nope_jax.config import ModelConfig
from nope_jax.data.gguf import GGUFHeader
from nope_jax.encodings import ALiBi
from nope_jax.interop.families.family import GGUF, Family, gguf_rows, named, read_heads, read_tied
from nope_jax.interop.families.gpt2 import GGUF_WEIGHTS, QUERY_KEY_VALUE
from nope_jax.interop.settings import Settings
from nope_jax.interop.weights import Weight, linear

WEIGHTS = (
    Weight("transformer.word_embeddings.weight", "V D", "embedding"),
    *linear("transformer.word_embeddings_layernorm", "D", "embedding_norm"),
    *linear("transformer.h.{}.input_layernorm", "D", "attention_norm"),
    *linear("transformer.h.{}.self_attention.query_key_value", "(K * H) D", *QUERY_KEY_VALUE),
    *linear("transformer.h.{}.self_attention.dense", "D (N H)", "attention/out"),
    *linear("transformer.h.{}.post_attention_layernorm", "D", "mlp_norm"),
    *linear("transformer.h.{}.mlp.dense_h_to_4h", "F D", "mlp/up"),
    *linear("transformer.h.{}.mlp.dense_4h_to_h", "D F", "mlp/down"),
    *linear("transformer.ln_f", "D", "norm"),
    Weight("lm_head.weight", "V D", "head"),
)


def read(settings: Settings) -> ModelConfig:
    width, count = named(settings, "hidden_size", "n_embed"), named(settings, "n_head", "num_attention_heads")
    heads = read_heads(settings, count, width)
    settings.only("apply_residual_connection_post_layernorm", False)
    settings.only("n_inner", None, 4 * heads["model_dim"])
    # Ways to compute, and of an ALiBi that is the same for any offset.
    settings.ignore(
        "slow_but_exact",
        "skip_bias_add",
        "skip_bias_add_qkv",
        "masked_softmax_fusion",
        "bias_dropout_fusion",
        "attention_softmax_in_fp32",
        "offset_alibi",
    )
    return ModelConfig(
        vocab_size=settings.integer("vocab_size"),
        num_layers=settings.integer(named(settings, "n_layer", "num_hidden_layers")),
        **heads,
        mlp="plain",
        mlp_dim=4 * heads["model_dim"],
        activation="gelu_tanh",
        norm="layer",
        norm_eps=settings.number("layer_norm_epsilon", 1e-5),
        biases=("qkv", "out", "mlp", "norm"),
        embedding_scale=1.0,
        embedding_norm=True,
        tie_embeddings=read_tied(settings, True),
        encoding=ALiBi(),
        train_length=settings.integer("seq_length", 2048),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "hidden_size": config.model_dim,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "seq_length": config.train_length,
    }


def gguf_settings(metadata: Settings, header: GGUFHeader) -> dict[str, Any]:
    heads, width = metadata.integer("attention.head_count"), metadata.integer("embedding_length")
    metadata.only("attention.head_count_kv", heads)
    metadata.only("feed_forward_length", 4 * width)
    return {
        "vocab_size": gguf_rows(header),
        "n_layer": metadata.integer("block_count"),
        "n_head": heads,
        "hidden_size": width,
        "layer_norm_epsilon": metadata.number("attention.layer_norm_epsilon", 1e-5),
        "seq_length": metadata.integer("context_length"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }


FAMILY = Family(
    name="bloom",
    architecture="BloomForCausalLM",
    weights=WEIGHTS,
    read=read,
    write=write,
    prefix="transformer.",
    gguf=GGUF("bloom", (*GGUF_WEIGHTS, *linear("token_embd_norm", "D", "embedding_norm")), gguf_settings),
)
