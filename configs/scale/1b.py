"""The scale study at 1 B parameters: the decoder of configs/nope_1b.py, trained on 22 B tokens.

    make study SIZE=1b LENGTH=2048

trains it with five encodings at one length, on all GPUs of a host, and evaluates them; docs/pods.md says at what cost.
A single run, and one at another length with as many tokens per step:

    python train.py --config configs/scale/1b.py --workdir runs/1b_alibi --model.encoding alibi
    python train.py --config configs/scale/1b.py --workdir runs/1b_512 --data.context_length 512 --data.batch_size 4096

20 tokens per parameter are what suits a given amount of computation best (Hoffmann et al. 2022, arXiv 2203.15556);
configs/nope_1b.py takes five times as many. Requires the dataset and the tokenizer of that file, and, for `make study`,
PG-19.
"""

from pathlib import Path

from nope_jax.config import Config, load_file, override


def get_config() -> Config:
    nope_1b = load_file(Path(__file__).parents[1] / "nope_1b.py")
    return override(nope_1b, {"optimizer.warmup_steps": 1000, "optimizer.accumulation": 16, "train.steps": 10_500})
