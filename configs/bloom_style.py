"""BLOOM's shape (Scao et al. 2022, arXiv 2211.05100) at the size of GPT-2 small: 124 M parameters, ALiBi.

    python train.py --config configs/bloom_style.py --workdir runs/bloom
    python train.py --config configs/bloom_style.py --workdir runs/bloom_nope --model.encoding nope

A LayerNorm after the embedding, for stability; LayerNorm and biases in all layers, a plain GELU, tied embeddings.
Unlike BLOOM, the tokenizer is GPT-2's: BLOOM has 250,880 tokens for 59 languages.

Size, vocabulary, data and schedule are those of configs/gpt2.py, so that shapes can be compared. Requires the same
dataset and tokenizer.json as that file.
"""

import dataclasses
from pathlib import Path

from nope_jax.config import Config, ModelConfig, load_file


def get_config() -> Config:
    gpt2 = load_file(Path(__file__).with_name("gpt2.py"))
    return dataclasses.replace(
        gpt2,
        model=ModelConfig(
            vocab_size=50_304,
            num_layers=12,
            num_heads=12,
            model_dim=768,
            mlp="plain",
            activation="gelu_tanh",
            norm="layer",
            norm_eps=1e-5,
            biases=("qkv", "out", "mlp", "norm"),
            embedding_scale=1.0,
            embedding_norm=True,
            tie_embeddings=True,
            encoding="alibi",
            dtype="bfloat16",
            remat="full",
        ),
    )
