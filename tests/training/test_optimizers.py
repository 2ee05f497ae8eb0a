"""Optimizers and schedules: what each does to which parameters, and that the defaults are what they were."""

import functools
import inspect
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from nope_jax import config as configs
from nope_jax.config import ModelConfig, OptimizerConfig
from nope_jax.config.choices import CHOICES
from nope_jax.data import Batch
from nope_jax.models import Decoder, abstract_decoder, decoder
from nope_jax.training.adafactor import matrix_axes
from nope_jax.training.optimizer import OPTIMIZERS, make_optimizer, matrices
from nope_jax.training.schedules import SCHEDULES, learning_rate_schedule
from nope_jax.training.state import TrainState, no_skips
from nope_jax.training.step import seeded_step
from tests.support.drawn_model import drawn_model

MEMBERS = {"name": OPTIMIZERS, "schedule": SCHEDULES}
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
    params = nnx.state(abstract_decoder(config))
    decayed = {path[-1] for path, decay in nnx.to_flat_state(matrices(params)) if decay.get_value()}
    assert decayed == {"embedding", "query", "key", "value", "out", "gate", "up", "down", "head"}


def first_update(optimizer: optax.GradientTransformation, gradient: nnx.State, params: nnx.State) -> nnx.State:
    """In NumPy."""
    update = jax.jit(lambda gradient, params: optimizer.update(gradient, optimizer.init(params), params)[0])
    return jax.tree.map(np.asarray, update(gradient, params))


def test_muon_orthogonalises_the_matrix_of_each_layer_and_leaves_the_rest_to_adam():
    model = ModelConfig(num_layers=2, num_heads=4, num_kv_heads=2, model_dim=16, mlp_dim=24, encoding="t5")
    params = nnx.state(drawn_model(model))
    draw = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: 1e-3 * draw.normal(size=x.shape).astype(np.float32), params)
    found = {}
    for name in "muon", "adamw":
        config = OptimizerConfig(name, learning_rate=0.5, warmup_steps=1, weight_decay=0.1)
        updates = first_update(make_optimizer(config, 10), grads, params)
        found[name] = dict(nnx.to_flat_state(jax.tree.map(lambda u, p: u / 0.5 + 0.1 * np.asarray(p), updates, params)))
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


@functools.cache
def parameters() -> nnx.State:
    sizes = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "model_dim": 16, "mlp_dim": 24, "vocab_size": 32}
    return nnx.state(drawn_model(ModelConfig(**sizes, encoding="t5")))


def gradients(params: nnx.State, steps: int) -> list[nnx.State]:
    draw = np.random.default_rng(0)
    return [jax.tree.map(lambda x: draw.normal(size=x.shape).astype(np.float32), params) for _ in range(steps)]


def test_adafactor_treats_the_matrix_of_each_layer_as_optax_treats_a_matrix():
    params = parameters()
    config = OptimizerConfig("adafactor", learning_rate=1.0, warmup_steps=0, weight_decay=0.0, clip_norm=1e9)
    optimizer = make_optimizer(config, 10**9)
    oracle = optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=1), optax.clip_by_block_rms(1.0), optax.scale(-1.0)
    )
    axes = {path: matrix_axes(variable) for path, variable in nnx.to_flat_state(params)}

    def apart(tree: nnx.State) -> dict:
        """Each layer's matrix as a matrix, and the rest as it is."""
        found = {}
        for path, variable in nnx.to_flat_state(tree):
            array = variable.get_value()
            if axes[path] is None:
                found[path] = array.reshape(-1)  # which optax does not factor
                continue
            size = math.prod(array.shape[axis] for axis in axes[path][0])
            for layer, matrix in enumerate(array if "blocks" in path else array[None]):
                found[*path, layer] = matrix.reshape(size, -1)
        return found

    state, expected_state = jax.jit(optimizer.init)(params), jax.jit(oracle.init)(apart(params))
    update, expected_update = jax.jit(optimizer.update), jax.jit(oracle.update)
    for gradient in gradients(params, 3):
        updates, state = update(gradient, state, params)
        expected, expected_state = expected_update(apart(gradient), expected_state, apart(params))
        chex.assert_trees_all_close(apart(updates), expected, rtol=1e-4, atol=1e-6)
    # Two vectors for a matrix: the state is that of the norms and the encoding, and little more.
    in_matrices = sum(array.size for path, array in apart(params).items() if axes.get(path[:-1]))
    assert sum(array.size for array in jax.tree.leaves(state)) < 0.2 * in_matrices


def test_lion_takes_the_sign_of_its_momentum():
    params = parameters()
    config = OptimizerConfig("lion", learning_rate=0.5, warmup_steps=0, weight_decay=0.0)
    optimizer = make_optimizer(config, 10**9)
    [gradient] = gradients(params, 1)
    updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, -0.5 * np.sign(g), rtol=1e-6), updates, gradient)


@functools.cache
def third_update(name: str, **settings: float) -> list[np.ndarray]:
    matrix, scale = nnx.Param(jnp.ones((1, 8, 6)), axes=("layers", "embed", "mlp")), nnx.Param(jnp.ones(8))
    params = nnx.State({"query": matrix, "norm": scale})
    optimizer = make_optimizer(OptimizerConfig(name, warmup_steps=0, learning_rate=1.0, **settings), 10)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for gradient in gradients(params, 3):
        updates, state = update(gradient, state, params)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(updates)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_setting_changes_what_its_optimizer_does(name):
    for setting, default in CHOICES["name"][name].items():
        other = {"b1": 0.999, "eps": 1.0}.get(setting, default / 2)
        changed = third_update(name, **{setting: other})
        assert any((x != y).any() for x, y in zip(changed, third_update(name), strict=True)), setting
    for x, y in zip(third_update(name, **CHOICES["name"][name]), third_update(name), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("decay", ["matrices", "no_embedding", "all"])
def test_weight_decay_is_of_what_optimizer_decay_says(decay):
    params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), parameters())
    config = OptimizerConfig("lion", learning_rate=1.0, warmup_steps=0, weight_decay=0.25, decay=decay)
    optimizer = make_optimizer(config, 10**9)
    updates = first_update(optimizer, jax.tree.map(np.zeros_like, params), params)
    decayed = {str(path[-1]) for path, update in nnx.to_flat_state(updates) if np.any(update.get_value())}
    assert all((update.get_value() == -0.25).all() for _, update in nnx.to_flat_state(updates) if np.any(update[...]))
    hidden = {"query", "key", "value", "out", "gate", "up", "down"}
    others = {str(path[-1]) for path, _ in nnx.to_flat_state(params)}
    expected = {"matrices": {"embedding", "head", *hidden}, "no_embedding": {"head", *hidden}, "all": others}
    assert decayed == expected[decay]


MODEL = ModelConfig(num_layers=1, num_heads=2, model_dim=8, mlp_dim=8, vocab_size=32)
TOKENS = np.random.default_rng(0).integers(0, 32, (4, 9), np.int32)
MASK = np.arange(8) % 3 > 0
BATCH = Batch(TOKENS[:, :-1], TOKENS[:, 1:], loss_mask=np.broadcast_to(MASK, (4, 8)))


@pytest.fixture(scope="module", params=[64, pytest.param(2**26, marks=pytest.mark.slow)])
def descent(request) -> tuple[nnx.GraphDef[Decoder], TrainState, jax.stages.Compiled]:
    """A decoder, its first state, and a step against the gradient, with a z-loss, an average, and bad steps skipped."""
    graphdef, params = nnx.split(drawn_model(MODEL))
    optimizer = optax.scale_by_schedule(lambda count: -1.0)
    state = TrainState(params, optimizer.init(params), no_skips(), params)
    step = seeded_step(graphdef, optimizer, accumulation=2, z_loss=0.5, ema=0.2, skip_bad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "LOGITS_AT_ONCE", request.param)
        return graphdef, state, jax.jit(step).lower(state, BATCH, 0).compile()


def test_the_z_loss_is_in_the_gradient_and_not_in_the_loss(descent):
    def objective(params: nnx.State) -> tuple[jax.Array, jax.Array]:
        logits = nnx.merge(graphdef, params)(BATCH.tokens)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, BATCH.targets)
        return (nll + 0.5 * jax.nn.logsumexp(logits, axis=-1) ** 2)[:, MASK].mean(), nll[:, MASK].mean()

    graphdef, state, step = descent
    after, metrics = step(state, BATCH, 0)
    expected, nll = jax.jit(jax.grad(objective, has_aux=True))(state.params)
    gradient = jax.tree.map(lambda old, new: np.asarray(old) - np.asarray(new), state.params, after.params)
    chex.assert_trees_all_close(gradient, expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(metrics["loss"], nll, rtol=1e-6)


def test_the_average_of_the_weights_follows_them(descent):
    _, state, step = descent
    expected = jax.tree.map(np.asarray, state.params)
    for decay in (2 / 11, 0.2, 0.2):  # (1 + n) / (10 + n) after one update, then more than 0.2
        state, _ = step(state, BATCH, 0)
        new = jax.tree.map(np.asarray, state.params)
        expected = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, expected, new)  # noqa: B023
    chex.assert_trees_all_close(state.ema, expected, rtol=1e-5, atol=1e-6)
    bad, metrics = step(state, BATCH._replace(tokens=np.full_like(BATCH.tokens, 99)), 0)
    assert metrics["skipped_in_a_row"] == 1
    chex.assert_trees_all_equal(bad.ema, state.ema)
