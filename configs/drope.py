"""DroPE: train with RoPE, drop it, recalibrate briefly at the original length (Gelberg et al. 2025, arXiv 2512.12167).

RoPE helps a model to learn and then keeps it from reading further than it has learned to. This run starts from the
weights of one trained with RoPE, goes without positions, and takes two fifths of its steps, at its length:

    python train.py --config configs/tiny.py --workdir runs/rope --model.encoding rope
    python train.py --config configs/drope.py --workdir runs/drope --train.init_from runs/rope
    python eval.py --workdirs runs/rope runs/drope --lengths 128 256 512 1024 2048 --out runs/drope_report

The RoPE run ends at a validation loss of 1.47 nats per byte, this one at 1.96; NoPE from the start is at 2.0 after as
many steps as RoPE took (two Zen 4 cores, 2026-11-20). For s times the original length the paper also multiplies the
content logit by 1 + 0.412·ln s, which is `UniformScale(factor=1 + 0.412 * math.log(s))`.
"""

from nope_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(vocab_size=256, num_layers=4, num_heads=4, model_dim=64, encoding="nope"),
        data=DataConfig(source="python_stdlib", tokenizer="bytes", context_length=128, batch_size=16),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=10),
        train=TrainConfig(steps=240, log_every=10, checkpoint_every=120, eval_every=60, eval_batches=32),
    )
