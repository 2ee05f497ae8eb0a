"""The functions encodings are made of, held to Hugging Face's, to the papers' printed numbers and to float64 NumPy."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nope_jax import encodings
from nope_jax.encodings import (
    AttentionSpan,
    NoPE,
    TokenInputs,
    alibi_slopes,
    apply_rope,
    rope_frequencies,
    sinusoidal_positions,
    t5_bucket,
)
from tests.support import oracles
from tests.support.drawn_model import small_model

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "huggingface.json").read_text())
POSITIONS = np.array(GOLDEN["positions"])
ROPE_SETTINGS = [
    {},
    {"interleaved": True},
    {"rotary_dim": 4},
    {"rotary_dim": 6, "interleaved": True, "base": 100.0},
]

# Entries are of order 1 and pass through a few float32 roundings (2⁻²⁴ each), angles of up to 63 rad included.
close = {"rtol": 1e-5, "atol": 1e-5}


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


turn = jax.jit(apply_rope, static_argnames=("base", "rotary_dim", "interleaved", "scaling"))


def turned(x, positions, **settings):
    """By one program: outside jit each operation is compiled by itself."""
    return np.asarray(turn(x, positions, **settings))


def rope_settings(golden):
    return {name: golden[name] for name in ("base", "rotary_dim", "interleaved")}


# --- RoPE


@pytest.mark.parametrize("model", ["llama", "gptj", "gpt_neox"])
def test_rope_turns_as_published_models_do(model):
    golden = GOLDEN["rope"][model]
    out = turned(np.array(GOLDEN["rope"]["x"], np.float32), POSITIONS, **rope_settings(golden))
    np.testing.assert_allclose(out, golden["out"], **close)


@pytest.mark.parametrize("model", ["llama", "gptj", "gpt_neox"])
def test_rope_oracle_turns_as_published_models_do(model):
    golden = GOLDEN["rope"][model]
    out = oracles.rope(GOLDEN["rope"]["x"], POSITIONS, **rope_settings(golden))
    np.testing.assert_allclose(out, golden["out"], **close)


@pytest.mark.parametrize("settings", ROPE_SETTINGS, ids=str)
def test_rope_agrees_with_float64(settings):
    x = random(2, 5, 3, 8)
    positions = np.array([[0, 1, 2, 3, 4], [7, 0, 50, 50, -3]])
    np.testing.assert_allclose(turned(x, positions, **settings), oracles.rope(x, positions, **settings), **close)


def test_rope_takes_one_row_of_positions_for_the_whole_batch():
    x = random(2, 4, 1, 8)
    positions = np.array([3, 1, 4, 1])
    np.testing.assert_array_equal(turned(x, positions), turned(x, np.stack([positions, positions])))


def test_rope_keeps_its_angles_in_float32_for_bfloat16():
    # In bfloat16 257 rounds to 256, so that two neighbours would turn alike.
    x = random(1, 4, 1, 16).astype(jnp.bfloat16)
    positions = np.array([256, 257, 1000, 1001])
    out = turned(x, positions)
    assert out.dtype == jnp.bfloat16
    expected = oracles.rope(x.astype(np.float64), positions)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=2**-8, atol=1e-3)


def test_rope_error_at_far_positions_is_that_of_a_float32_angle():
    x = random(1, 3, 1, 16)
    positions = np.array([1_000, 30_000, 131_071])
    error = np.abs(turned(x, positions) - oracles.rope(x, positions))
    # The frequency and its product with the position round once each; a pair moves by its norm times the angle's error.
    norms = np.sqrt(x[..., :8] ** 2 + x[..., 8:] ** 2)
    bound = np.concatenate([norms, norms], -1) * (positions[None, :, None, None] * 2**-22 + 1e-6)
    assert (error <= bound).all()


@pytest.mark.parametrize("settings", ROPE_SETTINGS, ids=str)
def test_rope_products_depend_only_on_distance(settings):
    query, key = random(1, 6, 2, 8), random(1, 6, 2, 8, seed=1)

    def product(shift):
        return np.einsum("btnh,bsnh->bnts", *(turned(x, np.arange(6) + shift, **settings) for x in (query, key)))

    np.testing.assert_allclose(product(0), product(40), **close)
    assert not np.allclose(product(0), np.einsum("btnh,bsnh->bnts", query, key), atol=1e-2)


def test_rope_leaves_position_zero_and_the_features_past_rotary_dim_alone():
    x = random(1, 3, 2, 8)
    out = turned(x, np.array([0, 1, 9]), rotary_dim=4)
    np.testing.assert_array_equal(out[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(out[:, 0], x[:, 0])
    assert not np.allclose(out[:, 1:, :, :4], x[:, 1:, :, :4])


def test_rope_frequencies_fall_geometrically_from_one():
    np.testing.assert_allclose(rope_frequencies(16), oracles.rope_frequencies(16), rtol=1e-6)
    np.testing.assert_allclose(rope_frequencies(6, base=500_000.0), oracles.rope_frequencies(6, 500_000.0), rtol=1e-6)


def test_linear_scaling_divides_every_position():
    # Chen et al. 2023: θ' = θ / factor, which turns position factor · p as plain RoPE turns p.
    x = random(1, 4, 1, 8)
    positions = np.array([0, 1, 5, 20])
    scaled = turned(x, 4 * positions, scaling=encodings.LinearScaling(factor=4.0))
    np.testing.assert_allclose(scaled, turned(x, positions), **close)


@pytest.mark.parametrize("rotary_dim", [3, 0, -2, 10])
def test_rope_refuses_a_rotary_dim_that_is_odd_or_does_not_fit(rotary_dim):
    with pytest.raises(ValueError, match=r"\Arotary_dim .*\Z"):
        apply_rope(jnp.ones((1, 2, 1, 8)), np.arange(2), rotary_dim=rotary_dim)


def test_rope_refuses_an_odd_head_and_a_base_that_is_not_positive():
    with pytest.raises(ValueError, match=r"\Arotary_dim .*\Z"):
        apply_rope(jnp.ones((1, 2, 1, 7)), np.arange(2))
    with pytest.raises(ValueError, match=r"\Abase .*\Z"):
        apply_rope(jnp.ones((1, 2, 1, 8)), np.arange(2), base=0.0)
    with pytest.raises(ValueError, match=r"\Adim .*\Z"):
        rope_frequencies(5)


# --- ALiBi


@pytest.mark.parametrize("num_heads", [int(heads) for heads in GOLDEN["alibi_slopes"]])
def test_alibi_slopes_are_those_of_published_models(num_heads):
    golden = GOLDEN["alibi_slopes"][str(num_heads)]
    np.testing.assert_allclose(alibi_slopes(num_heads), golden, rtol=1e-6)
    np.testing.assert_allclose(oracles.alibi_slopes(num_heads), golden, rtol=1e-6)


def test_alibi_slopes_are_those_printed_in_the_paper():
    # Press et al. 2022, section 3: 1/2¹ .. 1/2⁸ for 8 heads, 1/2^0.5, 1/2¹, 1/2^1.5 .. 1/2⁸ for 16.
    np.testing.assert_array_equal(alibi_slopes(8), [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256])
    np.testing.assert_allclose(alibi_slopes(16), [2 ** -(h / 2) for h in range(1, 17)], rtol=1e-6)


def test_alibi_slopes_refuse_no_heads():
    with pytest.raises(ValueError, match=r"\Anum_heads .*\Z"):
        alibi_slopes(0)


# --- T5


@pytest.mark.parametrize("golden", GOLDEN["t5_bucket"], ids=lambda x: f"{x['bidirectional']}-{x['num_buckets']}")
def test_t5_buckets_are_those_of_the_published_model(golden):
    settings = {name: golden[name] for name in ("bidirectional", "num_buckets", "max_distance")}
    relative = np.array(GOLDEN["relative"])
    bucket = jax.jit(lambda relative: t5_bucket(relative, **settings))(relative)
    assert jnp.issubdtype(bucket.dtype, jnp.integer)
    np.testing.assert_array_equal(bucket, golden["buckets"])
    np.testing.assert_array_equal(oracles.t5_bucket(relative, **settings), golden["buckets"])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("num_buckets", "times"), [(4, 2), (8, 16), (12, 10), (32, 8), (32, 16)])
def test_t5_buckets_are_exact_at_their_edges_for_any_sizes(num_buckets, times, bidirectional):
    # A maximum distance that is a power of two times the exact buckets puts edges on integers, where rounding shows.
    max_distance = times * num_buckets // (4 if bidirectional else 2)
    settings = {"bidirectional": bidirectional, "num_buckets": num_buckets, "max_distance": max_distance}
    relative = np.arange(-max_distance - 3, max_distance + 4)
    bucket = jax.jit(lambda relative: t5_bucket(relative, **settings))(relative)
    np.testing.assert_array_equal(bucket, oracles.t5_bucket(relative, **settings))


def test_a_t5_decoder_has_sixteen_exact_buckets_and_sends_the_future_to_the_present():
    relative = np.array([5, 1, 0, -1, -15, -16, -18, -19, -128, -10_000])
    bucket = jax.jit(lambda relative: t5_bucket(relative, bidirectional=False))(relative)
    np.testing.assert_array_equal(bucket, [0, 0, 0, 1, 15, 16, 16, 17, 31, 31])


def test_bidirectional_t5_has_eight_exact_buckets_a_side_and_tells_the_sides_apart():
    relative = np.array([-1, 1, -7, 7, -8, 8, -12, -128, 128, 10_000])
    bucket = jax.jit(lambda relative: t5_bucket(relative, bidirectional=True))(relative)
    np.testing.assert_array_equal(bucket, [1, 17, 7, 23, 8, 24, 9, 15, 31, 31])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("num_buckets", {"bidirectional": False, "num_buckets": 0}),
        ("num_buckets", {"bidirectional": True, "num_buckets": 2}),
        ("max_distance", {"bidirectional": False, "max_distance": 16}),
    ],
)
def test_t5_refuses_sizes_without_room_for_both_kinds_of_bucket(name, settings):
    with pytest.raises(ValueError, match=rf"\A{name} .*\Z"):
        t5_bucket(jnp.arange(3), **settings)


# --- Absolute positions


@pytest.mark.parametrize("layout", ["interleaved", "halves"])
def test_sinusoids_are_those_of_published_models_in_both_layouts(layout):
    golden = GOLDEN["sinusoidal"][layout]
    out = jax.jit(lambda positions: sinusoidal_positions(positions, 8, layout=layout))(POSITIONS)
    np.testing.assert_allclose(out, golden, **close)
    np.testing.assert_allclose(oracles.sinusoidal(POSITIONS, 8, halves=layout == "halves"), golden, **close)


@pytest.mark.parametrize("layout", ["interleaved", "halves"])
def test_sinusoids_agree_with_float64(layout):
    positions = np.array([[0, 1, 2], [99, 3, 64]])
    out = jax.jit(lambda positions: sinusoidal_positions(positions, 10, layout=layout))(positions)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, oracles.sinusoidal(positions, 10, halves=layout == "halves"), **close)


def test_sinusoids_alternate_by_default_as_in_the_paper():
    out = jax.jit(lambda positions: sinusoidal_positions(positions, 6))(np.array([0]))
    np.testing.assert_allclose(out, [[0, 1, 0, 1, 0, 1]])


def test_sinusoids_refuse_odd_widths_and_other_layouts():
    with pytest.raises(ValueError, match=r"\Afeatures .*\Z"):
        sinusoidal_positions(jnp.arange(3), 5)
    with pytest.raises(ValueError, match=r"\Alayout .*\Z"):
        sinusoidal_positions(jnp.arange(3), 4, layout="thirds")


def learned(positions, embeddings):
    """Of a table of four rows, which are 0 to 5, 6 to 11 and so on."""

    def run(table, embeddings, positions):
        return encodings.Learned(4).input({"positions": table}, embeddings, TokenInputs(None, positions, None, 4))

    table = np.arange(24, dtype=np.float32).reshape(4, 6)
    return np.asarray(jax.jit(run)(table, embeddings, positions))


def test_a_learned_table_adds_its_rows():
    embeddings, positions = random(2, 3, 6), np.array([[0, 3, 1], [2, 2, 0]])
    added = (6 * positions[..., None] + np.arange(6)).astype(np.float32)
    np.testing.assert_array_equal(learned(positions, embeddings), embeddings + added)


@pytest.mark.parametrize("positions", [[[0, 1, 4]], [[0, -1, 2]]])
def test_a_learned_table_never_answers_for_a_position_it_does_not_have(positions):
    # Under jit nothing can be raised; what must not happen is a clipped or wrapped row.
    out, positions = learned(np.array(positions), np.zeros((1, 3, 6), np.float32)), np.array(positions)
    missing = (positions < 0) | (positions > 3)
    assert np.isnan(out[missing]).all() and np.isfinite(out[~missing]).all()


def test_a_decoder_with_a_learned_table_refuses_to_go_past_it():
    model = small_model(encoding="learned", train_length=8)
    assert model.max_length == 8
    with pytest.raises(ValueError, match=r"\A.*\b8\b.*\Z"):
        model(np.zeros((1, 9), int))
    with pytest.raises(ValueError, match=r"\A.*\b8\b.*\Z"):
        model(np.zeros((1, 2), int), positions=np.array([7, 8]))


# --- The registry


def test_the_registry_holds_the_promised_names_as_frozen_hashable_settings():
    assert {"nope", "learned", "sinusoidal", "rope", "alibi", "t5"} <= set(encodings.ENCODINGS)
    for make in encodings.ENCODINGS.values():
        encoding = make()
        assert encoding == make() and hash(encoding) == hash(make())
        field = next(iter(dataclasses.fields(encoding)), None)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(encoding, field.name if field else "anything", 1)


# --- Former names


def test_an_encoding_written_with_former_names_means_what_it_meant():
    with pytest.warns(DeprecationWarning, match="Reach is now called AttentionSpan"):
        from nope_jax.encodings import Reach
    with pytest.warns(DeprecationWarning) as warned:

        class Before(NoPE):
            def temperature(self, params, query_positions, key_positions):
                return 2.0

            def reach(self):
                return Reach(window=3)

    told = {str(warning.message) for warning in warned}
    assert told == {"Before.temperature is now called logit_scale", "Before.reach is now called span"}

    class Mixin:
        def reach(self):
            return Reach(window=5)

    with pytest.warns(DeprecationWarning, match="Mixin.reach is now called span"):

        class Mixed(Mixin, NoPE):
            pass

    assert Mixed().span() == AttentionSpan(window=5)
    with pytest.warns(DeprecationWarning, match="core is now called unwrapped"):
        assert Mixed().core == Mixed()
    x = random(1, 5, 2, 8)
    params: dict = {}
    assert Before().logit_scale(params, x, x) == 2.0 and Before().span() == AttentionSpan(window=3)
    with pytest.raises(AttributeError, match="no attribute 'Reaches'"):
        encodings.__getattr__("Reaches")
