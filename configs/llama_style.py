"""Llama's shape (Touvron et al. 2023, arXiv 2302.13971) at the size of GPT-2 small: 162 M parameters, RoPE.

    python train.py --config configs/llama_style.py --workdir runs/llama
    python train.py --config configs/llama_style.py --workdir runs/llama_nope --model.encoding nope

RMSNorm, SwiGLU with 8/3 of the width, no biases, an untied head: all are defaults of this package but for the factor of
the embeddings, which Llama does not have. Keys and values have as many heads as queries, as in Llama 1.

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
            embedding_scale=1.0,
            encoding="rope",
            dtype="bfloat16",
            remat="full",
        ),
    )
