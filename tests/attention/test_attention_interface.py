"""What attention takes: as a part of Flax's own layers, and what it refuses."""

import dataclasses
import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from nope_jax import attention, encodings
from nope_jax.attention import (
    alibi_attention,
    attention_weights,
    backends,
    dot_product_attention,
    encoded_attention,
    nope_attention,
    rope_attention,
    t5_attention,
)
from nope_jax.encodings import ALiBi, BlockLogit, CoPE, DistanceLogit, Encoding, NoPE, Shaw
from tests.support.attention_cases import ATTENTION, LENGTH, assert_close, every_encoding, inputs, parameters, random

# --- Inside Flax's own attention layers


def but_for_slow(*quick):
    return pytest.mark.parametrize(
        "encoding", [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in ATTENTION]
    )


def causal_layer_arguments(encoding):
    x = random(2, 12, 16)
    return x, LAYER_MASKS["causal"], functools.partial(ATTENTION[encoding], **parameters(encoding))


@but_for_slow("rope")
def test_it_drops_into_nnx_multi_head_attention(encoding):
    x, mask, attend = causal_layer_arguments(encoding)
    layer = nnx.MultiHeadAttention(
        num_heads=4, in_features=16, decode=False, attention_fn=attend, dropout_rate=0.1, deterministic=True,
        rngs=nnx.Rngs(0),
    )  # fmt: skip

    @nnx.jit
    def run(layer, x):
        direct = layer.out(attend(layer.query(x), layer.key(x), layer.value(x)))
        return layer(x, mask=mask), layer(x, is_causal=True), direct

    masked, causal, direct = run(layer, x)
    assert_close(masked, direct, tolerance=2e-6)
    assert_close(causal, direct, tolerance=2e-6)


@but_for_slow()  # what decodes below is the same layer
def test_it_drops_into_linen_multi_head_attention(encoding):
    x, mask, attend = causal_layer_arguments(encoding)
    layer = linen.MultiHeadDotProductAttention(num_heads=4, attention_fn=attend, dropout_rate=0.1, deterministic=True)
    variables = layer.init(jax.random.key(0), x, mask=mask)
    weights = variables["params"]

    def project(name):
        return jnp.einsum("btd,dnh->btnh", x, weights[name]["kernel"]) + weights[name]["bias"]

    direct = attend(project("query"), project("key"), project("value"))
    direct = jnp.einsum("btnh,nhd->btd", direct, weights["out"]["kernel"]) + weights["out"]["bias"]
    assert_close(layer.apply(variables, x, mask=mask), direct, tolerance=2e-6)


PROJECTION = {"kernel": random(16, 4, 4) / 4, "bias": random(4, 4, seed=1)}
LINEN_WEIGHTS = {
    **dict.fromkeys(("query", "key", "value"), PROJECTION),
    "out": {"kernel": random(4, 4, 16, seed=2) / 4, "bias": random(16, seed=3)},
}


def linen_layer(attend, x, *more, **keywords):
    """What a linen layer gives of x with this attention."""
    layer = linen.MultiHeadDotProductAttention(num_heads=4, attention_fn=attend)
    return layer.apply({"params": LINEN_WEIGHTS}, x, *more, **keywords)


TOKENS = {"bool": np.array([[True] * 9 + [False] * 3] * 2), "float32": np.array([[1.0] * 9 + [0.0] * 3] * 2)}
LAYER_MASKS = {
    "none": None,
    "causal": linen.make_causal_mask(np.ones((2, 12))),  # float32
    "padding": linen.make_attention_mask(TOKENS["float32"], TOKENS["float32"]),
    "both": linen.combine_masks(
        linen.make_causal_mask(np.ones((2, 12)), dtype=bool), TOKENS["bool"][:, None, None], dtype=bool
    ),
}


@pytest.mark.parametrize(
    ("mask", "jit"),
    [
        *(("none", False), ("causal", True), ("padding", False), ("both", False)),
        *(
            pytest.param(mask, jit, marks=pytest.mark.slow)
            for mask, jit in (("none", True), ("causal", False), ("padding", True), ("both", True))
        ),
    ],
)
def test_linen_layers_mean_what_they_mean_with_flax_s_own_attention(mask, jit):
    """Without a mask they are bidirectional; masks of floating-point zeros and ones are masks."""
    x = random(2, 12, 16)

    def run(attend, mask):
        return linen_layer(attend, x, mask=mask)

    run = jax.jit(run, static_argnums=0) if jit else run
    kept = slice(None) if mask != "padding" else slice(9)  # rows without a key are another thing in Flax
    for attend in nope_attention, dot_product_attention, functools.partial(encoded_attention, NoPE(), {}):
        found, wanted = run(attend, LAYER_MASKS[mask]), run(linen.dot_product_attention, LAYER_MASKS[mask])
        assert_close(found[:, kept], wanted[:, kept], tolerance=5e-6)


def test_linen_cross_attention_is_flax_s():
    x, memory, seen = random(2, 5, 16), random(2, 12, 16), TOKENS["float32"][:, None, None]

    @jax.jit
    def run(x, memory):
        attends = nope_attention, linen.dot_product_attention
        return [[linen_layer(attend, x, memory, mask=mask) for attend in attends] for mask in (None, seen)]

    for found, wanted in run(x, memory):
        assert_close(found, wanted, tolerance=5e-6)


def test_a_linen_layer_may_be_given_causal_attention():
    x = random(2, 12, 16)
    found = linen_layer(functools.partial(nope_attention, is_causal=True), x)
    wanted = linen_layer(linen.dot_product_attention, x, mask=LAYER_MASKS["causal"])
    assert_close(found, wanted, tolerance=5e-6)


# One that turns queries and keys, and one that adds to their products.


@but_for_slow("t5")
def test_linen_decodes_token_by_token_as_in_one_pass(encoding):
    x, mask, attend = causal_layer_arguments(encoding)
    wanted = jax.jit(functools.partial(linen_layer, attend))(x, mask=mask)
    layer = linen.MultiHeadDotProductAttention(num_heads=4, attention_fn=attend, decode=True)
    empty = jax.eval_shape(layer.init, jax.random.key(0), x)["cache"]
    variables = {"params": LINEN_WEIGHTS, "cache": jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), empty)}
    step = jax.jit(functools.partial(layer.apply, mutable=["cache"]))
    for t in range(x.shape[1]):
        out, cache = step(variables, x[:, t : t + 1])
        variables = variables | cache
        assert_close(out[:, 0], wanted[:, t], tolerance=5e-6)


@but_for_slow("rope")
def test_nnx_decodes_token_by_token_as_in_one_pass(encoding):
    x, mask, attend = causal_layer_arguments(encoding)
    layer = nnx.MultiHeadAttention(num_heads=4, in_features=16, decode=False, attention_fn=attend, rngs=nnx.Rngs(0))
    wanted = nnx.jit(lambda layer, x: layer(x, mask=mask))(layer, x)
    layer.init_cache(x.shape)
    step = nnx.jit(lambda layer, x: layer(x, decode=True))
    for t in range(x.shape[1]):
        assert_close(step(layer, x[:, t : t + 1])[:, 0], wanted[:, t], tolerance=5e-6)


@pytest.mark.parametrize("more", [{}, {"is_causal": False}, {"is_causal": True}], ids=["unsaid", "both ways", "causal"])
@pytest.mark.parametrize("length", [5, pytest.param(12, marks=pytest.mark.slow)])
def test_nnx_layers_mean_what_they_mean_with_flax_s_own_attention(length, more):
    """Also where lengths differ: Flax's causal mask is aligned at the first tokens."""
    layers = [
        nnx.MultiHeadAttention(num_heads=4, in_features=16, decode=False, attention_fn=attend, rngs=nnx.Rngs(0))
        for attend in (nope_attention, nnx.dot_product_attention)
    ]
    outputs = nnx.jit(lambda layers, *arrays: [layer(*arrays, **more) for layer in layers])(
        layers, random(2, length, 16), random(2, 12, 16, seed=1)
    )
    assert_close(*outputs, tolerance=5e-6)


def test_additive_masks_are_refused_in_layers_too_where_they_can_be_seen():
    with pytest.raises(ValueError, match=r"(?m)\Amask must be booleans, or zeros and ones, not -inf$"):
        linen_layer(nope_attention, random(2, 12, 16), mask=np.where(np.tri(12), 0.0, -np.inf)[None, None])


def test_nnx_is_not_causal_unless_it_says_so():
    x, _, attend = causal_layer_arguments("nope")
    layer = nnx.MultiHeadAttention(num_heads=4, in_features=16, decode=False, attention_fn=attend, rngs=nnx.Rngs(0))
    direct = attend(layer.query(x), layer.key(x), layer.value(x), is_causal=False)
    assert_close(layer(x), layer.out(direct), tolerance=2e-6)


def test_active_dropout_is_refused_inside_nnx():
    x, mask, attend = causal_layer_arguments("nope")
    layer = nnx.MultiHeadAttention(
        num_heads=4, in_features=16, decode=False, attention_fn=attend, dropout_rate=0.1, deterministic=False,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"\A.*dropout_rate.*\Z"):
        layer(x, mask=mask)


def test_active_dropout_is_refused_inside_linen():
    x, mask, attend = causal_layer_arguments("nope")
    layer = linen.MultiHeadDotProductAttention(num_heads=4, attention_fn=attend, dropout_rate=0.1, deterministic=False)
    with pytest.raises(ValueError, match=r"\Adropout_rate "):
        layer.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x, mask=mask)


# --- Bad input


@every_encoding
def test_an_unknown_keyword_is_a_type_error(encoding):
    with pytest.raises(TypeError, match="windw"):
        ATTENTION[encoding](*inputs(), windw=3, **parameters(encoding))


BAD = [
    ("implementation", "fast"),
    ("implementation", ("streaming", "fast")),
    ("implementation", ()),
    ("window", 0),
    ("window", 2.5),
    ("chunk_size", 0),
    ("chunk_size", 2.5),
    ("mask", np.ones((3, 1), bool)),
    ("mask", np.where(np.tri(LENGTH), 0.0, -np.inf)),
    ("mask", np.tri(LENGTH, dtype=np.float32)),
    ("mask", np.where(np.tri(LENGTH), 0, -(10**9))),
    ("query_positions", np.arange(5)),
    ("query_positions", np.arange(LENGTH) / 2),
    ("key_positions", np.zeros((3, LENGTH), int)),
    ("segment_ids", np.zeros((2, 5), int)),
    ("logit_scale", np.ones(3)),
    ("qk_scale", 0.0),
    ("softcap", -1.0),
]


@every_encoding
@pytest.mark.parametrize(("name", "bad"), BAD, ids=[f"{name}-{i}" for i, (name, _) in enumerate(BAD)])
def test_a_bad_argument_is_refused_in_one_line_that_names_it(encoding, name, bad):
    attend = functools.partial(ATTENTION[encoding], **{name: bad}, **parameters(encoding))
    with pytest.raises(ValueError) as refusal:
        jax.eval_shape(attend, *inputs())
    assert re.fullmatch(rf".*\b{name}\b.*", str(refusal.value))


def test_a_mask_of_floating_point_is_refused_by_naming_what_a_bias_is_given_as():
    with pytest.raises(ValueError, match=r"\Amask must be boolean.*\blogit=.*dot_product_attention"):
        jax.jit(nope_attention)(*inputs(), mask=np.zeros((LENGTH, LENGTH), np.float32))


def test_an_integer_mask_of_zeros_and_ones_is_a_boolean_one():
    masks = [np.tri(LENGTH)[::-1].astype(dtype) for dtype in (np.int32, bool)]
    found, wanted = jax.jit(lambda *arrays: [nope_attention(*arrays, mask=mask) for mask in masks])(*inputs())
    np.testing.assert_array_equal(found, wanted)


BAD_SHAPES = [
    ("query", [(2, 3, 8), (2, 3, 1, 8), (2, 3, 1, 8)]),
    ("key", [(2, 3, 4, 8), (3, 8), (2, 3, 1, 8)]),
    ("value", [(2, 3, 4, 8), (2, 3, 1, 8), (2, 4, 1, 8)]),
    ("value", [(2, 3, 4, 8), (2, 3, 2, 8), (2, 3, 1, 8)]),
    ("key", [(2, 3, 4, 8), (1, 3, 2, 8), (1, 3, 2, 8)]),
    ("key", [(2, 3, 4, 8), (2, 3, 2, 4), (2, 3, 2, 8)]),
    ("heads", [(2, 3, 4, 8), (2, 3, 3, 8), (2, 3, 3, 8)]),
    ("heads", [(2, 3, 4, 8), (2, 3, 8, 8), (2, 3, 8, 8)]),
]


@every_encoding
@pytest.mark.parametrize(("name", "shapes"), BAD_SHAPES)
def test_shapes_that_do_not_fit_are_refused_in_one_line_that_names_the_argument(encoding, name, shapes):
    with pytest.raises(ValueError, match=rf"\A.*\b{name}\b.*\Z"):
        ATTENTION[encoding](*(np.ones(shape, np.float32) for shape in shapes), **parameters(encoding))


def test_segments_need_a_pair_when_lengths_differ():
    with pytest.raises(ValueError, match=r"\A.*segment_ids.*pair.*\Z"):
        nope_attention(inputs(T=3)[0], *inputs(T=5)[1:], segment_ids=np.zeros((2, 3), int))


@pytest.mark.parametrize("rotary_dim", [3, 10, 0])
def test_rope_refuses_a_rotary_dim_that_is_odd_or_larger_than_the_head(rotary_dim):
    with pytest.raises(ValueError, match=r"\Arotary_dim .*\Z"):
        rope_attention(*inputs(), rotary_dim=rotary_dim)


def test_alibi_and_t5_refuse_parameters_for_another_number_of_heads():
    with pytest.raises(ValueError, match=r"\A.*\bslopes\b.*\Z"):
        alibi_attention(*inputs(), slopes=np.ones(3, np.float32))
    with pytest.raises(ValueError, match=r"\A.*\btable\b.*\Z"):
        t5_attention(*inputs(), table=np.ones((32, 3), np.float32))
    with pytest.raises(ValueError, match=r"\A.*\btable\b.*\Z"):
        t5_attention(*inputs(), table=np.ones(32, np.float32))


# --- Every function

COMMON = inspect.signature(dot_product_attention).parameters
FUNCTIONS = [name for name in attention.__all__ if name.endswith("_attention")]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_takes_and_documents_what_all_of_them_do(name):
    function = getattr(attention, name)
    parameters, doc = inspect.signature(function).parameters, inspect.getdoc(function)
    missing = COMMON.keys() - parameters.keys()
    assert missing == (set() if name == "dot_product_attention" else {"logit", "value_term"})
    named = [p for p in parameters if p in ("query", "key", "value") or p not in COMMON]
    assert all(f"    {p}: " in doc for p in named)
    assert doc.count("Args:") == 1 and function.__name__ == name


def test_what_a_call_is_given_is_checked_once(monkeypatch):
    checked = []
    original = attention.mask_spec.per_token
    monkeypatch.setattr(
        attention.mask_spec, "per_token", lambda name, *rest: checked.append(name) or original(name, *rest)
    )
    at = np.arange(LENGTH)
    jax.eval_shape(functools.partial(alibi_attention, query_positions=at, key_positions=at), *inputs())
    assert sorted(checked) == ["key_positions", "query_positions"]


# --- Backends


@pytest.fixture
def picky(monkeypatch):
    """A backend that serves some calls alone, and whose output is the queries."""

    def attend(query, factor, key, value, *rest):
        return query, *backends.BACKENDS["reference"].attend(query, factor, key, value, *rest)[1:]

    def supports(query, factor, key, value, logit, *rest):
        return None if logit is None else f"logit must be None, not a {type(logit).__name__}"

    table = {**backends.BACKENDS, "picky": backends.Backend(attend, supports)}
    monkeypatch.setattr(backends, "BACKENDS", table)


@pytest.mark.usefixtures("picky")
def test_of_several_backends_the_first_that_can_serve_a_call_does():
    query, key, value = inputs()

    @jax.jit
    def run(*operands):
        served = [nope_attention(*operands, implementation=name) for name in ("picky", ["picky", "reference"])]
        orders = ("picky", "reference"), ("reference", "picky"), "reference"
        return served, [alibi_attention(*operands, implementation=order) for order in orders]

    served, (*left, wanted) = run(query, key, value)
    for found in served:
        np.testing.assert_array_equal(found, query)
    for found in left:
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.usefixtures("picky")
@pytest.mark.parametrize("implementation", ["picky", ("picky",)])
def test_a_backend_that_cannot_serve_a_call_says_why(implementation):
    with pytest.raises(
        ValueError, match=r'\Aimplementation "picky" cannot serve this call: logit must be None, not a DistanceLogit\Z'
    ):
        alibi_attention(*inputs(), implementation=implementation)


# --- Weights


@dataclasses.dataclass(frozen=True)
class ShawKeys(Shaw):
    """Without what it adds to the output."""

    def value(self, params):
        return None


@pytest.mark.parametrize(
    ("encoding", "params", "same"),
    [
        (ALiBi(), {}, ALiBi()),
        (CoPE(5), {"embeddings": random(5, 8)}, CoPE(5)),
        (Shaw(2), {"keys": random(5, 8), "values": random(5, 8)}, ShawKeys(2)),
    ],
    ids=["distance", "scan", "value term"],
)
def test_the_weights_are_what_attention_multiplies_values_with(encoding, params, same: Encoding):
    query, key, _ = inputs(T=9, S=13)
    identity = np.broadcast_to(np.eye(13, dtype=np.float32)[:, None], (2, 13, 2, 13))
    common = {"window": 7, "segment_ids": (np.ones((2, 9), int), np.minimum(np.arange(13), 1) + np.zeros((2, 1), int))}

    @jax.jit
    def run(query, key, identity):
        out = encoded_attention(
            same, params, query, key, identity, return_stats=True, implementation="reference", **common
        )
        return attention_weights(encoding, params, query, key, return_stats=True, **common), out

    (weights, stats), (out, wanted) = run(query, key, identity)
    assert weights.shape == (2, 4, 9, 13)
    np.testing.assert_array_equal(weights, np.swapaxes(out, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, stats, wanted)


def test_a_row_that_sees_no_key_weighs_none():
    weights = attention_weights(NoPE(), {}, *inputs()[:2], mask=np.arange(LENGTH) > 3)
    assert_close(weights.sum(-1), np.broadcast_to(np.arange(LENGTH) > 3, (2, 4, LENGTH)))


# --- Outside of jit


@pytest.mark.parametrize("implementation", ["reference", "streaming"])
def test_a_function_of_distance_made_anew_in_every_call_is_compiled_once(implementation, compilations):
    query, key, value = inputs()
    slopes = np.linspace(1.0, 2.0, 4)

    def attend(slope):
        bias = DistanceLogit(lambda slopes, distance: -slope * jnp.multiply.outer(slopes, distance), slopes)
        return dot_product_attention(query, key, value, logit=bias, implementation=implementation)

    attend(1.0)
    before = compilations()
    out = attend(2.0)
    assert compilations() == before
    assert_close(out, alibi_attention(query, key, value, slopes=2.0 * slopes, implementation="reference"))


def test_temperature_is_called_logit_scale_here():
    with pytest.raises(TypeError, match="^temperature: .*is logit_scale; above 1, it sharpens"):
        ATTENTION["alibi"](*inputs(), temperature=2.0)


@pytest.mark.slow  # as in test_attention_numbers.py
@pytest.mark.parametrize("length", [12, 300])
def test_one_row_of_distances_may_serve_all_heads(length):
    query, key, value = inputs(T=length)
    shared = DistanceLogit(lambda _, distance: -0.1 * distance)
    each = DistanceLogit(lambda _, distance: jnp.stack([-0.1 * distance] * 4))
    wanted = dot_product_attention(query, key, value, logit=each)
    assert_close(dot_product_attention(query, key, value, logit=shared), wanted, tolerance=1e-6)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda q: dot_product_attention(q, q, q, logit=jnp.zeros((12, 12))), "logit must be a DistanceLogit"),
        (lambda q: dot_product_attention(q, q, q, logit=DistanceLogit(lambda _, d: jnp.ones((3, *d.shape)))),
         "logit must have a row for each of 2 heads, or one for all, not 3"),
        (lambda q: dot_product_attention(q, q, q, logit=DistanceLogit(lambda _, d: jnp.ones((2, 5)))),
         r"the value of <lambda> must have shape \[2, 23\], or 1 in place of an axis, not \[2, 5\]"),
        (lambda q: dot_product_attention(q, q, q, logit=BlockLogit(lambda _, block: block.distance)),
         r"the value of <lambda> must have shape \[1, 2, 12, 12\], or 1 in place of an axis, not \[1, 12, 12\]"),
        (lambda q: dot_product_attention(q, q, q, logit=BlockLogit(lambda _, block: None)),
         "the value of <lambda> must be an array of numbers, not None"),
        (lambda q: dot_product_attention(q, q, q, implementation=3), "implementation must be one of"),
        (lambda q: dot_product_attention(q, q, q, segment_ids=(q[..., 0, 0],)), "segment_ids must be an array or a"),
        (lambda q: nope_attention(q.tolist(), q, q), "query must be an array, not a list"),
        (lambda q: encoded_attention("rope", {}, q, q, q), "encoding must be an Encoding, such as"),
        (lambda q: nope_attention(q, q, q, key_positions="x"), "key_positions must be an array of numbers, not 'x'"),
        (lambda q: nope_attention(q, q, q, segment_ids=[[0] * 12, [1]]), "segment_ids must be an array of numbers"),
        (lambda q: nope_attention(q, q, q, mask=[[True], []]), "mask must be an array of numbers, not .*True"),
        (lambda q: nope_attention(q, q, q, is_causal=None), "is_causal must be True or False, not None"),
        (lambda q: nope_attention(q, q, q, return_stats="no"), "return_stats must be True or False, not 'no'"),
        (lambda q: nope_attention(q, q, q, qk_scale="2"), "qk_scale must be positive, not '2'"),
        (lambda q: attention.rope_attention(q[..., :5], q[..., :5], q), "rotary_dim must be given for .* odd, 5"),
        (lambda q: nope_attention(q, q, q, logit_scale="x"), "logit_scale must be an array of numbers, not 'x'"),
        (lambda q: nope_attention(q, q, q, logit_scale=10**20), "logit_scale must fit int32, not 10000000000000"),
        (lambda q: nope_attention(q, q, q, query_positions=[2**40] * 12), "query_positions must fit int32, not"),
        (lambda q: nope_attention(q, q, q, logit_scale=-1e39), "logit_scale must be at most 3.4.*, which fits float32"),
        (lambda q: nope_attention(q, q, q, key_positions=np.arange(12) - 2**31 - 9),
         "key_positions must be at most 2147483647, which fits int32, not -2147483657"),
        (lambda q: nope_attention(q, q, q, segment_ids=np.full((1, 12), 3 * 10**9, np.uint32)),
         "segment_ids must be at most 2147483647, which fits int32, not 3000000000"),
        (lambda q: encodings.alibi_slopes("8"), "num_heads must be an integer of at least 1, not '8'"),
        (lambda q: attention.alibi_attention(q, q, q, slopes="x"), "slopes must be an array of numbers, not 'x'"),
        (lambda q: attention.shaw_attention(q, q, q, key_table=None, value_table=q), "key_table must be .* not None"),
        (lambda q: attention.fire_attention(q, q, q, hidden_weights=[1], hidden_bias=[1], weights=[[1] * 2], c=None),
         "c must be an array of numbers, not None"),
    ],
)  # fmt: skip
def test_what_is_no_term_array_or_encoding_is_named(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call(random(1, 12, 2, 8))
