"""Attention: one function per encoding, with interchangeable backends."""

from nope_jax.attention.dot_product import AttentionStats, dot_product_attention
from nope_jax.attention.encoded import attention_weights, encoded_attention
from nope_jax.attention.functions import (
    alibi_attention,
    cope_attention,
    deberta_attention,
    fire_attention,
    forgetting_attention,
    kerple_attention,
    nezha_attention,
    nope_attention,
    rope_attention,
    shaw_attention,
    t5_attention,
    transformer_xl_attention,
    tupe_attention,
    xpos_attention,
)

__all__ = [
    "AttentionStats",
    "alibi_attention",
    "attention_weights",
    "cope_attention",
    "deberta_attention",
    "dot_product_attention",
    "encoded_attention",
    "fire_attention",
    "forgetting_attention",
    "kerple_attention",
    "nezha_attention",
    "nope_attention",
    "rope_attention",
    "shaw_attention",
    "t5_attention",
    "transformer_xl_attention",
    "tupe_attention",
    "xpos_attention",
]
