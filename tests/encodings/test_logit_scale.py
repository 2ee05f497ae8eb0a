"""The logit scale wrappers against their papers' formulas, alone, around other encodings and within attention."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nope_jax import ModelConfig
from nope_jax.attention import encoded_attention
from nope_jax.encodings import (
    T5,
    AttentionSpan,
    Chunked,
    Encoding,
    HeadScale,
    Llama4Scale,
    LogN,
    ModelDims,
    RoPE,
    SSMax,
    SwanScale,
    UniformScale,
    Windowed,
    keys_seen,
    logit_scale_product,
)
from nope_jax.models.decoder import abstract_decoder
from tests.support import oracles
from tests.support.attention_cases import assert_close, compiled, inputs, random, reference_only, streaming_only

SIZES = ModelDims(num_heads=4, head_dim=8, model_dim=32, num_kv_heads=2, vocab_size=16)
POSITIONS = np.array([[0, 1, 2, 7, 8, 15, 63, 511, 2047], [3, 0, 30, 31, 32, 100, 12, 4096, 9999]])
LEARNED = {"head_scale": random(4, seed=5) + 2, "ssmax": random(4, seed=6) / 8 + 0.5}


@dataclasses.dataclass(frozen=True)
class Tempered(Encoding):
    """Has a logit scale of a given shape."""

    kind: str = "rows"

    def logit_scale(self, params, query_positions, key_positions):
        rows = 1 / (1 + query_positions.astype(jnp.float32))
        return {
            "none": None,
            "number": 0.5,
            "heads": jnp.arange(1.0, 5.0),
            "rows": rows[:, None],
            "all": rows[:, None] * jnp.arange(1.0, 5.0)[:, None],
        }[self.kind]


def factors(encoding, positions=POSITIONS, params=LEARNED):
    positions = jnp.asarray(positions)
    return encoding.logit_scale(params, positions, positions)


@pytest.mark.parametrize(
    "span",
    [AttentionSpan(), AttentionSpan(window=5), AttentionSpan(chunk_size=8), AttentionSpan(window=5, chunk_size=8)],
)
def test_keys_seen_are_those_that_one_counts(span):
    wanted = oracles.keys_seen(POSITIONS, *span)
    np.testing.assert_array_equal(keys_seen(jnp.asarray(POSITIONS), span), wanted)


def test_log_n_is_one_within_the_training_length_and_grows_as_the_logarithm_after_it():
    got = factors(LogN(length=32))
    assert got.shape == (2, 1, POSITIONS.shape[1])
    assert_close(got[:, 0], oracles.log_n(POSITIONS + 1, 32))
    assert set(np.asarray(got)[np.broadcast_to(POSITIONS[:, None] < 32, got.shape)]) == {1.0}
    assert got.max() > 1.9


@pytest.mark.parametrize(
    "within", [Windowed(window=100), Chunked(chunk_size=100), Windowed(Chunked(chunk_size=90), 70)]
)
def test_log_n_and_ssmax_count_the_keys_within_reach(within):
    seen = oracles.keys_seen(POSITIONS, *within.span())
    assert_close(factors(LogN(within, length=32))[:, 0], oracles.log_n(seen, 32))
    wanted = LEARNED["ssmax"][:, None] * np.log(seen)[:, None]
    assert_close(factors(SSMax(within)), wanted)


def test_log_n_takes_its_length_from_the_model():
    nested = HeadScale(LogN(RoPE()))
    assert nested.bind(dataclasses.replace(SIZES, train_length=64)) == HeadScale(LogN(RoPE(), length=64))
    assert LogN(length=9).bind(dataclasses.replace(SIZES, train_length=64)).length == 9
    assert LogN().bind(SIZES) == LogN()
    with pytest.raises(ValueError, match=r"length must be given .*LogN\(length=512\)"):
        factors(LogN())
    with pytest.raises(ValueError, match="length must be given"):
        encoded_attention(LogN(), {}, *inputs())


def test_uniform_scale_is_one_number():
    assert factors(UniformScale()) == 1.2
    assert factors(UniformScale(factor=1.8)) == 1.8


@pytest.mark.parametrize(("wrapper", "name", "start"), [(HeadScale, "head_scale", 1.0), (SSMax, "ssmax", 0.168)])
def test_learned_scales_are_one_per_layer_and_head(wrapper, name, start):
    for encoding, value in ((wrapper(), start), (wrapper(start=1.5), 1.5)):
        params = encoding.init_layer(jax.random.key(0), SIZES)
        assert params.keys() == {name}
        assert params[name].dtype == jnp.float32
        np.testing.assert_array_equal(params[name], np.full(4, value, np.float32))
        assert encoding.init_shared(jax.random.key(0), SIZES) == {}
    decoder = abstract_decoder(ModelConfig(num_layers=3, encoding=wrapper(T5()), model_dim=16))
    assert decoder.blocks[0].attention.position[name].shape == (3, 4)
    assert decoder.positions[0]["table"].shape == (32, 4)


def test_ssmax_starts_at_a_mean_factor_of_one_over_the_lengths_of_its_paper():
    assert math.isclose(SSMax().start * np.log(np.arange(1, 1025)).mean(), 1, rel_tol=5e-3)


def test_head_scale_is_its_parameter():
    np.testing.assert_array_equal(factors(HeadScale()), LEARNED["head_scale"])


@reference_only
def test_ssmax_is_a_power_of_the_number_of_keys(implementation):
    query, key, _ = inputs(T=9)
    identity = np.broadcast_to(np.eye(9, dtype=np.float32)[:, None], (2, 9, 2, 9))  # the output is the weights
    scale = LEARNED["ssmax"]
    attend = functools.partial(encoded_attention, SSMax(), {"ssmax": scale}, implementation=implementation)
    out, _ = compiled(attend, query, key, identity)
    wanted = np.zeros(out.shape)
    for b, t, n in np.ndindex(2, 9, 4):
        logits = key[b, : t + 1, n // 2].astype(np.float64) @ query[b, t, n] / math.sqrt(8)
        wanted[b, t, n, : t + 1] = oracles.ssmax_weights(logits, scale[n])
    assert_close(out, wanted)


def test_llama4_temperature_is_a_staircase():
    got = np.asarray(factors(Llama4Scale()))[:, 0]
    assert got[POSITIONS < 8191].max() == 1
    assert_close(got[1, -1], 1 + 0.1 * math.log(2))
    edges = np.resize([0, 8190, 8191, 16382, 16383, 10**6], POSITIONS.shape)
    wanted = [1 + 0.1 * math.log(1 + (p + 1) // 8192) for p in edges[0]]
    assert_close(factors(Llama4Scale(), edges)[0, 0], wanted)
    wanted = [1 + 0.7 * math.log(1 + (p + 1) // 3) for p in edges[0]]
    assert_close(factors(Llama4Scale(floor_scale=3, scale=0.7), edges)[0, 0], wanted)


@pytest.mark.parametrize("offset", [362.0, 20.0])
def test_swan_temperature_is_its_paper_s_logarithm(offset):
    got = factors(SwanScale(offset=offset))
    assert_close(got[:, 0], oracles.swan(POSITIONS, offset))
    assert got[0, 0, 0] == 1
    assert SwanScale().offset == 362


@pytest.mark.parametrize("kind", ["none", "number", "heads", "rows", "all"])
@pytest.mark.parametrize(
    "wrapper",
    [LogN(length=4), UniformScale(), HeadScale(), SSMax(), Llama4Scale(floor_scale=3), SwanScale()],
)
def test_temperatures_multiply(wrapper, kind):
    outer, inner = (_spread(factors(e)) for e in (wrapper, Tempered(kind)))
    got = _spread(factors(dataclasses.replace(wrapper, encoding=Tempered(kind))))
    assert_close(got, outer * inner)


def test_a_product_of_numbers_and_heads_does_not_take_heads_for_positions():
    heads, rows = jnp.arange(4.0), jnp.ones((1, 1, 4)) * jnp.arange(4.0)
    assert logit_scale_product(None, None) is None
    assert logit_scale_product(heads, None) is heads
    assert logit_scale_product(2.0, heads).shape == (4,)
    np.testing.assert_array_equal(logit_scale_product(heads, rows)[0], np.outer(np.arange(4), np.arange(4)))
    np.testing.assert_array_equal(logit_scale_product(rows, heads)[0], np.outer(np.arange(4), np.arange(4)))


@streaming_only
def test_a_temperature_multiplies_the_content_logit_and_not_the_bias(implementation):
    """Grouped heads, a bias within, a logit scale given beside, and queries at the end of a cache."""
    query, key, value = inputs(T=5, S=21)
    table, scale = random(32, 4, seed=7), LEARNED["head_scale"]
    encoding = LogN(HeadScale(T5()), length=4)
    params = {"table": table, "head_scale": scale}
    attend = functools.partial(encoded_attention, encoding, params, logit_scale=0.7, implementation=implementation)
    out, stats = compiled(attend, query, key, value)
    at = oracles.positions(2, 5, 21)
    factor = 0.7 * scale[:, None] * oracles.log_n(at[0] + 1, 4)[:, None]
    wanted = oracles.attention(query, key, value, bias=oracles.t5_bias(table, *at), logit_scale=factor)
    assert_close(out, wanted.output)
    assert_close(stats.entropy, wanted.entropy)
    assert_close(stats.logsumexp, wanted.logsumexp)


@reference_only
def test_explicit_positions_decide_the_factor(implementation):
    query, key, value = inputs(T=6, S=9)
    where = np.array([[3, 30, 31, 32, 90, 90], [8, 8, 9, 40, 41, 700]])
    keys = np.sort(np.random.default_rng(0).integers(0, 60, (2, 9)), axis=1)
    keys[:, 0] = 0
    at = {"query_positions": where, "key_positions": keys}
    attend = functools.partial(encoded_attention, SwanScale(LogN(length=32), offset=40.0), {}, **at)
    out, _ = compiled(attend, query, key, value, implementation=implementation)
    factor = (oracles.swan(where, 40.0) * oracles.log_n(where + 1, 32))[:, None]
    assert_close(out, oracles.attention(query, key, value, logit_scale=factor, **at).output)


@pytest.mark.parametrize(
    ("wrapper", "implementation"),
    [
        (HeadScale(Tempered()), "streaming"),
        (SSMax(RoPE()), "reference"),
        pytest.param(HeadScale(Tempered()), "reference", marks=pytest.mark.slow),
        pytest.param(SSMax(RoPE()), "streaming", marks=pytest.mark.slow),
    ],
)
def test_learned_scales_have_the_gradient_of_differences(wrapper, implementation):
    query, key, value = inputs(T=12)
    name = next(iter(wrapper.init_layer(jax.random.key(0), SIZES)))
    pull = random(2, 12, 4, 8, seed=8)

    def loss(scale):
        out = encoded_attention(wrapper, {name: scale}, query, key, value, implementation=implementation)
        return jnp.sum(out * pull)

    def oracle(scale):
        at = oracles.positions(2, 12, 12)
        rotated, factor = (query, key), scale[:, None] / (1 + at[0])[:, None]
        if name == "ssmax":
            rotated, factor = (oracles.rope(x, at[0]) for x in rotated), scale[:, None] * np.log(1 + at[0])[:, None]
        return np.sum(oracles.attention(*rotated, value, logit_scale=factor).output * pull)

    scale = LEARNED[name].astype(np.float64)
    steps = 1e-5 * np.eye(4)
    wanted = [(oracle(scale + step) - oracle(scale - step)) / 2e-5 for step in steps]
    assert_close(jax.jit(jax.grad(loss))(LEARNED[name]), wanted)


def test_a_factor_of_float32_scales_queries_of_bfloat16():
    query, key, value = (jnp.asarray(x, jnp.bfloat16) for x in inputs())
    for encoding in (LogN(length=4), SSMax(), HeadScale(), SwanScale(), Llama4Scale(), UniformScale()):
        params = encoding.init_layer(jax.random.key(0), SIZES)
        out = jax.eval_shape(functools.partial(encoded_attention, encoding, params), query, key, value)
        assert out.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogN(length=1), "length must be at least 2, not 1"),
        (lambda: LogN().bind(dataclasses.replace(SIZES, train_length=1)), "length must be at least 2, not 1"),
        (lambda: UniformScale(factor=0.0), "factor must be positive, not 0.0"),
        (lambda: HeadScale(start=-1.0), "start must be positive, not -1.0"),
        (lambda: SSMax(start=math.nan), "start must be positive, not nan"),
        (lambda: Llama4Scale(floor_scale=0), "floor_scale must be at least 1, not 0"),
        (lambda: Llama4Scale(scale=-0.1), "scale must be at least 0, not -0.1"),
        (lambda: SwanScale(offset=1.0), "offset must be above 1, not 1.0"),
        (lambda: UniformScale(1.5), r"encoding must be an Encoding, such as RoPE\(\), not 1.5"),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def _spread(logit_scale):
    """A logit scale of any form as [B, N, T]."""
    logit_scale = np.asarray(1.0 if logit_scale is None else logit_scale)
    logit_scale = logit_scale[:, None] if logit_scale.ndim == 1 else logit_scale
    return np.broadcast_to(logit_scale, (2, 4, POSITIONS.shape[1]))
