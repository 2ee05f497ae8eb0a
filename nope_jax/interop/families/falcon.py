"""Falcon: attention and MLP in parallel after one norm or two, or one after the other; few key heads; RoPE, or ALiBi
inside the division by √H (transformers: models/falcon)."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from nope_jax.config import ModelConfig
from nope_jax.encodings import ALiBi, alibi_slopes
from nope_jax.interop.alibi import alibi
from nope_jax.interop.families.family import ACTIVATIONS, Family, read_heads, read_tied, write_activation
from nope_jax.interop.families.gpt2 import QUERY_KEY_VALUE
from nope_jax.interop.rotary import per_layer, read_rope, write_rope
from nope_jax.interop.settings import Settings
from nope_jax.interop.weights import Weight, linear

WEIGHTS = (
    Weight("transformer.word_embeddings.weight", "V D", "embedding"),
    *linear("transformer.h.{}.input_layernorm", "D", "attention_norm", block=("sequential", "parallel_shared_norm")),
    *linear("transformer.h.{}.ln_attn", "D", "attention_norm", block="parallel"),
    *linear("transformer.h.{}.self_attention.query_key_value", "(K * H) D", *QUERY_KEY_VALUE),
    *linear("transformer.h.{}.self_attention.dense", "D (N H)", "attention/out"),
    *linear("transformer.h.{}.post_attention_layernorm", "D", "mlp_norm", block="sequential"),
    *linear("transformer.h.{}.ln_mlp", "D", "mlp_norm", block="parallel"),
    *linear("transformer.h.{}.mlp.dense_h_to_4h", "F D", "mlp/up"),
    *linear("transformer.h.{}.mlp.dense_4h_to_h", "D F", "mlp/down"),
    *linear("transformer.ln_f", "D", "norm"),
    Weight("lm_head.weight", "V D", "head"),
)

_SWITCH = {True: True, False: False, None: False}


def slopes(heads: int, head_dim: int) -> list[float]:
    """Those of the paper, rounded to bfloat16 and divided by √H as Falcon's are.

    transformers also rounds slope times position to bfloat16, which is not done here.
    """
    rounded = alibi_slopes(heads).astype(jnp.bfloat16).astype(jnp.float32)
    return (np.asarray(rounded) / np.float32(head_dim**0.5)).tolist()


def read(settings: Settings) -> ModelConfig:
    heads = read_heads(settings, "num_attention_heads", "hidden_size")
    count, size = heads["num_heads"], heads["model_dim"] // heads["num_heads"]
    new, few = (settings.choice(name, name == "multi_query", _SWITCH) for name in _NAMES)
    parallel = settings.choice("parallel_attn", True, _SWITCH)
    rope = read_rope(settings, size)
    norms = settings.get("num_ln_in_parallel_attn")
    settings.only("num_ln_in_parallel_attn", None, 1, *((2,) if new else ()))
    if new:
        settings.only("parallel_attn", True)
    settings.only("apply_residual_connection_post_layernorm", False)
    settings.ignore("num_kv_heads", "ff_factor", "auto_map")  # transformers' own code is that of auto_map
    return ModelConfig(
        vocab_size=settings.integer("vocab_size"),
        num_layers=settings.integer("num_hidden_layers"),
        **heads,
        num_kv_heads=settings.integer("num_kv_heads", count) if new else 1 if few else count,
        mlp="plain",
        mlp_dim=settings.integer("ffn_hidden_size", 4 * heads["model_dim"]),
        activation=settings.choice("activation", "gelu", ACTIVATIONS),
        norm="layer",
        norm_eps=settings.number("layer_norm_epsilon", 1e-5),
        block="sequential" if not parallel else "parallel" if new and norms != 1 else "parallel_shared_norm",
        biases=settings.choice("bias", False, {True: ("qkv", "out", "mlp", "norm"), False: ("norm",)}),
        embedding_scale=1.0,
        tie_embeddings=read_tied(settings, True),
        encoding=alibi(slopes(count, size)) if settings.choice("alibi", False, _SWITCH) else rope,
        train_length=settings.integer("max_position_embeddings", 2048),
    )


_NAMES = "new_decoder_architecture", "multi_query"


def write(config: ModelConfig) -> dict[str, Any]:
    kv_heads = config.num_kv_heads or config.num_heads
    new = config.block == "parallel" or kv_heads not in (1, config.num_heads)
    return {
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_kv_heads": kv_heads,
        "hidden_size": config.model_dim,
        "ffn_hidden_size": config.mlp_size,
        "activation": write_activation(config),
        "layer_norm_epsilon": config.norm_eps,
        "new_decoder_architecture": new,
        "multi_query": not new and kv_heads == 1,
        "parallel_attn": config.block != "sequential",
        "num_ln_in_parallel_attn": (2 if config.block == "parallel" else 1) if new else None,
        "bias": "qkv" in config.biases,
        "alibi": isinstance(per_layer(config)[0], ALiBi),
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.train_length,
        **write_rope(config),
    }


FAMILY = Family(
    name="falcon",
    architecture="FalconForCausalLM",
    weights=WEIGHTS,
    read=read,
    write=write,
    prefix="transformer.",
)
