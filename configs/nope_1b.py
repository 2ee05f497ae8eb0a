"""The 1.1 B NoPE decoder of Wang et al. 2024 (arXiv 2404.12224): TinyLlama's architecture without positions.

    python train.py --config configs/nope_1b.py --workdir runs/nope_1b

Parameters, gradients and optimizer state are sharded over all chips. On 16 TPU v5e chips,

    python train.py --config configs/nope_1b.py --compile_for v5e:4x4

says that each needs 8.0 of its 16 GiB (2026-11-21), with each batch split into four microbatches.

Architecture, steps of 2 M tokens and learning rate are from Zhang et al. 2024 (TinyLlama, arXiv 2401.02385); 50,000
steps are 100 B tokens. Wang et al. then tune the logit scale of its heads for context extension: eval.py tune.

Requires the dataset, prepared under data.dir, and Llama 2's tokenizer.json (32,000 tokens; available at
huggingface.co/TinyLlama/TinyLlama-1.1B-Chat-v1.0) at the path below.
"""

from nope_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=32_000,
            num_layers=22,
            num_heads=32,
            num_kv_heads=4,
            model_dim=2048,
            mlp_dim=5632,
            encoding="nope",
            dtype="bfloat16",
            remat="full",
        ),
        data=DataConfig(
            source="tfds:c4/en", tokenizer="tokenizers/llama2/tokenizer.json", context_length=2048, batch_size=1024
        ),
        optimizer=OptimizerConfig(learning_rate=4e-4, warmup_steps=2000, accumulation=4),
        train=TrainConfig(steps=50_000, log_every=10, checkpoint_every=1000, eval_every=1000, eval_batches=4),
        mesh=MeshConfig(fsdp=-1),
    )
