"""SmolLM3's architecture (Bakouch et al. 2025, huggingface.co/blog/smollm3): 3.1 B parameters, every fourth layer NoPE.

    python train.py --config configs/smollm3_3b.py --workdir runs/smollm3_3b

Parameters and optimizer state take 34 GiB, sharded over all chips, whose number must divide the 576 rows of the batch.
On 64 TPU v6e chips,

    python train.py --config configs/smollm3_3b.py --compile_for v6e:8x8

says that each needs 11.3 of its 32 GiB (2026-11-21).

Three layers of RoPE, then one without positions: the schedule "smollm3". Tied embeddings, attention within documents,
2.36 M tokens per step, learning rate and warm-up are as published. The published learning rate stays constant and
decays at the end; here it follows a cosine. 100,000 steps are 236 B tokens, of the published 11.2 T. The authors do not
apply weight decay to the embedding; here it is decayed.

Requires the dataset, prepared under data.dir, and the tokenizer.json of huggingface.co/HuggingFaceTB/SmolLM3-3B-Base at
the path below.
"""

from nope_jax.config import Config, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=128_256,
            num_layers=36,
            num_heads=16,
            num_kv_heads=4,
            model_dim=2048,
            mlp_dim=11_008,
            tie_embeddings=True,
            encoding="smollm3",
            dtype="bfloat16",
            remat="full",
        ),
        data=DataConfig(
            source="tfds:c4/en",
            tokenizer="tokenizers/smollm3/tokenizer.json",
            context_length=4096,
            batch_size=576,
            document_mask=True,
        ),
        optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=2000),
        train=TrainConfig(steps=100_000, log_every=10, checkpoint_every=1000, eval_every=1000, eval_batches=4),
        mesh=MeshConfig(fsdp=-1),
    )
