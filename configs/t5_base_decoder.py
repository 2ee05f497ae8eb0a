"""The decoder of Kazemnejad et al. 2023 (arXiv 2305.19466): T5-base without its encoder, 110 M parameters.

    python train.py --config configs/t5_base_decoder.py --workdir runs/t5_base_nope

For one accelerator: a step's rows are taken in four parts. On a TPU v5e chip

    python train.py --config configs/t5_base_decoder.py --compile_for v5e:1x1

says that it needs 10.8 of its 16 GiB (2026-11-21).

Shape, batch, learning rate, weight decay, warm-up (6 %) and steps are theirs; they anneal linearly, here it is a cosine
to a tenth, and GELU stands for T5's ReLU. Their five encodings are nope, t5, alibi, sinusoidal and
RoPE(rotary_dim=16, interleaved=True). They train on small tasks, longer ones at the test; here it reads text.

Needs the dataset, prepared under data.dir, and T5's SentencePiece model (32,000 tokens;
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
