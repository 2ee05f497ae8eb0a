"""The decoder of the study: 0.9 million parameters, trained on windows of 128 bytes of Python's standard library.

    make study

trains it with six encodings, tunes the logit scale of two of them, evaluates all runs and writes docs/study.md, which
states the training times; the Makefile in this directory lists the steps. It trains on four times as many tokens as
configs/tiny.py: enough for NoPE to learn to count, and so to lose count past its training length.
"""

from nope_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(vocab_size=256, num_layers=4, num_heads=8, model_dim=128, encoding="nope"),
        data=DataConfig(source="python_stdlib", tokenizer="bytes", context_length=128, batch_size=16),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=100),
        train=TrainConfig(steps=2500, log_every=25, checkpoint_every=250, eval_every=500, eval_batches=32),
    )
