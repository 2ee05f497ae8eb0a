"""PaLM's shape (Chowdhery et al. 2022, arXiv 2204.02311) at the size of GPT-2 small: 139 M parameters, RoPE.

    python train.py --config configs/palm_style.py --workdir runs/palm
    python train.py --config configs/palm_style.py --workdir runs/palm_nope --model.encoding nope

Attention and MLP read the same norm and are added at once (a parallel block), all query heads share one key/value head
(multi-query attention), SwiGLU with four times the width, LayerNorm, no biases, and embeddings tied to the head and
scaled by the root of the width. Unlike PaLM, the head dim is 64, not 256, and the optimizer is AdamW, not Adafactor.

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
            num_kv_heads=1,
            model_dim=768,
            mlp_dim=3072,
            norm="layer",
            block="parallel_shared_norm",
            tie_embeddings=True,
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
