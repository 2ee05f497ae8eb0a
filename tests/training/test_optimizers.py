"""Optimizers and schedules: what each does to which parameters, and that the defaults are what they were."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nope_jax import Decoder
from nope_jax import config as configs
from nope_jax.config import ModelConfig, OptimizerConfig
from nope_jax.config.choices import CHOICES
from nope_jax.training.optimizer import OPTIMIZERS, decays, make_optimizer
from nope_jax.training.schedules import SCHEDULES, learning_rate_schedule

MEMBERS = {"schedule": SCHEDULES}
"""The functions by the field that chooses them."""


@pytest.mark.parametrize("choice", MEMBERS)
def test_the_config_knows_what_there_is_and_its_settings(choice):
    assert configs.wanted(configs.HINTS[f"optimizer.{choice}"]) == f"one of {', '.join(MEMBERS[choice])}"
    for name, member in MEMBERS[choice].items():
        assert inspect.signature(member).parameters.keys() == CHOICES[choice][name].keys(), name


RATES = {
    "cosine": {60: 1.1, 110: 0.2, 1000: 0.2},  # half way down, at the end, and past it
    "linear": {60: 1.1, 85: 0.65, 110: 0.2, 1000: 0.2},
    "constant": {60: 2.0, 110: 2.0, 1000: 2.0},
    "wsd": {60: 2.0, 88: 2.0, 99: 1.1, 110: 0.2, 1000: 0.2},  # the last 22 of 110 steps
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_learning_rate_warms_up_and_then_follows_the_schedule(name):
    rate = learning_rate_schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=10, schedule=name), steps=110)
    expected = {0: 0.2, 4: 1.0, 9: 2.0, 10: 2.0} | RATES[name]
    assert {count: float(rate(count)) for count in expected} == pytest.approx(expected)


def test_settings_of_a_schedule_shape_it():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=0, schedule="wsd", floor=0.0, decay_share=0.5)
    rate = learning_rate_schedule(config, steps=100)
    assert [float(rate(count)) for count in (0, 50, 75, 100)] == pytest.approx([2.0, 2.0, 1.0, 0.0])


def test_the_default_schedule_gives_the_bits_that_it_always_gave():
    @jax.jit
    def before(count):
        count = jnp.asarray(count, jnp.float32)
        warmup = (count + 1) / 50
        cosine = 0.55 + 0.45 * jnp.cos(jnp.pi * jnp.clip((count - 50) / 450, 0, 1))
        return 1e-3 * jnp.minimum(warmup, cosine)

    counts = jnp.arange(520)
    np.testing.assert_array_equal(jax.jit(learning_rate_schedule(OptimizerConfig(), 500))(counts), before(counts))


@pytest.mark.parametrize("encoding", ["nope", "learned", "t5"])
def test_matrices_decay_and_norms_and_encodings_do_not(encoding):
    config = ModelConfig(
        num_layers=2, num_heads=2, model_dim=16, encoding=encoding, tie_embeddings=False, train_length=32
    )
    params = nnx.state(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    decayed = {path[-1] for path, decay in nnx.to_flat_state(decays(params)) if decay.get_value()}
    assert decayed == {"embedding", "query", "key", "value", "out", "gate", "up", "down", "head"}


def test_the_config_knows_the_optimizers_there_are():
    assert configs.wanted(configs.HINTS["optimizer.name"]) == f"one of {', '.join(OPTIMIZERS)}"


def test_muon_orthogonalises_the_matrix_of_each_layer_and_leaves_the_rest_to_adam():
    model = ModelConfig(num_layers=2, num_heads=4, num_kv_heads=2, model_dim=16, mlp_dim=24, encoding="t5")
    params = nnx.state(Decoder(model, rngs=nnx.Rngs(0)))
    draw = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: 1e-3 * draw.normal(size=x.shape).astype(np.float32), params)
    found = {}
    for name in "muon", "adamw":
        config = OptimizerConfig(name, learning_rate=0.5, warmup_steps=1, weight_decay=0.1)
        optimizer = make_optimizer(config, 10)
        updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
        found[name] = dict(nnx.to_flat_state(jax.tree.map(lambda u, p: u / 0.5 + 0.1 * p, updates, params)))
    for path, update in found["muon"].items():
        if path[0] != "blocks" or path[-1] not in ("query", "key", "value", "out", "gate", "up", "down"):
            # Adam's first step is the gradient's sign; Nesterov's momentum makes it longer.
            assert np.corrcoef(np.ravel(update.get_value()), np.ravel(found["adamw"][path].get_value()))[0, 1] > 0.999
            continue
        for matrix in update.get_value():
            rows = 16 if path[-1] != "down" else 24
            matrix = matrix.reshape(-1, 16) if path[-1] == "out" else matrix.reshape(rows, -1)
            singular = np.linalg.svd(matrix, compute_uv=False) / (0.2 * max(matrix.shape) ** 0.5)
            # Newton and Schulz's iteration brings all of them to about 1, within what Jordan's coefficients allow.
            assert singular.min() > 0.5 and singular.max() < 1.3, path
