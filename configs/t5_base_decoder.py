"""The decoder of Kazemnejad et al. 2023 (arXiv 2305.19466): T5-base without its encoder, 110 M parameters.

    python train.py --config configs/t5_base_decoder.py --workdir runs/t5_base_nope

For one accelerator: each batch is split into four microbatches. On a TPU v5e chip,

    python train.py --config configs/t5_base_decoder.py --compile_for v5e:1x1

says that it needs 10.8 of its 16 GiB (2026-11-21).

Architecture, batch, learning rate, weight decay, warm-up (6 %) and steps are the paper's. It anneals linearly, where
this uses a cosine to a tenth, and T5's ReLU is replaced by GELU. The paper's five encodings are nope, t5, alibi,
sinusoidal and RoPE(rotary_dim=16, interleaved=True). It trains on small tasks, with longer ones at test time; this
config trains on text.

Requires the dataset, prepared under data.dir, and T5's SentencePiece model (32,000 tokens;
huggingface.co/google-t5/t5-base) at the path below.
"""

from nope_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=32_128,
            num_layers=12,
            num_heads=12,
            model_dim=768,
            mlp_dim=3072,
            mlp="plain",
            tie_embeddings=True,
            encoding="nope",
            dtype="bfloat16",
        ),
        data=DataConfig(
            source="tfds:wiki40b/en", tokenizer="tokenizers/t5/spiece.model", context_length=512, batch_size=64
        ),
        optimizer=OptimizerConfig(learning_rate=3e-5, warmup_steps=2400, b2=0.999, weight_decay=0.05, accumulation=4),
        train=TrainConfig(steps=40_000, log_every=20, checkpoint_every=2000, eval_every=2000, eval_batches=16),
    )
