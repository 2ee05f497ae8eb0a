"""Train a decoder. Started again on the same workdir, it goes on from the newest checkpoint there.

    python train.py --config configs/tiny.py --workdir runs/nope --model.encoding nope --train.steps 500

Every field of the config is an option by its dotted name; --help lists them. The workdir receives config.json,
metrics.jsonl and checkpoints/. Exit status: 0 finished, 1 diverged, 2 bad input, 130 (Ctrl-C) or 143 (SIGTERM) stopped
and saved.
"""

import importlib.metadata
import os
import sys

from nope_jax.cli import parse_train, run
from nope_jax.config import Config


def main() -> None:
    config, workdir = parse_train(sys.argv[1:])
    tune_xla(config)
    from nope_jax.training import train  # seconds of imports, which bad arguments need not wait for

    train(config, workdir)


def tune_xla(config: Config) -> None:
    """Sets flags that XLA reads when the first device is asked for; one that it does not know would end the process."""
    version = tuple(int(part) for part in importlib.metadata.version("jaxlib").split(".")[:2])
    if version >= (0, 12) and config.model.dtype == "float32":
        # A step on a CPU then takes two thirds of the time; in bfloat16 it would take longer.
        os.environ["XLA_FLAGS"] = f"--xla_cpu_experimental_ynn_fusion_type=dot {os.environ.get('XLA_FLAGS', '')}"


if __name__ == "__main__":
    sys.exit(run(main))
