"""GPT-NeoX and Pythia: attention and MLP in parallel, each with its norm, and RoPE for a part of each head
(transformers: models/gpt_neox)."""

from typing import Any

from nope_jax.config import ModelConfig
from nope_jax.data.gguf import GGUFHeader
from nope_jax.interop.families.family import (
    ACTIVATIONS,
    GGUF,
    Family,
    gguf_rows,
    read_heads,
    read_tied,
    write_activation,
)
from nope_jax.interop.families.gpt2 import GGUF_WEIGHTS, QUERY_KEY_VALUE
from nope_jax.interop.rotary import read_rope, write_rope
from nope_jax.interop.settings import Settings
from nope_jax.interop.weights import Weight, linear

WEIGHTS = (
    Weight("gpt_neox.embed_in.weight", "V D", "embedding"),
    *linear("gpt_neox.layers.{}.input_layernorm", "D", "attention_norm"),
    *linear("gpt_neox.layers.{}.attention.query_key_value", "(K * H) D", *QUERY_KEY_VALUE),
    *linear("gpt_neox.layers.{}.attention.dense", "D (N H)", "attention/out"),
    *linear("gpt_neox.layers.{}.post_attention_layernorm", "D", "mlp_norm"),
    *linear("gpt_neox.layers.{}.mlp.dense_h_to_4h", "F D", "mlp/up"),
    *linear("gpt_neox.layers.{}.mlp.dense_4h_to_h", "D F", "mlp/down"),
    *linear("gpt_neox.final_layer_norm", "D", "norm"),
    Weight("embed_out.weight", "V D", "head"),
)


def read(settings: Settings) -> ModelConfig:
    heads = read_heads(settings, "num_attention_heads", "hidden_size")
    base, share = settings.number("rotary_emb_base", 10_000.0), settings.number("rotary_pct", 0.25)
    settings.only("rope_theta", base)
    settings.only("partial_rotary_factor", share)
    return ModelConfig(
        vocab_size=settings.integer("vocab_size"),
        num_layers=settings.integer("num_hidden_layers"),
        **heads,
        mlp="plain",
        mlp_dim=settings.integer("intermediate_size"),
        activation=settings.choice("hidden_act", "gelu", ACTIVATIONS),
        norm="layer",
        norm_eps=settings.number("layer_norm_eps", 1e-5),
        block=settings.choice("use_parallel_residual", True, {True: "parallel", False: "sequential"}),
        biases=settings.choice("attention_bias", True, {True: ("qkv", "out", "mlp", "norm"), False: ("mlp", "norm")}),
        embedding_scale=1.0,
        tie_embeddings=read_tied(settings, False),
        encoding=read_rope(settings, heads["model_dim"] // heads["num_heads"], base=base, share=share),
        train_length=settings.integer("max_position_embeddings", 2048),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    rope = write_rope(config)
    names = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "hidden_size": config.model_dim,
        "intermediate_size": config.mlp_size,
        "hidden_act": write_activation(config),
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.block == "parallel",
        "attention_bias": "qkv" in config.biases,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.train_length,
        "rotary_pct": 1.0,
        **{names.get(name, name): value for name, value in rope.items()},
    }


def gguf_settings(metadata: Settings, header: GGUFHeader) -> dict[str, Any]:
    heads, width = metadata.integer("attention.head_count"), metadata.integer("embedding_length")
    metadata.only("attention.head_count_kv", heads)
    return {
        "vocab_size": gguf_rows(header),
        "num_hidden_layers": metadata.integer("block_count"),
        "num_attention_heads": heads,
        "hidden_size": width,
        "intermediate_size": metadata.integer("feed_forward_length"),
        "layer_norm_eps": metadata.number("attention.layer_norm_epsilon", 1e-5),
        "use_parallel_residual": bool(metadata.get("use_parallel_residual", True)),
        "max_position_embeddings": metadata.integer("context_length"),
        "rotary_pct": metadata.integer("rope.dimension_count", width // heads) / (width // heads),
        "rotary_emb_base": metadata.number("rope.freq_base", 10_000.0),
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }


FAMILY = Family(
    name="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    weights=WEIGHTS,
    read=read,
    write=write,
    prefix="gpt_neox.",
    gguf=GGUF("gptneox", GGUF_WEIGHTS, gguf_settings),
    ignored=(r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
)
