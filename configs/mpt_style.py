"""MPT's shape (MosaicML 2023, databricks.com/blog/mpt-7b) at the size of GPT-2 small: 124 M parameters, ALiBi.

    python train.py --config configs/mpt_style.py --workdir runs/mpt
    python train.py --config configs/mpt_style.py --workdir runs/mpt_nope --model.encoding nope

LayerNorm, a plain GELU and tied embeddings as in GPT-2, but no biases anywhere. Some MPT models clip queries, keys and
values at ±8, which is left out here.

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
            activation="gelu",
            norm="layer",
            norm_eps=1e-5,
            embedding_scale=1.0,
            tie_embeddings=True,
            encoding="alibi",
            dtype="bfloat16",
            remat="full",
        ),
    )
