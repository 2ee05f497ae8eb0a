"""What holds for every encoding that has a name: both implementations agree, causality, decoding, memory."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nope_jax.attention import encoded_attention
from nope_jax.encodings import (
    ENCODINGS,
    SCHEDULES,
    AttentionSink,
    Convolution,
    LogN,
    LongRoPEScaling,
    ModelDims,
    Randomized,
    RoPE,
    Wrapper,
)
from tests.support.attention_cases import IN_ATTENTION, ONE_OF_EACH, assert_close, others_slow
from tests.support.drawn_model import small_model

B, T, S, N, K, H, D, V = 2, 13, 21, 4, 2, 8, 16, 32
TRAINED = 24
SIZES = ModelDims(num_heads=N, head_dim=H, model_dim=D, train_length=TRAINED, num_kv_heads=K, vocab_size=V)

KINDS = [name for name in IN_ATTENTION if not issubclass(ENCODINGS[name], Wrapper)]  # wrappers change no kernel
every_kind = pytest.mark.parametrize("name", KINDS)
# Of RoPE and T5, the plainest in a kernel, test_attention.py proves the same; the logit scale has its gradient in all.
# What only one of these tests would see is quick; of the others another test stands for the names that are left out.
PLAIN = {"nope", "rope", "t5", "head_scale"}
# Their values and gradients at positions that run on are held by test_relative.py, test_contextual.py and test_bias.py,
# and behind a cache by the decoding below; at positions that do not, a table by distance is test_bias.py's, CoPE and
# forgetting are test_contextual.py's.
HELD = {"shaw", "transformer_xl", "cope", "forgetting", "fire"}
ANYWHERE = HELD - {"shaw"}


pytestmark = pytest.mark.usefixtures("small_blocks")


def encoding_of(name):
    return ENCODINGS[name]().bind(SIZES)


def shapes_of_parameters(encoding):
    return jax.eval_shape(
        lambda key: {**encoding.init_shared(key, SIZES), **encoding.init_layer(key, SIZES)}, jax.random.key(0)
    )


def parameters(encoding, seed=0):
    """Numbers for all parameters, none of which is where it has no effect."""
    draws = np.random.default_rng(seed)
    shapes = shapes_of_parameters(encoding)
    return jax.device_put(jax.tree.map(lambda x: draws.normal(0, 0.5, x.shape).astype(x.dtype), shapes))


def operands(seed=0, queries=T, keys=S):
    draws = np.random.default_rng(seed)
    shapes = (B, queries, N, H), (B, keys, K, H), (B, keys, K, H), (B, keys, D)
    return [jax.device_put(draws.standard_normal(shape).astype(np.float32)) for shape in shapes]


def attend(encoding, params, query, key, value, inputs, **common):
    """One layer's attention; the queries are those of the last tokens."""
    features = encoding.features(params, inputs, None)
    query_features = jax.tree.map(lambda x: x[:, -query.shape[1] :], features)
    return encoded_attention(
        encoding, params, query, key, value, query_features=query_features, key_features=features, **common
    )


@functools.partial(jax.jit, static_argnums=0)
def gradients_and_values(encoding, params, arrays, logit_scale, common):
    """Output, statistics, and the gradient of all of them by all that is differentiable, of both implementations."""

    def loss(params, arrays, logit_scale, implementation):
        told = common | {"logit_scale": logit_scale, "implementation": implementation, "return_stats": True}
        out, stats = attend(encoding, params, *arrays, **told)
        some = jnp.isfinite(stats.logsumexp)  # rows that see no key
        total = (out * np.cos(np.arange(out.size, dtype=np.float32).reshape(out.shape))).sum() + (
            stats.entropy**2
        ).sum()
        return total + jnp.where(some, stats.logsumexp, 0.0).sum(), (out, stats.entropy, some, stats.logsumexp)

    gradient = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
    return [gradient(params, arrays, logit_scale, name) for name in ("streaming", "reference")]


def assert_streaming_is_reference(encoding, arrays, common, seed=0):
    params, logit_scale = parameters(encoding, seed), np.linspace(0.5, 1.5, N, dtype=np.float32)
    both = gradients_and_values(encoding, params, arrays, logit_scale, common)
    (gradient, values), (wanted_gradient, wanted) = both
    jax.tree.map(assert_close, values, wanted)
    # A gradient sums over rows and blocks in another order, with the cancellation that comes with it.
    jax.tree.map(functools.partial(assert_close, tolerance=5e-5), gradient, wanted_gradient)


@pytest.mark.parametrize("name", others_slow([*KINDS, "head_scale"], but=PLAIN | HELD))
def test_streaming_is_reference_behind_a_cache(name):
    """Positions that run on, queries the last of the keys' tokens, grouped heads, a logit scale per head."""
    assert_streaming_is_reference(encoding_of(name), operands(), {})


@pytest.mark.parametrize("name", others_slow([*KINDS, "head_scale"], but=PLAIN | ANYWHERE))
@hypothesis.given(seed=st.integers(0, 2**16))
@hypothesis.settings(max_examples=4, derandomize=True, deadline=None)
def test_streaming_is_reference_for_any_positions_segments_and_mask(name, seed):
    draws = np.random.default_rng(seed)
    length = TRAINED
    common = {
        "query_positions": draws.integers(0, length, (B, S)),
        "key_positions": draws.integers(0, length, (B, S)),
        "segment_ids": (draws.integers(0, 2, (B, S)), draws.integers(0, 2, (B, S))),
        "mask": draws.random((B, N, S, S)) < draws.uniform(0.3, 1.0),
    }
    assert_streaming_is_reference(encoding_of(name), operands(seed, queries=S), common, seed)


@pytest.mark.slow
@every_kind
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=12, derandomize=True, deadline=None)
def test_streaming_is_reference_for_any_shapes(name, data):
    encoding = encoding_of(name)
    keys = data.draw(st.integers(1, encoding.max_length(SIZES) or 40), label="keys")
    queries = data.draw(st.integers(1, keys), label="queries")
    common = {
        "window": data.draw(st.none() | st.integers(1, 30), label="window"),
        "chunk_size": data.draw(st.none() | st.integers(1, 30), label="chunk_size"),
        "is_causal": data.draw(st.booleans(), label="is_causal"),
    }
    arrays, params = operands(0, queries, keys), parameters(encoding)

    def run(implementation):
        def loss(params, arrays):
            out, stats = attend(encoding, params, *arrays, **common, implementation=implementation, return_stats=True)
            return (out**2).sum() + stats.entropy.sum(), (out, *stats)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, arrays)

    (values, gradient), (wanted, wanted_gradient) = run("streaming"), run("reference")
    jax.tree.map(functools.partial(assert_close, tolerance=5e-5), values, wanted)
    # Where every query sees one key, some gradients are nothing but rounding: all are measured by the largest.
    largest = max(jnp.abs(array).max() for array in jax.tree.leaves(wanted_gradient))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-5, atol=5e-5 * largest), gradient, wanted_gradient
    )
    jax.clear_caches()  # the system lets a process map a number of programs, and these are many


@pytest.mark.slow  # their gradients are those of oracles that see no future
@every_kind
def test_the_gradient_from_the_future_is_zero(name):
    encoding, row, common = encoding_of(name), 9, {"implementation": "streaming"}
    params = parameters(encoding)

    @jax.jit
    def gradient(arrays):
        return jax.grad(lambda a: (attend(encoding, params, *a, **common)[:, row] ** 2).sum())(arrays)

    query, *of_keys = map(np.asarray, gradient(operands(queries=S)))
    for array in of_keys:
        assert (array[:, row + 1 :] == 0).all()
        assert array.shape[-1] == D or (array[:, : row + 1] != 0).any()  # not every encoding looks at the inputs
    assert (query[:, row] != 0).any() and (np.delete(query, row, axis=1) == 0).all()


SHIFTED = 5
INVARIANT = ["nope", "rope", "xpos", "alibi", "t5", "kerple", "shaw", "nezha", "transformer_xl", "deberta", "cope"]
INVARIANT += ["forgetting"]
NOT_INVARIANT = ["fire", "tupe"]
ELSEWHERE = ["nope", "rope", "alibi", "t5"]  # test_attention.py has them


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.slow) if x in ELSEWHERE else x for x in INVARIANT + NOT_INVARIANT]
)
def test_a_shift_of_all_positions_changes_nothing_exactly_where_it_should_not(name):
    encoding = encoding_of(name)
    params, arrays, positions = parameters(encoding), operands(queries=S), np.arange(S)

    @jax.jit
    def at(positions):
        return attend(encoding, params, *arrays, query_positions=positions, key_positions=positions)

    here, there = at(positions % 19), at(positions % 19 + SHIFTED)
    if name in INVARIANT:
        assert_close(there, here, tolerance=1e-5)
    else:
        assert not np.allclose(there, here, atol=1e-3)


def decoder(encoding, **changes):
    settings = {"num_heads": N, "num_kv_heads": K, "model_dim": D, "mlp_dim": 24, "train_length": TRAINED}
    return small_model(**settings | {"vocab_size": V, "num_layers": 2, "encoding": encoding} | changes)


TOKENS = np.random.default_rng(1).integers(0, V, (B, TRAINED))

# Frequencies that depend on how much room there is.
LONG_ROPE = RoPE(scaling=LongRoPEScaling((1.0, 1.5), (1.0, 3.0), 8, factor=2.0))
# In one decoder: what holds of it holds of all of them, and one alone is a slow test. NoPE decodes in
# test_model_fields.py, CoPE and forgetting in test_kv_cache.py, a table and frequencies that depend on the room in
# test_generation.py; terms by distance know nothing of a cache but the positions that all have.
TOGETHER = "recursive", AttentionSink(LogN(Randomized(Convolution(), maximum=2 * TRAINED), length=8))
OTHERS = "learned", "fire", "cope", "forgetting", LONG_ROPE


@pytest.mark.parametrize(
    "encoding",
    [TOGETHER, pytest.param(OTHERS, marks=pytest.mark.slow), *others_slow(ENCODINGS, but=ONE_OF_EACH)],
    ids=str,
)
def test_token_by_token_gives_the_logits_of_one_pass(encoding):
    model = decoder(encoding, **{"num_layers": len(encoding)} if isinstance(encoding, tuple) else {})
    graph, state = nnx.split(model)

    @jax.jit
    def step(state, tokens, cache):
        return nnx.merge(graph, state).decode_step(tokens, cache, return_stats=True)

    logits, stats = jax.jit(lambda state: nnx.merge(graph, state)(TOKENS, return_stats=True))(state)
    logits, entropy = np.asarray(logits), np.asarray(stats.entropy)
    cache = model.init_cache(B, TRAINED)
    first, _, cache = step(state, TOKENS[:, :5], cache)  # a prompt at once
    assert_close(first, logits[:, :5], tolerance=1e-5)
    for t in range(5, TRAINED):
        got, got_stats, cache = step(state, TOKENS[:, t : t + 1], cache)
        assert_close(np.asarray(got)[:, 0], logits[:, t], tolerance=1e-5)
        assert_close(np.asarray(got_stats.entropy)[..., 0], entropy[..., t], tolerance=1e-5)
    assert cache.length == TRAINED
    with pytest.raises(ValueError, match="room for 24 and holds 24"):
        model.decode_step(TOKENS[:, :1], cache)


@pytest.mark.slow  # test_kv_cache.py has them with windows that end within the text
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_decode_too(name):
    model = decoder(name, num_layers=4)
    logits, cache = model(TOKENS[:, :9]), model.init_cache(B, 9)
    first, cache = model.decode_step(TOKENS[:, :6], cache)
    last, _ = model.decode_step(TOKENS[:, 6:9], cache)
    assert_close(jnp.concatenate([first, last], axis=1), logits, tolerance=1e-5)


# Those whose formula divides by, or takes a logarithm of, a length, a position or a gate. Gradients of the others at a
# common length are finite by the tests above, and recurrences past training by test_absolute.py.
@pytest.mark.parametrize("name", ["fire", "forgetting", "log_n"])
def test_attention_is_finite_at_one_token_and_at_twice_the_training_length(name):
    encoding = ENCODINGS[name]().bind(dataclasses.replace(SIZES, train_length=4))

    def loss(params, arrays):
        out, stats = attend(encoding, params, *arrays, implementation="reference", return_stats=True)
        return (out**2).sum() + stats.entropy.sum() + stats.logsumexp.sum()

    @jax.jit
    def losses_and_gradients(params, one, more):
        return loss(params, one), jax.value_and_grad(loss, argnums=(0, 1))(params, more)

    found = losses_and_gradients(parameters(encoding), operands(queries=1, keys=1), operands(queries=8, keys=8))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODINGS)
def test_nothing_is_nan_in_a_decoder_of_one_token_or_twice_the_training_length(name):
    trained = 4
    model = decoder(name, num_layers=1, train_length=trained)
    graph, state = nnx.split(model)
    longest = 2 * trained
    if model.max_length is not None and model.max_length < longest:
        with pytest.raises(ValueError, match=f"between 0 and {model.max_length - 1}"):
            model(TOKENS[:, :longest])
        longest = trained

    def loss(state, tokens):
        logits, stats = nnx.merge(graph, state)(tokens, return_stats=True)
        return jax.nn.logsumexp(logits).sum() + stats.entropy.sum()

    @jax.jit
    def losses_and_gradient(state):
        return loss(state, TOKENS[:, :1]), jax.value_and_grad(loss)(state, TOKENS[:, :longest])

    assert all(np.isfinite(x).all() for x in jax.tree.leaves(losses_and_gradient(state)))


def largest_array(jaxpr):
    """Elements of the largest array anywhere in a program."""
    dims = [getattr(v.aval, "size", 0) for eqn in jaxpr.eqns for v in eqn.outvars]
    parameters = [leaf for eqn in jaxpr.eqns for leaf in jax.tree.leaves(list(eqn.params.values()))]
    inner = [largest_array(getattr(leaf, "jaxpr", leaf)) for leaf in parameters if hasattr(leaf, "eqns")]
    return max([0, *dims, *inner])


# The memory of NoPE, T5, Shaw and CoPE is measured in test_attention_compiled.py.
@pytest.mark.parametrize("explicit", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", others_slow(KINDS, but=PLAIN | {"fire", "shaw", "cope", "transformer_xl"}))
def test_no_array_of_queries_times_keys_exists(name, explicit):
    """In the program of value and gradient, whatever the compiler makes of it, for positions given or not."""
    encoding = ENCODINGS[name]().bind(ModelDims(N, H, D, 4096, K, V))
    params = shapes_of_parameters(encoding)

    def largest(length):
        shapes = (1, length, N, H), (1, length, K, H), (1, length, K, H), (1, length, D)
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        at = {"query_positions": np.arange(length), "key_positions": np.arange(length)} if explicit else {}

        def loss(params, arrays):
            out, stats = attend(encoding, params, *arrays, **at, implementation="streaming", return_stats=True)
            return out.sum() + stats.entropy.sum()

        return largest_array(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params, arrays).jaxpr)

    small, large = largest(512), largest(1024)
    assert large <= 2.1 * small
    assert large < 1024**2
