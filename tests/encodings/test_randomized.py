"""Randomized positions: what is drawn, that all inside are told the same, and training, evaluation and decoding."""

import collections
import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

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


sampled = jax.jit(randomized_positions, static_argnums=(1, 2))


@pytest.mark.parametrize(("length", "maximum"), [(0, 3), (1, 1), (1, 50), (7, 7), (20, 64), (500, 2048)])
def test_a_sample_ascends_without_repetition_below_maximum(length, maximum):
    for seed in range(3):
        sample = np.asarray(sampled(jax.random.key(seed), length, maximum))
        assert sample.shape == (length,) and np.issubdtype(sample.dtype, np.integer)
        assert (np.diff(sample) > 0).all() and ((sample >= 0) & (sample < maximum)).all()


def test_every_set_of_positions_is_as_likely_as_any_other():
    draws, (length, maximum) = 6000, (2, 6)

    @jax.jit
    def drawn(key):
        return jax.vmap(lambda key: randomized_positions(key, length, maximum))(jax.random.split(key, draws))

    samples = np.asarray(drawn(jax.random.key(0)))
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
    encoding, positions = Randomized(maximum=64), np.array([[0, 1, 2, 9], [3, 3, 4, 8]])

    @jax.jit
    def told(key):
        samples = [randomized_positions(draw, 10, 64) for draw in (key, jax.random.key(0))]
        twice = [[encoding.positions(positions, 10, draw) for _ in range(2)] for draw in (key, None)]
        return samples, twice, Randomized(maximum=10).positions(positions, 10, key)

    samples, twice, all_there_are = told(jax.random.key(5))
    for sample, (once, again) in zip(samples, twice, strict=True):
        np.testing.assert_array_equal(once, np.asarray(sample)[positions])
        np.testing.assert_array_equal(again, once)
    assert not np.array_equal(twice[0], twice[1])
    np.testing.assert_array_equal(all_there_are, positions)


def test_positions_outside_of_the_sample_keep_their_order_and_are_in_no_table():
    encoding, positions = Randomized(maximum=20), np.arange(-3, 9)[None]
    told = np.asarray(jax.jit(lambda key: encoding.positions(positions, 5, key))(jax.random.key(1)))[0]
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
    at = np.arange(4)[None]

    def told(key):
        _, length, same = encoding.positions(at, 4, key)
        assert length == 30 and same is key

    jax.eval_shape(told, jax.random.key(0))
    seen = TokenInputs(np.zeros((1, 4), int), at, None, 4)
    assert encoding.input({}, np.zeros((1, 4, 8), np.float32), seen) == seen._replace(length=30)


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
        Randomized(maximum=12).positions(np.arange(13)[None], 13, None)


# --- In a decoder


@functools.cache
def randomized_decoder():
    """At the input and in the layers."""
    return model((Randomized(Learned(), maximum=40), Randomized(RoPE(), maximum=40)), num_layers=2)


def test_a_decoder_sees_the_sample_as_if_it_were_given_those_positions():
    # The plain model's table is as long as the randomized one's, and drawn from the same key.
    plain = model((Learned(length=40), RoPE()), num_layers=2)
    for key in (None, jax.random.key(3)):
        sample = sampled(jax.random.key(0) if key is None else key, 10, 40)
        assert_close(randomized_decoder()(IDS, key=key), plain(IDS, positions=sample), tolerance=1e-6)


def test_keys_change_the_answer_of_a_decoder_and_their_absence_does_not():
    evaluated, again = (randomized_decoder()(IDS) for _ in range(2))
    np.testing.assert_array_equal(again, evaluated)
    one, other = (randomized_decoder()(IDS, key=jax.random.key(seed)) for seed in (1, 2))
    assert not np.allclose(one, other, atol=1e-4)


def test_the_rows_of_a_table_that_were_drawn_are_trained():
    encoding, key, weights = Randomized(Learned(), maximum=40), jax.random.key(4), random(2, 10, 8)

    @jax.jit
    @jax.grad
    def gradient_of(params):
        at = encoding.positions(np.arange(10)[None], 10, key)
        out = encoding.input(params, np.zeros((2, 10, 8), np.float32), TokenInputs(IDS, at, None, 10))
        return (out * weights).sum()

    gradient = gradient_of({"positions": random(40, 8)})["positions"]
    used = np.zeros(40, bool)
    used[np.asarray(sampled(key, 10, 40))] = True
    np.testing.assert_array_equal(np.abs(gradient).sum(-1) > 0, used)


def test_a_decoder_refuses_more_tokens_than_maximum():
    randomized = model(Randomized(maximum=12))
    assert randomized.max_length == 12
    randomized.check_tokens(np.zeros((1, 12), int))
    with pytest.raises(ValueError, match=r"\A.*\b12\b.*\Z"):
        randomized(np.zeros((1, 13), int))


def test_samples_serve_as_positions_of_any_attention_function():
    arrays = [random(1, 6, 2, 8, seed=seed) for seed in range(3)]
    attend = functools.partial(rope_attention, implementation="reference")

    @jax.jit
    def outputs(*arrays):
        at = randomized_positions(jax.random.key(0), 6, 50)
        moved = [attend(*arrays, query_positions=x, key_positions=x) for x in (at, at + 7)]
        return *moved, attend(*arrays)

    turned, shifted, plain = outputs(*arrays)
    assert_close(turned, shifted)
    assert not np.allclose(turned, plain, atol=1e-3)
