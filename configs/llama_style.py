"""Llama's shape (Touvron et al. 2023, arXiv 2302.13971) at the size of GPT-2 small: 162 M parameters, RoPE.

    python train.py --config configs/llama_style.py --workdir runs/llama
    python train.py --config configs/llama_style.py --workdir runs/llama_nope --model.encoding nope

RMSNorm, SwiGLU with 8/3 of the width, no biases, an untied head: all are defaults of this package but for the factor of
the embeddings, which Llama does not have. Keys and values have as many heads as queries, as in Llama 1.

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
            embedding_scale=1.0,
            encoding="rope",
            dtype="bfloat16",
            remat=True,
        ),
        data=DataConfig(
            source="tfds:c4/en", tokenizer="tokenizers/gpt2/tokenizer.json", context_length=1024, batch_size=512
        ),
        optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=700, accumulation=8),
        train=TrainConfig(steps=19_000, log_every=10, checkpoint_every=1000, eval_every=1000, eval_batches=8),
    )
