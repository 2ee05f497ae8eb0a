"""The study of Kazemnejad et al. 2023: tasks x encodings x seeds, trained, asked and ranked.

    make length-study                  # SIZE=small: a decoder of 0.1 million parameters, overnight on two cores
    make length-study SIZE=paper       # the paper's decoder of 85 million parameters, for one GPU

Runs of one shape (encoding and context length) train together, then answer. Started again it goes on. After every
group, docs/length_generalization.md is written with what there is so far.
"""

import argparse
import dataclasses
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={os.cpu_count()}")  # before JAX

from benchmarks.length_study import page
from nope_jax.config import Config, DataConfig, EncodingSpec, ModelConfig, OptimizerConfig, TrainConfig
from nope_jax.encodings import RoPE
from nope_jax.evaluation.common.evaluation import evaluate
from nope_jax.evaluation.registry import Options, TasksConfig
from nope_jax.training.flops import model_flops_per_token
from nope_jax.training.together import train_together

CONTEXTS = {
    (64, 128): (
        *("copy", "copy_2x", "copy_replaced", "copy_multi", "copy_multi_2x", "reverse", "reverse_2x", "reverse_mcrv"),
        *("addition", "summation", "parity", "sort", "lego", "scan"),
    ),
    (128, 128): ("polynomial", "sort_integers"),
    (128, 576): ("pcfg",),
}
"""Tasks by context length, which holds their longest example of training, and by the size of their vocabulary."""
SEEDS = range(3)


@dataclasses.dataclass(frozen=True)
class Size:
    """A size of the study."""

    model: dict
    rotary_dim: int
    """A quarter of the head dimension, as in the paper."""
    optimizer: OptimizerConfig
    steps: int
    tokens: int | None
    """Tokens per step, in packed rows. None: 64 examples, one per row, as in the paper."""
    together: int
    """Runs that train together at most."""

    @property
    def encodings(self) -> dict[str, EncodingSpec]:
        rope = RoPE(rotary_dim=self.rotary_dim, interleaved=True)
        return {
            name: rope if name == "rope" else name for name in ("nope", "t5", "alibi", "rope", "sinusoidal", "learned")
        }

    def config(self, task: str, encoding: EncodingSpec, seed: int, context: int, vocab: int) -> Config:
        packed, every = self.tokens is not None, max(1, self.steps // 4)
        return Config(
            ModelConfig(vocab_size=vocab, encoding=encoding, **self.model),
            DataConfig(
                source=f"task:{task}",
                tokenizer=f"task:{task}",
                context_length=context,
                batch_size=64 if self.tokens is None else self.tokens // context,
                document_mask=packed,
                seed=seed,
            ),
            self.optimizer,
            TrainConfig(
                steps=self.steps,
                log_every=max(1, self.steps // 20),
                checkpoint_every=every,
                eval_every=every,
                eval_batches=4,
                seed=seed,
            ),
        )


SIZES = {
    "small": Size(
        {"num_layers": 2, "num_heads": 4, "model_dim": 64},
        rotary_dim=4,
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=60, weight_decay=0.05),
        steps=1000,
        tokens=2048,
        together=42,
    ),
    # Architecture, batch, rate, warm-up and decay as in configs/t5_base_decoder.py. The paper's rate falls linearly to
    # 0; a cosine to a tenth is what optimizer.* has.
    "paper": Size(
        {
            "num_layers": 12,
            "num_heads": 12,
            "model_dim": 768,
            "mlp_dim": 3072,
            "mlp": "plain",
            "tie_embeddings": True,
            "dtype": "bfloat16",
        },
        rotary_dim=16,
        optimizer=OptimizerConfig(learning_rate=3e-5, warmup_steps=2400, b2=0.999, weight_decay=0.05),
        steps=40_000,
        tokens=None,
        together=3,
    ),
}

Runs = list[tuple[Config, Path]]


def groups(size: Size, folder: Path, tasks: list[str], encodings: list[str]) -> Iterator[Runs]:
    """The runs of the study with their workdirs, in groups that train together."""
    for name, ((context, vocab), listed) in itertools.product(encodings, CONTEXTS.items()):
        runs = [
            (size.config(task, size.encodings[name], seed, context, vocab), folder / f"{task}-{name}-{seed}")
            for task in listed
            if task in tasks
            for seed in SEEDS
        ]
        for first in range(0, len(runs), size.together):
            yield runs[first : first + size.together]


def flops(runs: Runs) -> float:
    """Of the training of some runs."""
    return sum(
        model_flops_per_token(config) * config.data.batch_size * config.data.context_length * config.train.steps
        for config, _ in runs
    )


def seconds_per_flop(runs: Runs) -> float:
    """Measured on two runs, for a few steps."""
    steps = 12
    with tempfile.TemporaryDirectory() as folder:
        shorter = TrainConfig(steps=steps, log_every=steps // 2, checkpoint_every=steps, eval_every=steps)
        timed = [
            (
                dataclasses.replace(config, train=dataclasses.replace(shorter, seed=config.train.seed)),
                Path(folder, str(i)),
            )
            for i, (config, _) in enumerate(runs[:2])
        ]
        train_together(timed)
        last = [json.loads(line) for line in Path(folder, "0", "metrics.jsonl").read_text().splitlines()]
        rate = next(line["tokens_per_second"] for line in reversed(last) if "tokens_per_second" in line)
    return 1 / (rate * len(timed) * model_flops_per_token(timed[0][0]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains, asks and ranks: tasks x encodings x seeds.")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps", type=int, help="Other than those of the size.")
    parser.add_argument("--examples", type=int, default=50, help="Questions for each length.")
    parser.add_argument("--tasks", nargs="+", choices=sum(CONTEXTS.values(), ()), default=sum(CONTEXTS.values(), ()))
    parser.add_argument("--encodings", nargs="+", choices=SIZES["small"].encodings, default=[*SIZES["small"].encodings])
    parser.add_argument("--out", type=Path, help="Folder of the runs; runs/length_study/SIZE by default.")
    parser.add_argument("--page", type=Path, default=page.PAGE)
    given = parser.parse_args()
    size = SIZES[given.size]
    if given.steps is not None:
        size = dataclasses.replace(size, steps=given.steps)
    folder = given.out or Path("runs/length_study", given.size)
    command = f"make length-study SIZE={given.size}"
    if given.steps is not None:
        command = f"python -m benchmarks.length_study.study --size {given.size} --steps {given.steps}"
    whole = list(groups(size, folder / "runs", given.tasks, given.encodings))
    total = sum(map(flops, whole))
    hours = total * seconds_per_flop(whole[0]) / 3600
    print(f"{sum(map(len, whole))} runs in {len(whole)} groups: training takes about {hours:.1f} h here", flush=True)
    began, done, at_work = time.monotonic(), 0.0, 0.0
    for i, runs in enumerate(whole, 1):
        train_together(runs)
        out = folder / "reports" / str(i)
        settings = TasksConfig(examples=given.examples)
        evaluate("tasks", Options(tuple(workdir for _, workdir in runs), (), out, {}, settings))
        done, at_work = done + flops(runs), time.monotonic() - began
        page.write(given.page, folder, command, sum(CONTEXTS.values(), ()), [*size.encodings])
        left = at_work * (total - done) / done / 3600
        print(f"group {i} of {len(whole)} is done; at this pace the rest takes {left:.1f} h", flush=True)


if __name__ == "__main__":
    main()
