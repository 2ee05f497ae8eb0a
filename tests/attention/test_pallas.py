"""The kernels for TPUs and GPUs, run in interpret mode."""

import functools
import logging
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh, AxisType

from nope_jax.attention import (
    alibi_attention,
    dot_product_attention,
    encoded_attention,
    fire_attention,
    nope_attention,
    shaw_attention,
)
from nope_jax.attention.backends import BACKENDS
from nope_jax.attention.backends.pallas import served
from nope_jax.attention.backends.pallas.call import Call, tokens_of
from nope_jax.attention.backends.pallas.pairwise import Pairwise
from nope_jax.attention.backends.pallas.tpu import shear
from nope_jax.attention.backends.pallas.vectors import tables_of
from nope_jax.attention.mask_spec import MaskSpec
from nope_jax.config.schema import Implementation
from nope_jax.encodings import (
    ENCODINGS,
    FIRE,
    AttentionSink,
    BlockLogit,
    BlockValue,
    DistanceLogit,
    DistanceVectors,
    ModelDims,
)
from tests.support.attention_cases import IN_ATTENTION, assert_close, mapped, random

B, T, N, K, H, H2 = 2, 21, 4, 2, 8, 12
"""Three blocks, the last one padded."""


KERNELS = ("pallas_tpu", "pallas_gpu")


def arrays(keys=T):
    shapes = (B, T, N, H), (B, keys, K, H), (B, keys, K, H2)
    return tuple(random(*shape, seed=i) for i, shape in enumerate(shapes))


def by_distance(table, distance):
    return table[:, jnp.clip(distance + T, 0, table.shape[1] - 1)]


@functools.cache
def program(implementation, **static):
    """A function of arrays: output, statistics and gradient, with keywords that are traced too."""

    @jax.jit
    def run(operands, logit_scale, table, traced):
        def loss(operands, logit_scale, table):
            logit = None if table is None else DistanceLogit(by_distance, table)
            out, (entropy, logsumexp) = dot_product_attention(
                *operands,
                logit=logit,
                logit_scale=logit_scale,
                implementation=implementation,
                return_stats=True,
                **static,
                **traced,
            )
            out, weights = out.astype(jnp.float32), jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
            total = (jnp.where(jnp.isfinite(out), out, 0.0) * weights).sum() + (jnp.nan_to_num(entropy) ** 2).sum()
            return total + jnp.where(jnp.isfinite(logsumexp), logsumexp, 0.0).sum(), (out, entropy, logsumexp)

        (_, values), gradient = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(operands, logit_scale, table)
        return values, gradient

    return run


def assert_same(found, wanted, tolerance=1e-5):
    """Values, and gradients, which are sums over blocks with the cancellation that comes with them."""
    for results, factor in zip(zip(found, wanted, strict=True), (1, 5), strict=True):
        jax.tree.map(functools.partial(assert_close, tolerance=factor * tolerance), *results)


SCALE = np.linspace(0.5, 1.5, B * N * T, dtype=np.float32).reshape(B, N, T)
TABLE = random(N, 2 * T, seed=7)
SEGMENTS = np.sort(np.random.default_rng(0).integers(0, 3, (B, T)), axis=1)
POSITIONS = {
    "query_positions": np.arange(T)[::-1] + 3,
    "key_positions": np.arange(T + 5)[None] + np.array([[0], [2]]),
}


RULES = {"window": 18, "softcap": 2.0}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_table_of_distances_grouped_queries_segments_a_window_and_a_soft_cap_are_the_reference_s(kernel):
    traced = {"segment_ids": (SEGMENTS, SEGMENTS)}
    found, wanted = (program(name, **RULES)(arrays(), SCALE, TABLE, traced) for name in (kernel, "reference"))
    assert_same(found, wanted)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kernel", KERNELS)
def test_with_64_bits_it_computes_in_32(kernel):
    """What is traced of a call and its gradient, the kernels too, has no float of 64 bits."""

    def loss(*operands):
        out, stats = alibi_attention(*operands, implementation=kernel, return_stats=True)
        return out.sum() + stats.entropy.sum()

    with jax.enable_x64(True):
        traced = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*arrays()))
    assert "pallas_call" in traced and "f32" in traced and "f64" not in traced


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kernel", KERNELS)
def test_with_64_bits_the_gradient_is_the_reference_s(kernel):
    def gradient(implementation):
        return jax.jit(jax.grad(lambda *operands: alibi_attention(*operands, implementation=implementation).sum()))

    operands = arrays()
    with jax.enable_x64(True):
        found = gradient(kernel)(*operands)
    wanted = gradient("reference")(*operands)
    assert found.dtype == jnp.float32
    assert_close(found, wanted, tolerance=5e-5)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kernel", KERNELS)
def test_segments_and_what_is_not_finite_reach_those_who_see_them(kernel):
    attend, reference = (program(name, **RULES) for name in (kernel, "reference"))
    query, key, value = arrays()
    alone = np.where(SEGMENTS == 1, 9, SEGMENTS)  # queries that see nothing
    segments = {"segment_ids": (alone, SEGMENTS)}
    wanted = reference((query, key, value), SCALE, TABLE, segments)
    found = attend((query, key, value), SCALE, TABLE, segments)
    assert_same(found, wanted)
    none = np.broadcast_to((alone == 9)[:, None], (B, N, T))
    out, entropy, logsumexp = map(np.asarray, found[0])
    assert none.any() and (out.swapaxes(1, 2)[none] == 0).all()
    assert (entropy[none] == 0).all() and (logsumexp[none] == -np.inf).all()

    hidden = tuple(np.argwhere(SEGMENTS == 1)[0])
    for places, seen in ([hidden], False), ([(0, 2)], True), ([(1, 17), (0, 9)], True):
        key_, value_ = np.array(key), np.array(value)
        for place in places:
            key_[place], value_[place] = np.nan, np.inf
        touched = reference((query, key_, value_), SCALE, TABLE, segments)
        found = attend((query, key_, value_), SCALE, TABLE, segments)
        leaves = (map(np.asarray, jax.tree.leaves(of)) for of in (found, wanted, touched))
        for x, clean, now in zip(*leaves, strict=True):
            same = clean == now
            assert same.any() and same.all() == (not seen)
            assert_close(np.where(same, x, 0.0), np.where(same, clean, 0.0), tolerance=5e-5)
        np.testing.assert_array_equal(*(np.isfinite(results[0][0]) for results in (found, touched)))


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("keys", "static", "traced", "dtype"),
    [
        (T, {"is_causal": False, "window": 9}, {}, "float32"),
        (T, {"chunk_size": 12}, {}, "bfloat16"),
        (T, {"chunk_size": 5, "is_causal": False}, {}, "float32"),
        (T + 12, {"window": 7, "qk_scale": 0.6}, {}, "float32"),
        (T - 9, {}, {}, "float32"),
        (T + 5, {"chunk_size": 12, "window": 5}, POSITIONS, "bfloat16"),
    ],
)
def test_every_rule_is_the_reference_s(keys, static, traced, dtype, kernel):
    operands = tuple(x.astype(dtype) for x in arrays(keys))
    table = None if traced else TABLE
    found, wanted = (program(name, **static)(operands, SCALE, table, traced) for name in (kernel, "reference"))
    assert_same(found, wanted, 1e-5 if dtype == "float32" else 0.01)


DIMS = ModelDims(num_heads=N, head_dim=H, model_dim=16, train_length=T, num_kv_heads=K, vocab_size=32)
NOT_SERVED = {("cope", kernel): "the logit must be .* ScanLogit" for kernel in KERNELS}


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
def test_on_a_gpu_half_precision_and_both_directions_without_a_rule():
    """Where nothing is hidden, no sum is computed again; the last blocks have fewer queries and keys."""
    operands = tuple(x.astype("float16") for x in arrays(T + 2))
    found, wanted = (program(name, is_causal=False)(operands, SCALE, TABLE, {}) for name in ("pallas_gpu", "reference"))
    assert_same(found, wanted, 2e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", IN_ATTENTION)
def test_every_encoding_is_the_reference_s_or_is_refused(name, kernel):
    encoding = ENCODINGS[name]().bind(DIMS)
    encoding = encoding if isinstance(encoding, AttentionSink) else AttentionSink(encoding)
    params = encoding.init_shared(jax.random.key(0), DIMS) | encoding.init_layer(jax.random.key(1), DIMS)
    params = {name: x + 0.3 * random(*x.shape, seed=i) for i, (name, x) in enumerate(params.items())}
    query, key, _ = arrays()
    operands, tokens = (query, key, jnp.asarray(random(B, T, K, H, seed=2))), jnp.asarray(random(B, T, 16))

    def run(implementation):
        @jax.jit
        @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
        def compute(params, operands):
            features = encoding.features(params, tokens, None)
            keywords = {"query_features": features, "key_features": features, "return_stats": True}
            out, stats = encoded_attention(encoding, params, *operands, implementation=implementation, **keywords)
            return (out**2).sum() + (stats.entropy**2).sum() + stats.logsumexp.sum(), (out, *stats)

        (_, values), gradient = compute(params, operands)
        return values, gradient

    reason = NOT_SERVED.get((name, kernel))
    if reason is not None:
        with pytest.raises(ValueError, match=f'implementation "{kernel}" cannot serve this call: {reason}'):
            run(kernel)
        return
    found, wanted = run(kernel), run("reference")
    assert_same(found, wanted)


def rising(parameters, query_position, key_position, of_query=0.0, of_key=0.0):
    """Of two numbers per head, which the other axis of an array may come after, one for all heads, and features."""
    (slope, tilt), least = parameters
    distance = jnp.abs(query_position - key_position).astype(jnp.float32)
    found = slope * jnp.log(distance + jnp.exp(least)) + tilt * query_position + of_query * of_key
    return jnp.where(distance < 12, found, -jnp.inf)


def rising_block(parameters, block):
    (per_head, least), pairs = parameters, (block.query_positions[:, None, :, None], block.key_positions[:, None, None])
    of_query, of_key = block.query_features[:, None, :, None], jnp.moveaxis(block.key_features, -1, 1)[:, :, None]
    return rising((tuple(per_head[:, :, None, None]), least), *pairs, of_query, of_key)


@functools.partial(jax.jit, static_argnames="implementation")
def of_both_positions(operands, parameters, traced, implementation):
    def loss(operands, parameters):
        (parameters, features) = parameters
        logit = BlockLogit(rising_block, parameters, *features, by_pair=rising, heads=(1, None, None, 2))
        out, stats = dot_product_attention(
            *operands, logit=logit, implementation=implementation, return_stats=True, **traced
        )
        return (out**2).sum() + (stats.entropy**2).sum() + stats.logsumexp.sum(), (out, *stats)

    (_, values), gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(operands, parameters)
    return values, gradient


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("kernel", "keys", "traced"),
    [
        ("pallas_tpu", T, {}),
        pytest.param("pallas_gpu", T, {}, marks=pytest.mark.slow),
        pytest.param("pallas_tpu", T + 5, POSITIONS, marks=pytest.mark.slow),
        ("pallas_gpu", T + 5, POSITIONS),
    ],
)
def test_a_logit_of_both_positions_is_the_reference_s(kernel, keys, traced):
    """Its gradient too, wherever parameters and features of tokens have their axis of heads; -inf hides a key."""
    parameters, features = (random(2, N, seed=8), np.float32(0.4)), (random(B, T, seed=9), random(B, keys, N, seed=10))
    learned = parameters, features
    found, wanted = (of_both_positions(arrays(keys), learned, traced, name) for name in (kernel, "reference"))
    assert_same(found, wanted)


WINDOW = 2 * T - 11


def vectors_at(tables, distances):
    """Not a number where no query sees a key: in the future and past the window."""
    seen = (distances >= 0) & (distances < WINDOW)
    found = (jnp.moveaxis(table[:, distances + 2 * T], 0, 1) for table in tables)
    return DistanceVectors(*(jnp.where(seen.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.nan) for x in found))


def vectors_block(tables, block):
    """The definition, with a vector for every pair."""
    query, key, constant = (table[:, block.distance + 2 * T] for table in tables)
    of_queries = jnp.einsum("bnqh,nbqkh->bnqk", block.query, query)
    of_keys = jnp.einsum("bnkh,nbqkh->bnqk", block.key, key)
    constant = jnp.moveaxis(constant, 0, 1)
    finite = jnp.isfinite(constant)  # of a factor times -inf, the gradient would be no number
    return (
        of_queries
        + block.factor[..., None] * (of_keys + jnp.where(finite, constant, 0.0))
        + jnp.where(finite, 0.0, -jnp.inf)
    )


def value_vectors(table, distances, head_dim):
    assert table.shape[2] == head_dim
    return jnp.moveaxis(table[:, distances + 2 * T], 0, 1)


def value_block(table, weights, block):
    return jnp.einsum("bnqk,bqkh->bnqh", weights, table[0, block.distance + 2 * T])


def test_a_row_of_many_distances_adds_up_in_float32():
    """In the tables that kernels are given: the gradient of a bfloat16 row, rounded once."""
    operand, rule = jnp.zeros((1, 256, 1, H)), MaskSpec(None, None, None, None, None, False, None)

    def nearest(table, distances, *_):
        return table[jnp.clip(distances, -5, 5) + 5][:, None]

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(of_logit, of_value):
        logit = BlockLogit(vectors_block, of_logit, by_distance=lambda *x: DistanceVectors(query=nearest(*x)))
        value_term = BlockValue(value_block, of_value, by_distance=nearest)
        call = Call.of(operand, operand, rule, None, True, None, logit, query_size=64, key_size=64)
        tables = tables_of(call, operand, operand, logit, value_term, tokens_of(call, rule), 256, 256)
        return sum((x * np.abs(random(*x.shape, seed=3))).sum() for x in (tables.query, tables.value))

    rows = random(11, H), random(11, H)
    found, wanted = gradient(*(x.astype(jnp.bfloat16) for x in rows)), gradient(*rows)
    jax.tree.map(functools.partial(assert_close, tolerance=2**-8), found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_row_of_many_distances_adds_up_in_float32_in_a_kernel_s_gradient(kernel):
    query, key, value = (random(1, 256, 1, H, seed=i) for i in range(3))
    tables = random(2, 11, H, seed=3).astype(jnp.bfloat16)

    @functools.partial(jax.jit, static_argnums=1)
    @jax.grad
    def gradient(tables, implementation):
        by_name = {"key_table": tables[0], "value_table": tables[1]}
        return shaw_attention(query, key, value, **by_name, implementation=implementation).sum()

    found, wanted = gradient(tables, kernel), gradient(tables.astype(np.float32), "reference")
    for x, y in zip(found, wanted, strict=True):
        assert_close(x, y, tolerance=2**-8)


def test_what_a_tpu_does_to_rows_is_what_interpret_mode_does(monkeypatch):
    rows = jnp.asarray(random(16, 32))

    @functools.partial(pl.pallas_call, out_shape=[rows[:, :16], rows], interpret=True)
    def both(rows, block, back):
        block[...] = shear.sheared(rows[...])
        back[...] = shear.unsheared(block[...])

    here = both(rows)
    wanted = [[rows[x, (y - x) % 32] for y in range(16)] for x in range(16)]
    np.testing.assert_array_equal(here[0], np.array(wanted))
    np.testing.assert_array_equal(np.array([[here[1][x, (y - x) % 32] for y in range(16)] for x in range(16)]), here[0])
    monkeypatch.setattr(shear, "platform", lambda: "tpu")
    for x, y in zip(here, both(rows), strict=True):
        np.testing.assert_array_equal(x, y)


def bodies(program):
    """All equations of a program, body by body."""
    yield program.eqns
    for one in program.eqns:
        for inner in jax.tree.leaves(list(one.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from bodies(inner)


def test_on_a_gpu_all_threads_wait_for_what_one_moves():
    """Which interpret mode cannot show; nor that no loop loads what it has not yet stored."""

    def loss(tables, *operands):
        return shaw_attention(*operands, key_table=tables[0], value_table=tables[1], implementation="pallas_gpu").sum()

    with jax.default_device("gpu"):
        traced = jax.make_jaxpr(jax.grad(loss, argnums=range(4)))(random(2, 11, 64), *[random(1, 256, 1, 64)] * 3)
    kernels = [one for body in bodies(traced) for one in body if one.primitive.name == "pallas_call"]
    move, moves = ["masked_swap", "debug_barrier", "masked_load", "debug_barrier"], 0
    for kernel in kernels:
        slot = kernel.outvars[-1].aval.shape
        for body in bodies(kernel.params["jaxpr"]):
            found = [one.primitive.name for one in body if not one.invars or one.invars[0].aval.shape == slot]
            found = [name.removesuffix("_p") for name in found]  # as a barrier is called by jax 0.10
            found = [name for name in found if name in move]
            moves += len(found) // 4
            assert found == move * (len(found) // 4)
        assert kernel.params["compiler_params"].num_stages == 1
    assert (len(kernels), moves) == (8, 3 * (2 + 3 + 2) + 3 + 2)


@pytest.mark.parametrize("name", ["query", "constant"])
def test_vectors_of_another_shape_are_refused(name):
    def by_distance(_, distances):
        return DistanceVectors(**{name: jnp.zeros((len(distances), N + 1))})

    logit = BlockLogit(vectors_block, by_distance=by_distance)
    with pytest.raises(ValueError, match=rf"by_distance must return {name} vectors .* not \(\d+, {N + 1}\)"):
        dot_product_attention(*arrays(), logit=logit, implementation="pallas_tpu")


@functools.partial(jax.jit, static_argnames=("softcap", "implementation", "by_distance"))
def with_vectors(operands, tables, scale, softcap, implementation, by_distance):
    def loss(operands, tables, scale):
        by_value = None if by_distance is None else value_vectors
        out, stats = dot_product_attention(
            *operands,
            logit=BlockLogit(vectors_block, tables[:3], by_distance=by_distance, heads=(0, 0, None)),
            value_term=BlockValue(value_block, tables[3], by_distance=by_value, heads=(None,)),
            logit_scale=scale,
            window=WINDOW,
            softcap=softcap,
            implementation=implementation,
            return_stats=True,
        )
        seen = jnp.where(jnp.isfinite(out), out, 0.0), jnp.nan_to_num(stats.entropy)
        return sum((x**2).sum() for x in seen), (out, *stats)

    (_, values), gradient = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(operands, tables, scale)
    return values, gradient


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("keys", "softcap"), [pytest.param(T, 3.0, marks=pytest.mark.slow), (T + 9, None)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_terms_of_vectors_per_distance_are_the_reference_s(kernel, keys, softcap):
    """Of heads, and of all heads; a constant of -inf hides keys, and what is not finite reaches those who see it."""
    shapes = (N, 4 * T, H), (N, 4 * T, H), (1, 4 * T), (1, 4 * T, H2)
    tables = tuple(random(*shape, seed=9 + i) for i, shape in enumerate(shapes))
    hiding = np.where(np.arange(4 * T) % 5, tables[2], -np.inf)
    query, key, value = arrays(keys)
    of_nan = key.copy()
    of_nan[0, keys - 1] = np.nan
    for key_, constant in ((key, hiding), (of_nan, tables[2])):
        tables_ = (*tables[:2], constant, tables[3])
        found, wanted = (
            jax.tree.map(np.asarray, with_vectors((query, key_, value), tables_, SCALE, softcap, name, by_distance))
            for name, by_distance in ((kernel, vectors_at), ("reference", None))
        )
        for x, y in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
            np.testing.assert_array_equal(np.isfinite(x), np.isfinite(y))
        assert_same(*(jax.tree.map(np.nan_to_num, results) for results in (found, wanted)))


def test_what_a_logit_of_both_positions_takes_is_counted():
    """For the estimates of `--compile_for`: at least an addition and two products for a unit of FIRE's MLP."""
    encodings = [FIRE(width=width) for width in (4, 8)]
    units = (jax.eval_shape(lambda key, fire=fire: fire.init_layer(key, DIMS), jax.random.key(0)) for fire in encodings)
    zeros = (jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype)), params) for params in units)
    small, large = (Pairwise.of(FIRE().logit(params, None, None)) for params in zeros)
    assert large.operations() - small.operations() >= 4 * 3
    assert large.operations(gradient=True) > 2 * large.operations() > 2 * 8 * 3


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("kernel", KERNELS)
def test_it_may_be_mapped_and_recomputed(kernel):
    operands = [jnp.stack([x, 2 * x]) for x in arrays()]
    found, wanted = (
        jax.jit(functools.partial(mapped, functools.partial(alibi_attention, implementation=name)))(*operands)
        for name in (kernel, "reference")
    )
    jax.tree.map(functools.partial(assert_close, tolerance=5e-5), found, wanted)


@pytest.mark.parametrize(
    ("queries", "keys", "sizes", "is_causal", "window", "moved"),
    [(21, 21, (8, 4), True, None, 0), (21, 30, (4, 8), True, 16, 0), (30, 21, (8, 8), False, 13, -7)],
)
def test_the_blocks_that_meet_are_those_in_which_a_query_sees_a_key(queries, keys, sizes, is_causal, window, moved):
    """And whole are those in which every query, or what would be one past the end, sees every key."""
    rule = MaskSpec(None, None, None, None, None, is_causal, window, query_offset=jnp.int32(moved))
    operands = jnp.zeros((1, queries, 1, H)), jnp.zeros((1, keys, 1, H))
    call = Call.of(*operands, rule, None, True, None, query_size=sizes[0], key_size=sizes[1])
    offset = keys - queries + moved
    query, key = np.arange(call.query_blocks * sizes[0])[:, None], np.arange(call.key_blocks * sizes[1])
    seen = np.asarray(rule.by_distance(jnp.asarray(query + offset - key))) & (key < keys)
    blocks = seen.reshape(call.query_blocks, sizes[0], call.key_blocks, sizes[1])
    some, every = blocks[: queries // sizes[0]].any((1, 3)), blocks.all((1, 3))
    assert some.any() and every.any() and not every.all()

    query_blocks, key_blocks = every.shape

    @jax.jit
    def ranges(offset):
        of_queries, of_keys = np.arange(query_blocks), np.arange(key_blocks)
        by_query = (of(of_queries, offset) for of in (call.seen_whole_by, call.keys_of))
        return *by_query, *(of(of_keys, offset) for of in (call.seeing_whole, call.queries_of))

    def between(range_, own, others):
        first, last = (np.broadcast_to(x, own)[:, None] for x in range_)
        return (first <= np.arange(others)) & (np.arange(others) <= last)

    whole_keys, some_keys, whole_queries, some_queries = ranges(offset)
    np.testing.assert_array_equal(between(whole_keys, query_blocks, key_blocks), every)
    np.testing.assert_array_equal(between(whole_queries, key_blocks, query_blocks), every.T)
    meet = between(some_keys, query_blocks, key_blocks)
    np.testing.assert_array_equal(meet[: len(some)][some.any(1)], some[some.any(1)])
    assert (between(some_queries, key_blocks, query_blocks)[:, : len(some)] >= some.T).all()


# --- Which calls it serves, and which it gets


def shapes(queries=T, keys=T, dtype="float32"):
    return [
        jax.ShapeDtypeStruct((B, length, heads, H), dtype) for length, heads in ((queries, N), (keys, K), (keys, K))
    ]


@pytest.mark.parametrize(
    ("keywords", "dtype", "reason"),
    [
        ({}, "float16", "query must be float32 or bfloat16, not float16"),
        ({"mask": np.ones((T, T), bool)}, "float32", "there is a mask; is_causal, window"),
        ({"precision": jax.lax.DotAlgorithmPreset.TF32_TF32_F32}, "float32", "precision must be None, a jax.lax.Prec"),
        ({"query_positions": np.arange(T)}, "float32", "with a DistanceLogit, positions must be consecutive"),
        ({"implementation": "pallas_gpu"}, "float8_e5m2", "query must be float32, bfloat16 or float16, not float8"),
    ],
)
def test_what_it_cannot_serve_it_refuses_with_the_reason(keywords, dtype, reason):
    keywords = {"implementation": "pallas_tpu"} | keywords
    name = keywords["implementation"]
    with pytest.raises(ValueError, match=rf'(?m)\Aimplementation "{name}" cannot serve this call: {reason}.*$'):
        jax.eval_shape(functools.partial(alibi_attention, **keywords), *shapes(dtype=dtype))


DEVICES = {
    "tpu": jax.sharding.AbstractDevice("TPU v5 lite", num_cores=1, platform="tpu"),
    "gpu": jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu"),
}


def mesh_of(platform, *axes, size=2):
    device = DEVICES[platform]
    mesh = AbstractMesh((size,) * len(axes), axes, axis_types=(AxisType.Auto,) * len(axes), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def chosen(caplog, function, *operands, **keywords):
    """The debug message of a call, compiled for whatever is in context."""
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "nope_jax.attention"):
        jax.make_jaxpr(functools.partial(function, **keywords))(*operands)
    return caplog.messages[-1]


def nothing(parameters, block):
    return jnp.zeros_like(block.distance, jnp.float32)[:, None]


def test_on_a_tpu_the_kernel_is_chosen_where_it_serves_and_the_log_says_why_not(caplog):
    def fire(*operands, width=6):
        return fire_attention(
            *operands, hidden_weights=jnp.ones(width), hidden_bias=jnp.ones(width), weights=jnp.ones((width, N))
        )

    long = shapes(256, 256)
    assert chosen(caplog, alibi_attention, *long).startswith('"reference" for queries (2, 256, 4, 8)')
    with mesh_of("tpu", "data"):
        assert chosen(caplog, alibi_attention, *long).startswith('"pallas_tpu" for queries (2, 256, 4, 8) and keys')
        assert chosen(caplog, alibi_attention, *shapes(256, 300)).startswith('"pallas_tpu"')
        assert chosen(caplog, alibi_attention, *shapes(1, 300)).startswith('"streaming"')
        assert chosen(caplog, alibi_attention, *shapes(100, 100)).startswith('"reference"')
        assert chosen(caplog, alibi_attention, *long, implementation="streaming").startswith('"streaming"')
        assert chosen(caplog, fire, *shapes(512, 512)).startswith('"pallas_tpu"')
        assert chosen(caplog, fire, *shapes(512, 512), width=100) == (
            '"streaming" for queries (2, 512, 4, 8) and keys (2, 512, 2, 8); "pallas_tpu" cannot serve this call: '
            "the logit must have at most 256 parameters per head and features, not 303"
        )
        parameters, flags = (jnp.ones((2, N)), jnp.float32(0)), jnp.ones((2, 256, N), bool)
        logit = BlockLogit(nothing, parameters, flags, flags, by_pair=rising, heads=(1, None, 2, 2))
        why = "features must be floats [B, T], or [B, T, N] with 2 in heads, not bool (2, 256, 4) with 2"
        assert why in chosen(caplog, dot_product_attention, *long, logit=logit)
        for keywords in ({"heads": (1, None)}, {"by_pair": rising}):
            logit = BlockLogit(nothing, parameters, **keywords)
            why = "None, a DistanceLogit, or a BlockLogit with by_pair and heads, not a BlockLogit without"
            assert why in chosen(caplog, dot_product_attention, *long, logit=logit)
    with mesh_of("tpu", "model"):  # a mesh of somebody else's
        assert "XLA cannot shard it over the mesh axes model" in chosen(caplog, nope_attention, *long)
    with jax.default_device("tpu"):
        assert chosen(caplog, nope_attention, *long).startswith('"pallas_tpu"')


def test_on_a_gpu_the_kernel_is_chosen_by_the_same_rule(caplog, monkeypatch):
    with mesh_of("gpu", "data"):
        assert chosen(caplog, alibi_attention, *shapes(256, 256)).startswith('"pallas_gpu" for queries (2, 256, 4, 8)')
        assert chosen(caplog, alibi_attention, *shapes(1, 300)).startswith('"pallas_gpu"')
        assert chosen(caplog, alibi_attention, *shapes(100, 100)).startswith('"reference"')
        wide = [jax.ShapeDtypeStruct((B, 256, heads, 300), "float32") for heads in (N, K, K)]
        assert "head dims must be at most 256, not 300 of query" in chosen(caplog, alibi_attention, *wide)
        monkeypatch.setattr(served, "compute_capability", lambda: "7.5")
        refused = "it needs a GPU of compute capability 8.0, 9.0, 10.0, not 7.5"
        assert refused in chosen(caplog, alibi_attention, *shapes(256, 256))
    with mesh_of("tpu", "data"), pytest.raises(ValueError, match="it needs a GPU .* not a TPU"):
        jax.eval_shape(functools.partial(nope_attention, implementation="pallas_gpu"), *shapes())


@pytest.mark.parametrize("kind", DEVICES)
@pytest.mark.parametrize(
    "axes", [("data", "tensor"), *(pytest.param((axis,), marks=pytest.mark.slow) for axis in ("data", "tensor"))]
)
def test_over_several_devices_it_is_always_within_shard_map(axes, kind):
    """Also where nothing divides: XLA cannot partition a kernel."""
    operands = [jax.ShapeDtypeStruct((3, 128, 3, H), jnp.float32)] * 3
    with mesh_of(kind, *axes):
        program = str(jax.make_jaxpr(nope_attention)(*operands))
    assert "pallas_call" in program and "shard_map" in program


def test_a_config_takes_every_implementation():
    assert set(get_args(Implementation)) == set(BACKENDS)
