"""What numbers attention may meet: mixed dtypes, 64 bits, NaN and infinities, terms of one row, no tokens at all."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nope_jax import attention
from nope_jax.attention import dot_product_attention, nope_attention
from nope_jax.attention.backends.diagonals import shear, unshear
from nope_jax.encodings import ENCODINGS, BlockLogit, BlockValue, CoPE, DistanceLogit, Shaw
from tests.support.attention_cases import (
    IMPLEMENTATIONS,
    assert_close,
    every_implementation,
    others_slow,
    random,
    streaming_and_some_reference,
    streaming_only,
)

pytestmark = pytest.mark.usefixtures("small_blocks")

B, T, N, K, H, D = 1, 21, 4, 2, 8, 16


def arrays(length=T, keys=None):
    keys = length if keys is None else keys
    return [random(B, n, heads, H, seed=i) for i, (n, heads) in enumerate([(length, N), (keys, K), (keys, K)])]


def own_parameters(name, keys=T):
    """What `<name>_attention` needs beside queries, keys and values."""
    positive = np.full(N, 0.5, np.float32)
    return {
        "cope": {"embeddings": random(5, H)},
        "deberta": {"relative": random(8, D), "key_kernel": random(D, K, H), "query_kernel": random(D, N, H)},
        "fire": {"hidden_weights": random(6), "hidden_bias": random(6), "weights": random(6, N)},
        "forgetting": {"log_forget": -np.abs(random(B, keys, N))},
        "kerple": {"r1": positive, "r2": positive},
        "shaw": {"key_table": random(9, H), "value_table": random(9, H)},
        "t5": {"table": random(32, N)},
        "transformer_xl": {
            "content_bias": random(N, H),
            "position_bias": random(N, H),
            "position_kernel": random(D, N, H),
        },
        "tupe": {
            "positions": random(64, D),
            "query_kernel": random(D, N, H),
            "key_kernel": random(D, K, H),
            "table": random(32, N),
        },
    }.get(name, {})


FUNCTIONS = sorted(name.removesuffix("_attention") for name in attention.__all__ if name.endswith("_attention"))
FUNCTIONS = [name for name in FUNCTIONS if name in ENCODINGS]
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
some_functions = pytest.mark.parametrize("name", others_slow(FUNCTIONS))


def value_and_gradient(attend, operands, **keywords):
    """A function of the operands: output and statistics in float32, and the gradient of all of them."""

    def loss(*operands):
        out, stats = attend(*operands, return_stats=True, **keywords)
        assert out.dtype == operands[2].dtype
        assert stats.entropy.dtype == stats.logsumexp.dtype == jnp.float32
        out, (entropy, logsumexp) = out.astype(jnp.float32), stats
        total = (out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape))).sum() + (entropy**2).sum()
        return total + jnp.where(jnp.isfinite(logsumexp), logsumexp, 0.0).sum(), (out, entropy, logsumexp)

    return jax.value_and_grad(loss, argnums=tuple(range(len(operands))), has_aux=True)


def results(attend, *operands, **keywords):
    """Output and statistics, and the gradient."""
    (_, values), gradient = jax.jit(value_and_gradient(attend, operands, **keywords))(*operands)
    return jax.tree.map(lambda x: np.asarray(x, np.float64), (values, gradient))


# --- Dtypes

F32, BF16, F16 = jnp.float32, jnp.bfloat16, jnp.float16
MIXES = [mix for mix in itertools.product([F32, BF16, F16], repeat=3) if len(set(mix)) > 1]
QUICK = [("block", (F16, BF16, F32)), ("scan", (F32, BF16, BF16))]


def block_term(table, block):
    return jnp.einsum("bnqh,bnkh,h->bnqk", block.query, block.key.astype(jnp.float32), table)


def distance_term(rate, distance):
    return -rate[:, None] * jnp.abs(distance) if distance.ndim == 1 else -jnp.multiply.outer(rate, jnp.abs(distance))


TERMS = {
    "none": dict,
    "distance": lambda: {"logit": DistanceLogit(distance_term, np.linspace(0.1, 0.5, N, dtype=np.float32))},
    "block": lambda: {"logit": BlockLogit(block_term, random(H))},
    "scan": lambda: {"logit": CoPE().logit({"embeddings": random(5, H)}, None, None)},
    "value": lambda: {"value_term": Shaw(clip=4).value({"values": random(9, H)})},
    "soft cap": lambda: {"softcap": 0.5, "qk_scale": 1.2},
    "soft cap and block": lambda: {"softcap": 0.5, **TERMS["block"]()},
    "soft cap and scan": lambda: {"softcap": 0.5, **TERMS["scan"]()},
}


@pytest.mark.parametrize(
    ("term", "mix"),
    [
        (term, mix) if (term, mix) in QUICK else pytest.param(term, mix, marks=pytest.mark.slow)
        for term, mix in itertools.product(TERMS, MIXES)
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(jnp.dtype(d).name for d in x),
)
def test_dtypes_may_be_mixed(term, mix):
    operands = [x.astype(dtype) for x, dtype in zip(arrays(), mix, strict=True)]
    streaming, reference = (
        results(dot_product_attention, *operands, implementation=name, **TERMS[term]())
        for name in ("streaming", "reference")
    )
    for actual, wanted in zip(streaming[0], reference[0], strict=True):
        assert_close(actual, wanted, tolerance=0.02)
    for actual, wanted in zip(streaming[1], reference[1], strict=True):
        assert_close(actual, wanted, tolerance=0.03)


def test_narrow_keys_and_values_cost_a_float32_query_nothing():
    """What is computed of them is computed in float32, as the reference does."""
    query, key, value = arrays()
    key = key.astype(BF16)
    (values, gradient), (wanted, wanted_gradient) = (
        results(nope_attention, query, key, value, implementation=name) for name in ("streaming", "reference")
    )
    jax.tree.map(assert_close, values, wanted)
    assert_close(gradient[0], wanted_gradient[0], tolerance=5e-5)


@some_functions
@pytest.mark.parametrize(
    ("dtype", "cases"),
    # Explicit positions are int64 then, which is what may not be carried through blocks.
    [
        (F32, [(np.arange(T), "streaming")]),
        *(
            pytest.param(x, [*itertools.product([None, np.arange(T)], IMPLEMENTATIONS)], marks=pytest.mark.slow)
            for x in (F32, BF16, jnp.float64)
        ),
    ],
    ids=["quick", "float32", "bfloat16", "float64"],
)
def test_all_can_be_traced_with_64_bits_and_where_jax_promotes_nothing(dtype, cases, name):
    function, own = getattr(attention, f"{name}_attention"), own_parameters(name)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        operands = [jax.ShapeDtypeStruct(x.shape, dtype) for x in arrays()]
        for positions, implementation in cases:
            common = {"query_positions": positions, "key_positions": positions, "implementation": implementation}
            _, gradient = jax.eval_shape(value_and_gradient(function, operands, **common, **own), *operands)
            assert all(x.dtype == dtype for x in gradient)


@pytest.mark.parametrize("name", [name if name in ("t5", "shaw") else slow(name) for name in FUNCTIONS])
@streaming_only
def test_all_can_be_traced_where_jax_promotes_nothing_and_positions_run_on(implementation, name):
    function, own = getattr(attention, f"{name}_attention"), own_parameters(name)
    operands = [jax.ShapeDtypeStruct(x.shape, F32) for x in arrays()]
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        compute = value_and_gradient(function, operands, implementation=implementation, **own)
        _, gradient = jax.eval_shape(compute, *operands)
    assert [(x.shape, x.dtype) for x in gradient] == [(x.shape, F32) for x in operands]


def _in_64_bits(table, weights, block):
    return weights @ (table * block.key.astype(jnp.float64))


def test_a_value_term_of_64_bits_is_added_in_32():
    with jax.enable_x64(True):
        operands = [jax.ShapeDtypeStruct(x.shape, F32) for x in arrays()]
        term = BlockValue(_in_64_bits, jax.ShapeDtypeStruct((), jnp.float64), heads=(None,))
        own = functools.partial(dot_product_attention, implementation="streaming")
        assert jax.eval_shape(lambda term, *x: own(*x, value_term=term), term, *operands).dtype == F32
        shaw = functools.partial(attention.shaw_attention, **own_parameters("shaw"), implementation="streaming")
        assert jax.eval_shape(shaw, *operands).dtype == F32


@pytest.mark.parametrize(
    "name", ["t5", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cope", "forgetting"))]
)
def test_float64_is_computed_in_float32(name):
    function, own, operands = getattr(attention, f"{name}_attention"), own_parameters(name), arrays()
    wanted, wanted_gradient = results(function, *operands, implementation="reference", **own)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in operands]
        values, gradient = results(function, *wide, implementation="streaming", **own)
    jax.tree.map(assert_close, values, wanted)
    jax.tree.map(lambda a, b: assert_close(a, b, tolerance=5e-5), gradient, wanted_gradient)


# --- NaN and infinities


# The reference has one path for all; a term of distances knows no query, key or value.
ALIKE = ["none", "distance", "soft cap", "block", "soft cap and scan"]


@streaming_and_some_reference("term", TERMS, ["value"], slow=ALIKE)
def test_what_is_not_finite_does_not_reach_rows_that_do_not_see_it(term, implementation):
    query, key, value = arrays()
    bad_key, bad_value = (np.array(key), value), (key, np.array(value))
    bad_key[0][:, 13, :, 3], bad_value[1][:, 13, :, 3] = np.nan, np.inf
    keywords = {"implementation": implementation, **TERMS[term]()}

    @jax.jit
    def compute(mask, *operands):
        return value_and_gradient(dot_product_attention, operands, mask=mask, **keywords)(*operands)

    seen, hidden = np.full(T, True), np.arange(T) != 13
    wanted = np.asarray(compute(seen, query, key, value)[0][1][0])
    for damaged in bad_key, bad_value:
        out = np.asarray(compute(seen, query, *damaged)[0][1][0])
        assert_close(out[:, :13], wanted[:, :13])
        assert not np.isfinite(out[:, 13:, :, 3]).any()

    # Hidden from all it is as any other number, backward too.
    ((_, values), gradient), ((_, clean), clean_gradient) = (
        compute(hidden, query, *others) for others in ((bad_key[0], bad_value[1]), (key, value))
    )
    jax.tree.map(assert_close, values, clean)
    jax.tree.map(lambda a, b: assert_close(a, b, tolerance=5e-5), gradient, clean_gradient)


RATE = np.float32(0.1)
NOWHERE = np.int32(-1), np.array([-1])


@functools.cache
def near_in_a_window():
    def near(rate, distance):
        return jnp.broadcast_to(-rate * distance, (N, *distance.shape))

    def attend(query, key, value, rate, **keywords):
        return dot_product_attention(query, key, value, logit=DistanceLogit(near, rate), window=6, **keywords)

    return results(attend, *arrays(), RATE, implementation="reference")


def hide_far(rate, distance):
    return jnp.where(distance > 5, -jnp.inf, -rate * distance)


def hide_far_blocks(parameters, block):
    """Far keys, and all keys from queries at either of two positions."""
    scalar, array = parameters["hidden"]
    hidden = ((block.query_positions == scalar) | (block.query_positions == array))[:, :, None] | (block.distance > 5)
    return jnp.where(hidden, -jnp.inf, -parameters["rate"] * block.distance)[:, None]


HIDING = {
    "distance": lambda rate, _: DistanceLogit(hide_far, rate),
    "block": lambda rate, hidden: BlockLogit(hide_far_blocks, {"rate": rate, "hidden": hidden}),
}


@functools.cache
def hiding(kind, positions, implementation):
    """A jitted (positions that see nothing, query, key, value, rate) -> (loss, output and statistics), gradient."""
    at = np.arange(T) if positions == "explicit" else None
    keywords = {"implementation": implementation, "query_positions": at, "key_positions": at}

    @jax.jit
    def compute(hidden, *operands):
        def attend(query, key, value, rate, **keywords):
            return dot_product_attention(query, key, value, logit=HIDING[kind](rate, hidden), **keywords)

        return value_and_gradient(attend, operands, **keywords)(*operands)

    return compute


@pytest.mark.parametrize(
    ("kind", "positions", "implementation"),
    [
        case
        if case
        in [
            ("distance", "run on", "streaming"),
            ("block", "explicit", "streaming"),
            ("distance", "explicit", "reference"),
        ]
        else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product(HIDING, ["run on", "explicit"], IMPLEMENTATIONS)
    ],
)
def test_a_bias_of_minus_infinity_hides_a_key_as_a_window_does(kind, positions, implementation):
    """One row of distances serves all heads; integers among a term's parameters are no obstacle to its gradient."""
    (_, values), gradient = hiding(kind, positions, implementation)(NOWHERE, *arrays(), RATE)
    jax.tree.map(lambda a, b: assert_close(a, b, tolerance=5e-5), (values, gradient), near_in_a_window())


@streaming_only
def test_a_row_whose_bias_hides_every_key_gives_zeros(implementation):
    at_two = np.int32(2), np.array([2])
    found = hiding("block", "explicit", implementation)(at_two, *arrays(), RATE)
    (_, (out, entropy, logsumexp)), gradient = jax.tree.map(np.asarray, found)
    assert (out[:, 2] == 0).all() and (entropy[..., 2] == 0).all() and (logsumexp[..., 2] == -np.inf).all()
    assert all(np.isfinite(x).all() for x in gradient)


# --- One row for all heads


ONE_ROW = {"no axis of heads": lambda rate, d: -rate * d, "an axis of one": lambda rate, d: -rate * d[None]}


@pytest.mark.slow  # a bias that hides far keys is such a row
@every_implementation
@pytest.mark.parametrize("positions", ["run on", "explicit"])
@pytest.mark.parametrize("shape", ONE_ROW)
def test_a_function_of_distance_may_give_one_row_for_all_heads(shape, positions, implementation):
    rate, positions = jnp.float32(0.3), np.arange(T) if positions == "explicit" else None

    def attend(function, implementation):
        def of(query, key, value, rate, **keywords):
            logit = DistanceLogit(function, rate)
            return dot_product_attention(query, key, value, logit=logit, **keywords)

        keywords = {"query_positions": positions, "key_positions": positions, "implementation": implementation}
        return results(of, *arrays(), rate, **keywords)

    wanted = attend(lambda rate, d: jnp.broadcast_to(-rate * d, (N, *d.shape)), "reference")
    jax.tree.map(lambda a, b: assert_close(a, b, tolerance=5e-5), attend(ONE_ROW[shape], implementation), wanted)


# --- No tokens


# A bias, of the reference with a table of positions, and of streaming also a scan and features of tokens.
WITHOUT_KEYS = {"streaming": ("t5", "cope", "forgetting"), "reference": ("tupe",)}


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        (name, way) if name in WITHOUT_KEYS[way] else pytest.param(name, way, marks=pytest.mark.slow)
        for name, way in itertools.product(FUNCTIONS, IMPLEMENTATIONS)
    ],
)
def test_rows_without_keys_give_zeros(name, implementation):
    """Queries before the first key, no keys at all, and no queries."""
    function = getattr(attention, f"{name}_attention")
    for queries, keys in [(T, 13), (3, 0), (0, 3)]:
        if name == "forgetting" and queries > keys:
            continue  # whose queries are tokens of the keys
        (out, entropy, logsumexp), gradient = results(
            function, *arrays(queries, keys), implementation=implementation, **own_parameters(name, keys)
        )
        empty = max(queries - keys, 0)
        assert out.shape == (B, queries, N, H) and entropy.shape == logsumexp.shape == (B, N, queries)
        assert (out[:, :empty] == 0).all() and (entropy[..., :empty] == 0).all()
        assert (logsumexp[..., :empty] == -np.inf).all()
        assert all(np.isfinite(x).all() for x in (out, entropy, logsumexp[..., empty:], *gradient))


def test_tupe_refuses_default_positions_before_its_table():
    with pytest.raises(ValueError, match=r"\Aquery_positions must be .*, not -8\Z"):
        attention.tupe_attention(*arrays(T, 13), is_causal=False, **own_parameters("tupe"))


# --- Integers


@pytest.mark.parametrize("kind", [int, np.int64, np.uint8, jnp.int32])
def test_a_window_and_chunks_may_be_any_integer(kind):
    for name in ("window", "chunk_size"):
        found = nope_attention(*arrays(), **{name: kind(4)})
        np.testing.assert_array_equal(found, nope_attention(*arrays(), **{name: 4}))


@pytest.mark.parametrize("name", ["window", "chunk_size"])
def test_a_window_or_chunks_larger_than_positions_can_be_hide_nothing(name):
    np.testing.assert_array_equal(nope_attention(*arrays(), **{name: 10**20}), nope_attention(*arrays()))


@pytest.mark.parametrize("bad", [True, np.True_, 4.0, "4", np.array([4, 4])], ids=str)
@pytest.mark.parametrize("name", ["window", "chunk_size"])
def test_other_windows_and_chunks_are_refused(name, bad):
    with pytest.raises(ValueError, match=rf"\A{name} must be an integer"):
        nope_attention(*arrays(), **{name: bad})


def test_sums_by_distance_are_the_transpose_of_a_block_by_distance():
    values, block = np.random.default_rng(0).normal(size=(3, 13)), np.random.default_rng(1).normal(size=(3, 7, 7))
    (wanted,) = jax.jit(lambda values, block: jax.vjp(shear, values)[1](block))(*map(np.float32, (values, block)))
    found = jax.jit(unshear)(np.float32(block.swapaxes(1, 2)))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
