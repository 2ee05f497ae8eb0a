"""CoPE, the forget gate, and attention whose logits sum over keys, held to float64 NumPy in small blocks."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nope_jax.attention import cope_attention, dot_product, encoded_attention, forgetting_attention
from nope_jax.encodings import (
    ENCODINGS,
    BlockValue,
    CoPE,
    Forgetting,
    ModelDims,
    RunningSum,
    ScanLogit,
    Tile,
    forget_sums,
)
from tests.support import oracles
from tests.support.attention_cases import (
    IMPLEMENTATIONS,
    LENGTH,
    TOLERANCE,
    assert_close,
    compiled,
    compiled_together,
    inputs,
    random,
    reference_and_some_streaming,
    reference_only,
    streaming_and_some_reference,
    streaming_only,
)

SIZES = ModelDims(num_heads=4, head_dim=8, model_dim=32)
INDEX = np.arange(LENGTH)
DOCUMENTS = np.stack([np.searchsorted([4, 13, 14], INDEX, side="right"), np.searchsorted([10], INDEX, side="right")])


pytestmark = pytest.mark.usefixtures("small_blocks")


def draw(seed=0):
    return np.random.default_rng(seed)


# Few enough positions that some sums are clipped and some are not.
EMBEDDINGS = random(5, 8, seed=9)


def cope_oracle(query, key, value, embeddings, *, logit_scale=1.0, scaled=False, **rule):
    bias = oracles.cope_bias(query, key, embeddings, logit_scale=logit_scale, scaled=scaled, **rule)
    return oracles.attention(query, key, value, bias=bias, logit_scale=logit_scale, **rule)


def assert_agrees(results, wanted):
    out, stats = results
    assert_close(out, wanted.output)
    assert_close(stats.entropy, wanted.entropy)
    assert_close(stats.logsumexp, wanted.logsumexp)


RULES = {
    "causal": {},
    "window": {"window": 5},
    "segments": {"segment_ids": draw().integers(0, 3, (2, LENGTH))},
    "mask of keys": {"mask": INDEX % 3 != 1},
    "mask per head and row": {"mask": draw().random((2, 4, LENGTH, LENGTH)) < 0.6, "is_causal": False},
    "rows that see nothing": {"mask": (INDEX % 3 > 0)[:, None]},
    "no key before the last block": {"mask": INDEX > 15},
    "logit scale per head, both ways": {
        "logit_scale": np.array([0.5, 1.0, 2.0, 0.0], np.float32),
        "is_causal": False,
    },
    "positions with gaps, per row": {
        "query_positions": np.stack([np.cumsum(draw().integers(1, 9, LENGTH)), INDEX]),
        "key_positions": np.stack([np.cumsum(draw().integers(1, 9, LENGTH)), INDEX]),
        "window": 30,
    },
    "positions out of order": {
        "query_positions": draw(1).permutation(LENGTH),
        "key_positions": draw(2).permutation(LENGTH),
    },
}
RULES["any mask, positions out of order"] = RULES["positions out of order"] | {
    "mask": RULES["mask per head and row"]["mask"] & RULES["rows that see nothing"]["mask"]
}


QUICK = ["segments", "no key before the last block", "logit scale per head, both ways", "positions with gaps, per row"]
ANY = "any mask, positions out of order"
OTHERS = [rule for rule in RULES if rule not in QUICK and rule != ANY]


@functools.cache
def cope_by_rules(rules, implementation):
    settings = {"embeddings": EMBEDDINGS, "implementation": implementation}
    return compiled_together({rule: (cope_attention, inputs(), RULES[rule] | settings) for rule in rules})


# The gradients below have any mask by streaming, and with it what else is slow here.
@pytest.mark.parametrize(
    ("rule", "implementation"),
    [(rule, "streaming") for rule in QUICK]
    + [(ANY, "reference")]
    + [pytest.param(rule, "streaming", marks=pytest.mark.slow) for rule in [ANY, *OTHERS]]
    + [pytest.param(rule, "reference", marks=pytest.mark.slow) for rule in [*QUICK, *OTHERS]],
)
def test_cope_counts_the_keys_each_query_sees(rule, implementation):
    together = next(rules for rules in (QUICK, [ANY], OTHERS) if rule in rules)
    results = cope_by_rules(tuple(together), implementation)[rule]
    assert_agrees(results, cope_oracle(*inputs(), EMBEDDINGS, **RULES[rule]))


@streaming_only
def test_cope_of_queries_against_a_cache(implementation):
    # Three queries at the end or where they are told are among the slow gradients below.
    arrays = {(queries, keys): inputs(T=queries, S=keys) for queries, keys in ((1, 17), (20, 9))}
    settings = {"embeddings": EMBEDDINGS, "implementation": implementation}
    results = compiled_together({shape: (cope_attention, given, settings) for shape, given in arrays.items()})
    for shape, given in arrays.items():
        assert_agrees(results[shape], cope_oracle(*given, EMBEDDINGS))


@reference_and_some_streaming("kv_heads", [1, 4], [], slow=[1])
def test_cope_with_embeddings_per_head_and_the_division_of_its_code(kv_heads, implementation):
    settings, arrays = {"embeddings": random(4, 7, 8, seed=5), "scaled": True}, inputs(K=kv_heads)
    results = compiled(cope_attention, *arrays, **settings, implementation=implementation)
    assert_agrees(results, cope_oracle(*arrays, **settings))


@reference_only
def test_a_single_position_adds_the_same_to_every_key(implementation):
    out, _ = compiled(cope_attention, *inputs(), embeddings=EMBEDDINGS[:1], implementation=implementation)
    assert_close(out, oracles.attention(*inputs()).output)


@reference_only
def test_open_gates_count_tokens(implementation):
    # σ(40) is 1: the query's own key is at position 1, and what is added is q·e[distance + 1].
    query, key, value = inputs()
    query[..., 0], key[..., 0], key[..., 1:] = 1.0, 40 * math.sqrt(8), 0.0
    embeddings = random(30, 8, seed=4)
    out, _ = compiled(cope_attention, query, key, value, embeddings=embeddings, implementation=implementation)
    table = np.einsum("btnh,ph->bntp", query.astype(np.float64), embeddings.astype(np.float64))
    distance = np.maximum(INDEX[:, None] - INDEX, 0)
    bias = np.take_along_axis(table, np.broadcast_to(distance + 1, (2, 4, LENGTH, LENGTH)), axis=-1)
    assert_close(out, oracles.attention(query, key, value, bias=bias).output)


@streaming_only
def test_bfloat16_in_is_bfloat16_out_with_sums_in_float32(implementation):
    arrays = [x.astype(jnp.bfloat16) for x in inputs()]
    exact = [x.astype(np.float64) for x in arrays]
    out, stats = compiled(cope_attention, *arrays, embeddings=EMBEDDINGS, implementation=implementation)
    wanted = cope_oracle(*exact, EMBEDDINGS)
    assert out.dtype == jnp.bfloat16
    assert_close(out, wanted.output, tolerance=2**-8)
    assert_close(stats.logsumexp, wanted.logsumexp)


def mix(results):
    """A number in which every output and statistic has a voice of its own; rows that see nothing say nothing."""
    out, entropy, logsumexp = results
    where = np.where if isinstance(logsumexp, np.ndarray) else jnp.where  # in float64 for the oracles
    logsumexp = where(abs(logsumexp) < math.inf, logsumexp, 0.0)
    return sum((x * random(*x.shape, seed=20 + i)).sum() for i, x in enumerate((out, entropy, logsumexp)))


def with_gradients(attend, implementations):
    """Compiled, of arrays: output, entropy and logsumexp by each; and the gradient of `mix` of them in every array."""

    def loss(arrays, implementation):
        out, stats = attend(**arrays, implementation=implementation, return_stats=True)
        return mix((out, *stats)), (out, *stats)

    @jax.jit
    def run(arrays):
        return [jax.grad(loss, has_aux=True)(arrays, implementation) for implementation in implementations]

    return run


def assert_slope(gradient, exact, arrays, h=1e-5):
    """The gradient along a random direction against finite differences in float64."""
    for seed, name in enumerate(arrays):
        direction = random(*arrays[name].shape, seed=40 + seed).astype(np.float64)
        ahead, behind = (mix(exact(**arrays | {name: arrays[name] + step * direction})[:3]) for step in (h, -h))
        wanted = (ahead - behind) / (2 * h)
        scale = math.sqrt((np.float64(gradient[name]) ** 2).sum() + 1e-4)
        assert abs((np.float64(gradient[name]) * direction).sum() - wanted) < 2 * TOLERANCE * scale, name


def cope_arrays(**shape):
    arrays = dict(zip(("query", "key", "value"), inputs(**shape), strict=True))
    return arrays | {"embeddings": EMBEDDINGS, "logit_scale": np.linspace(0.5, 1.5, 4, dtype=np.float32)}


@pytest.mark.parametrize("rule", [pytest.param("causal", marks=pytest.mark.slow), "any mask, positions out of order"])
def test_gradients_of_cope_agree_with_finite_differences_in_float64(rule):
    arrays, exact = cope_arrays(), functools.partial(cope_oracle, **RULES[rule])
    attend = functools.partial(cope_attention, **RULES[rule])
    ((gradient, results),) = with_gradients(attend, ["streaming"])(arrays)
    jax.tree.map(assert_close, results, tuple(exact(**arrays)[:3]))
    assert set(gradient) == {"query", "key", "value", "embeddings", "logit_scale"}
    assert_slope(gradient, exact, arrays)


@pytest.mark.parametrize(
    ("shape", "rule"),
    [
        pytest.param({}, {"segment_ids": DOCUMENTS, "window": 6}, marks=pytest.mark.slow),
        pytest.param({}, RULES["any mask, positions out of order"], marks=pytest.mark.slow),
        pytest.param({"T": 3, "S": 21}, {"query_positions": np.array([7, 8, 9])}, marks=pytest.mark.slow),
    ],
)
def test_scanning_has_the_values_of_the_oracle_and_the_gradients_of_the_definition(shape, rule):
    arrays = cope_arrays(**shape)
    streamed, reference = with_gradients(functools.partial(cope_attention, **rule), IMPLEMENTATIONS[::-1])(arrays)
    wanted = tuple(cope_oracle(**arrays, **rule)[:3])
    for _, results in (streamed, reference):
        jax.tree.map(assert_close, results, wanted)
    jax.tree.map(assert_close, streamed[0], reference[0])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(streamed[0]))


def _drifting(parameters, block, content, visible, carry):
    """A sum over later keys of something that depends on every array of a term, one of integers among them."""
    rate, order = parameters
    of_query, of_key = block.query_features[:, None, :, None], block.key_features[:, None, None, :]
    apart = jnp.sin(rate[:, None, None] * of_query * of_key + order[0] * block.factor[..., None])
    step = jnp.where(visible, apart * jnp.tanh(content + block.query @ block.key.mT), 0.0)
    sums = jnp.cumsum(step[..., ::-1], axis=-1)[..., ::-1] + carry[..., None]
    return sums, sums[..., 0]


def _leaning(scale, weights, block):
    return scale * (weights @ jnp.sin(block.key)) * block.query_features[:, None, :, None]


def test_scanning_differentiates_every_array_of_its_terms():
    """Of the last 13 queries."""
    query, key, value = inputs(T=13, S=LENGTH)
    arrays = {"query": query, "key": key, "value": value, "logit_scale": np.linspace(0.5, 1.5, 4, dtype=np.float32)}
    terms = {"rate": random(4, seed=11), "scale": random(seed=12), "features": random(2, LENGTH, seed=13)}

    def attend(rate, scale, features, **arrays):
        return dot_product.dot_product_attention(
            **arrays,
            logit=ScanLogit(_drifting, (rate, np.array([2, 3])), features[:, -13:], features),
            value_term=BlockValue(_leaning, scale),
            mask=RULES["mask per head and row"]["mask"][:, :, -13:],
            softcap=2.0,
        )

    streamed, reference = with_gradients(attend, IMPLEMENTATIONS[::-1])(arrays | terms)
    jax.tree.map(assert_close, streamed, reference)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(streamed[0]))


def test_scanning_visits_blocks_from_the_last_key_and_skips_what_is_not_seen():
    # Which keys a block had, in the order of the visits, is written into the logits through the carry.
    def order(_, block, content, visible, carry):
        return jnp.broadcast_to(carry[..., None], content.shape), carry + jnp.where(visible, 1.0, 0.0).sum(-1)

    zeros = [np.zeros((1, 24, 1, 2), np.float32)] * 3
    _, stats = compiled(dot_product.dot_product_attention, *zeros, logit=ScanLogit(order), implementation="streaming")
    # Query 20 sees 5 keys of the last block with carry 0, then 8 with 5, then 8 with 13.
    logsumexp = np.asarray(stats.logsumexp)[0, 0]
    assert_close(logsumexp[20], math.log(5 + 8 * math.exp(5) + 8 * math.exp(13)))
    assert_close(logsumexp[3], math.log(4))


# --- The forget gate


def log_forget(B=2, S=LENGTH, N=4, seed=3):
    return -np.log1p(np.exp(-1.0 - random(B, S, N, seed=seed)))


def forget_oracle(query, key, value, log_forget, query_start=None, **common):
    bias = oracles.forgetting_bias(log_forget, query.shape[1], query_start)
    return oracles.attention(query, key, value, bias=bias, **common)


# What is visible is not its own to say: test_every_encoding.py has segments and masks, and gradients at any positions.
@streaming_and_some_reference(
    "rule",
    ["causal", "window", "segments", "mask per head and row", "logit scale per head, both ways",
     "positions with gaps, per row"],
    ["positions with gaps, per row"],
    slow=["causal", "window", "segments", "mask per head and row"],
)  # fmt: skip
def test_forgetting_is_that_of_the_paper(rule, implementation):
    settings = RULES[rule] | {"implementation": implementation}
    results = compiled(forgetting_attention, *inputs(), log_forget=log_forget(), **settings)
    assert_agrees(results, forget_oracle(*inputs(), log_forget(), **RULES[rule]))


@streaming_only
def test_forgetting_of_queries_against_a_cache(implementation):
    arrays, settings = inputs(T=3, S=LENGTH, K=1), {"log_forget": log_forget(), "implementation": implementation}
    told = {"query_start": np.int32(9), "query_positions": np.arange(9, 12)}
    results = compiled_together(
        {
            "at its end": (forgetting_attention, arrays, settings),
            "where they are told": (forgetting_attention, arrays, settings | told),
        }
    )
    assert_agrees(results["at its end"], forget_oracle(*arrays, log_forget()))
    wanted = forget_oracle(*arrays, log_forget(), 9, query_positions=told["query_positions"])
    assert_agrees(results["where they are told"], wanted)


def test_gradients_of_forgetting_agree_with_finite_differences_in_float64():
    attend = with_gradients(forgetting_attention, ["streaming"])
    arrays = dict(zip(("query", "key", "value"), inputs(), strict=True))
    for gates in (log_forget(), np.zeros((2, LENGTH, 4), np.float32)):  # open gates forget nothing and still learn
        arrays["log_forget"] = gates
        ((gradient, results),) = attend(arrays)
        jax.tree.map(assert_close, results, tuple(forget_oracle(**arrays)[:3]))
        assert_slope(gradient, forget_oracle, arrays)


def test_a_gate_of_zero_forgets_all_tokens_before():
    query, key, value = inputs()
    gates = log_forget().copy()
    gates[:, 9] = -np.inf

    @jax.jit
    def attend(*arrays):
        return [
            forgetting_attention(
                *(x[:, start:] for x in arrays[:3]), log_forget=arrays[3][:, start:], implementation="reference"
            )
            for start in (0, 9)
        ]

    out, later = attend(query, key, value, gates)
    assert np.isfinite(out).all()
    assert_close(np.asarray(out)[:, 9:], later)


def test_bfloat16_inputs_have_their_gates_in_float32():
    params = {"weights": random(32, 4) / 10, "bias": random(4, seed=1)}
    x = random(2, LENGTH, 32).astype(jnp.bfloat16)

    @jax.jit
    def attend(x, *arrays):
        sums = Forgetting().features(params, x, None)
        return sums, encoded_attention(Forgetting(), params, *arrays, query_features=sums, key_features=sums)

    sums, out = attend(x, *(x.astype(jnp.bfloat16) for x in inputs()))
    assert sums.high.dtype == sums.low.dtype == jnp.float32
    gate = x.astype(np.float64) @ params["weights"].astype(np.float64) + params["bias"]
    assert_close(sums.high, np.cumsum(-np.log1p(np.exp(-gate)), axis=1))
    assert out.dtype == jnp.bfloat16


def test_sums_run_on_from_token_to_token():
    gates = log_forget().copy()

    @jax.jit
    def sums(gates):
        whole, parts, previous = forget_sums(gates), [], None
        for start, stop in ((0, 5), (5, 6), (6, LENGTH)):
            parts.append(forget_sums(gates[:, start:stop], previous))
            previous = jax.tree.map(lambda x: x[:, -1], parts[-1])
        none = jax.tree.map(jnp.zeros_like, previous)
        return (
            whole,
            RunningSum(*(jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True))),
            forget_sums(gates, none),
        )

    whole, parts, from_none = sums(gates)
    exact = np.cumsum(np.asarray(gates, np.float64), axis=1)
    for run in (whole, parts):
        np.testing.assert_allclose(np.float64(run.high) + np.float64(run.low), exact, rtol=1e-12)
    jax.tree.map(np.testing.assert_array_equal, from_none, whole)


@pytest.mark.parametrize("strength", [1e-4, 0.3, 20.0])
def test_differences_of_long_sums_stay_exact(strength):
    # Sums of up to -3e5 at T = 16,384, whose float32 neighbours are 0.03 apart.
    length = 16_384
    gates = -(strength * draw().random((1, length, 2))).astype(np.float32)
    gates[0, : length // 2, 0] *= 20 / strength  # a past of strong forgetting, then weak
    sums = jax.jit(forget_sums)(gates)
    exact = np.cumsum(gates.astype(np.float64), axis=1)
    logit = Forgetting().logit({}, None, None, sums, sums)
    rows = np.array([1, 100, 8191, 8300, 12_000, length - 1])

    def block(queries, keys):
        cut = [jax.tree.map(lambda x, at=at: x[:, at], sums) for at in (queries, keys)]
        query, key = (jnp.zeros((1, 2, len(at), 1)) for at in (queries, keys))
        factor, query_positions, key_positions = 1.0, queries[None], keys[None]
        return logit.block(Tile(query, factor, key, query_positions, key_positions, *cut))

    actual = np.asarray(jax.jit(lambda: block(rows, np.arange(length)))())
    wanted = (exact[:, rows, None] - exact[:, None, :]).transpose(0, 3, 1, 2)
    near = np.arange(length) <= rows[:, None]
    error = np.abs(actual - wanted)[:, :, near]
    assert (error <= 1e-6 * np.abs(wanted[:, :, near]) + 1e-9).all()
    if strength == 20.0:
        plain = (exact.astype(np.float32)[:, rows, None] - exact.astype(np.float32)[:, None, :]).transpose(0, 3, 1, 2)
        assert np.abs(plain - wanted)[:, :, near].max() > 5e-3


def test_the_forget_gate_starts_as_in_its_authors_code():
    dims = ModelDims(num_heads=64, head_dim=8, model_dim=512)
    params = jax.jit(Forgetting().init_layer, static_argnums=1)(jax.random.key(0), dims)
    np.testing.assert_allclose(np.asarray(params["weights"]).std(), 0.02, rtol=0.02)
    np.testing.assert_array_equal(params["bias"], np.zeros(64))


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("num_positions", lambda: CoPE(num_positions=0)),
        ("embeddings", lambda: cope_attention(*inputs(), embeddings=np.ones((5, 7)))),
        ("embeddings", lambda: cope_attention(*inputs(), embeddings=np.ones((3, 5, 8)))),
        ("embeddings", lambda: cope_attention(*inputs(), embeddings=np.ones(8))),
        ("log_forget", lambda: forgetting_attention(*inputs(), log_forget=np.zeros((2, LENGTH, 3)))),
        ("log_forget", lambda: forgetting_attention(*inputs(T=3), log_forget=np.zeros((2, 4, 4)))),
        ("query", lambda: forgetting_attention(*inputs(T=4, S=3), log_forget=np.zeros((2, 3, 4)))),
    ],
)
def test_what_cannot_be_is_refused_by_name(name, make):
    with pytest.raises(ValueError, match=rf"\A{name} must .*\Z"):
        make()


def test_the_registry_has_the_papers_settings():
    assert ENCODINGS["cope"]() == CoPE(num_positions=64, scaled=False) and ENCODINGS["forgetting"]() == Forgetting()
    params = CoPE().init_layer(jax.random.key(0), SIZES)
    assert params["embeddings"].shape == (64, 8) and not params["embeddings"].any()
