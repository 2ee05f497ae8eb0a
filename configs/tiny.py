"""The demo: a decoder of a quarter of a million parameters that reads 128 bytes of Python's standard library at a time.

    python train.py --config configs/tiny.py --workdir runs/nope --model.encoding nope

Takes one to two minutes on two CPU cores. NoPE, the slowest to learn, ends at a validation loss of about 2.0 nats per
byte, RoPE at about 1.5 (`make demo`, two Zen 4 cores, 2026-11-20).
"""

from nope_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(vocab_size=256, num_layers=4, num_heads=4, model_dim=64, encoding="nope"),
        data=DataConfig(source="python_stdlib", tokenizer="bytes", context_length=128, batch_size=16),
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=50),
        train=TrainConfig(steps=600, log_every=20, checkpoint_every=300, eval_every=300, eval_batches=32),
    )
