"""Attention under every encoding and implementation, held to float64 NumPy, to itself and to its mathematics."""

import functools
import json
import math
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nope_jax.attention import (
    AttentionStats,
    alibi_attention,
    nope_attention,
    t5_attention,
)
from tests.support import oracles
from tests.support.attention_cases import (
    ATTENTION,
    LENGTH,
    TOLERANCE,
    assert_agrees,
    assert_close,
    compiled,
    every_encoding,
    every_implementation,
    expected,
    inputs,
    parameters,
    random,
    reference_only,
    streaming_and_some_reference,
    streaming_only,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "huggingface.json").read_text())["attention"]


pytestmark = pytest.mark.usefixtures("small_blocks")


# --- Values


def published(name):
    """An encoding; queries, keys and values; and the keywords; of what a published model has computed."""
    golden = {key: np.array(x, np.float32) for key, x in GOLDEN[name].items()}
    keywords = {"is_causal": name != "t5_bidirectional"}
    if "table" in golden:
        keywords |= {"table": golden["table"], "max_distance": 16, "bidirectional": name == "t5_bidirectional"}
    return name.split("_")[0], (golden["query"], golden["key"], golden["value"]), keywords, golden


@pytest.mark.parametrize("name", GOLDEN)
def test_what_attention_is_held_to_is_that_of_published_models(name):
    encoding, arrays, keywords, golden = published(name)
    wanted = expected(encoding, *arrays, **keywords)
    assert_close(wanted.output, golden["out"])
    assert_close(wanted.entropy, golden["entropy"])


@pytest.mark.slow  # as it is what it is held to, below
@every_implementation
@pytest.mark.parametrize("name", GOLDEN)
def test_attention_is_that_of_published_models(name, implementation):
    encoding, arrays, keywords, golden = published(name)
    out, stats = ATTENTION[encoding](*arrays, implementation=implementation, return_stats=True, **keywords)
    assert_close(out, golden["out"])
    assert_close(stats.entropy, golden["entropy"])


@every_implementation
@every_encoding
def test_values_and_statistics_agree_with_float64(encoding, implementation):
    assert_agrees(encoding, implementation, *inputs(), **parameters(encoding))


@reference_only
def test_default_parameters_are_the_papers(implementation):
    for encoding, own in ("alibi", {}), ("rope", {}), ("t5", {"table": random(32, 4, seed=9)}):
        assert_agrees(encoding, implementation, *inputs(), **own, jit=True)


def draw(seed=0):
    return np.random.default_rng(seed)


INDEX = np.arange(LENGTH)
DOCUMENTS = np.stack([np.searchsorted([4, 13, 14], INDEX, side="right"), np.searchsorted([10], INDEX, side="right")])
"""Segments [2, T]: four documents in the first row (one of a single token), two in the second."""

COMMON = {
    "not causal": {"is_causal": False},
    "window": {"window": 3},
    "window of one": {"window": 1},
    "window of a block": {"window": 8},
    "window on both sides": {"window": 3, "is_causal": False},
    "chunks": {"chunk_size": 5},
    "chunks of a block, with a window": {"chunk_size": 8, "window": 6},
    "chunks on both sides": {"chunk_size": 6, "is_causal": False},
    "chunks of positions with gaps": {"chunk_size": 7, "query_positions": 2 * INDEX, "key_positions": 2 * INDEX},
    "segments": {"segment_ids": DOCUMENTS},
    "segments that return": {"segment_ids": draw().integers(0, 3, (2, LENGTH))},
    "mask of keys": {"mask": INDEX % 3 != 1},
    "mask of the first keys": {"mask": INDEX > 11},
    "mask per head and row": {"mask": draw().random((2, 4, LENGTH, LENGTH)) < 0.6, "is_causal": False},
    "scalar logit scale": {"logit_scale": 1.7},
    "logit scale per head": {"logit_scale": np.array([0.5, 1.0, 2.0, 0.0], np.float32)},
    "logit scale per row": {"logit_scale": random(2, 4, LENGTH) + 1.0},
    "logit scale per position": {"logit_scale": np.linspace(0.5, 2.0, LENGTH, dtype=np.float32)[None, None]},
    "scale": {"qk_scale": 0.8, "logit_scale": 1.7},
    "soft cap": {"softcap": 0.4},
    "soft cap of scaled logits in a mask": {
        "softcap": 0.4,
        "qk_scale": 2.0,
        "logit_scale": 1.7,
        "mask": INDEX % 3 != 1,
    },
    "positions of documents": {
        "query_positions": np.concatenate([np.arange(9), np.arange(12)]),
        "key_positions": np.concatenate([np.arange(9), np.arange(12)]),
        "segment_ids": np.array([[0] * 9 + [1] * 12] * 2),
    },
    "positions with gaps, per row": {
        "query_positions": np.stack([np.cumsum(draw().integers(1, 9, LENGTH)), INDEX]),
        "key_positions": np.stack([np.cumsum(draw().integers(1, 9, LENGTH)), INDEX]),
    },
    "positions out of order": {
        "query_positions": draw(1).permutation(LENGTH),
        "key_positions": draw(2).permutation(LENGTH),
        "window": 4,
    },
    "only query positions": {"query_positions": np.sort(draw().integers(0, 30, LENGTH))},
    "chunks of query positions with gaps": {
        "query_positions": np.sort(draw().integers(0, 30, LENGTH)),
        "chunk_size": 7,
    },
    "all at once": {
        "window": 9,
        "segment_ids": draw().integers(0, 3, (2, LENGTH)),
        "mask": draw().random((2, 4, LENGTH, LENGTH)) < 0.8,
        "logit_scale": random(2, 4, LENGTH) + 1.0,
    },
}


# Every kind of mask and factor once.
OF_THE_REFERENCE = ["window on both sides", "chunks of query positions with gaps"]
OF_THE_REFERENCE += ["soft cap of scaled logits in a mask", "all at once"]
# Another case, or another test, has these and more.
INCLUDED = ["not causal", "window of a block", "chunks", "chunks of a block, with a window", "segments"]
INCLUDED += ["mask of keys", "mask of the first keys", "soft cap", "scale", "scalar logit scale"]
INCLUDED += ["logit scale per head", "logit scale per position", "positions of documents", "positions out of order"]
INCLUDED += ["positions with gaps, per row", "window of one", "chunks of positions with gaps", "only query positions"]
INCLUDED += ["segments that return", "mask per head and row", "logit scale per row"]


@streaming_and_some_reference("case", COMMON, OF_THE_REFERENCE, slow=INCLUDED)
def test_every_common_keyword_agrees_with_float64(case, implementation):
    assert_agrees("t5", implementation, *inputs(), **parameters("t5"), **COMMON[case])


@reference_only
@pytest.mark.parametrize("encoding", ["rope", "alibi"])
def test_rope_and_alibi_follow_explicit_positions(encoding, implementation):
    assert_agrees(encoding, implementation, *inputs(), **parameters(encoding), **COMMON["positions with gaps, per row"])


@reference_only
def test_without_causality_alibi_and_bidirectional_t5_reach_both_ways(implementation):
    assert_agrees("alibi", implementation, *inputs(), **parameters("alibi"), is_causal=False)
    assert_agrees("t5", implementation, *inputs(), **parameters("t5"), is_causal=False, bidirectional=True)


@pytest.mark.slow  # as segments do, whose queries are fewer than the keys
@every_implementation
@every_encoding
def test_fewer_queries_than_keys_stand_at_the_end_of_the_keys(encoding, implementation):
    assert_agrees(encoding, implementation, *inputs(T=10, S=LENGTH), **parameters(encoding))


@streaming_only
def test_segments_of_queries_and_keys_may_differ_in_length(implementation):
    segments = np.array([[1] * 6 + [2] * 4] * 2), np.array([[0] * 4 + [1] * 11 + [2] * 5 + [3]] * 2)
    assert_agrees("t5", implementation, *inputs(T=10, S=LENGTH), segment_ids=segments, **parameters("t5"), jit=True)


@pytest.mark.slow  # elsewhere they are two, for four heads with slopes of their own
@every_implementation
@pytest.mark.parametrize("kv_heads", [1, 3, 6])
def test_query_head_n_uses_key_value_head_n_over_group_size(kv_heads, implementation):
    assert_agrees("alibi", implementation, *inputs(N=6, K=kv_heads))


@every_implementation
def test_temperature_multiplies_the_content_and_not_the_bias(implementation):
    # At logit scale 0 only the bias is left, and at 3 the same as three times the queries.
    query, key, value = inputs()
    attend = functools.partial(t5_attention, implementation=implementation, return_stats=True, **parameters("t5"))
    for scale in 0.0, 3.0:
        jax.tree.map(assert_close, attend(query, key, value, logit_scale=scale), attend(scale * query, key, value))


@streaming_and_some_reference("encoding", ATTENTION, ["t5"], slow=["nope", "alibi"])
def test_large_logits_do_not_overflow(encoding, implementation):
    query, key, value = inputs()
    query, key = 30 * query, 30 * key
    out, stats = ATTENTION[encoding](
        query, key, value, implementation=implementation, return_stats=True, **parameters(encoding)
    )
    wanted = expected(encoding, query, key, value, **parameters(encoding))
    # Logits of thousands carry an absolute error of thousands · 2⁻²⁴, which weights and entropy inherit.
    assert np.abs(wanted.logsumexp).max() > 1000
    assert_close(out, wanted.output, tolerance=1e-3)
    assert_close(stats.entropy, wanted.entropy, tolerance=1e-3)
    assert_close(stats.logsumexp, wanted.logsumexp)


@streaming_and_some_reference("encoding", ATTENTION, ["t5"], slow=["nope", "alibi"])
def test_bfloat16_in_is_bfloat16_out_with_softmax_and_statistics_in_float32(encoding, implementation):
    query, key, value = (x.astype(jnp.bfloat16) for x in inputs())
    out, stats = compiled(ATTENTION[encoding], query, key, value, implementation=implementation, **parameters(encoding))
    assert out.dtype == jnp.bfloat16
    assert stats.entropy.dtype == stats.logsumexp.dtype == jnp.float32
    wanted = expected(encoding, *(np.asarray(x, np.float64) for x in (query, key, value)), **parameters(encoding))
    assert_close(out, wanted.output, tolerance=2**-8)
    # RoPE rounds the turned queries and keys to bfloat16; elsewhere nothing before the statistics is rounded to it.
    tolerance = 2**-7 if encoding == "rope" else TOLERANCE
    assert_close(stats.entropy, wanted.entropy, tolerance=tolerance)
    assert_close(stats.logsumexp, wanted.logsumexp, tolerance=tolerance)


@reference_only
@pytest.mark.parametrize("encoding", ["rope", "t5"])
def test_jit_changes_nothing(encoding, implementation):
    attend = functools.partial(
        ATTENTION[encoding], implementation=implementation, return_stats=True, **parameters(encoding)
    )
    jax.tree.map(functools.partial(assert_close, tolerance=2e-6), jax.jit(attend)(*inputs()), attend(*inputs()))


@every_implementation
def test_arrays_may_all_be_traced(implementation):
    query, key, value = inputs()
    traced = {
        "segment_ids": DOCUMENTS,
        "mask": draw().random((2, 1, LENGTH, LENGTH)) < 0.8,
        "logit_scale": np.array([0.5, 1.0, 2.0, 1.3], np.float32),
        "query_positions": INDEX + 3,
        "key_positions": INDEX + 3,
        "table": parameters("t5")["table"],
    }
    function = functools.partial(t5_attention, implementation=implementation, max_distance=10)
    out = jax.jit(lambda *qkv, **keywords: function(*qkv, **keywords))(query, key, value, **traced)
    assert_close(out, expected("t5", query, key, value, max_distance=10, **traced).output)


def test_statistics_come_as_a_named_pair_and_only_when_asked_for():
    out = nope_attention(*inputs())
    assert out.shape == (2, LENGTH, 4, 8)
    same, stats = nope_attention(*inputs(), return_stats=True)
    assert isinstance(stats, AttentionStats)
    assert stats.entropy.shape == stats.logsumexp.shape == (2, 4, LENGTH)
    assert_close(same, out, tolerance=2e-6)


# --- Mathematics


@every_implementation
def test_nope_weighs_identical_tokens_equally(implementation):
    query, key, value = (np.full_like(x, number) for x, number in zip(inputs(), (0.3, 0.7, 1.0), strict=True))
    value = value * INDEX.astype(np.float32)[:, None, None]
    out, stats = nope_attention(query, key, value, implementation=implementation, return_stats=True)
    assert_close(stats.entropy, np.broadcast_to(np.log(INDEX + 1), stats.entropy.shape))
    assert_close(out, np.broadcast_to(INDEX[:, None, None] / 2, out.shape))


@every_implementation
def test_nope_counts_tokens_by_a_value_that_only_the_first_carries(implementation):
    # Kazemnejad et al. 2023, theorem 1: constant keys give 1/t at position t = 1, 2, ..., from which t can be read.
    query, key, value = inputs()
    key, value = np.ones_like(key), np.zeros_like(value)
    value[:, 0] = 1.0
    out, _ = nope_attention(query, key, value, implementation=implementation, return_stats=True)
    assert_close(out, np.broadcast_to(1 / (INDEX[:, None, None] + 1), out.shape))


@every_implementation
def test_nope_without_a_mask_is_permutation_equivariant_and_the_causal_mask_breaks_it(implementation):
    order = draw().permutation(LENGTH)
    arrays = inputs()
    permuted = [x[:, order] for x in arrays]

    def attend(arrays, **keywords):
        return np.asarray(nope_attention(*arrays, implementation=implementation, return_stats=True, **keywords)[0])

    assert_close(attend(permuted, is_causal=False), attend(arrays, is_causal=False)[:, order])
    assert not np.allclose(attend(permuted), attend(arrays)[:, order], atol=1e-2)


@streaming_and_some_reference("encoding", ATTENTION, ["t5"], slow=["nope", "alibi"])
def test_a_shift_of_all_positions_changes_nothing(encoding, implementation):
    attend = functools.partial(
        ATTENTION[encoding], *inputs(), implementation=implementation, return_stats=True, **parameters(encoding)
    )
    shifted = attend(query_positions=INDEX + 40, key_positions=INDEX + 40)
    jax.tree.map(assert_close, shifted, attend())


@streaming_and_some_reference("encoding", ATTENTION, ["t5"], slow=["alibi"])
def test_stretched_positions_matter_to_every_encoding_but_nope(encoding, implementation):
    attend = functools.partial(
        ATTENTION[encoding], *inputs(), implementation=implementation, return_stats=True, **parameters(encoding)
    )
    change = np.abs(attend(query_positions=3 * INDEX, key_positions=3 * INDEX)[0] - attend()[0]).max()
    assert change < 2e-6 if encoding == "nope" else change > 0.1


@every_implementation
def test_alibi_is_a_bias_of_slope_times_key_position(implementation):
    # softmax forgets -m·i, which is constant in a row, so that slope · j alone says the same.
    slopes = parameters("alibi")["slopes"]
    wanted = oracles.attention(*inputs(), bias=slopes[None, :, None, None] * INDEX)
    out, _ = alibi_attention(*inputs(), slopes=slopes, implementation=implementation, return_stats=True)
    assert_close(out, wanted.output)


@streaming_and_some_reference("encoding", ATTENTION, [], slow=["nope", "rope", "alibi"])
def test_the_last_query_alone_against_a_cache_is_the_last_row(encoding, implementation):
    query, key, value = inputs()
    attend = functools.partial(
        ATTENTION[encoding], implementation=implementation, return_stats=True, **parameters(encoding)
    )
    out, stats = jax.tree.map(np.asarray, attend(query, key, value))
    last, last_stats = jax.jit(attend)(query[:, -1:], key, value)
    assert_close(last, out[:, -1:])
    assert_close(last_stats.entropy, stats.entropy[..., -1:])
    assert_close(last_stats.logsumexp, stats.logsumexp[..., -1:])


def span(encoding, implementation, is_causal):
    """How much row t of the output feels token s of query, key and value: three arrays [T, S]."""
    keywords = parameters(encoding, N=2) | {"implementation": implementation, "is_causal": is_causal}

    def row(query, key, value, t):
        return ATTENTION[encoding](query, key, value, **keywords)[:, t].sum()

    gradient = jax.jit(jax.grad(row, argnums=(0, 1, 2)))
    rows = [gradient(*inputs(B=1, N=2, K=1, H=4), t) for t in range(LENGTH)]
    return [np.abs(np.stack(x)).max((1, 3, 4)) for x in zip(*rows, strict=True)]


PAST = np.tril(np.ones((LENGTH, LENGTH), bool))


@streaming_and_some_reference("encoding", ATTENTION, [], slow=["nope", "rope", "alibi"])
def test_no_gradient_reaches_the_past_from_the_future(encoding, implementation):
    by_query, by_key, by_value = span(encoding, implementation, is_causal=True)
    assert (by_query[~np.eye(LENGTH, dtype=bool)] == 0).all()
    assert (by_key[~PAST] == 0).all() and (by_value[~PAST] == 0).all()
    # The first row has one key, whose weight is 1 whatever it is.
    assert (by_value[PAST] > 0).all() and (by_key[1:][PAST[1:]] > 0).all()


@reference_only
def test_without_causality_every_token_feels_every_other(implementation):
    _, by_key, by_value = span("nope", implementation, is_causal=False)
    assert (by_key > 0).all() and (by_value > 0).all()


# --- Rows that see nothing

NONE = np.zeros((2, 4, LENGTH, LENGTH), bool)
IN_ORDER = np.stack([INDEX] * 2)
EVERY = {
    "query_positions": IN_ORDER,
    "key_positions": IN_ORDER,
    "segment_ids": (0 * DOCUMENTS, 0 * DOCUMENTS),
    "mask": ~NONE,
}
"""Hides nothing but the future; with it, one program serves all cases."""

NOTHING = {
    "masked rows": {"mask": NONE | (INDEX % 3 > 0)[:, None]},
    "masked rows of a block": {"mask": NONE | (INDEX >= 8)[:, None]},
    "everything masked": {"mask": NONE},
    "a batch row masked": {"mask": NONE | np.array([True, False])[:, None, None, None]},
    "no key of the segment": {"segment_ids": (DOCUMENTS, np.minimum(DOCUMENTS, 1))},
    "before all keys": {"query_positions": IN_ORDER - 10},
    "outside the window": {"query_positions": 3 * IN_ORDER},
}


@functools.cache
def gradients_past_empty_rows(encoding, implementation):
    """A jitted (query, key, value, keywords) -> gradients, (output, statistics); cases alike in shape share it."""
    attend = functools.partial(
        ATTENTION[encoding], implementation=implementation, return_stats=True, window=18, **parameters(encoding)
    )

    def loss(query, key, value, keywords):
        out, stats = attend(query, key, value, **keywords)
        return mix(out, stats._replace(logsumexp=jnp.nan_to_num(stats.logsumexp, neginf=0.0))), (out, stats)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))


@streaming_and_some_reference("case", NOTHING, ["masked rows", "everything masked"])
def test_rows_that_see_nothing_give_zeros_and_finite_gradients(case, implementation):
    keywords = EVERY | NOTHING[case]
    found = gradients_past_empty_rows("t5", implementation)(*inputs(), keywords)
    gradients, (out, stats) = jax.tree.map(np.asarray, found)
    wanted = expected("t5", *inputs(), window=18, **parameters("t5"), **keywords)
    empty = np.isneginf(wanted.logsumexp)
    assert empty.any()
    assert (np.swapaxes(out, 1, 2)[empty] == 0).all()
    assert (stats.entropy[empty] == 0).all()
    assert_close(out, wanted.output)
    assert_close(stats.entropy, wanted.entropy)
    assert_close(stats.logsumexp, wanted.logsumexp)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert (np.swapaxes(gradients[0], 1, 2)[empty] == 0).all()


@reference_only
def test_queries_before_the_first_key_see_nothing(implementation):
    # The queries end at the last of ten keys: the first eleven stand at -11 to -1.
    arrays, keywords = inputs(S=10), parameters("t5")
    found = compiled(t5_attention, *arrays, **keywords, implementation=implementation)
    out, stats = jax.tree.map(np.asarray, found)
    assert (out[:, :11] == 0).all() and np.isneginf(stats.logsumexp[..., :11]).all()
    assert np.isfinite(stats.logsumexp[..., 11:]).all()
    wanted = expected("t5", *arrays, **keywords)
    jax.tree.map(assert_close, (out, *stats), (wanted.output, wanted.entropy, wanted.logsumexp))


# --- Gradients


def mix(out, stats):
    """A number in which every output and statistic has a voice of its own."""
    return sum((x * random(*x.shape, seed=20 + i)).sum() for i, x in enumerate((out, stats.entropy, stats.logsumexp)))


def differentiable(encoding, N=4):
    """The encoding's arrays, and its other settings."""
    settings = parameters(encoding, N)
    arrays = {name: x for name, x in settings.items() if isinstance(x, np.ndarray)}
    return arrays, {name: x for name, x in settings.items() if name not in arrays}


def gradients_of(encoding, implementation, keywords, arrays, query, key, value):
    """Output, statistics, and the gradients of their mix in queries, keys, values and `arrays`."""

    def loss(differentiated):
        out, stats = ATTENTION[encoding](**differentiated, **keywords, implementation=implementation, return_stats=True)
        seen = jnp.isfinite(stats.logsumexp)
        return mix(out, stats._replace(logsumexp=jnp.where(seen, stats.logsumexp, 0.0))), (out, stats)

    differentiated = {"query": query, "key": key, "value": value, **arrays}
    return jax.jit(jax.grad(loss, has_aux=True))(differentiated)


@pytest.mark.parametrize(
    "encoding", ["t5", *(pytest.param(name, marks=pytest.mark.slow) for name in ("nope", "rope", "alibi"))]
)
def test_gradients_agree_with_finite_differences_in_float64_and_streaming_with_reference(encoding):
    arrays, settings = differentiable(encoding)
    arrays["logit_scale"] = np.linspace(0.5, 1.5, 4, dtype=np.float32)
    gradient, results = gradients_of(encoding, "reference", settings, arrays, *inputs())
    assert set(gradient) == {"query", "key", "value", *arrays}

    # Finite differences along one random direction through all of them, of fourth order: h⁴ of the fifth derivative.
    at = dict(zip(("query", "key", "value"), inputs(), strict=True)) | arrays
    direction = {name: random(*x.shape, seed=30 + i) for i, (name, x) in enumerate(at.items())}

    def oracle(step):
        moved = {name: x + step * direction[name].astype(np.float64) for name, x in at.items()}
        wanted = expected(encoding, **moved, **settings)
        return mix(wanted.output, wanted)

    h = 1e-3
    wanted = (8 * (oracle(h) - oracle(-h)) - (oracle(2 * h) - oracle(-2 * h))) / (12 * h)
    slope = sum((np.float64(gradient[name]) * direction[name]).sum() for name in at)
    scale = math.sqrt(sum((np.float64(gradient[name]) ** 2).sum() for name in at))
    assert abs(slope - wanted) < TOLERANCE * scale

    streamed = gradients_of(encoding, "streaming", settings, arrays, *inputs())
    jax.tree.map(assert_close, streamed, (gradient, results))


@pytest.mark.slow  # each example is a compilation
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=100, derandomize=True, deadline=None)
def test_streaming_is_reference_for_any_shapes(data):
    """In value, statistics and every gradient, for shapes and keywords drawn at random."""
    encoding = data.draw(st.sampled_from(list(ATTENTION)))
    B, K, groups = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3)))
    S = data.draw(st.integers(1, 40) | st.sampled_from([7, 8, 9, 16, 17, 24]))
    T = data.draw(st.just(S) | st.just(1) | st.integers(1, 40))
    keywords = {"is_causal": data.draw(st.booleans()), "window": data.draw(st.none() | st.integers(1, S))}
    draws = draw(data.draw(st.integers(0, 100)))
    if data.draw(st.booleans()):
        keywords["segment_ids"] = draws.integers(0, 2, (B, T)), np.sort(draws.integers(0, 2, (B, S)))
    if data.draw(st.booleans()):
        keywords |= {"query_positions": draws.integers(0, S + 5, (B, T)), "key_positions": draws.permutation(S)}
    if data.draw(st.booleans()):
        keywords["mask"] = draws.random((1, groups * K, T, S)) < 0.7
    arrays, settings = differentiable(encoding, groups * K)
    arrays["logit_scale"] = draws.uniform(0.5, 2.0, (B, 1, T)).astype(np.float32)
    arguments = settings | keywords, arrays, *inputs(B=B, T=T, S=S, N=groups * K, K=K, H=4)
    actual, wanted = (gradients_of(encoding, name, *arguments) for name in ("streaming", "reference"))
    jax.tree.map(assert_close, actual, wanted)


@hypothesis.given(seed=st.integers(0, 2**16))
@hypothesis.settings(max_examples=30, derandomize=True, deadline=None)
def test_streaming_is_reference_for_any_positions_segments_and_mask(seed):
    # Values and gradients in one shape, so that what varies costs no compilation.
    draws = draw(seed)
    keywords = {
        "query_positions": draws.integers(-2, 25, (2, LENGTH)),
        "key_positions": draws.integers(0, 25, (2, LENGTH)),
        "segment_ids": (draws.integers(0, 3, (2, LENGTH)), draws.integers(0, 3, (2, LENGTH))),
        "mask": draws.random((2, 4, LENGTH, LENGTH)) < draws.random(),
    }
    actual, wanted = (
        gradients_past_empty_rows("t5", name)(*inputs(seed=seed), keywords) for name in ("streaming", "reference")
    )
    jax.tree.map(assert_close, actual, wanted)
