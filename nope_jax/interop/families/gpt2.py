"""GPT-2: a learned table of positions, LayerNorms, biases everywhere (transformers: models/gpt2)."""

from typing import Any

from nope_jax.config import ModelConfig
from nope_jax.data.gguf import GGUFHeader
from nope_jax.encodings import Learned
from nope_jax.interop.families.family import (
    ACTIVATIONS,
    GGUF,
    Family,
    gguf_rows,
    read_heads,
    read_tied,
    write_activation,
)
from nope_jax.interop.rotary import per_layer
from nope_jax.interop.settings import Settings
from nope_jax.interop.weights import Weight

QUERY_KEY_VALUE = "attention/query", "attention/key", "attention/value"
QUERY_KEY_VALUE_BIAS = "attention/query_bias", "attention/key_bias", "attention/value_bias"

# Its layers multiply from the left, so matrices are [inputs, outputs].
WEIGHTS = (
    Weight("transformer.wte.weight", "V D", "embedding"),
    Weight("transformer.wpe.weight", "=", "positions/0/positions"),
    Weight("transformer.h.{}.ln_1.weight", "D", "attention_norm"),
    Weight("transformer.h.{}.ln_1.bias", "D", "attention_norm_bias"),
    Weight("transformer.h.{}.attn.c_attn.weight", "D (* H)", *QUERY_KEY_VALUE),
    Weight("transformer.h.{}.attn.c_attn.bias", "(* H)", *QUERY_KEY_VALUE_BIAS),
    Weight("transformer.h.{}.attn.c_proj.weight", "(N H) D", "attention/out"),
    Weight("transformer.h.{}.attn.c_proj.bias", "D", "attention/out_bias"),
    Weight("transformer.h.{}.ln_2.weight", "D", "mlp_norm"),
    Weight("transformer.h.{}.ln_2.bias", "D", "mlp_norm_bias"),
    Weight("transformer.h.{}.mlp.c_fc.weight", "D F", "mlp/up"),
    Weight("transformer.h.{}.mlp.c_fc.bias", "F", "mlp/up_bias"),
    Weight("transformer.h.{}.mlp.c_proj.weight", "F D", "mlp/down"),
    Weight("transformer.h.{}.mlp.c_proj.bias", "D", "mlp/down_bias"),
    Weight("transformer.ln_f.weight", "D", "norm"),
    Weight("transformer.ln_f.bias", "D", "norm_bias"),
    Weight("lm_head.weight", "V D", "head"),
)

GGUF_WEIGHTS = (
    Weight("token_embd.weight", "V D", "embedding"),
    Weight("position_embd.weight", "=", "positions/0/positions"),
    Weight("blk.{}.attn_norm.weight", "D", "attention_norm"),
    Weight("blk.{}.attn_norm.bias", "D", "attention_norm_bias"),
    Weight("blk.{}.attn_qkv.weight", "(* H) D", *QUERY_KEY_VALUE),
    Weight("blk.{}.attn_qkv.bias", "(* H)", *QUERY_KEY_VALUE_BIAS),
    Weight("blk.{}.attn_output.weight", "D (N H)", "attention/out"),
    Weight("blk.{}.attn_output.bias", "D", "attention/out_bias"),
    Weight("blk.{}.ffn_norm.weight", "D", "mlp_norm"),
    Weight("blk.{}.ffn_norm.bias", "D", "mlp_norm_bias"),
    Weight("blk.{}.ffn_up.weight", "F D", "mlp/up"),
    Weight("blk.{}.ffn_up.bias", "F", "mlp/up_bias"),
    Weight("blk.{}.ffn_down.weight", "D F", "mlp/down"),
    Weight("blk.{}.ffn_down.bias", "D", "mlp/down_bias"),
    Weight("output_norm.weight", "D", "norm"),
    Weight("output_norm.bias", "D", "norm_bias"),
    Weight("output.weight", "V D", "head"),
)


def read(settings: Settings) -> ModelConfig:
    heads, length = read_heads(settings, "n_head", "n_embd"), settings.integer("n_positions")
    settings.only("scale_attn_by_inverse_layer_idx", False)
    settings.only("add_cross_attention", False)
    settings.ignore("n_ctx", "reorder_and_upcast_attn", *(name for name in settings if name.startswith("summary_")))
    return ModelConfig(
        vocab_size=settings.integer("vocab_size"),
        num_layers=settings.integer("n_layer"),
        **heads,
        mlp="plain",
        mlp_dim=settings.integer("n_inner", 4 * heads["model_dim"]),
        activation=settings.choice("activation_function", "gelu_new", ACTIVATIONS),
        norm="layer",
        norm_eps=settings.number("layer_norm_epsilon", 1e-5),
        biases=("qkv", "out", "mlp", "norm"),
        attention_scale=settings.choice("scale_attn_weights", True, {True: None, False: 1.0}),
        embedding_scale=1.0,
        tie_embeddings=read_tied(settings, True),
        encoding=Learned(length),
        train_length=length,
    )


def write(config: ModelConfig) -> dict[str, Any]:
    encoding = per_layer(config)[0]
    length = encoding.length if isinstance(encoding, Learned) else None
    return {
        "vocab_size": config.vocab_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_embd": config.model_dim,
        "n_inner": config.mlp_size,
        "n_positions": length or config.train_length,
        "activation_function": write_activation(config),
        "layer_norm_epsilon": config.norm_eps,
        "scale_attn_weights": config.attention_scale != 1.0,
        "tie_word_embeddings": config.tie_embeddings,
    }


def gguf_settings(metadata: Settings, header: GGUFHeader) -> dict[str, Any]:
    return {
        "vocab_size": gguf_rows(header),
        "n_layer": metadata.integer("block_count"),
        "n_head": metadata.integer("attention.head_count"),
        "n_embd": metadata.integer("embedding_length"),
        "n_inner": metadata.integer("feed_forward_length"),
        "n_positions": metadata.integer("context_length"),
        "layer_norm_epsilon": metadata.number("attention.layer_norm_epsilon", 1e-5),
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }


FAMILY = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    weights=WEIGHTS,
    read=read,
    write=write,
    prefix="transformer.",
    ignored=(r".*\.attn\.(bias|masked_bias)",),  # the causal mask, which old versions saved
    gguf=GGUF("gpt2", GGUF_WEIGHTS, gguf_settings),
)
