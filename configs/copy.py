"""A model that copies a repeated symbol, the first task of Kazemnejad et al. 2023, on 2 to 20 symbols.

    python train.py --config configs/copy.py --workdir runs/copy

Takes 1 min 46 s on two Zen 4 cores, shared with other work, and ends at a validation loss of 0.0000 nats per token of
the answer, on instances held out of training. (One run, 2026-11-21.) `--data.source task:NAME --data.tokenizer
task:NAME` trains on another task of docs/data.md; model.vocab_size must be as large as its words are many, and
data.context_length as its longest example.
"""

from nope_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(vocab_size=128, num_layers=2, num_heads=4, model_dim=64, encoding="nope"),
        data=DataConfig(
            source="task:copy", tokenizer="task:copy", document_mask=True, context_length=64, batch_size=32
        ),
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=20),
        train=TrainConfig(steps=1000, log_every=100, checkpoint_every=500, eval_every=500, eval_batches=8),
    )
