"""Shaw, NEZHA, Transformer-XL, TUPE and DeBERTa, held to float64 NumPy and to published models."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nope_jax.attention import (
    deberta_attention,
    encoded_attention,
    nezha_attention,
    shaw_attention,
    transformer_xl_attention,
    tupe_attention,
)
from nope_jax.encodings import NEZHA, TUPE, DeBERTa, ModelDims, Shaw, TransformerXL, deberta_bucket
from tests.goldens import regenerate
from tests.support import oracles
from tests.support.attention_cases import (
    IMPLEMENTATIONS,
    TOLERANCE,
    assert_close,
    compiled,
    compiled_together,
    inputs,
    random,
    streaming_and_some_reference,
)
from tests.support.drawn_model import small_model

GOLDEN = regenerate.load("relative")

LENGTH, FAR = 21, 40
"""Three blocks, the last one padded; and what positions are below."""
N, K, H, D = 4, 2, 8, 6
QKV = "query", "key", "value"
HEADS = {"content_bias": (N, H), "position_bias": (N, H), "position_kernel": (D, N, H)}
UNTIED = {"positions": (FAR, D), "query_kernel": (D, N, H), "key_kernel": (D, K, H), "scale": (D,), "shift": (D,)}
DISENTANGLED = {"relative": (8, D), "key_kernel": (D, K, H), "query_kernel": (D, N, H)}


def draws(shapes, seed=20):
    return {name: random(*shape, seed=seed + i) / 2 for i, (name, shape) in enumerate(shapes.items())}


CASES = {
    "shaw": (shaw_attention, draws({"key_table": (7, H), "value_table": (7, H)})),
    "nezha": (nezha_attention, {"clip": 3}),
    "transformer_xl": (transformer_xl_attention, draws(HEADS)),
    "tupe_a": (tupe_attention, draws(UNTIED)),
    "tupe_r": (tupe_attention, draws(UNTIED | {"table": (8, N)}) | {"max_distance": 10}),
    "deberta": (deberta_attention, draws(DISENTANGLED)),
    "deberta_released": (deberta_attention, draws(DISENTANGLED) | {"released": True}),
    "deberta_buckets": (deberta_attention, draws(DISENTANGLED) | {"max_distance": 14}),
}
"""What to call with which parameters."""

every_case = pytest.mark.parametrize("case", CASES)
# The others' arrays come to a kernel as these do: Transformer-XL's as rows by distance, TUPE's as queries and keys.
QUICK_KINDS, OTHER_KINDS = ("shaw", "deberta_buckets"), ("transformer_xl", "tupe_r")


pytestmark = pytest.mark.usefixtures("small_blocks")


def expected(case, parameters, query, key, value, *, query_positions=None, key_positions=None, **common):
    """The oracle's answer; the logit scale, a number or one per head, multiplies all but T5's bias."""
    (B, T, _, dim), S = query.shape, key.shape[1]
    at = oracles.positions(B, T, S, query_positions, key_positions)
    name, parameters, value_table, bias = case.split("_")[0], dict(parameters), None, 0.0
    if name == "nezha":
        value_table = oracles.nezha_table(parameters["clip"], dim)
        added = oracles.shaw_logit(query, value_table, *at)
    elif name == "shaw":
        value_table = parameters["value_table"]
        added = oracles.shaw_logit(query, parameters["key_table"], *at)
    elif name == "transformer":
        added = oracles.transformer_xl_logit(query, key, **parameters, query_positions=at[0], key_positions=at[1])
    elif name == "tupe":
        if "table" in parameters:
            bias = oracles.t5_bias(parameters.pop("table"), *at, max_distance=parameters.pop("max_distance"))
        added = oracles.tupe_logit(**parameters, query_positions=at[0], key_positions=at[1])
    else:
        added = oracles.deberta_logit(query, key, **parameters, query_positions=at[0], key_positions=at[1])
    parts = {"tupe": 2, "deberta": 3}.get(name, 1)
    logit_scale = np.broadcast_to(np.float64(common.pop("logit_scale", 1.0)), query.shape[2:3]) / math.sqrt(parts)
    wanted = oracles.attention(
        query,
        key,
        value,
        bias=bias + logit_scale[:, None, None] / math.sqrt(dim) * added,
        logit_scale=logit_scale,
        query_positions=at[0],
        key_positions=at[1],
        **common,
    )
    if value_table is not None:
        wanted = wanted._replace(output=wanted.output + oracles.shaw_value(wanted.weights, value_table, *at))
    return wanted


def assert_agrees(case, implementation, query, key, value, **common):
    function, parameters = CASES[case]
    results = compiled(function, query, key, value, **parameters, **common, implementation=implementation)
    assert_results_agree(results, expected(case, parameters, query, key, value, **common))


def assert_results_agree(results, wanted):
    out, stats = results
    assert_close(out, wanted.output)
    assert_close(stats.entropy, wanted.entropy)
    assert_close(stats.logsumexp, wanted.logsumexp)


# --- Values


INDEX = np.arange(LENGTH)
ANYWHERE = np.stack([np.random.default_rng(b).choice(FAR, LENGTH, replace=False) for b in range(4)])
COMMON = {
    "positions that run on, both ways": {"is_causal": False, "logit_scale": 1.5},
    "any positions, both ways": {
        "query_positions": ANYWHERE[:2],
        "key_positions": ANYWHERE[2:],
        "is_causal": False,
        "logit_scale": np.array([0.5, 1.0, 2.0, 0.0], np.float32),
    },
    "documents in a window": {"segment_ids": np.stack([INDEX > 9, INDEX // 4]).astype(int), "window": 6},
}


QUICK = "nezha", "transformer_xl", "tupe_a", "tupe_r", "deberta_buckets"  # NEZHA is Shaw with other tables
OTHERS = tuple(case for case in CASES if case not in QUICK)


@functools.cache
def results_of(cases, common, implementation):
    settings = COMMON[common] | {"implementation": implementation}
    return compiled_together({case: (CASES[case][0], inputs(), CASES[case][1] | settings) for case in cases})


# Positions that run on are in the gradients below and in the published models.
@streaming_and_some_reference("common", COMMON, [], slow=["documents in a window", "positions that run on, both ways"])
@pytest.mark.parametrize("case", [*QUICK, *[pytest.param(case, marks=pytest.mark.slow) for case in OTHERS]])
def test_values_and_statistics_agree_with_float64(case, common, implementation):
    results = results_of(QUICK if case in QUICK else OTHERS, common, implementation)[case]
    assert_results_agree(results, expected(case, CASES[case][1], *inputs(), **COMMON[common]))


@pytest.mark.slow  # test_every_encoding.py holds one such case of each
@every_case
def test_queries_at_the_end_of_a_cache_agree_with_float64(case):
    assert_agrees(case, "streaming", *inputs(T=10, S=LENGTH))


@pytest.mark.slow  # so test_kv_cache.py decodes
@pytest.mark.parametrize("case", ["shaw", "tupe_r"])
def test_one_query_in_a_cache_that_is_not_full_yet_agrees_with_float64(case):
    assert_agrees(case, "reference", *inputs(T=1, S=LENGTH), query_positions=np.array([13]), key_positions=INDEX)


def arrays_of(golden, names):
    return {name: np.array(golden[name], np.float32) for name in names}


def as_xlnet(name, golden):
    return transformer_xl_attention, arrays_of(golden, HEADS), {"is_causal": name == "causal"}


def as_transformers(name, golden):
    buckets = {"max_distance": golden["max_distance"]} if golden["buckets"] else {}
    parameters = arrays_of(golden, DISENTANGLED) | {"released": True} | buckets
    return deberta_attention, parameters, {"is_causal": golden["is_causal"]}


PUBLISHED = {
    (encoding, name): (golden, *call(name, golden))
    for encoding, call in (("transformer_xl", as_xlnet), ("deberta", as_transformers))
    for name, golden in GOLDEN[encoding].items()
}


@functools.cache
def of_published():
    return compiled_together(
        {
            case: (attend, list(arrays_of(golden, QKV).values()), parameters | common | {"implementation": "streaming"})
            for case, (golden, attend, parameters, common) in PUBLISHED.items()
        }
    )


@pytest.mark.parametrize("case", PUBLISHED, ids="-".join)
def test_attention_and_oracle_are_those_of_xlnet_and_of_transformers(case):
    golden, _, parameters, common = PUBLISHED[case]
    wanted = expected(case[0], parameters, *arrays_of(golden, QKV).values(), **common)
    out, stats = of_published()[case]
    for output, entropy in ((out, stats.entropy), (wanted.output, wanted.entropy)):
        assert_close(output, golden["out"])
        assert_close(entropy, golden["entropy"])


def test_the_paper_and_the_released_deberta_differ_by_the_order_of_the_queries_rows():
    # Within the table δ(j,i) is 2·rows - δ(i,j): two encodings whose tables are read from opposite ends.
    golden = GOLDEN["deberta"]["within"]
    query, key, value, relative = (np.array(golden[x], np.float32) for x in ("query", "key", "value", "relative"))
    rows = np.arange(len(relative))
    turned = relative[np.minimum(len(relative) - rows, len(relative) - 1)]
    kernels = {x: np.array(golden[x], np.float32) for x in ("key_kernel", "query_kernel")}
    # [table of K, turned table of Q] beside each other, each read by its own kernel.
    both = np.concatenate([relative, turned], axis=1)
    nothing = np.zeros_like(kernels["key_kernel"])
    paper = {
        "relative": both,
        "key_kernel": np.concatenate([kernels["key_kernel"], nothing]),
        "query_kernel": np.concatenate([nothing, kernels["query_kernel"]]),
    }

    @jax.jit
    def outputs(*arrays):
        tables = paper, kernels | {"relative": relative}
        return [deberta_attention(*arrays, **parameters, is_causal=False) for parameters in tables]

    out, other = outputs(query, key, value)
    assert_close(out, golden["out"])
    assert np.abs(np.asarray(other) - np.array(golden["out"])).max() > 1e-2


@pytest.mark.parametrize("golden", GOLDEN["deberta_bucket"], ids=lambda g: f"{g['num_buckets']}-{g['max_distance']}")
def test_deberta_buckets_are_those_of_transformers(golden):
    settings = {name: golden[name] for name in ("num_buckets", "max_distance")}
    buckets = jax.jit(functools.partial(deberta_bucket, **settings))(np.array(GOLDEN["distances"]))
    np.testing.assert_array_equal(buckets, golden["buckets"])
    np.testing.assert_array_equal([oracles.deberta_bucket(d, **settings) for d in GOLDEN["distances"]], buckets)


@pytest.mark.parametrize("case", ["shaw", pytest.param("transformer_xl", marks=pytest.mark.slow)])
def test_bfloat16_in_is_bfloat16_out(case):
    function, parameters = CASES[case]
    arrays = [x.astype(jnp.bfloat16) for x in inputs()]
    out, stats = compiled(function, *arrays, **parameters, implementation="reference")
    assert out.dtype == jnp.bfloat16 and stats.entropy.dtype == jnp.float32
    wanted = expected(case, parameters, *(x.astype(np.float32) for x in arrays))
    # Transformer-XL rounds q + u to bfloat16, and TUPE its positions; elsewhere only the output is.
    rounded = case.split("_")[0] in ("transformer", "tupe")
    assert_close(out, wanted.output, tolerance=2**-6 if rounded else 2**-7)
    assert_close(stats.logsumexp, wanted.logsumexp, tolerance=2**-7 if rounded else TOLERANCE)


# --- Gradients


POSITIONS = {
    "run on": {},
    "given": {"query_positions": ANYWHERE[:2, :11], "key_positions": ANYWHERE[2:, :11], "is_causal": False},
}
WEIGHTS = random(2, 11, N, H, seed=7)


def arrays_and_settings(case):
    """All that has a gradient, and what has none."""
    parameters = CASES[case][1]
    arrays = {name: x for name, x in parameters.items() if isinstance(x, np.ndarray)}
    settings = {name: x for name, x in parameters.items() if name not in arrays}
    return dict(zip(QKV, inputs(T=11), strict=True)) | arrays, settings


@functools.cache
def gradients_and_results(cases, positions):
    """Of all of these kinds, by one program."""

    def loss(arrays, case):
        _, settings = arrays_and_settings(case)
        common = settings | POSITIONS[positions] | {"implementation": "streaming", "return_stats": True}
        out, stats = CASES[case][0](**arrays, **common)
        return (out * WEIGHTS).sum() + stats.entropy.sum(), (out, *stats)

    @jax.jit
    def gradients(arrays):
        return {case: jax.grad(loss, has_aux=True)(arrays[case], case) for case in arrays}

    return gradients({case: arrays_and_settings(case)[0] for case in cases})


@pytest.mark.parametrize("positions", ["run on", pytest.param("given", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", [*QUICK_KINDS, *[pytest.param(case, marks=pytest.mark.slow) for case in OTHER_KINDS]])
def test_values_are_those_of_the_oracle_and_gradients_of_all_arrays_its_differences(case, positions):
    arrays, settings = arrays_and_settings(case)

    def oracle(arrays):
        parameters = {name: x for name, x in arrays.items() if name not in QKV} | settings
        return expected(case, parameters, *(arrays[name] for name in QKV), **POSITIONS[positions])[:3]

    gradient, results = gradients_and_results(QUICK_KINDS if case in QUICK_KINDS else OTHER_KINDS, positions)[case]
    jax.tree.map(assert_close, results, tuple(oracle(arrays)))
    for i, (name, slopes) in enumerate(gradient.items()):  # along one direction each
        slopes, step = np.asarray(slopes, np.float64), 1e-5
        direction = random(*slopes.shape, seed=50 + i).astype(np.float64)
        ahead, behind = (oracle(arrays | {name: arrays[name] + size * direction}) for size in (step, -step))
        wanted = ((ahead[0] - behind[0]) * WEIGHTS).sum() + (ahead[1] - behind[1]).sum()
        # The error is that of a sum of numbers of either sign.
        error = (direction * slopes).sum() - wanted / (2 * step)
        assert abs(error) < TOLERANCE * np.abs(direction * slopes).sum()


# --- Encodings


SIZES = ModelDims(num_heads=N, head_dim=H, model_dim=D, train_length=FAR, num_kv_heads=K)


def made(encoding):
    """Numbers in place of an encoding's parameters."""
    shapes = jax.eval_shape(
        lambda key: encoding.init_shared(key, SIZES) | encoding.init_layer(key, SIZES), jax.random.key(0)
    )
    return jax.device_put(draws({name: x.shape for name, x in shapes.items()}, seed=30))


def test_the_functions_are_the_encodings():
    def renamed(params, **names):
        return {names.get(name, name): x for name, x in params.items()}

    shaw, xl, tupe = Shaw(clip=3), TransformerXL(), TUPE()
    buckets = DeBERTa(max_distance=14, buckets=4, released=True)
    pairs = [
        (shaw, shaw_attention, lambda p: renamed(p, keys="key_table", values="value_table")),
        (NEZHA(), nezha_attention, dict),
        (xl, transformer_xl_attention, dict),
        (tupe, tupe_attention, lambda p: renamed(p, bias="table")),
        (TUPE(relative=False), tupe_attention, dict),
        (buckets, deberta_attention, lambda p: p | {"max_distance": 14, "released": True}),
    ]

    @jax.jit
    def outputs(params):
        return [
            (
                encoded_attention(encoding, p, *inputs(T=7), implementation="reference"),
                function(*inputs(T=7), **arguments(p), implementation="reference"),
            )
            for (encoding, function, arguments), p in zip(pairs, params, strict=True)
        ]

    for of_encoding, of_function in outputs([made(encoding) for encoding, _, _ in pairs]):
        np.testing.assert_array_equal(of_encoding, of_function)


def test_defaults_are_the_papers():
    assert (Shaw().clip, NEZHA().clip, DeBERTa().max_distance) == (16, 64, 512)
    assert TUPE().relative and (TUPE().num_buckets, TUPE().max_distance) == (32, 128)
    dims = dataclasses.replace(SIZES, train_length=None)

    def shapes(init):
        return {name: x.shape for name, x in jax.eval_shape(lambda key: init(key, dims), jax.random.key(0)).items()}

    assert shapes(Shaw().init_layer) == {"keys": (33, H), "values": (33, H)}
    assert shapes(NEZHA().init_layer) == {}
    assert shapes(DeBERTa().init_shared)["relative"] == (1024, D)
    assert shapes(TUPE().init_shared)["positions"] == (1024, D)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_that_no_query_reads_reach_none(implementation):
    function, parameters = CASES["shaw"]
    arrays, table = inputs(), parameters["key_table"]
    damaged = np.where(np.arange(len(table))[:, None] > len(table) // 2, np.nan, table)
    attend = functools.partial(function, *arrays, value_table=parameters["value_table"], implementation=implementation)
    assert_close(attend(key_table=damaged), attend(key_table=table))


def test_positions_that_a_table_has_not_give_nan_rather_than_another_row():
    positions = np.array([[0, 3, FAR]])
    for encoding in (TUPE(), DeBERTa(absolute=True)):
        assert encoding.max_length(SIZES) == FAR
        query, _ = jax.jit(encoding.query_key)(made(encoding), *inputs(T=3)[:2], positions, positions)
        query = np.asarray(query)
        assert np.isnan(query[:, 2]).any(-1).all() and np.isfinite(query[:, :2]).all()
    assert DeBERTa().max_length(SIZES) is None


def test_absolute_deberta_adds_its_rows_to_the_queries():
    encoding = DeBERTa(max_distance=4, absolute=True)
    params, (query, key, value) = made(encoding), inputs()
    positions = np.sort(ANYWHERE[:2])
    rows = np.stack([np.asarray(params["absolute"])[row] for row in positions])
    at = {"query_positions": positions, "key_positions": positions}
    out = jax.jit(lambda *arrays: encoded_attention(encoding, params, *arrays, **at))(query, key, value)
    plain = {name: params[name] for name in DISENTANGLED}
    assert_close(out, expected("deberta", plain, query + rows, key, value, **at).output)


def test_absolute_layers_of_a_decoder_share_the_relative_table_and_bound_its_length():
    model = small_model(num_layers=2, train_length=12, encoding=("deberta", DeBERTa(absolute=True)))
    assert [encoding.unwrapped for encoding in model.encodings] == [DeBERTa()] * 2
    assert len(model.positions) == 1 and set(model.positions[0]) == {"relative"}
    assert ["absolute" in block.attention.position for block in model.blocks] == [False, True]
    assert model.max_length == 12
    assert jax.eval_shape(model, np.arange(12)[None]).shape == (1, 12, 32)
    with pytest.raises(ValueError, match=r"\A.*\b12\b.*\Z"):
        model(np.zeros((1, 13), int))


# --- Bad input


BAD_ENCODINGS = [
    ("clip", lambda: Shaw(clip=0)),
    ("clip", lambda: NEZHA(clip=-1)),
    ("head_dim", lambda: NEZHA().init_layer(jax.random.key(0), dataclasses.replace(SIZES, head_dim=5))),
    ("model_dim", lambda: TransformerXL().init_layer(jax.random.key(0), dataclasses.replace(SIZES, model_dim=5))),
    ("length", lambda: TUPE(length=0)),
    ("num_buckets", lambda: TUPE(num_buckets=3)),
    ("max_distance", lambda: TUPE(max_distance=16)),
    ("max_distance", lambda: DeBERTa(max_distance=0)),
    ("buckets", lambda: DeBERTa(buckets=5)),
    ("buckets", lambda: DeBERTa(buckets=2)),
    ("max_distance", lambda: DeBERTa(buckets=8, max_distance=5)),
    ("length", lambda: DeBERTa(absolute=True, length=0)),
    ("num_buckets", lambda: deberta_bucket(jnp.arange(3), num_buckets=3)),
]


@pytest.mark.parametrize(("name", "make"), BAD_ENCODINGS)
def test_settings_that_cannot_work_are_refused_in_one_line_that_names_them(name, make):
    with pytest.raises(ValueError, match=rf"\A{name} .*\Z"):
        make()


BAD_PARAMETERS = [
    ("shaw", "key_table", (6, H)),
    ("shaw", "key_table", (7, H + 1)),
    ("shaw", "key_table", (1, H)),
    ("shaw", "value_table", (9, H)),
    ("transformer_xl", "content_bias", (H,)),
    ("transformer_xl", "position_bias", (N, 1)),
    ("transformer_xl", "position_kernel", (5, N, H)),
    ("transformer_xl", "position_kernel", (D, K, H)),
    ("tupe_r", "positions", (D,)),
    ("tupe_r", "query_kernel", (D, K, H)),
    ("tupe_r", "key_kernel", (D, N, H)),
    ("tupe_r", "scale", (1,)),
    ("tupe_r", "shift", ()),
    ("tupe_r", "table", (8, K)),
    ("deberta", "relative", (7, D)),
    ("deberta", "relative", (8,)),
    ("deberta", "key_kernel", (D, N, H)),
    ("deberta", "query_kernel", (D + 1, N, H)),
]


@pytest.mark.parametrize(("case", "name", "shape"), BAD_PARAMETERS)
def test_parameters_of_another_shape_are_refused_in_one_line_that_names_them(case, name, shape):
    function, parameters = CASES[case]
    with pytest.raises(ValueError, match=rf"\A{name} .*\Z"):
        function(*inputs(), **parameters | {name: np.zeros(shape, np.float32)})


def test_nezha_refuses_heads_without_sinusoids_and_values_of_another_width():
    query, key, value = inputs(H=5)
    with pytest.raises(ValueError, match=r"\Avalue .*\Z"):
        nezha_attention(query, key, value)
    query, key, value = inputs()
    with pytest.raises(ValueError, match=r"\Avalue .*\Z"):
        nezha_attention(query, key, value[..., :6])


@pytest.mark.parametrize(
    ("rows", "max_distance", "reason"),
    [(5, None, "a positive even number of rows, not 5"), (6, 30, "a multiple of 4 rows, at least 8, not 6")],
)
def test_a_table_of_other_rows_is_refused(rows, max_distance, reason):
    kernels = {name: np.ones((6, 2, 8), np.float32) for name in ("key_kernel", "query_kernel")}
    with pytest.raises(ValueError, match=f"relative must have {reason}"):
        deberta_attention(
            *[np.ones((1, 4, 2, 8), np.float32)] * 3,
            relative=np.ones((rows, 6), np.float32),
            max_distance=max_distance,
            **kernels,
        )
