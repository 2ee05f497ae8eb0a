"""The optimizers of `optimizer.name` beside each other: validation loss by learning rate, on the demo and on the study.

    python -m benchmarks.optimizers [--steps 300] [--only NAME ...]

Every optimizer trains configs/tiny.py and benchmarks/study/decoder.py with NoPE from the same seed, at the learning
rates below, with its default settings and what else the config says. Prints a table in Markdown: the loss is that after
the last step, in nats per token.
"""

import argparse
import tempfile
import time
from pathlib import Path

from nope_jax.config import Config, load_file, override
from nope_jax.retention import validation_losses
from nope_jax.training import train

ROOT = Path(__file__).parents[1]
CONFIGS = {"demo": ROOT / "configs" / "tiny.py", "study": ROOT / "benchmarks" / "study" / "decoder.py"}
RATES = {
    "adamw": (3e-3, 1e-2, 2e-2),
    "lion": (3e-4, 1e-3, 3e-3),
    "adafactor": (3e-3, 1e-2, 2e-2),
    "muon": (3e-3, 1e-2, 2e-2),
}
"""Learning rates to try, by optimizer."""


def loss_of(config: Config) -> float:
    """Train a run and return its validation loss after the last step."""
    with tempfile.TemporaryDirectory() as folder:
        train(config, folder)
        return validation_losses(Path(folder))[config.train.steps]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    arguments = parser.parse_args()
    steps, rows, began = arguments.steps, [], time.perf_counter()
    for where in arguments.only:
        config = override(
            load_file(CONFIGS[where]),
            {
                "train.steps": steps,
                "train.log_every": steps // 10,
                "train.checkpoint_every": steps,
                "train.eval_every": steps,
            },
        )
        for name, rates in RATES.items():
            found = [
                loss_of(override(config, {"optimizer.name": name, "optimizer.learning_rate": rate})) for rate in rates
            ]
            cells = [
                f"**{loss:.3f}** at {rate:g}" if loss == min(found) else f"{loss:.3f} at {rate:g}"
                for rate, loss in zip(rates, found, strict=True)
            ]
            rows.append(f"| {where} | `{name}` | {', '.join(cells)} |")
    print("| config | optimizer | validation loss at each learning rate |", "|---|---|---|", *rows, sep="\n")
    print(f"\n{steps} steps each, {(time.perf_counter() - began) / 60:.0f} minutes in all.")


if __name__ == "__main__":
    main()
