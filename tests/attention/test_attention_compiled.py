"""Attention as users run it: optimised by the compiler, in full blocks; accuracy, block boundaries and memory."""

import dataclasses
import functools
import itertools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nope_jax.attention import cope_attention, dot_product_attention, encoded_attention
from nope_jax.attention.blocks import BLOCK_SIZE
from nope_jax.encodings import ENCODINGS, BlockLogit, Encoding, ModelDims, ScanLogit, Wrapper
from tests.support.attention_cases import (
    ATTENTION,
    assert_agrees,
    assert_close,
    expected,
    inputs,
    parameters,
    streaming_and_some_reference,
    streaming_only,
)

OPTIMISED: dict[str, int | bool] = {"xla_backend_optimization_level": 3}
if "fusion_emitters" in os.environ["XLA_FLAGS"]:
    OPTIMISED["xla_cpu_use_fusion_emitters"] = True


@functools.cache
def optimised(encoding, implementation):
    """Output and statistics; the other tests are compiled quickly instead (conftest.py), and round differently."""
    own = parameters(encoding, N=2)
    attend = functools.partial(ATTENTION[encoding], return_stats=True, implementation=implementation, **own)
    return jax.jit(attend, compiler_options=OPTIMISED)


def over_blocks(length=BLOCK_SIZE + 1):
    """With all queries but the first, so that queries and keys are cut at different places."""
    query, key, value = inputs(B=1, T=length, N=2, K=1)
    return query[:, 1:], key, value


@streaming_and_some_reference("encoding", ATTENTION, [], slow=["nope", "rope", "t5"])
def test_values_and_statistics_agree_with_float64_over_several_blocks(encoding, implementation):
    out, stats = optimised(encoding, implementation)(*over_blocks())
    wanted = expected(encoding, *over_blocks(), **parameters(encoding, N=2))
    assert_close(out, wanted.output)
    assert_close(stats.entropy, wanted.entropy)
    assert_close(stats.logsumexp, wanted.logsumexp)


@streaming_only
def test_the_entropy_of_a_decided_row_is_zero_however_large_its_logits(implementation):
    # ln Σ e^s - Σ p·s, taken literally, loses it: both are in the millions, where float32 is good to an eighth.
    query, key, value = over_blocks()
    query, key = 1e3 * query, 1e3 * key
    _, stats = optimised("alibi", implementation)(query, key, value)
    wanted = expected("alibi", query, key, value, **parameters("alibi", N=2))
    assert np.abs(wanted.logsumexp).max() > 1e6 and wanted.entropy.max() < 1e-6
    assert_close(stats.entropy, wanted.entropy)


@pytest.mark.slow  # one more than a block is above
@pytest.mark.parametrize("length", [BLOCK_SIZE, 2 * BLOCK_SIZE + 1])
def test_streaming_agrees_with_float64_at_block_boundaries(length):
    assert_agrees("alibi", "streaming", *over_blocks(length))


@pytest.mark.slow  # in small blocks, test_attention.py has windows that skip and cut them
@pytest.mark.parametrize("window", [BLOCK_SIZE, BLOCK_SIZE + 1])
def test_a_window_in_a_long_sequence_agrees_with_float64(window):
    assert_agrees("alibi", "streaming", *inputs(B=1, T=3 * BLOCK_SIZE, N=2, K=1), window=window)


def temporaries(encoding, length, *, gradient, **keywords):
    """Bytes of scratch memory of the compiled function, entropy included; nothing is run."""
    heads = 2
    settings = parameters(encoding, heads)
    arrays = {name: x for name, x in settings.items() if isinstance(x, np.ndarray)}
    settings = {name: x for name, x in settings.items() if name not in arrays} | keywords
    array = jax.ShapeDtypeStruct((1, length, heads, 16), jnp.float32)

    def attend(query, key, value, arrays):
        return ATTENTION[encoding](
            query, key, value, **arrays, **settings, implementation="streaming", return_stats=True
        )

    def loss(*operands):
        out, stats = attend(*operands)
        return (out**2).sum() + stats.entropy.sum()

    function = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)) if gradient else attend)
    return function.lower(array, array, array, arrays).compile().memory_analysis().temp_size_in_bytes


LONG = 8192
GROWTH = 2.3
"""At most, for each doubling of the length; weights would grow by 4."""


@pytest.mark.parametrize(
    ("encoding", "gradient"), [("t5", True), pytest.param("nope", True, marks=pytest.mark.slow)]
)  # and more by doubling, which is slow
def test_memory_grows_with_length_and_not_with_its_square(encoding, gradient):
    # Of the temporaries, not one is an array of all pairs, be it a mask for all heads.
    assert temporaries(encoding, LONG, gradient=gradient) < LONG**2


@pytest.mark.slow
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("encoding", ["nope", "rope", "alibi", "t5"])
def test_memory_grows_linearly_at_every_doubling(encoding, gradient):
    dims = [temporaries(encoding, length, gradient=gradient) for length in (1024, 2048, 4096, 8192, 16_384)]
    assert all(large < GROWTH * small for small, large in itertools.pairwise(dims))


def test_memory_grows_with_length_under_positions_segments_and_a_window_too():
    positions = np.arange(LONG)
    keywords = {"query_positions": positions, "key_positions": positions, "segment_ids": positions[None] // 700}
    assert temporaries("t5", LONG, gradient=True, window=900, **keywords) < LONG**2


KINDS = [name for name, cls in ENCODINGS.items() if not issubclass(cls, Wrapper) and cls.logit is not Encoding.logit]
LIGHT = ["shaw"]  # one that skews, with a value term; the one that scans is below


@pytest.mark.parametrize(
    "name", [*LIGHT, *(pytest.param(name, marks=pytest.mark.slow) for name in KINDS if name not in LIGHT)]
)
def test_memory_of_every_kind_of_logit_grows_with_length(name):
    encoding, dims = ENCODINGS[name](), ModelDims(num_heads=2, head_dim=16, model_dim=32, train_length=LONG)
    params = jax.eval_shape(
        lambda key: {**encoding.init_shared(key, dims), **encoding.init_layer(key, dims)}, jax.random.key(0)
    )
    array, tokens = (jax.ShapeDtypeStruct((1, LONG, *rest), jnp.float32) for rest in ((2, 16), (32,)))

    def loss(params, query, key, value, tokens):
        features = encoding.features(params, tokens, None)
        keywords = {"query_features": features, "key_features": features, "implementation": "streaming"}
        out, stats = encoded_attention(encoding, params, query, key, value, return_stats=True, **keywords)
        return (out**2).sum() + stats.entropy.sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    compiled = gradient.lower(params, array, array, array, tokens).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < LONG**2


def test_memory_under_a_scan_over_layers_grows_with_length():
    # What follows from positions alone, such as a mask of all pairs, must not be kept for the backward pass.
    attend = functools.partial(cope_attention, embeddings=np.ones((5, 8), np.float32), implementation="streaming")

    def loss(x):
        return jax.lax.scan(lambda x, _: (x + attend(x, x, x), None), x, length=2)[0].sum()

    compiled = jax.jit(jax.grad(loss)).lower(jax.ShapeDtypeStruct((1, LONG, 2, 8), jnp.float32)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < LONG**2


def _marked(scale, block):
    """A term with one sine: it tells in the compiled program how often the term is computed."""
    return jnp.sin(scale * (block.query @ block.key.mT))


def _marked_and_counted(scale, block, content, visible, carry):
    return _marked(scale, block) + carry[..., None], carry + jnp.where(visible, content, 0.0).sum(-1)


TERMS = [(BlockLogit(_marked), 2), (ScanLogit(_marked_and_counted), 1)]
"""And the number of loops over blocks in a backward pass: the blocks of a diagonal, with and without a mask, or all."""


@pytest.mark.parametrize(("logit", "loops"), TERMS, ids=["block", "scan"])
def test_the_backward_pass_computes_a_term_once_per_block(logit, loops):
    # Not once for the logits and once more for its gradient.
    array = jax.ShapeDtypeStruct((1, BLOCK_SIZE + 20, 2, 16), jnp.float32)

    def loss(scale, query, key, value):
        term = dataclasses.replace(logit, parameters=scale, heads=(None,))
        return dot_product_attention(query, key, value, logit=term, implementation="streaming").sum()

    def sines(function):
        compiled = jax.jit(function).lower(jnp.float32(1), array, array, array).compile()
        return len(re.findall(r" sine\(", compiled.as_text()))

    assert sines(jax.grad(loss, argnums=(0, 1, 2, 3))) == sines(loss) + loops
