"""MPT's shape (MosaicML 2023, databricks.com/blog/mpt-7b) at the size of GPT-2 small: 124 M parameters, ALiBi.

    python train.py --config configs/mpt_style.py --workdir runs/mpt
    python train.py --config configs/mpt_style.py --workdir runs/mpt_nope --model.encoding nope

LayerNorm, a plain GELU and tied embeddings as in GPT-2, but no biases anywhere. Some MPT models clip queries, keys and
values at ±8, which is left out here.

Size, vocabulary, data and schedule are those of configs/gpt2.py, so that shapes can be compared. Requires the same
dataset and tokenizer.json as that file.
"""

from nope_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
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
            remat=True,
        ),
        data=DataConfig(
            source="tfds:c4/en", tokenizer="tokenizers/gpt2/tokenizer.json", context_length=1024, batch_size=512
        ),
        optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=700, accumulation=8),
        train=TrainConfig(steps=19_000, log_every=10, checkpoint_every=1000, eval_every=1000, eval_batches=8),
    )
