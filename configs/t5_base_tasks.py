"""The decoder of Kazemnejad et al. 2023 (arXiv 2305.19466) on one of their tasks, by their recipe: 85 M parameters.

    python train.py --config configs/t5_base_tasks.py --workdir runs/t5_copy

Every example has a row of its own, as in the paper. Another task is `--data.source task:NAME --data.tokenizer
task:NAME`; model.vocab_size must be as large as its words are many (the paper has T5's 32,000), data.context_length as
its longest example. `make length-study SIZE=paper` trains on all tasks, with six encodings and three seeds each;
docs/length_generalization.md says what that takes. On a TPU v5e chip,

    python train.py --config configs/t5_base_tasks.py --compile_for v5e:1x1

says that it needs 5.8 of its 16 GiB (2026-11-21).
"""

import dataclasses
from pathlib import Path

from nope_jax.config import Config, DataConfig, load_file


def get_config() -> Config:
    decoder = load_file(Path(__file__).with_name("t5_base_decoder.py"))
    return dataclasses.replace(
        decoder,
        model=dataclasses.replace(decoder.model, vocab_size=128, train_length=None),
        data=DataConfig(source="task:copy", tokenizer="task:copy", context_length=64, batch_size=64),
        optimizer=dataclasses.replace(decoder.optimizer, schedule="linear", floor=0.0, accumulation=1),
    )
