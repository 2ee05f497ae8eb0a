"""T5's decoder, with T5's bias and without division by √H (transformers: models/t5).

A T5 is an encoder and a decoder whose layers attend to it. What is loaded is the decoder as it is when there is nothing
to attend to: self-attention and MLP. Encoder and cross-attention are left out, so this decoder cannot be saved as a T5
again; it is saved as the decoder-only T5 of `custom_t5`.
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from nope_jax.config import ModelConfig
from nope_jax.encodings import T5
from nope_jax.interop.families.family import ACTIVATIONS, Family, read_tied
from nope_jax.interop.settings import Settings
from nope_jax.interop.weights import Weight

BUCKETS = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"

WEIGHTS = (
    Weight("shared.weight", "V D", "embedding"),
    Weight(BUCKETS, "=", "positions/0/table"),
    Weight("decoder.block.{}.layer.0.layer_norm.weight", "D", "attention_norm"),
    Weight("decoder.block.{}.layer.0.SelfAttention.q.weight", "(N H) D", "attention/query"),
    Weight("decoder.block.{}.layer.0.SelfAttention.k.weight", "(K H) D", "attention/key"),
    Weight("decoder.block.{}.layer.0.SelfAttention.v.weight", "(K H) D", "attention/value"),
    Weight("decoder.block.{}.layer.0.SelfAttention.o.weight", "D (N H)", "attention/out"),
    Weight("decoder.block.{}.layer.2.layer_norm.weight", "D", "mlp_norm"),
    Weight("decoder.block.{}.layer.2.DenseReluDense.wi.weight", "F D", "mlp/up", mlp="plain"),
    Weight("decoder.block.{}.layer.2.DenseReluDense.wi_0.weight", "F D", "mlp/gate", mlp="gated"),
    Weight("decoder.block.{}.layer.2.DenseReluDense.wi_1.weight", "F D", "mlp/up", mlp="gated"),
    Weight("decoder.block.{}.layer.2.DenseReluDense.wo.weight", "D F", "mlp/down"),
    Weight("decoder.final_layer_norm.weight", "D", "norm"),
    Weight("lm_head.weight", "V D", "head"),
)

IGNORED = (
    r"(encoder|decoder)\.embed_tokens\.weight",  # copies of `shared`
    r"decoder\.block\.\d+\.layer\.1\..*",  # cross-attention
)


def read_decoder(settings: Settings, *, layers: str, length: int) -> dict[str, Any]:
    """All fields but the encoding, given the setting for the number of layers, and the trained length by default."""
    forward = settings.get("feed_forward_proj", "relu")
    gate, _, activation = forward.rpartition("-")
    if gate not in ("", "gated") or activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"{settings.where}: feed_forward_proj {forward!r} is not supported, only (gated-) {known}")
    width = settings.integer("d_model")
    # transformers 5 writes what T5 1.1's config meant, and that all are tied, which they are not.
    scaled = settings.choice("scale_decoder_outputs", read_tied(settings, True), {True: True, False: False})
    settings.only("is_gated_act", gate == "gated")
    settings.ignore("num_layers", "num_decoder_layers", "output_past", "dense_act_fn")  # the last says the same
    return {
        "vocab_size": settings.integer("vocab_size"),
        "num_layers": settings.integer(layers),
        "num_heads": settings.integer("num_heads"),
        "head_dim": settings.integer("d_kv"),
        "model_dim": width,
        "mlp": "gated" if gate else "plain",
        "mlp_dim": settings.integer("d_ff"),
        "activation": "gelu_tanh" if forward == "gated-gelu" else ACTIVATIONS[activation],
        "norm_eps": settings.number("layer_norm_epsilon", 1e-6),
        "attention_scale": 1.0,
        "embedding_scale": 1.0,
        "logits_scale": width**-0.5 if scaled else 1.0,
        "tie_embeddings": scaled,
        "train_length": settings.integer("n_positions", length),
    }


def read_bias(settings: Settings) -> T5:
    """T5's bias."""
    return T5(
        num_buckets=settings.integer("relative_attention_num_buckets", 32),
        max_distance=settings.integer("relative_attention_max_distance", 128),
    )


def read(settings: Settings) -> ModelConfig:
    settings.ignore("is_encoder_decoder")
    layers = "num_layers" if settings.get("num_decoder_layers") is None else "num_decoder_layers"
    return ModelConfig(**read_decoder(settings, layers=layers, length=512), encoding=read_bias(settings))


def with_own_head(config: ModelConfig, names: Callable[[], Collection[str]]) -> ModelConfig:
    """Tied after all, if there is no head; transformers 5 makes such models."""
    absent = not config.tie_embeddings and "lm_head.weight" not in names()
    return dataclasses.replace(config, tie_embeddings=True) if absent else config


def write(config: ModelConfig) -> dict[str, Any]:
    raise ValueError("that a decoder has no encoder")


FAMILY = Family(
    name="t5",
    architecture="T5ForConditionalGeneration",
    former_architectures=("T5WithLMHeadModel",),
    weights=WEIGHTS,
    read=read,
    write=write,
    prefix="",
    told_by_tensors=with_own_head,
    ignored=(*IGNORED, r"encoder\..*"),
)
