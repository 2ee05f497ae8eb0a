"""MPT: ALiBi with its own slopes where the number of heads is no power of two, and no biases at all
(transformers: models/mpt)."""

import math
from typing import Any

from nope_jax.config import ModelConfig
from nope_jax.interop.alibi import alibi, slopes_of
from nope_jax.interop.families.family import Family, read_heads, read_tied
from nope_jax.interop.families.gpt2 import QUERY_KEY_VALUE
from nope_jax.interop.settings import Settings
from nope_jax.interop.weights import Weight

WEIGHTS = (
    Weight("transformer.wte.weight", "V D", "embedding"),
    Weight("transformer.blocks.{}.norm_1.weight", "D", "attention_norm"),
    Weight("transformer.blocks.{}.attn.Wqkv.weight", "(* H) D", *QUERY_KEY_VALUE),
    Weight("transformer.blocks.{}.attn.out_proj.weight", "D (N H)", "attention/out"),
    Weight("transformer.blocks.{}.norm_2.weight", "D", "mlp_norm"),
    Weight("transformer.blocks.{}.ffn.up_proj.weight", "F D", "mlp/up"),
    Weight("transformer.blocks.{}.ffn.down_proj.weight", "D F", "mlp/down"),
    Weight("transformer.norm_f.weight", "D", "norm"),
    Weight("lm_head.weight", "V D", "head"),
)


def slopes(heads: int, largest: float) -> list[float]:
    """2^(-largest·i/P) for i = 1..P, P the next power of two: every second, then the rest, if that is too many.

    transformers takes `largest` to be 8 whatever alibi_bias_max is; MPT's own code does not.
    """
    above = 2 ** math.ceil(math.log2(heads))
    own = [2 ** (-largest * i / above) for i in range(1, above + 1)]
    return own if above == heads else (own[1::2] + own[::2])[:heads]


def read(settings: Settings) -> ModelConfig:
    heads = read_heads(settings, "n_heads", "d_model")
    attention = Settings(settings.get("attn_config") or {}, f"{settings.where}: attn_config")
    attention.only("alibi", True)
    attention.only("attn_type", "multihead_attention")
    attention.only("clip_qkv", None)
    attention.only("prefix_lm", False)
    attention.only("qk_ln", False)
    attention.only("attn_uses_sequence_id", False)
    attention.ignore("attn_impl", "is_encoder_decoder")
    encoding = alibi(slopes(heads["num_heads"], attention.number("alibi_bias_max", 8)))
    scale = attention.get("softmax_scale")
    attention.refuse_rest()
    settings.only("expansion_ratio", 4)
    settings.only("no_bias", True)
    settings.only("logit_scale", None)
    settings.only("norm_type", "low_precision_layernorm", "layernorm")
    # With ALiBi there is no table of positions; transformers' own code is that of auto_map.
    settings.ignore("learned_pos_emb", "embedding_fraction", "init_device", "init_config", "verbose")
    settings.ignore("auto_map", "tokenizer_name")
    return ModelConfig(
        vocab_size=settings.integer("vocab_size"),
        num_layers=settings.integer("n_layers"),
        **heads,
        mlp="plain",
        mlp_dim=4 * heads["model_dim"],
        activation="gelu",
        norm="layer",
        norm_eps=settings.number("layer_norm_epsilon", 1e-5),
        attention_scale=scale,
        embedding_scale=1.0,
        tie_embeddings=read_tied(settings, True),
        encoding=encoding,
        train_length=settings.integer("max_seq_len", 2048),
    )


def write(config: ModelConfig) -> dict[str, Any]:
    own, heads = slopes_of(config), config.num_heads
    # The first slope is that of i = 1, or of i = 2 if every second comes first.
    above = 2 ** math.ceil(math.log2(heads))
    largest = 8 if own is None else round(-math.log2(own[0]) * above / (1 if above == heads else 2))
    return {
        "vocab_size": config.vocab_size,
        "n_layers": config.num_layers,
        "n_heads": heads,
        "d_model": config.model_dim,
        "max_seq_len": config.train_length,
        "layer_norm_epsilon": config.norm_eps,
        "attn_config": {"alibi": True, "alibi_bias_max": largest, "softmax_scale": config.attention_scale},
        "tie_word_embeddings": config.tie_embeddings,
    }


FAMILY = Family(
    name="mpt",
    architecture="MptForCausalLM",
    former_architectures=("MPTForCausalLM",),
    weights=WEIGHTS,
    read=read,
    write=write,
    prefix="transformer.",
)
