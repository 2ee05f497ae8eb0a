"""How much faster small models train together than one at a time: steps of one model per second.

    python -m benchmarks.together [MODELS ...]

On a CPU, every core is a device of its own. Two sizes of a decoder with 2 layers and NoPE, on a task with rows of 64
tokens, 32 a step. Steps are timed without compilation, input and checkpoints.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={os.cpu_count()}")  # before JAX

from nope_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig, override
from nope_jax.training.together import train_together

STEPS = 60


def steps_per_second(width: int, models: int) -> float:
    config = Config(
        ModelConfig(vocab_size=128, num_layers=2, num_heads=4, model_dim=width, encoding="nope"),
        DataConfig(source="task:copy", tokenizer="task:copy", document_mask=True, context_length=64, batch_size=32),
        OptimizerConfig(),
        TrainConfig(steps=STEPS, log_every=STEPS // 3, checkpoint_every=STEPS, eval_every=STEPS, eval_batches=1),
    )
    with tempfile.TemporaryDirectory() as folder:
        workdirs = [Path(folder, str(seed)) for seed in range(models)]
        train_together([(override(config, {"train.seed": i}), workdir) for i, workdir in enumerate(workdirs)])
        logged = [json.loads(line) for line in (workdirs[0] / "metrics.jsonl").read_text().splitlines()]
    # The first third warms up.
    rates = [line["tokens_per_second"] for line in logged if line["step"] > STEPS // 3 and "tokens_per_second" in line]
    return models * sum(rates) / len(rates) / (32 * 64)


def main() -> None:
    counts = [int(word) for word in sys.argv[1:]] or [1, 4, 20]
    print("width models steps/s")
    for width in (32, 64):
        for count in counts:
            print(f"{width:5} {count:6} {steps_per_second(width, count):7.1f}", flush=True)


if __name__ == "__main__":
    main()
