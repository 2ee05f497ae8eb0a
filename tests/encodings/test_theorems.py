"""What NoPE can and cannot know of positions: the constructions of docs/theorems.md, at full length and with weights.

Theorems 1 and 2 are those of Kazemnejad et al. 2023 (arXiv 2305.19466, appendix). Their layers are written out here:
an embedding, matrices for queries, keys, values and output, and a ReLU network, on one residual stream.

Shapes: T length, N heads, H head dim, D width of the residual stream.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nope_jax.attention import alibi_attention, nope_attention
from nope_jax.encodings import Sinusoidal, TokenInputs
from tests.support import oracles
from tests.support.attention_cases import assert_close, compiled, inputs, random, reference_only

LENGTH = 4096
VOCABULARY, CONTENT, H = 12, 14, 16
FIRST, ONE, SHARE, POSITION, COS, SIN = range(6)
"""What the channels of the residual stream hold before those of the tokens' content."""
D = SIN + 1 + CONTENT
FREQUENCY, HEIGHT, SLOPE = 0.37, 1.5, 2**-8
"""Of the two relative terms: HEIGHT · cos(FREQUENCY · distance) and -SLOPE · distance."""


class Head(NamedTuple):
    """Weights of an attention layer."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    """[D, N, H] each."""
    out: np.ndarray
    """[N, H, D]"""


def embedding():
    """Token 0, which comes first and only there, says so; every token says 1; the others have content."""
    table = np.zeros((VOCABULARY, D), np.float32)
    table[0, FIRST] = 1
    table[:, ONE] = 1
    table[1:, SIN + 1 :] = random(VOCABULARY - 1, CONTENT)
    return table


@functools.partial(jax.jit, static_argnames=("is_causal", "implementation"))
def attend(x, weights, **common):
    """An attention layer without positions, on the residual stream [T, D]."""
    query, key, value = (jnp.einsum("td,dnh->tnh", x, w, precision="highest")[None] for w in weights[:3])
    out = nope_attention(query, key, value, precision="highest", **common)[0]
    return x + jnp.einsum("tnh,nhd->td", out, weights.out, precision="highest")


def reading_head():
    """Constant keys, so that all weights are 1/t; the value that the first token alone carries goes to SHARE."""
    query, key, value, out = np.zeros((D, 1, 1)), np.zeros((D, 1, 1)), np.zeros((D, 1, 1)), np.zeros((1, 1, D))
    query[ONE], key[ONE], value[FIRST], out[..., SHARE] = 3, 1, 1, 1
    return Head(*(w.astype(np.float32) for w in (query, key, value, out)))


def write_position(x):
    """A ReLU network that reads 1/t in SHARE and writes t, cos and sin of its angle, exact at every t up to LENGTH.

    Unit k of the first layer is a ramp between 1/(k+1) and 1/k, which the second cuts to a step: 1 where t > k. The
    third tells by a difference of two steps which t it is, and writes a row of a table; any table would do.
    """
    k = np.arange(LENGTH + 1)
    gain = (2.0 * k + 1) * (k + 1)
    ramp = jax.nn.relu(np.float32(0.5 + 2 * (k + 1)) - np.float32(gain) * x[:, SHARE, None])
    steps = 1 - jax.nn.relu(1 - ramp)
    here = jax.nn.relu(steps[:, :-1] - steps[:, 1:])  # of t = 1 .. LENGTH
    t = k[1:].astype(float)
    table = np.zeros((LENGTH, D))
    table[:, POSITION], table[:, COS], table[:, SIN] = t, np.cos(FREQUENCY * t), np.sin(FREQUENCY * t)
    return x + jnp.matmul(here, table.astype(np.float32), precision="highest")


def relative_heads(slope=SLOPE):
    """Two heads of q·k/√H = content + f(distance): f = -slope · distance, and f = HEIGHT · cos(FREQUENCY · distance).

    The first adds (-t, 1)·(1, s) = -(t - s), the second (cos at, sin at)·(cos as, sin as) = cos a(t - s). Values are
    the content.
    """
    query, key, value = (random(D, 2, H, seed=seed) / math.sqrt(CONTENT) for seed in (1, 2, 3))
    query[: SIN + 1] = key[: SIN + 1] = value[: SIN + 1] = 0
    query[..., CONTENT:] = key[..., CONTENT:] = 0
    past, wave, root = 0, 1, math.sqrt(H)
    query[POSITION, past, CONTENT], key[ONE, past, CONTENT] = -slope * root, 1
    query[ONE, past, CONTENT + 1], key[POSITION, past, CONTENT + 1] = slope * root, 1
    query[COS, wave, CONTENT], key[COS, wave, CONTENT] = HEIGHT * root, 1
    query[SIN, wave, CONTENT + 1], key[SIN, wave, CONTENT + 1] = HEIGHT * root, 1
    return Head(query, key, value, np.zeros((2, H, D), np.float32))


@functools.cache
def after_layer_one():
    """The residual stream [T, D] after the layer that finds positions, of random tokens behind the first."""
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, LENGTH)
    tokens[0] = 0

    @jax.jit
    def layer(x):
        x = attend(x, reading_head(), implementation="streaming")
        return jax.lax.map(write_position, x.reshape(-1, 256, D)).reshape(LENGTH, D)

    return np.asarray(layer(embedding()[tokens]))


def test_theorem_1_attention_gives_one_over_t():
    """To half a unit of the last place: nothing but a division is rounded."""
    share = after_layer_one()[:, SHARE].astype(np.float64)
    t = np.arange(1, LENGTH + 1)
    np.testing.assert_allclose(share * t, 1, rtol=2**-24, atol=0)
    # Reading t off as 1/share is good to 2⁻²⁴ of t, which at 4,096 is the spacing of its floats but not t itself.
    assert 0 < np.abs(1 / share - t).max() <= LENGTH * 2**-24


@reference_only  # the test above is by streaming
def test_theorem_1_holds_in_both_implementations(implementation):
    tokens = np.r_[0, np.random.default_rng(1).integers(1, VOCABULARY, 299)]
    x = attend(embedding()[tokens], reading_head(), implementation=implementation)
    np.testing.assert_allclose(np.asarray(x)[:, SHARE], 1 / np.arange(1, 301), rtol=2**-23, atol=0)


def test_theorem_1_a_relu_network_writes_the_position():
    """Exactly, at every one of 4,096 positions, though 1/4095 and 1/4096 differ in the fourth digit only."""
    x = after_layer_one().astype(np.float64)
    t = np.arange(1, LENGTH + 1)
    np.testing.assert_array_equal(x[:, POSITION], t)
    np.testing.assert_array_equal(x[:, COS], np.cos(FREQUENCY * t).astype(np.float32))
    np.testing.assert_array_equal(x[:, SIN], np.sin(FREQUENCY * t).astype(np.float32))


def test_theorem_1_needs_the_causal_mask():
    tokens = np.r_[0, np.random.default_rng(1).integers(1, VOCABULARY, 299)]
    x = attend(embedding()[tokens], reading_head(), is_causal=False, implementation="reference")
    np.testing.assert_allclose(np.asarray(x)[:, SHARE], np.full(300, 1 / 300), rtol=2**-23)


ROWS = np.r_[0:6, 100:4000:150, 4090:4096]
"""Queries that the oracle, which is slow, looks at."""


def second_layer(slope=SLOPE):
    """Queries, keys and values [T, N, H] of the layer with relative terms, float32."""
    return projected(after_layer_one(), relative_heads(slope)[:3])


@jax.jit
def projected(x, weights):
    return [jnp.einsum("td,dnh->tnh", x, w, precision="highest")[None] for w in weights]


@jax.jit
def of_rows(query, key, value):
    """Output and statistics of the queries ROWS."""
    return nope_attention(query[:, ROWS], key, value, query_positions=ROWS, return_stats=True)


def oracle_of_second_layer(slope=SLOPE):
    """The same attention from content alone and explicit distances, float64; rows ROWS."""
    query, key, value = (np.array(x, np.float64) for x in second_layer(slope))
    query[..., CONTENT:] = key[..., CONTENT:] = 0
    distance = ROWS[:, None] - np.arange(LENGTH)
    bias = np.stack([-slope * distance, HEIGHT * np.cos(FREQUENCY * distance)])
    return oracles.attention(query[:, ROWS], key, value, bias=bias, query_positions=ROWS)


def test_theorem_2_positions_in_the_stream_become_relative_terms():
    out, stats = of_rows(*second_layer())
    wanted = oracle_of_second_layer()
    assert_close(out, wanted.output)
    assert_close(stats.entropy, wanted.entropy)
    assert_close(stats.logsumexp, wanted.logsumexp)
    # The terms matter: without them the same content attends otherwise.
    query, key, value = map(np.asarray, second_layer())
    query, key = (np.where(np.arange(H) < CONTENT, x, 0) for x in (query, key))
    plain = oracles.attention(query[:, ROWS], key, value, query_positions=ROWS)
    assert (np.abs(plain.output - out).max((0, 1, 3)) > 0.1).all()


def test_theorem_2_nope_becomes_alibi():
    """At every position, from tokens alone; ALiBi is given the content and the distances."""
    query, key, value = (np.asarray(x)[:, :, :1] for x in second_layer())
    content = query[..., :CONTENT] * math.sqrt(CONTENT / H), key[..., :CONTENT]

    @jax.jit
    def both(*arrays):
        return nope_attention(*arrays), alibi_attention(*content, value, slopes=np.float32([SLOPE]))

    assert_close(*both(query, key, value))


def test_theorem_2_in_float32_is_as_good_as_slope_times_position():
    """A logit is the difference of two numbers as large as slope · t: steep slopes cost digits far out."""
    slope = 0.5
    _, stats = of_rows(*second_layer(slope))
    wanted = oracle_of_second_layer(slope)
    errors = np.abs(stats.logsumexp[0, 0] - wanted.logsumexp[0, 0])
    assert errors.max() <= 2 * slope * LENGTH * 2**-23


@reference_only
def test_without_the_mask_order_is_nothing_and_with_it_something(implementation):
    x = inputs(B=1, T=40)
    shuffled = np.random.default_rng(0).permutation(40)

    @jax.jit
    def outputs(*arrays):
        attend = functools.partial(nope_attention, *arrays, implementation=implementation)
        return attend(is_causal=False), attend(is_causal=True)

    (without, causal), (without_again, causal_again) = (
        map(np.asarray, outputs(*arrays)) for arrays in (x, [part[:, shuffled] for part in x])
    )
    assert_close(without_again, without[:, shuffled])
    assert (np.abs(causal[:, shuffled] - causal_again).max((0, 2, 3))[1:] > 1e-2).mean() > 0.9


@reference_only
def test_identical_tokens_are_seen_evenly(implementation):
    """Weights 1/n, entropy ln n, and the same output everywhere: no layer above can tell the positions apart."""
    T = 65
    query, key, value = (np.repeat(x, T, axis=1) for x in inputs(B=1, T=1))
    identity = np.broadcast_to(np.eye(T, dtype=np.float32)[:, None], (1, T, 2, T))  # the output is the weights
    both = np.concatenate([value, identity], axis=-1)
    out, stats = compiled(nope_attention, query, key, both, implementation=implementation)
    out, weights = np.split(np.asarray(out), [8], axis=-1)
    n = np.arange(1, T + 1)
    assert_close(out, np.broadcast_to(value.repeat(2, axis=2), out.shape))
    assert_close(stats.entropy, np.broadcast_to(np.log(n), (1, 4, T)))
    assert_close(weights[0, :, 0], np.tril(np.ones((T, T))) / n[:, None])


def test_a_shift_changes_what_sinusoids_do():
    embeddings = random(1, 40, 32)

    @jax.jit
    def attended(shift):
        at = shift + jnp.arange(40)[None]
        x = Sinusoidal().input({}, embeddings, TokenInputs(jnp.zeros((1, 40), int), at, None, 104))
        return nope_attention(*[x.reshape(1, 40, 4, 8)] * 2, embeddings.reshape(1, 40, 4, 8))

    assert np.abs(np.asarray(attended(64)) - attended(0)).max() > 0.1
