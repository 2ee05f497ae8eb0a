"""GPT-2 small (Radford et al. 2019), 124 M parameters, with any encoding: the usual baseline for comparisons.

    python train.py --config configs/gpt2.py --workdir runs/gpt2_nope
    python train.py --config configs/gpt2.py --workdir runs/gpt2 --model.encoding learned

The second command trains GPT-2, except for RMSNorm, no biases, and embeddings scaled by the root of their width. The
vocabulary of 50,257 is padded to a multiple of 128, for faster matrix multiplication on accelerators. Steps of 0.5 M
tokens, 10 B tokens in total, learning rate and warm-up are those of llm.c's reproduction (github.com/karpathy/llm.c,
scripts/run_gpt2_124M.sh).

On four TPU v5e chips, with parameters and optimizer state sharded over them,

    python train.py --config configs/gpt2.py --mesh.fsdp -1 --compile_for v5e:2x2

says that each needs 1.7 of its 16 GiB (2026-11-22), with each batch split into eight microbatches.

Requires the dataset, prepared under data.dir, and GPT-2's tokenizer.json (huggingface.co/openai-community/gpt2) at the
path below.
"""

from nope_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            vocab_size=50_304,
            num_layers=12,
            num_heads=12,
            model_dim=768,
            mlp="plain",
            tie_embeddings=True,
            encoding="nope",
            dtype="bfloat16",
            remat="full",
        ),
        data=DataConfig(
            source="tfds:c4/en", tokenizer="tokenizers/gpt2/tokenizer.json", context_length=1024, batch_size=512
        ),
        optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=700, accumulation=8),
        train=TrainConfig(steps=19_000, log_every=10, checkpoint_every=1000, eval_every=1000, eval_batches=8),
    )
