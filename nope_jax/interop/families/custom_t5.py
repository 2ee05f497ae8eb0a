"""McGill-NLP's decoder-only T5, with one of several encodings, as in codellm_1b_nope, _rotary and _alibi
(Kazemnejad et al. 2023, arXiv 2305.19466, and its code).

transformers runs these models only with the code that comes with them.
"""

from typing import Any

from nope_jax.config import ModelConfig
from nope_jax.encodings import T5, ALiBi, Encoding, NoPE, RoPE
from nope_jax.interop.families.family import Family
from nope_jax.interop.families.t5 import BUCKETS, IGNORED, WEIGHTS, read_bias, read_decoder
from nope_jax.interop.rotary import head_dim, per_layer
from nope_jax.interop.settings import Settings


def read(settings: Settings) -> ModelConfig:
    fields, buckets = read_decoder(settings, layers="num_layers", length=1024), read_bias(settings)
    settings.only("is_encoder_decoder", False)
    settings.ignore("auto_map", "num_decoder_layers")
    rope = RoPE(rotary_dim=fields["head_dim"] // 4, interleaved=True)
    encodings: dict[str, Encoding] = {
        "t5_relative_bias": buckets,
        "none": NoPE(),
        "rotary": rope,
        "rotary_rerun": rope,
        "new_rotary": rope,
        "alibi": ALiBi(),
    }
    return ModelConfig(**fields, encoding=settings.choice("position_encoding_type", "t5_relative_bias", encodings))


def write(config: ModelConfig) -> dict[str, Any]:
    encoding, own = per_layer(config)[0], config.activation or ("silu" if config.mlp == "gated" else "gelu_tanh")
    activation = {"gelu_tanh": "gelu_new"}.get(own, own)
    kind = {NoPE: "none", ALiBi: "alibi", RoPE: "rotary"}.get(type(encoding), "t5_relative_bias")
    buckets = encoding if isinstance(encoding, T5) else T5()
    return {
        "vocab_size": config.vocab_size,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "d_kv": head_dim(config),
        "d_model": config.model_dim,
        "d_ff": config.mlp_size,
        "feed_forward_proj": f"gated-{activation}" if config.mlp == "gated" else activation,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "n_positions": config.train_length,
        "position_encoding_type": kind,
        "relative_attention_num_buckets": buckets.num_buckets,
        "relative_attention_max_distance": buckets.max_distance,
        "is_decoder": True,
        "is_encoder_decoder": False,
    }


FAMILY = Family(
    name="custom_decoder_only_t5",
    architecture="CustomDecoderOnlyT5",
    weights=WEIGHTS,
    read=read,
    write=write,
    prefix="",
    # Buckets are there whatever the encoding is; tables of ALiBi and RoPE are computed.
    ignored=(*IGNORED, BUCKETS.replace(".", r"\."), r"decoder\.(alibi|fixed_rotary_embedding\.embed\.weight)"),
)
