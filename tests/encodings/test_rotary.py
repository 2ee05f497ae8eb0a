"""RoPE's scalings, held to Hugging Face's models, and xPos, held to float64 NumPy."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nope_jax import ModelConfig, config
from nope_jax.attention import rope_attention, xpos_attention
from nope_jax.encodings import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRoPEScaling,
    NTKScaling,
    ProportionalScaling,
    RoPE,
    XPos,
    YaRNScaling,
    apply_rope,
    rope_frequencies,
)
from tests.support import oracles
from tests.support.attention_cases import (
    assert_close,
    compiled,
    compiled_together,
    inputs,
    random,
    reference_and_some_streaming,
    reference_only,
)
from tests.support.drawn_model import small_model

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "rotary.json").read_text())

SCALINGS = {
    "default": lambda: None,
    "linear": LinearScaling,
    "dynamic": DynamicNTKScaling,
    "yarn": YaRNScaling,
    "longrope": LongRoPEScaling,
    "llama3": Llama3Scaling,
}
"""By transformers' rope types, with which the goldens' names begin."""

FACTORS = (1.0, 1.5, 2.0, 4.0)


def scaling_of(name, golden):
    return SCALINGS[name.split("_")[0]](**golden["settings"])


# --- Scalings


@pytest.mark.parametrize("name", GOLDEN["frequencies"])
def test_frequencies_of_full_size_heads_are_those_of_published_models(name):
    golden = GOLDEN["frequencies"][name]
    scaling, call = scaling_of(name, golden), dict(golden["call"])
    out = rope_frequencies(**call, scaling=scaling)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, golden["frequencies"], rtol=1e-5)
    np.testing.assert_allclose(1.0 if scaling is None else scaling.amplitude, golden["amplitude"], rtol=1e-7)

    length = call.pop("length")
    traced = jax.jit(lambda length: rope_frequencies(**call, scaling=scaling, length=length))(length)
    np.testing.assert_allclose(traced, golden["frequencies"], rtol=1e-5)


def test_both_sides_of_a_length_dependent_border_are_tested():
    golden = {name: np.array(x["frequencies"]) for name, x in GOLDEN["frequencies"].items()}
    np.testing.assert_array_equal(golden["dynamic_1"], golden["dynamic_2048"])
    assert not np.allclose(golden["dynamic_5000"], golden["dynamic_2048"], rtol=1e-2)
    assert not np.allclose(golden["longrope_4097"], golden["longrope_4096"], rtol=1e-2)


@pytest.mark.parametrize("name", GOLDEN["turned"])
def test_heads_turn_as_those_of_published_models(name):
    golden, x = GOLDEN["turned"][name], np.array(GOLDEN["x"], np.float32)
    turn = functools.partial(apply_rope, scaling=scaling_of(name, golden), **golden["call"])
    assert_close(jax.jit(turn)(x, np.array(golden["positions"])), golden["out"])


@pytest.mark.parametrize("name", GOLDEN["turned"])
def test_a_query_before_the_last_key_turns_by_the_frequencies_of_all_keys(name):
    golden, x = GOLDEN["turned"][name], np.array(GOLDEN["x"], np.float32)
    positions = np.array(golden["positions"])[None]
    encoding = RoPE(scaling=scaling_of(name, golden), **golden["call"])
    query, key = jax.jit(encoding.query_key)({}, x[:, 1:3], x, positions[:, 1:3], positions)
    assert_close(query, np.array(golden["out"])[:, 1:3])
    assert_close(key, golden["out"])


@reference_only
def test_attention_with_yarn_is_that_of_the_published_model(implementation):
    golden = GOLDEN["attention"]
    query, key, value = (np.array(golden[name], np.float32) for name in ("query", "key", "value"))
    scaling = YaRNScaling(**golden["settings"])
    out, stats = compiled(rope_attention, query, key, value, scaling=scaling, implementation=implementation)
    assert_close(out, golden["out"])
    assert_close(stats.entropy, golden["entropy"])


@pytest.mark.parametrize("dim", [4, 16, 128])
def test_ntk_scaling_is_rope_at_a_larger_base(dim):
    out = rope_frequencies(dim, base=500.0, scaling=NTKScaling(factor=6.0))
    np.testing.assert_allclose(out, oracles.ntk_frequencies(dim, 6.0, base=500.0), rtol=1e-6)
    np.testing.assert_allclose(out[0], 1.0)
    np.testing.assert_allclose(out[-1], oracles.rope_frequencies(dim, 500.0)[-1] / 6, rtol=1e-6)


def test_dynamic_ntk_is_ntk_by_what_the_length_asks_for():
    dynamic = rope_frequencies(32, scaling=DynamicNTKScaling(factor=4.0, original_length=100), length=250)
    np.testing.assert_allclose(dynamic, rope_frequencies(32, scaling=NTKScaling(factor=4 * 2.5 - 3)), rtol=1e-6)


@pytest.mark.parametrize("original_length", [1, 4, 6, 7, 10**9])
def test_yarn_stays_between_none_and_interpolation_at_any_length(original_length):
    plain = rope_frequencies(16, base=50.0)
    out = rope_frequencies(16, base=50.0, scaling=YaRNScaling(factor=4.0, original_length=original_length))
    plain, out = np.asarray(plain), np.asarray(out)
    assert (out <= plain).all() and (out >= plain / 4 * (1 - 1e-6)).all()
    if original_length == 10**9:  # where every pair turns often
        np.testing.assert_array_equal(out, plain)
    if original_length == 1:  # where none does
        np.testing.assert_allclose(out[1:], plain[1:] / 4, rtol=1e-6)


def test_proportional_scaling_turns_the_fastest_pairs_as_if_all_turned():
    """As in transformers 5 for Gemma 4: inv_freq of int(fraction · dim // 2) pairs over the whole dim, then zeros."""
    out = rope_frequencies(12, base=50.0, scaling=ProportionalScaling(fraction=0.6, factor=8.0))
    expected = [50.0 ** (-2 * m / 12) / 8 for m in range(3)] + [0.0] * 3
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    x = random(1, 3, 1, 12)
    turn = functools.partial(apply_rope, base=50.0, scaling=ProportionalScaling(0.6))
    turned = np.asarray(jax.jit(turn)(x, np.array([0, 7, 1001])))
    np.testing.assert_array_equal(turned[..., [3, 4, 5, 9, 10, 11]], x[..., [3, 4, 5, 9, 10, 11]])
    np.testing.assert_allclose(turned[0, 1, 0, 0], x[0, 1, 0, 0] * np.cos(7) - x[0, 1, 0, 6] * np.sin(7), rtol=1e-4)


def test_a_factor_of_one_changes_nothing():
    plain = rope_frequencies(16)
    for scaling in (
        LinearScaling(1),
        NTKScaling(1),
        DynamicNTKScaling(1, 8),
        YaRNScaling(1, 64),
        Llama3Scaling(1),
        ProportionalScaling(1.0),
        LongRoPEScaling((1,) * 8, (1,) * 8, 8, 1),
    ):
        np.testing.assert_allclose(rope_frequencies(16, scaling=scaling, length=8), plain, rtol=1e-7)
        assert scaling.amplitude == 1


def test_scaled_rope_keeps_bfloat16_and_computes_in_float32():
    x = random(1, 3, 1, 16).astype(jnp.bfloat16)
    turn = functools.partial(
        apply_rope, positions=np.array([256, 257, 1001]), scaling=YaRNScaling(factor=4.0, original_length=512)
    )
    out, exact = jax.jit(lambda x: (turn(x), turn(x.astype(jnp.float32))))(x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))


LENGTH_DEPENDENT = [DynamicNTKScaling(2.0, 8), LongRoPEScaling(FACTORS, FACTORS, 8, factor=2.0)]


@pytest.mark.parametrize("scaling", LENGTH_DEPENDENT, ids=lambda x: type(x).__name__)
def test_frequencies_that_depend_on_the_length_ask_for_it(scaling):
    with pytest.raises(ValueError, match=rf"\Alength, .*{type(scaling).__name__}.*\Z"):
        rope_frequencies(8, scaling=scaling)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("factor", lambda: LinearScaling(0.5)),
        ("factor", lambda: NTKScaling(factor=0.9)),
        ("factor", lambda: NTKScaling(factor=float("nan"))),
        ("factor", lambda: DynamicNTKScaling(factor=0, original_length=8)),
        ("original_length", lambda: DynamicNTKScaling(factor=2, original_length=0)),
        ("factor", lambda: YaRNScaling(factor=0.5, original_length=8)),
        ("original_length", lambda: YaRNScaling(factor=2, original_length=0)),
        ("beta_fast", lambda: YaRNScaling(factor=2, original_length=8, beta_fast=1.0)),
        ("beta_fast", lambda: YaRNScaling(factor=2, original_length=8, beta_fast=-1.0)),
        ("beta_slow", lambda: YaRNScaling(factor=2, original_length=8, beta_slow=0.0)),
        ("attention_factor", lambda: YaRNScaling(factor=2, original_length=8, attention_factor=0.0)),
        ("short_factors", lambda: LongRoPEScaling((), FACTORS, 8, factor=2)),
        ("long_factors", lambda: LongRoPEScaling(FACTORS, (1.0, 0.0, 1.0, 1.0), 8, factor=2)),
        ("long_factors", lambda: LongRoPEScaling(FACTORS, FACTORS[:3], 8, factor=2)),
        ("original_length", lambda: LongRoPEScaling(FACTORS, FACTORS, 0, attention_factor=1.0)),
        ("original_length", lambda: LongRoPEScaling(FACTORS, FACTORS, 1, factor=2)),
        ("factor", lambda: LongRoPEScaling(FACTORS, FACTORS, 8)),
        ("factor", lambda: LongRoPEScaling(FACTORS, FACTORS, 8, factor=0.5)),
        ("attention_factor", lambda: LongRoPEScaling(FACTORS, FACTORS, 8, attention_factor=-1.0)),
        ("factor", lambda: Llama3Scaling(factor=0.5)),
        ("original_length", lambda: Llama3Scaling(original_length=0)),
        ("low_frequency_factor", lambda: Llama3Scaling(low_frequency_factor=0.0)),
        ("high_frequency_factor", lambda: Llama3Scaling(high_frequency_factor=1.0)),
        ("fraction", lambda: ProportionalScaling(0.0)),
        ("fraction", lambda: ProportionalScaling(1.5)),
        ("factor", lambda: ProportionalScaling(0.5, factor=0.5)),
        ("scaling", lambda: RoPE(scaling="linear")),
        ("short_factors", lambda: rope_frequencies(6, scaling=LENGTH_DEPENDENT[1], length=9)),
        ("dim", lambda: rope_frequencies(2, scaling=NTKScaling(factor=2.0))),
        ("base", lambda: rope_frequencies(4, base=1.0, scaling=YaRNScaling(factor=2, original_length=8))),
    ],
)
def test_what_cannot_work_is_refused(name, make):
    with pytest.raises(ValueError, match=rf"\A{name} .*\Z"):
        make()


def test_scalings_compare_hash_and_survive_config_json(tmp_path):
    scalings = [
        NTKScaling(factor=2.0),
        YaRNScaling(factor=4.0, original_length=64, attention_factor=1.5, truncate=False),
        Llama3Scaling(),
        *LENGTH_DEPENDENT,
    ]
    assert len({*scalings, *map(dataclasses.replace, scalings)}) == len(scalings)
    assert LongRoPEScaling(list(FACTORS), np.array(FACTORS, np.float32), 8, factor=2.0) == LENGTH_DEPENDENT[1]
    encoding = (*(RoPE(scaling=scaling) for scaling in scalings), XPos(scale_base=64.0))
    written = config.Config(model=ModelConfig(num_layers=6, encoding=encoding))
    config.save(written, tmp_path)
    assert config.load(tmp_path) == written
    first = json.loads((tmp_path / "config.json").read_text())["model"]["encoding"][0]
    assert first["scaling"] == {"class": "nope_jax.encodings:NTKScaling", "factor": 2.0}


# --- xPos


def expected(query, key, value, *, base=10_000.0, scale_base=512.0, interleaved=True, **common):
    (B, T), S = query.shape[:2], key.shape[1]
    at = oracles.positions(B, T, S, common.pop("query_positions", None), common.pop("key_positions", None))
    settings = {"base": base, "scale_base": scale_base, "interleaved": interleaved}
    query = oracles.xpos(query, at[0], is_key=False, **settings)
    key = oracles.xpos(key, at[1], is_key=True, **settings)
    return oracles.attention(query, key, value, query_positions=at[0], key_positions=at[1], **common)


GAPS = np.cumsum(np.random.default_rng(0).integers(0, 9, (2, 21)), axis=1)

XPOS_CALLS = {
    "the paper's settings": {},
    "other settings": {"base": 50.0, "scale_base": 10.0, "interleaved": False},
    "logit_scale": {"scale_base": 10.0, "logit_scale": np.array([0.5, 1.0, 2.0, 1.5], np.float32)},
    "positions": {"scale_base": 10.0, "query_positions": GAPS, "key_positions": GAPS},
    "positions of documents": {
        "scale_base": 10.0,
        "query_positions": np.r_[0:9, 0:12],
        "key_positions": np.r_[0:9, 0:12],
        "segment_ids": np.array([[0] * 9 + [1] * 12] * 2),
    },
}


@functools.cache
def of_every_call(implementation):
    calls = {case: call | {"implementation": implementation} for case, call in XPOS_CALLS.items()}
    return compiled_together({case: (xpos_attention, inputs(), call) for case, call in calls.items()})


# Rotations are over when queries and keys come to an implementation.
@reference_and_some_streaming("case", XPOS_CALLS, [])
def test_xpos_attention_agrees_with_float64(case, implementation):
    out, stats = of_every_call(implementation)[case]
    wanted = expected(*inputs(), **XPOS_CALLS[case])
    assert_close(out, wanted.output)
    assert_close(stats.entropy, wanted.entropy)
    assert_close(stats.logsumexp, wanted.logsumexp)


@reference_only
def test_xpos_queries_in_a_cache_agree_with_float64(implementation):
    arrays, call = inputs(T=3, S=21), {"scale_base": 10.0}
    told = call | {"query_positions": np.array([[7, 8, 9], [2, 3, 20]])}

    @jax.jit
    def outputs(*arrays):
        return [xpos_attention(*arrays, implementation=implementation, **where) for where in (call, told)]

    for where, out in zip((call, told), outputs(*arrays), strict=True):
        assert_close(out, expected(*arrays, **where).output)


def test_xpos_that_does_not_fade_is_rope():
    @jax.jit
    def outputs(*arrays):
        xpos = [xpos_attention(*arrays, scale_base=scale_base) for scale_base in (1e8, 20.0)]
        return rope_attention(*arrays, interleaved=True), *xpos

    rope, lasting, fading = outputs(*inputs())
    assert_close(lasting, rope)
    assert not np.allclose(fading, rope, atol=1e-2)


@reference_only
def test_xpos_is_exact_over_all_the_positions_it_has(implementation):
    scale_base = 4.0
    length = XPos(scale_base=scale_base).max_length()
    assert length > 40 * scale_base
    arrays = inputs(B=1, T=length)

    def sums(*arrays):
        out = xpos_attention(*arrays, scale_base=scale_base, implementation=implementation)
        return out.sum(), out

    gradients, out = jax.jit(jax.grad(sums, argnums=(0, 1, 2), has_aux=True))(*arrays)
    assert_close(out, expected(*arrays, scale_base=scale_base).output)
    for gradient in gradients:
        assert np.isfinite(gradient).all()


def test_xpos_depends_on_distance_alone_to_the_last_bit():
    arrays = inputs()
    attend = jax.jit(lambda at: xpos_attention(*arrays, scale_base=20.0, query_positions=at, key_positions=at))
    far = GAPS + np.array([[1_000_001], [70_000]])
    np.testing.assert_array_equal(attend(GAPS), attend(far))


def test_xpos_refuses_a_span_that_float32_cannot_hold():
    limit = XPos(scale_base=4.0).max_length()
    arrays = inputs(B=1, T=limit + 1)
    message = rf"\Apositions must differ by less than {limit}, .*not by {limit}(\n|\Z)"
    with pytest.raises(ValueError, match=message):
        xpos_attention(*arrays, scale_base=4.0)
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda *x: xpos_attention(*x, scale_base=4.0))(*arrays)
    positions = np.r_[0:20, limit]
    with pytest.raises(ValueError, match=message):
        xpos_attention(*inputs(), scale_base=4.0, query_positions=positions, key_positions=positions)
    # Where the values cannot be seen there is NaN, which no one mistakes for an answer.
    traced = jax.jit(lambda at: xpos_attention(*inputs(), scale_base=4.0, query_positions=at, key_positions=at))
    assert np.isnan(traced(positions)).all()
    assert np.isfinite(traced(positions - (positions == limit))).all()
    with pytest.raises(ValueError, match=r"\Aquery_positions .*\Z"):
        xpos_attention(*inputs(), query_positions=np.arange(5))


def test_a_decoder_with_xpos_has_as_many_positions_as_float32_allows():
    encoding = XPos(scale_base=1.0)
    model = small_model(encoding=encoding)
    assert model.max_length == encoding.max_length()
    model.check_tokens(np.zeros((1, model.max_length), int))
    with pytest.raises(ValueError, match=r"\Apositions .*XPos.*\Z"):
        model(np.zeros((1, model.max_length + 1), int))


def test_xpos_has_the_number_of_positions_its_docstring_says():
    assert f"{XPos().max_length():,} at scale_base 512" in " ".join(XPos.__doc__.split())


@pytest.mark.parametrize("dtype", [pytest.param(jnp.bfloat16, marks=pytest.mark.slow), jnp.float16])
def test_xpos_keeps_the_dtype_and_does_not_overflow_in_it(dtype):
    arrays = [x.astype(dtype) for x in inputs(B=1, T=150)]
    out, _ = compiled(xpos_attention, *arrays, scale_base=4.0, implementation="reference")
    assert out.dtype == dtype
    wanted = expected(*(x.astype(np.float64) for x in arrays), scale_base=4.0).output
    tolerance = 0.03 if dtype == jnp.bfloat16 else 0.003
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("base", lambda: XPos(base=0.0)),
        ("scale_base", lambda: XPos(scale_base=-1.0)),
        ("scale_base", lambda: xpos_attention(*inputs(), scale_base=0.0)),
        ("the head dim must be even", lambda: xpos_attention(*inputs(H=7))),
    ],
)
def test_xpos_refuses_what_cannot_work(name, make):
    with pytest.raises(ValueError, match=rf"\A{name} .*\Z"):
        make()
