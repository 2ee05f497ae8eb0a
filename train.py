"""Train a decoder. Started again on the same workdir, it goes on from the newest checkpoint there.

    python train.py --config configs/tiny.py --workdir runs/nope --model.encoding nope --train.steps 500

Every field of the config is an option by its dotted name; --help lists them. The workdir receives config.json,
metrics.jsonl and checkpoints/. Exit status: 0 finished, 1 diverged, 2 bad input, 130 (Ctrl-C) or 143 (SIGTERM) stopped
and saved.
"""

import sys

from nope_jax.cli import parse_train, run


def main() -> None:
    config, workdir = parse_train(sys.argv[1:])
    from nope_jax.training import train  # seconds of imports, which bad arguments need not wait for

    train(config, workdir)


if __name__ == "__main__":
    sys.exit(run(main))
