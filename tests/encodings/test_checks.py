"""What cannot work is refused where it is said, in one line that names it and the bound."""

import functools
import math

import jax
import numpy as np
import pytest

from nope_jax import encodings as e
from nope_jax.attention import (
    encoded_attention,
    fire_attention,
    forgetting_attention,
    kerple_attention,
    nope_attention,
    tupe_attention,
)

INTEGERS = [
    (e.Learned, "length", 1),
    (e.Shaw, "clip", 1),
    (e.NEZHA, "clip", 1),
    (e.CoPE, "num_positions", 1),
    (e.T5, "num_buckets", 2),
    (e.FIRE, "width", 1),
    (e.TUPE, "length", 1),
    (e.DeBERTa, "max_distance", 1),
    (e.Convolution, "kernel_size", 2),
    (e.FLOATER, "substeps", 1),
    (e.Randomized, "maximum", 1),
    (e.Windowed, "window", 1),
    (e.Chunked, "chunk_size", 1),
    (e.LogN, "length", 2),
    (e.Llama4Scale, "floor_scale", 1),
    (e.RoPE, "rotary_dim", 2),
]
POSITIVE = [
    (e.RoPE, "base"),
    (e.Sinusoidal, "base"),
    (e.ComplexOrder, "base"),
    (e.XPos, "scale_base"),
    (e.FIRE, "c"),
    (e.FLOATER, "step_size"),
    (e.UniformScale, "factor"),
    (e.HeadScale, "start"),
    (e.SSMax, "start"),
    (e.SwanScale, "offset"),
]


@pytest.mark.parametrize(("cls", "name", "least"), INTEGERS, ids=lambda x: getattr(x, "__name__", x))
def test_counts_are_integers_from_a_bound_on(cls, name, least):
    with pytest.raises(ValueError, match=rf"\A{name} must be at least {least}, not {least - 1}\Z"):
        cls(**{name: least - 1})
    for bad in (least + 0.5, float(least), str(least), True):
        with pytest.raises(ValueError, match=rf"\A{name} must be an integer of at least {least}, not {bad!r}\Z"):
            cls(**{name: bad})


@pytest.mark.parametrize(("cls", "name"), POSITIVE, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan, "2"])
def test_factors_are_positive_and_finite(cls, name, bad):
    with pytest.raises(ValueError, match=rf"\A{name} must be positive, not "):
        cls(**{name: bad})


@pytest.mark.parametrize("bad", [0.5, math.inf, math.nan, "2"])
def test_scalings_do_not_shrink(bad):
    for scaling in (e.LinearScaling, e.NTKScaling):
        with pytest.raises(ValueError, match=r"\Afactor must be at least 1, not "):
            scaling(factor=bad)


QKV = (np.ones((1, 6, 2, 4), np.float32),) * 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kerple_attention(*QKV, r1=[1.0, -1.0], r2=[1.0, 1.0]), "r1 must be positive, not -1.0"),
        (lambda: kerple_attention(*QKV, r1=[1.0, 1.0], r2=[1.0, 0.0]), "r2 must be positive, not 0.0"),
        (
            lambda: fire_attention(
                *QKV, hidden_weights=np.ones(3), hidden_bias=np.ones(3), weights=np.ones((3, 2)), c=-1.0
            ),
            "c must be positive, not -1.0",
        ),
        (
            lambda: forgetting_attention(*QKV, log_forget=np.ones((1, 6, 2), np.float32)),
            "log_forget must be at most 0, logarithms of gates, not 1.0",
        ),
        (
            lambda: tupe_attention(
                *QKV, positions=np.ones((5, 8)), query_kernel=np.ones((8, 2, 4)), key_kernel=np.ones((8, 2, 4))
            ),
            "query_positions must be below 5, the rows of the table, not 5",
        ),
        (lambda: encoded_attention(e.Forgetting(), {}, *QKV), "query_features and key_features must be given"),
        (
            lambda: encoded_attention(e.Windowed(), {}, *QKV, window="3"),
            r"window must be an integer of at least 1 \(the query itself\), not '3'",
        ),
        (lambda: e.resolve("log_n:"), "'log_n:' must name what it wraps after the colon"),
        (lambda: e.resolve(":rope"), "unknown encoding|'' in ':rope' must be a wrapper"),
        (
            lambda: e.HeadScale(e.HeadScale()).init_layer(jax.random.key(0), e.ModelDims(2, 4, 8)),
            "encoding must not have a head_scale of its own",
        ),
    ],
)
def test_values_that_can_be_seen_are_checked(call, message):
    with pytest.raises(ValueError, match=rf"\A(?:{message})"):
        call()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32, np.int8])
def test_positions_of_any_integer_type_are_the_same_positions(dtype):
    x = [np.random.default_rng(i).standard_normal((1, 6, 2, 4)).astype(np.float32) for i in range(3)]
    at = np.array([0, 1, 3, 4, 7, 9], dtype)
    keywords = {"query_positions": at, "key_positions": at}
    wanted = nope_attention(*x, query_positions=at.astype(np.int32), key_positions=at.astype(np.int32))
    np.testing.assert_array_equal(nope_attention(*x, **keywords), wanted)


@pytest.mark.parametrize("wrapper", [e.SSMax(), e.LogN(length=4), e.Llama4Scale(), e.SwanScale()], ids=str)
def test_temperatures_are_finite_where_a_query_sees_no_key(wrapper):
    query, key = np.ones((1, 8, 2, 4), np.float32), np.ones((1, 3, 2, 4), np.float32)  # the first before position 0

    @jax.jit
    def outputs(*arrays):
        params = wrapper.init_layer(jax.random.key(0), e.ModelDims(2, 4, 8))
        attend = functools.partial(encoded_attention, wrapper, params, *arrays)
        return [attend(implementation=name) for name in ("reference", "streaming")]

    for out in map(np.asarray, outputs(query, key, key)):
        assert np.isfinite(out).all() and (out[:, :5] == 0).all()
