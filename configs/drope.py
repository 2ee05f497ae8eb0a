"""DroPE: train with RoPE, drop it, recalibrate briefly at the original length (Gelberg et al. 2025, arXiv 2512.12167).

RoPE helps a model to learn, but does not extrapolate. This run starts from the weights of one trained with RoPE, and
trains without positional encoding for two fifths of its steps, at its length:

    python train.py --config configs/tiny.py --workdir runs/rope --model.encoding rope
    python train.py --config configs/drope.py --workdir runs/drope --train.init_from runs/rope
    python eval.py --workdirs runs/rope runs/drope --lengths 128 256 512 1024 2048 --out runs/drope_report

The RoPE run ends at a validation loss of 3.14 nats per token, this one at 3.31; NoPE from scratch ends at 3.34 after as
many steps as RoPE (two Zen 4 cores, 2026-11-21). To extend to s times the original length, the paper also multiplies
the content logit by 1 + 0.412·ln s, which is `UniformScale(factor=1 + 0.412 * math.log(s))`.
"""

from pathlib import Path

from nope_jax.config import Config, OptimizerConfig, TrainConfig, load_file


def get_config() -> Config:
    tiny = load_file(Path(__file__).with_name("tiny.py"))
    return Config(
        model=tiny.model,
        data=tiny.data,
        optimizer=OptimizerConfig("muon", learning_rate=1e-2, warmup_steps=10),
        train=TrainConfig(steps=240, log_every=10, checkpoint_every=120, eval_every=60, eval_batches=32),
    )
