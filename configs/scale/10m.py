"""The scale study at 10 M parameters: the shape of configs/scale/100m.py, half as wide and deep, on 0.46 B tokens.

    make study SIZE=10m LENGTH=512

trains it with five encodings at one length, and evaluates them; docs/pods.md says at what cost. One GPU is enough.
A single run, and one at another length with as many tokens per step:

    python train.py --config configs/scale/10m.py --workdir runs/10m --model.encoding alibi
    python train.py --config configs/scale/10m.py --workdir runs/10m_512 --data.context_length 512 --data.batch_size 256

10.6 M parameters in the layers and 12.3 M in an embedding that is also the head: 20 tokens for each. Requires what
configs/scale/1b.py requires.
"""

from pathlib import Path

from nope_jax.config import Config, load_file, override


def get_config() -> Config:
    wider = load_file(Path(__file__).with_name("100m.py"))
    return override(
        wider,
        {
            "model.num_layers": 6,
            "model.num_heads": 6,
            "model.model_dim": 384,
            "data.batch_size": 128,
            "optimizer.learning_rate": 1e-3,
            "optimizer.warmup_steps": 200,
            "train.steps": 3500,
        },
    )
