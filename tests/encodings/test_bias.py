"""ALiBi, T5, KERPLE and FIRE: their settings and parameters, held to published models and to float64 NumPy."""

import functools
import itertools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nope_jax.attention import (
    alibi_attention,
    encoded_attention,
    fire_attention,
    kerple_attention,
    t5_attention,
)
from nope_jax.encodings import ENCODINGS, FIRE, KERPLE, T5, ALiBi, ModelDims, alibi_slopes
from tests.support import oracles
from tests.support.attention_cases import (
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
)

GOLDENS = Path(__file__).parents[1] / "goldens"
GOLDEN = json.loads((GOLDENS / "bias.json").read_text())
T5_GOLDEN = json.loads((GOLDENS / "huggingface.json").read_text())["attention"]
SIZES = ModelDims(num_heads=4, head_dim=8, model_dim=32)
INDEX = np.arange(LENGTH)


pytestmark = pytest.mark.usefixtures("small_blocks")


def kerple_parameters(variant):
    r2 = np.array([0.05, 0.3, 1.0, 4.0]) if variant == "log" else np.array([0.1, 0.7, 1.0, 2.0])
    return {"r1": np.array([2.0, 0.5, 0.1, 0.02], np.float32), "r2": r2.astype(np.float32)}


def fire_parameters():
    """A threshold in the middle of the positions, units that turn on, turn off, are always on and never on."""
    hidden_weights = np.linspace(-1.5, 1.5, 7, dtype=np.float32)
    hidden_weights[3] = 0.0
    hidden_bias = np.array([0.9, 0.3, 0.2, 0.4, -0.1, -0.6, 0.1], np.float32)
    mlp = {"hidden_weights": hidden_weights, "hidden_bias": hidden_bias, "weights": random(7, 4, seed=7)}
    return mlp | {"bias": random(4, seed=8), "c": np.float32(0.6), "threshold": np.float32(9.5)}


CASES = {
    "kerple log": (functools.partial(kerple_attention, variant="log"), kerple_parameters("log")),
    "kerple power": (functools.partial(kerple_attention, variant="power"), kerple_parameters("power")),
    "fire": (fire_attention, fire_parameters()),
}


def bias(case, parameters, query_positions, key_positions):
    if case == "fire":
        return oracles.fire_bias(query_positions, key_positions, **parameters)
    return oracles.kerple_bias(**parameters, query_positions=query_positions, key_positions=key_positions,
                               variant=case.split()[1])  # fmt: skip


def oracle(case, parameters, query, key, value, *, query_positions=None, key_positions=None, **common):
    at = oracles.positions(len(query), query.shape[1], key.shape[1], query_positions, key_positions)
    added = bias(case, parameters, *at)
    return oracles.attention(query, key, value, bias=added, query_positions=at[0], key_positions=at[1], **common)


COMMON = {
    "defaults": {},
    "logit scale per head, both ways": {
        "logit_scale": np.array([0.5, 1.0, 2.0, 0.0], np.float32),
        "is_causal": False,
    },
    "positions with gaps, per row": {
        "query_positions": np.stack([3 * INDEX, INDEX]),
        "key_positions": np.stack([3 * INDEX, INDEX]),
    },
}


QUICK = [
    ("kerple log", "logit scale per head, both ways"),
    ("kerple power", "positions with gaps, per row"),
    ("fire", "logit scale per head, both ways"),
    ("fire", "positions with gaps, per row"),
]
OTHERS = [pair for pair in itertools.product(CASES, COMMON) if pair not in QUICK]


@functools.cache
def results_of(pairs, implementation):
    calls = {
        (case, common): CASES[case][1] | COMMON[common] | {"implementation": implementation} for case, common in pairs
    }
    return compiled_together({pair: (CASES[pair[0]][0], inputs(), call) for pair, call in calls.items()})


# A bias by distance needs each of them once; the gradients below begin with the defaults.
@streaming_and_some_reference("pair", QUICK + OTHERS, [], slow=OTHERS)
def test_attention_is_that_of_the_paper(pair, implementation):
    out, stats = results_of(tuple(QUICK if pair in QUICK else OTHERS), implementation)[pair]
    case, common = pair
    wanted = oracle(case, CASES[case][1], *inputs(), **COMMON[common])
    assert_close(out, wanted.output)
    assert_close(stats.entropy, wanted.entropy)
    assert_close(stats.logsumexp, wanted.logsumexp)


# Of a bias by distance alone test_attention.py has this.
@reference_and_some_streaming("case", CASES, [], slow=["kerple log", "kerple power"])
def test_queries_against_a_cache_stand_at_its_end_or_where_they_are_told(case, implementation):
    attend, parameters = CASES[case]
    arrays = inputs(T=3, S=LENGTH)
    places = {}, {"query_positions": np.array([9, 10, 11])}

    @jax.jit
    def outputs(*arrays):
        return [attend(*arrays, **parameters, **where, implementation=implementation) for where in places]

    for where, out in zip(places, outputs(*arrays), strict=True):
        assert_close(out, oracle(case, parameters, *arrays, **where).output)


@reference_and_some_streaming("case", CASES, [], slow=["kerple log", "kerple power"])
def test_bfloat16_in_is_bfloat16_out_and_the_bias_is_float32(case, implementation):
    attend, parameters = CASES[case]
    arrays = [x.astype(jnp.bfloat16) for x in inputs()]
    out, stats = compiled(attend, *arrays, **parameters, implementation=implementation)
    wanted = oracle(case, parameters, *(x.astype(np.float64) for x in arrays))
    assert out.dtype == jnp.bfloat16
    assert_close(out, wanted.output, tolerance=2**-8)
    assert_close(stats.logsumexp, wanted.logsumexp)


def mix(out, logsumexp):
    return (out * random(*out.shape, seed=20)).sum() + (logsumexp * random(*logsumexp.shape, seed=21)).sum()


@pytest.mark.parametrize(
    ("case", "explicit"),
    [
        # As those of T5 and ALiBi in test_attention.py; a test below has the power's gradient in closed form.
        pytest.param("kerple log", False, marks=pytest.mark.slow),
        pytest.param("kerple power", False, marks=pytest.mark.slow),
        pytest.param("fire", True, marks=pytest.mark.slow),  # as the forgetting of test_every_encoding.py
        ("fire", False),
    ],
)
def test_values_agree_with_float64_and_gradients_of_every_parameter_with_its_differences(case, explicit):
    attend, parameters = CASES[case]
    where = {"query_positions": 2 * INDEX, "key_positions": 2 * INDEX} if explicit else {}

    def loss(parameters):
        out, stats = attend(*inputs(B=1), **parameters, **where, implementation="streaming", return_stats=True)
        return mix(out, stats.logsumexp), (out, *stats)

    def exact(parameters):
        return oracle(case, parameters, *inputs(B=1), **where)

    gradient, results = jax.jit(jax.grad(loss, has_aux=True))(parameters)
    jax.tree.map(assert_close, results, tuple(exact(parameters)[:3]))
    h = 1e-5
    for name, x in parameters.items():
        direction = np.asarray(random(*x.shape, seed=30), np.float64)
        ahead, behind = (exact(parameters | {name: x + step * direction}) for step in (h, -h))
        wanted = (mix(ahead.output, ahead.logsumexp) - mix(behind.output, behind.logsumexp)) / (2 * h)
        # The bias of all keys together is forgotten by the output, and moves every logsumexp by itself.
        size = max(float(np.abs(gradient[name]).sum()), 1.0)
        assert abs((np.float64(gradient[name]) * direction).sum() - wanted) < TOLERANCE * size, name


# --- ALiBi


# Streaming is held to the oracles above and in test_attention.py.
@reference_only
def test_alibi_is_that_of_mpt(implementation):
    golden = {name: np.array(x, np.float32) for name, x in GOLDEN["mpt"].items()}
    arrays = golden["query"], golden["key"], golden["value"]
    out, stats = compiled(alibi_attention, *arrays, implementation=implementation)
    assert_close(out, golden["out"])
    assert_close(stats.entropy, golden["entropy"])


@reference_only
def test_falcon_divides_its_slopes_by_the_root_of_the_head_dim_too(implementation):
    golden = {name: np.array(x, np.float32) for name, x in GOLDEN["falcon"].items()}
    arrays = golden["query"], golden["key"], golden["value"]
    slopes = np.asarray(alibi_slopes(4)) / math.sqrt(8)
    given = ALiBi(slopes=slopes.tolist())

    @jax.jit
    def outputs(*arrays):
        attend = functools.partial(alibi_attention, *arrays, implementation=implementation, return_stats=True)
        return attend(slopes=slopes), encoded_attention(given, {}, *arrays, implementation=implementation)

    (out, stats), of_encoding = outputs(*arrays)
    assert_close(out, golden["out"])
    assert_close(stats.entropy, golden["entropy"])
    assert_close(of_encoding, golden["out"])
    at = np.arange(arrays[0].shape[1])[None]
    plain = oracles.attention(*arrays, bias=oracles.alibi_bias(alibi_slopes(4), at, at))
    assert np.abs(plain.output - golden["out"]).max() > 1e-2


def test_slopes_of_ones_own_are_one_per_head_and_may_be_learned_from_there():
    given = ALiBi(learned=True, slopes=[0.5, 0.4, 0.3, 0.2])
    assert given == ALiBi(learned=True, slopes=(0.5, 0.4, 0.3, 0.2)) and hash(given)
    np.testing.assert_allclose(given.init_layer(jax.random.key(0), SIZES)["slopes"], [0.5, 0.4, 0.3, 0.2])
    with pytest.raises(ValueError, match=r"\Aslopes must be 4 numbers, one per query head, not 2\Z"):
        ALiBi(slopes=(0.5, 0.25)).bind(SIZES)
    with pytest.raises(ValueError, match=r"\Aslopes must be at least 0, not -1.0\Z"):
        ALiBi(slopes=(0.5, -1.0))


def test_learned_slopes_start_from_the_papers_and_are_parameters_of_each_layer():
    assert ALiBi().init_layer(jax.random.key(0), SIZES) == {}
    params = ALiBi(learned=True).init_layer(jax.random.key(0), SIZES)
    np.testing.assert_array_equal(params["slopes"], alibi_slopes(4))
    moved = {"slopes": np.array([0.9, 0.5, 0.1, -0.2], np.float32)}

    @jax.jit
    def outputs(*arrays):
        learned = [encoded_attention(ALiBi(learned=True), made, *arrays) for made in (params, moved)]
        return encoded_attention(ALiBi(), {}, *arrays), *learned

    arrays = inputs()
    plain, started, out = outputs(*arrays)
    np.testing.assert_array_equal(started, plain)
    wanted = oracles.attention(*arrays, bias=oracles.alibi_bias(moved["slopes"], INDEX[None], INDEX[None]))
    assert_close(out, wanted.output)


# --- T5


@reference_only
@pytest.mark.parametrize("name", ["t5_causal", "t5_bidirectional"])
def test_t5_without_the_root_is_the_published_model(name, implementation):
    golden = {key: np.array(x, np.float32) for key, x in T5_GOLDEN[name].items()}
    query = golden["query"] / math.sqrt(golden["query"].shape[-1])  # stored times √H; T5's own
    both = name == "t5_bidirectional"
    out, stats = compiled(
        t5_attention, query, golden["key"], golden["value"], table=golden["table"], max_distance=16, bidirectional=both,
        scaled=False, is_causal=not both, implementation=implementation,
    )  # fmt: skip
    assert_close(out, golden["out"])
    assert_close(stats.entropy, golden["entropy"])


def test_t5_without_the_root_multiplies_the_queries_and_keeps_their_dtype():
    table = random(32, 4, seed=9)
    logit_scale = np.array([0.5, 1.0, 2.0, 0.3], np.float32)

    @functools.partial(jax.jit, static_argnames="root")
    def both(*arrays, logit_scale, root):
        attend = functools.partial(t5_attention, *arrays, table=table)
        return attend(scaled=False, logit_scale=logit_scale), attend(logit_scale=root * logit_scale)

    unscaled, scaled = both(*inputs(), logit_scale=logit_scale, root=math.sqrt(8))
    assert_close(unscaled, scaled, tolerance=2e-6)
    # √16 = 4 is exact in bfloat16.
    unscaled, scaled = both(*(x.astype(jnp.bfloat16) for x in inputs(H=16)), logit_scale=1.0, root=4)
    assert unscaled.dtype == jnp.bfloat16
    np.testing.assert_array_equal(unscaled, scaled)


# --- KERPLE


@pytest.mark.parametrize("variant", ["log", "power"])
def test_kerple_starts_as_its_authors_code(variant):
    dims = SIZES.__class__(num_heads=4096, head_dim=1, model_dim=1)

    @jax.jit
    def start(key):
        return KERPLE(variant).logit(KERPLE(variant).init_layer(key, dims), None, None).parameters

    r1, r2 = map(np.asarray, start(jax.random.key(0)))
    most = {"log": (2, 1), "power": (1, 2)}[variant]
    for r, high in zip((r1, r2), most, strict=True):
        np.testing.assert_allclose([r.min(), r.max()], [0.01, high], rtol=5e-3)
        np.testing.assert_allclose(r.mean(), high / 2, rtol=0.05)


@pytest.mark.parametrize("variant", ["log", "power"])
def test_kerple_stays_within_its_bounds_wherever_training_takes_it(variant):
    names = jax.eval_shape(lambda key: KERPLE(variant).init_layer(key, SIZES), jax.random.key(0))

    @jax.jit
    def parameters(raw):
        return KERPLE(variant).logit({name: jnp.full(4, raw) for name in names}, None, None).parameters

    for raw in (-40.0, 40.0):
        r1, r2 = map(np.asarray, parameters(raw))
        assert (r1 > 0).all() and (r2 > 0).all() and np.isfinite(r1).all()
        assert variant == "log" or (r2 <= 2).all()


def test_the_power_kernel_has_a_finite_gradient_at_distance_0():
    @jax.jit
    @jax.value_and_grad
    def of(parameters):
        logit = KERPLE("power").bias(*parameters)
        return logit.function(logit.parameters, jnp.arange(3)).sum()

    value, gradient = of((np.float32([0.5]), np.float32([0.3])))
    assert_close(value, -0.5 * (1 + 2**0.3))
    assert_close(gradient, [[-(1 + 2**0.3)], [-0.5 * 2**0.3 * math.log(2)]])


# --- FIRE


def test_fire_starts_as_the_paper_says():
    params = jax.jit(FIRE().init_layer, static_argnums=1)(jax.random.key(0), SIZES)
    assert params["hidden_weights"].shape == params["hidden_bias"].shape == (32,)
    assert params["weights"].shape == (32, 4) and params["bias"].shape == (4,)
    np.testing.assert_allclose(np.exp(params["log_c"]), 0.1, rtol=1e-6)
    np.testing.assert_allclose(np.exp(params["log_threshold"]), 512, rtol=1e-6)
    assert np.abs(params["hidden_weights"]).max() <= 1 and np.abs(params["weights"]).max() <= 32**-0.5


def test_fire_forgets_the_bias_of_its_last_layer():
    @jax.jit
    def outputs(*arrays):
        return [fire_attention(*arrays, **fire_parameters() | told) for told in ({}, {"bias": None})]

    assert_close(*outputs(*inputs()))


def test_fire_depends_on_where_the_tokens_stand_only_past_the_threshold():
    @jax.jit
    def attend(at, threshold):
        told = {"threshold": threshold, "query_positions": at, "key_positions": at}
        return fire_attention(*inputs(), **fire_parameters() | told)

    near, far = fire_parameters()["threshold"], np.float32(100.0)
    assert_close(attend(INDEX + 40, far), attend(INDEX, far))
    assert np.abs(np.asarray(attend(INDEX + 40, near)) - attend(INDEX, near)).max() > 1e-2


def test_fire_is_exact_at_many_units_and_large_weights():
    # Pieces of a wide layer are short, and x often falls next to an edge.
    rng = np.random.default_rng(0)
    parameters = {
        "hidden_weights": rng.normal(size=64).astype(np.float32),
        "hidden_bias": rng.normal(size=64).astype(np.float32) * 0.5,
        "weights": random(64, 4, seed=1),
        "threshold": np.float32(7.0),
    }
    wanted = oracle("fire", parameters, *inputs())
    out, _ = compiled(fire_attention, *inputs(), **parameters)
    assert_close(out, wanted.output)


# --- Bad input, and models


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("variant", lambda: KERPLE("cosine")),
        ("width", lambda: FIRE(width=0)),
        ("c", lambda: FIRE(c=0.0)),
        ("threshold", lambda: FIRE(threshold=math.inf)),
        ("r1", lambda: kerple_attention(*inputs(), r1=np.ones(3), r2=np.ones(4))),
        ("r2", lambda: kerple_attention(*inputs(), r1=np.ones(4), r2=np.ones((4, 1)))),
        (
            "hidden_weights",
            lambda: fire_attention(*inputs(), **fire_parameters() | {"hidden_weights": np.ones((1, 7))}),
        ),
        ("hidden_bias", lambda: fire_attention(*inputs(), **fire_parameters() | {"hidden_bias": np.ones(6)})),
        ("weights", lambda: fire_attention(*inputs(), **fire_parameters() | {"weights": np.ones((4, 7))})),
        ("bias", lambda: fire_attention(*inputs(), **fire_parameters() | {"bias": np.ones(7)})),
        ("c", lambda: fire_attention(*inputs(), **fire_parameters() | {"c": np.ones(4)})),
    ],
)
def test_what_cannot_be_is_refused_by_name(name, make):
    with pytest.raises(ValueError, match=rf"\A{name} must .*\Z"):
        make()


def test_the_registry_has_the_papers_settings():
    assert ENCODINGS["kerple"]() == KERPLE("log") and ENCODINGS["fire"]() == FIRE(width=32, c=0.1, threshold=512.0)
    assert ENCODINGS["alibi"]() == ALiBi(learned=False) and ENCODINGS["t5"]() == T5(scaled=True)


@pytest.mark.parametrize(
    "encoding", [ALiBi(learned=True), KERPLE("log"), KERPLE("power"), FIRE(threshold=4.0)], ids=str
)
def test_every_parameter_of_a_layer_learns(encoding):
    def loss(params):
        return (encoded_attention(encoding, params, *inputs(B=1), implementation="reference") ** 2).sum()

    @jax.jit
    def gradient(key):
        return jax.grad(loss)(encoding.init_layer(key, SIZES))

    for name, x in gradient(jax.random.key(0)).items():
        # What all keys share the softmax forgets.
        assert np.isfinite(x).all() and (name == "bias" or np.abs(x).max() > 1e-6), name
