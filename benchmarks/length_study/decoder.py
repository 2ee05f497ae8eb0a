"""The decoder of the small length study: four layers of width 64, trained by the recipe of Kazemnejad et al. 2023.

    make length-study

trains it on every task, with six encodings and three seeds. Recipe: AdamW with weight decay 0.05, linear decay to 0 and
a warm-up of 6 % of the steps. A decoder this small needs and bears a higher learning rate than the paper's 3e-5, and
has fewer steps than its 40,000. Examples are packed into rows of 1,024 tokens a step, about 37 of the first task.
"""

from nope_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(vocab_size=128, num_layers=4, num_heads=4, model_dim=64, encoding="nope"),
        data=DataConfig(
            source="task:copy", tokenizer="task:copy", document_mask=True, context_length=64, batch_size=16
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-3, warmup_steps=144, schedule="linear", floor=0.0, b2=0.999, weight_decay=0.05
        ),
        train=TrainConfig(steps=2400, log_every=100, checkpoint_every=400, eval_every=800, eval_batches=4),
    )
