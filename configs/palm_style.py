"""PaLM's shape (Chowdhery et al. 2022, arXiv 2204.02311) at the size of GPT-2 small: 139 M parameters, RoPE.

    python train.py --config configs/palm_style.py --workdir runs/palm
    python train.py --config configs/palm_style.py --workdir runs/palm_nope --model.encoding nope

Attention and MLP read the same norm and are added at once (a parallel block), all query heads share one key/value head
(multi-query attention), SwiGLU with four times the width, LayerNorm, no biases, and embeddings tied to the head and
scaled by the root of the width. Unlike PaLM, the head dim is 64, not 256, and the optimizer is AdamW, not Adafactor.

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
            num_kv_heads=1,
            model_dim=768,
            mlp_dim=3072,
            norm="layer",
            block="parallel_shared_norm",
            tie_embeddings=True,
            encoding="rope",
            dtype="bfloat16",
            remat="full",
        ),
    )
