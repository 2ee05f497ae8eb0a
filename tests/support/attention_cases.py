"""What the tests of attention share: the functions, inputs, tolerances, and the oracle's answer to each call."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nope_jax.attention import alibi_attention, nope_attention, rope_attention, t5_attention
from nope_jax.encodings import ENCODINGS, Encoding, Wrapper
from tests.support import oracles

ATTENTION = {"nope": nope_attention, "rope": rope_attention, "alibi": alibi_attention, "t5": t5_attention}
IMPLEMENTATIONS = ["reference", "streaming"]

every_encoding = pytest.mark.parametrize("encoding", ATTENTION)
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
streaming_only, reference_only = (  # but for the slow tests
    pytest.mark.parametrize(
        "implementation",
        [name if name == quick else pytest.param(name, marks=pytest.mark.slow) for name in IMPLEMENTATIONS],
    )
    for quick in ("streaming", "reference")
)


def _one_and_some_of_the_other(one, name, cases, other, slow):
    return pytest.mark.parametrize(
        (name, "implementation"),
        [
            pytest.param(case, implementation, marks=pytest.mark.slow)
            if case in slow or (implementation != one and case not in other)
            else (case, implementation)
            for case, implementation in itertools.product(cases, IMPLEMENTATIONS)
        ],
        ids=str,
    )


def streaming_and_some_reference(name, cases, reference, slow=()):
    """Every case of an argument by streaming, but for the slow tests only some of them by the reference.

    Streaming has a path for each kind of position, mask and block; the reference has one for all. What another case
    proves too may be left to the slow tests altogether.
    """
    return _one_and_some_of_the_other("streaming", name, cases, reference, slow)


def reference_and_some_streaming(name, cases, streaming, slow=()):
    """The reverse, for what happens before queries and keys come to an implementation, or in a term alike in both."""
    return _one_and_some_of_the_other("reference", name, cases, streaming, slow)


TOLERANCE = 1e-5
"""Of float32 against float64, relative to an entry and to the largest entry of its array."""


def assert_close(actual, expected, tolerance=TOLERANCE, floor=0.1):
    """Within the tolerance of each entry and of the array's scale; infinities equal, NaN nowhere.

    The floor is the scale of what is zero but for rounding (the entropy of a row with one key).
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    finite = np.isfinite(expected)
    scale = max(np.abs(expected[finite]).max(initial=0.0), floor)
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * scale, equal_nan=False)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


LENGTH = 21
"""Three blocks, the last one padded."""


def inputs(B=2, T=LENGTH, S=None, N=4, K=2, H=8, seed=0):
    S = T if S is None else S
    return random(B, T, N, H, seed=seed), random(B, S, K, H, seed=seed + 1), random(B, S, K, H, seed=seed + 2)


def compiled(attend, *arrays, **keywords):
    """Output and statistics, by one program: outside jit each operation of an encoding is compiled by itself."""
    return jax.jit(lambda *arrays: attend(*arrays, **keywords, return_stats=True))(*arrays)


def compiled_together(calls):
    """`compiled` for each call, (function, arrays, keywords), by one program: half of what one costs is for itself."""

    @jax.jit
    def outputs(arrays):
        return {
            name: attend(*arrays[name], **keywords, return_stats=True) for name, (attend, _, keywords) in calls.items()
        }

    return outputs({name: arrays for name, (_, arrays, _) in calls.items()})


def parameters(encoding, N=4):
    """Settings away from the defaults, so that none can be lost on the way."""
    return {
        "nope": {},
        "rope": {"base": 50.0, "rotary_dim": 4, "interleaved": True},
        "alibi": {"slopes": np.linspace(0.9, 0.1, N, dtype=np.float32)},
        "t5": {"table": random(8, N, seed=9), "max_distance": 10},
    }[encoding]


def expected(encoding, query, key, value, *, query_positions=None, key_positions=None, is_causal=True, **common):
    """The oracle's answer to `ATTENTION[encoding](...)`, the encoding's own parameters among the keywords."""
    (B, T, N, _), S = query.shape, key.shape[1]
    at = oracles.positions(B, T, S, query_positions, key_positions)
    bias = 0.0
    if encoding == "rope":
        settings = {name: common.pop(name) for name in ("base", "rotary_dim", "interleaved") if name in common}
        query, key = oracles.rope(query, at[0], **settings), oracles.rope(key, at[1], **settings)
    elif encoding == "alibi":
        slopes = common.pop("slopes", None)
        bias = oracles.alibi_bias(oracles.alibi_slopes(N) if slopes is None else slopes, *at)
    elif encoding == "t5":
        settings = {name: common.pop(name) for name in ("max_distance", "bidirectional") if name in common}
        bias = oracles.t5_bias(common.pop("table"), *at, **settings)
    return oracles.attention(
        query, key, value, bias=bias, query_positions=at[0], key_positions=at[1], is_causal=is_causal, **common
    )


def assert_agrees(encoding, implementation, query, key, value, jit=False, **keywords):
    """With the float64 oracle; by one program where no other test has the operations of arrays of these shapes."""
    attend = functools.partial(ATTENTION[encoding], implementation=implementation, return_stats=True, **keywords)
    out, stats = (jax.jit(attend) if jit else attend)(query, key, value)
    wanted = expected(encoding, query, key, value, **keywords)
    assert_close(out, wanted.output)
    assert_close(stats.entropy, wanted.entropy)
    assert_close(stats.logsumexp, wanted.logsumexp)


WITHIN = ("query_key", "logit", "value", "logit_scale", "sink", "span", "features", "positions")


def changes_attention(name):
    """Whether an encoding does anything within a layer."""
    cls = ENCODINGS[name]
    base = Wrapper if issubclass(cls, Wrapper) else Encoding
    return any(getattr(cls, place) is not getattr(base, place) for place in WITHIN)


IN_ATTENTION = [name for name in ENCODINGS if changes_attention(name)]

ONE_OF_EACH = ["nope", "learned", "recursive", "convolution", "rope", "t5", "fire", "shaw", "transformer_xl", "cope"]
ONE_OF_EACH += ["forgetting", "log_n"]
"""An encoding for every way of working: what holds for these in minutes holds for all of them in `make test-all`."""


def others_slow(names, but=()):
    """Parameters of which only one of each way of working is quick, but for some that another test stands for."""
    quick = set(ONE_OF_EACH) - set(but)
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def mapped(attend, *operands):
    """Gradient of several calls at once, recomputed in the backward pass."""

    def loss(*operands):
        out, stats = attend(*operands, return_stats=True)
        return (out.astype(jnp.float32) ** 2).sum() + (stats.entropy**2).sum()

    return jax.vmap(jax.grad(jax.checkpoint(loss), argnums=(0, 1, 2)))(*operands)


def output_and_gradients(attend, *operands):
    """The output of attention, and the gradients of query, key and value, of a sum with all different weights."""

    def loss(*operands):
        out = attend(*operands)
        weights = np.cos(np.arange(out.size), dtype=np.float32).reshape(out.shape)
        return (out.astype(jnp.float32) * weights).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*operands)
    return out, *gradients
