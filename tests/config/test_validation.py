"""What a config refuses, and what it fills in."""

import pytest

from nope_jax.config import (
    Config,
    DataConfig,
    ModelConfig,
    override,
)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"model.num_layers": 0}, "model.num_layers must be at least 1, not 0"),
        ({"model.num_heads": 4.0}, "model.num_heads must be an integer, not 4.0"),
        ({"model.num_heads": True}, "model.num_heads must be an integer, not True"),
        ({"model.num_kv_heads": 3}, "model.num_kv_heads 3 must divide model.num_heads 4"),
        ({"model.num_heads": 3}, "model.num_heads 3 must divide model.model_dim 128"),
        ({"model.dtype": "float16"}, "model.dtype must be one of float32, bfloat16, not 'float16'"),
        (
            {"model.attention": "fused"},
            "model.attention must be one of reference, streaming, pallas_tpu, splash, cudnn, pallas_gpu or several or "
            "None, not 'fused'",
        ),
        ({"model.encoding": "rop"}, "model.encoding: unknown encoding 'rop': did you mean 'rope'?"),
        ({"model.encoding": ("rope", "nop")}, "model.encoding: unknown encoding 'nop'"),
        ({"model.encoding": ()}, "model.encoding: .*non-empty"),
        ({"model.encoding": ["rope"]}, "model.encoding must be a name, an Encoding, or a tuple of them, not .'rope'."),
        ({"data.context_length": -1}, "data.context_length must be at least 1, not -1"),
        ({"data.seed": -1}, "data.seed must be at least 0, not -1"),
        ({"optimizer.learning_rate": 0.0}, "optimizer.learning_rate must be greater than 0, not 0.0"),
        ({"optimizer.learning_rate": float("nan")}, "optimizer.learning_rate must be greater than 0, not nan"),
        ({"optimizer.b2": 1.0}, "optimizer.b2 must be at least 0 and less than 1, not 1.0"),
        ({"optimizer.schedule": "step"}, "optimizer.schedule must be one of cosine, linear, constant, wsd, not 'step'"),
        ({"optimizer.floor": 1.5}, "optimizer.floor must be from 0 to 1, a fraction of the peak, not 1.5"),
        (
            {"optimizer.decay_share": 0.0, "optimizer.schedule": "wsd"},
            "optimizer.decay_share must be greater than 0 and at most 1, not 0.0",
        ),
        ({"optimizer.decay_share": 0.1}, "decay_share is a setting of optimizer.schedule wsd, not of cosine"),
        (
            {"optimizer.floor": 0.1, "optimizer.schedule": "constant"},
            "optimizer.floor is a setting of optimizer.schedule cosine, linear, wsd, not of constant",
        ),
        (
            {"optimizer.name": "adafactor", "optimizer.b2": 0.9},
            "optimizer.b2 is a setting of optimizer.name adamw, lion, muon, not of adafactor",
        ),
        ({"optimizer.momentum": 0.9}, "optimizer.momentum is a setting of optimizer.name muon, not of adamw"),
        ({"optimizer.eps": 0.0}, "optimizer.eps must be greater than 0, not 0.0"),
        ({"train.ema": 1.0}, "train.ema must be at least 0 and less than 1, not 1.0"),
        ({"train.keep": 0}, "train.keep must be at least 1, not 0"),
        ({"train.keep_every": 300}, "train.keep_every must be a multiple of train.checkpoint_every 250, not 300"),
        ({"train.keep_best": 1, "train.eval_every": 100}, "train.eval_every 100 must be a multiple of .*every 250, or"),
        ({"train.init_step": "best"}, "train.init_step best needs train.init_from"),
        ({"train.init_step": "last"}, "train.init_step must be an integer or one of newest, best, not 'last'"),
        ({"optimizer.weight_decay": -0.1}, "optimizer.weight_decay must be at least 0, not -0.1"),
        ({"optimizer.accumulation": 3}, "optimizer.accumulation 3 must divide data.batch_size 32"),
        ({"eval.stride": 0}, "eval.stride must be at least 1, not 0"),
        ({"mesh.fsdp": 0}, "mesh.fsdp must be at least 1, or -1 for what the other axes leave, not 0"),
        ({"mesh.fsdp": -1, "mesh.tensor": -1}, "mesh: at most one axis may be -1, not fsdp, tensor"),
        ({"model.widht": 3}, "unknown field model.widht: did you mean model."),
    ],
)
def test_config_refuses(overrides, complaint):
    with pytest.raises(ValueError, match=complaint):
        override(Config(), overrides)


def test_train_length_is_the_context_length_unless_given():
    assert Config(data=DataConfig(context_length=99)).model.train_length == 99
    assert Config(model=ModelConfig(train_length=7), data=DataConfig(context_length=99)).model.train_length == 7
