"""Randomized positions: what is drawn, that all inside are told the same, and training, evaluation and decoding."""

import collections
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nope_jax.attention import rope_attention
from nope_jax.encodings import (
    Encoding,
    Hierarchical,
    Learned,
    ModelDims,
    Randomized,
    RoPE,
    TokenInputs,
    randomized_positions,
    resolve,
)
from tests.support.attention_cases import assert_close, random
from tests.support.drawn_model import small_model

SIZES = ModelDims(num_heads=2, head_dim=4, model_dim=8, train_length=10, vocab_size=16)
IDS = np.random.default_rng(0).integers(0, 16, (2, 10))


def model(encoding, num_layers=1):
    return small_model(encoding=encoding, num_layers=num_layers, train_length=10)


# --- The sample


@pytest.mark.parametrize(("length", "maximum"), [(0, 3), (1, 1), (1, 50), (7, 7), (20, 64), (500, 2048)])
def test_a_sample_ascends_without_repetition_below_maximum(length, maximum):
    draw = jax.jit(randomized_positions, static_argnums=(1, 2))
    for seed in range(3):
        sample = np.asarray(draw(jax.random.key(seed), length, maximum))
        assert sample.shape == (length,) and np.issubdtype(sample.dtype, np.integer)
        assert (np.diff(sample) > 0).all() and ((sample >= 0) & (sample < maximum)).all()


def test_every_set_of_positions_is_as_likely_as_any_other():
    draws, (length, maximum) = 6000, (2, 6)
    keys = jax.random.split(jax.random.key(0), draws)
    samples = np.asarray(jax.vmap(lambda key: randomized_positions(key, length, maximum))(keys))
    counts = collections.Counter(map(tuple, samples.tolist()))
    sets = list(itertools.combinations(range(maximum), length))
    expected = draws / len(sets)
    chi_squared = sum((counts[s] - expected) ** 2 / expected for s in sets)
    assert set(counts) <= set(sets)
    assert chi_squared < 36.1  # 14 degrees of freedom: one fair draw in a thousand is above


def test_a_longer_sample_than_there_are_positions_is_refused():
    with pytest.raises(ValueError, match=r"\Alength .*\b8\b.*\b9\b.*\Z"):
        randomized_positions(jax.random.key(0), 9, 8)


# --- The encoding


def test_positions_are_the_samples_and_the_same_ones_without_a_key():
    encoding, key = Randomized(maximum=64), jax.random.key(5)
    positions = jnp.array([[0, 1, 2, 9], [3, 3, 4, 8]])
    for draw in (key, None):
        sample = randomized_positions(jax.random.key(0) if draw is None else draw, 10, 64)
        told = encoding.positions(positions, 10, draw)
        np.testing.assert_array_equal(told, sample[positions])
        np.testing.assert_array_equal(encoding.positions(positions, 10, draw), told)
    assert not np.array_equal(encoding.positions(positions, 10, key), encoding.positions(positions, 10, None))
    np.testing.assert_array_equal(Randomized(maximum=10).positions(positions, 10, key), positions)


def test_positions_outside_of_the_sample_keep_their_order_and_are_in_no_table():
    told = np.asarray(Randomized(maximum=20).positions(jnp.arange(-3, 9)[None], 5, jax.random.key(1)))[0]
    assert (np.diff(told) > 0).all()
    np.testing.assert_array_equal(told < 0, np.arange(-3, 9) < 0)
    np.testing.assert_array_equal(told >= 20, np.arange(-3, 9) >= 5)


def test_what_is_inside_is_told_of_maximum():
    @dataclasses.dataclass(frozen=True)
    class Spy(Encoding):
        dims: ModelDims | None = None

        def bind(self, dims):
            return dataclasses.replace(self, dims=dims)

        def positions(self, positions, length, key):
            return (positions, length, key)

        def input(self, params, embeddings, tokens):
            return tokens

    encoding = Randomized(Spy(), maximum=30).bind(SIZES)
    assert encoding.encoding.dims == dataclasses.replace(SIZES, train_length=30)
    key = jax.random.key(0)
    assert encoding.positions(jnp.arange(4)[None], 4, key)[1:] == (30, key)
    seen = TokenInputs(jnp.zeros((1, 4), int), jnp.arange(4)[None], None, 4)
    assert encoding.input({}, jnp.zeros((1, 4, 8)), seen) == seen._replace(length=30)


def test_tables_inside_reach_maximum():
    encoding = resolve("randomized:learned")[0].bind(SIZES)
    assert encoding == Randomized(Learned()) and encoding.max_length(SIZES) == 2048 and encoding.unwrapped == encoding
    assert encoding.init_shared(jax.random.key(0), SIZES)["positions"].shape == (2048, 8)
    assert Randomized(Hierarchical(8), maximum=64).max_length(SIZES) == 64


def test_the_default_is_rope_at_the_papers_maximum():
    assert Randomized() == Randomized(RoPE(), maximum=2048) and resolve("randomized") == (Randomized(),)


def test_what_cannot_work_is_refused_by_name():
    for make in (
        lambda: Randomized(maximum=0),
        lambda: Randomized(Learned(100)).max_length(SIZES),
    ):
        with pytest.raises(ValueError, match=r"\Amaximum .*\Z"):
            make()
    with pytest.raises(ValueError, match=r"\Aencoding .*\Z"):
        Randomized("rope")
    with pytest.raises(ValueError, match=r"\Alength .*\b12\b.*\b13\b.*\Z"):
        Randomized(maximum=12).positions(jnp.arange(13)[None], 13, None)


# --- In a decoder


def test_a_decoder_sees_the_sample_as_if_it_were_given_those_positions():
    """At the input and in the layers."""
    # The plain model's table is as long as the randomized one's, and drawn from the same key.
    randomized = model((Randomized(Learned(), maximum=40), Randomized(RoPE(), maximum=40)), num_layers=2)
    plain = model((Learned(length=40), RoPE()), num_layers=2)
    for key in (None, jax.random.key(3)):
        sample = randomized_positions(jax.random.key(0) if key is None else key, 10, 40)
        assert_close(randomized(IDS, key=key), plain(IDS, positions=sample), tolerance=1e-6)


def test_keys_change_the_answer_of_a_decoder_and_their_absence_does_not():
    randomized = model(Randomized(maximum=40))
    evaluated = randomized(IDS)
    np.testing.assert_array_equal(randomized(IDS), evaluated)
    assert not np.allclose(randomized(IDS, key=jax.random.key(1)), randomized(IDS, key=jax.random.key(2)), atol=1e-4)


def test_the_tables_of_a_randomized_decoder_are_trained():
    randomized = model(Randomized(Learned(), maximum=40))
    graph, state = nnx.split(randomized)

    @jax.jit
    @jax.grad
    def gradient_of(state):
        return (nnx.merge(graph, state)(IDS, key=jax.random.key(4)) ** 2).mean()

    gradient = gradient_of(state)
    table = np.asarray(gradient["positions"][0]["positions"][...])
    used = np.zeros(40, bool)
    used[np.asarray(randomized_positions(jax.random.key(4), 10, 40))] = True
    np.testing.assert_array_equal(np.abs(table).sum(-1) > 0, used)


def test_a_decoder_refuses_more_tokens_than_maximum():
    randomized = model(Randomized(maximum=12))
    assert randomized.max_length == 12 and np.isfinite(randomized(np.zeros((1, 12), int))).all()
    with pytest.raises(ValueError, match=r"\A.*\b12\b.*\Z"):
        randomized(np.zeros((1, 13), int))


def test_samples_serve_as_positions_of_any_attention_function():
    arrays = [random(1, 6, 2, 8, seed=seed) for seed in range(3)]

    @jax.jit
    def outputs(*arrays):
        at = randomized_positions(jax.random.key(0), 6, 50)
        moved = [rope_attention(*arrays, query_positions=x, key_positions=x) for x in (at, at + 7)]
        return *moved, rope_attention(*arrays)

    turned, shifted, plain = outputs(*arrays)
    assert_close(turned, shifted)
    assert not np.allclose(turned, plain, atol=1e-3)
