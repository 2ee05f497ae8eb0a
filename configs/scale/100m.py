"""The scale study at 100 M parameters: the shape of configs/scale/1b.py, narrower, trained on 2.2 B tokens.

    make study SIZE=100m LENGTH=1024

trains it with five encodings at one length, on all GPUs of a host, and evaluates them; docs/pods.md says at what cost.
A single run, and one at another length with as many tokens per step:

    python train.py --config configs/scale/100m.py --workdir runs/100m --model.encoding alibi
    python train.py --config configs/scale/100m.py --workdir runs/100m_512 --data.context_length 512 \\
        --data.batch_size 1024

85 M parameters in the layers and 25 M in an embedding that is also the head: 20 tokens for each. Requires what
configs/scale/1b.py requires.
"""

from pathlib import Path

from nope_jax.config import Config, load_file, override


def get_config() -> Config:
    largest = load_file(Path(__file__).with_name("1b.py"))
    return override(
        largest,
        {
            "model.num_layers": 12,
            "model.num_heads": 12,
            "model.num_kv_heads": None,
            "model.model_dim": 768,
            "model.mlp_dim": None,
            "model.tie_embeddings": True,
            "model.train_length": None,
            "data.context_length": 1024,
            "data.batch_size": 512,
            "optimizer.learning_rate": 6e-4,
            "optimizer.warmup_steps": 400,
            "optimizer.accumulation": 1,
            "train.steps": 4200,
            "mesh.data": -1,
            "mesh.fsdp": 1,
        },
    )
