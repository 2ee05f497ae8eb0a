"""A model that learns passkey retrieval, finding a number hidden in filler text, within a context of 384 bytes.

    python train.py --config configs/passkey.py --workdir runs/passkey
    python eval.py passkey --workdirs runs/passkey --lengths 256 320 384 448 512 768 --out runs/passkey_report

Training takes 2 min 40 s on two Zen 4 cores, shared with other work. The model then finds all 100 keys (ten depths, ten
keys each) at each of these six lengths, up to twice its context; the evaluation takes 21 s. (One run, 2026-11-20.) With
three keys per depth it finds 100 % at 1,024 bytes, 57 % at 2,048 and 30 % at 4,096. For the first 700 steps the loss
stays near 0.2, the cost of the text without copying; then it falls to 0.06.

This is an easy task: the text has no other digits, and filler and wording are the same as in training.

The encoding is ALiBi because its heads with steep slopes quickly learn to copy from nearby. With RoPE
(--model.encoding rope), on an earlier form of these documents, the model had only begun to copy after 700 steps of
twice the batch size; NoPE was not tried.
"""

from nope_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(vocab_size=256, num_layers=2, num_heads=4, head_dim=32, model_dim=64, encoding="alibi"),
        data=DataConfig(source="task:passkey", tokenizer="bytes", context_length=384, batch_size=4),
        optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=20),
        train=TrainConfig(steps=1400, log_every=50, checkpoint_every=700, eval_every=700, eval_batches=8),
    )
