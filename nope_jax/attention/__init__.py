"""Attention: the definition, the streaming form, and one function per encoding."""

from nope_jax.attention.dot_product import AttentionStats, dot_product_attention
from nope_jax.attention.functions import (
    alibi_attention,
    encoded_attention,
    nope_attention,
    rope_attention,
    t5_attention,
)

__all__ = [
    "AttentionStats",
    "alibi_attention",
    "dot_product_attention",
    "encoded_attention",
    "nope_attention",
    "rope_attention",
    "t5_attention",
]
