"""Attention sinks, against a softmax with one more column."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nope_jax.attention import alibi_attention, attention_weights, encoded_attention
from nope_jax.encodings import ALiBi, AttentionSink, HeadScale, ModelDims, NoPE, Windowed, resolve
from tests.support import oracles
from tests.support.attention_cases import (
    LENGTH,
    assert_close,
    inputs,
    random,
    reference_and_some_streaming,
    streaming_only,
)
from tests.support.drawn_model import small_model

pytestmark = pytest.mark.usefixtures("small_blocks")
SINK = np.array([-1.0, 0.0, 1.5, 30.0], np.float32)
CASES = {
    "plain": {},
    "soft cap": {"softcap": 0.5, "logit_scale": 2.0},
    "rows without keys": {"mask": np.arange(LENGTH)[:, None] % 5 > 0, "window": 4},
}


# Most rows of the last case have keys.
@reference_and_some_streaming("case", CASES, ["rows without keys"], slow=["plain"])
def test_it_is_a_column_that_takes_part_in_the_softmax_and_has_no_value(case, implementation):
    arrays, common, layer = inputs(), {**CASES[case], "return_stats": True}, (AttentionSink(NoPE()), {"sink": SINK})

    @jax.jit
    def results(*arrays):
        outputs = encoded_attention(*layer, *arrays, implementation=implementation, **common)
        return outputs, attention_weights(*layer, *arrays[:2], **common)

    wanted = oracles.attention(*arrays, **CASES[case], sink=SINK)
    (out, stats), (weights, again) = results(*arrays)
    assert_close(out, wanted.output)
    assert_close(stats.entropy, wanted.entropy)
    assert_close(stats.logsumexp, wanted.logsumexp)
    assert_close(weights, wanted.weights)
    assert_close(again.entropy, wanted.entropy)
    assert_close(np.asarray(weights).sum(-1), 1 - np.exp(SINK[:, None] - wanted.logsumexp))


@streaming_only
def test_its_gradient_is_that_of_the_column(implementation):
    """Also of entropy and logsumexp, and where a row sees no key."""
    arrays, mask = inputs(K=4), np.arange(LENGTH)[:, None] > 2
    mix = random(2, LENGTH, 4, 8, seed=5)

    def total(out, entropy, logsumexp):
        return (out * mix).sum() + (entropy**2).sum() + logsumexp.sum()

    def loss(sink, *arrays):
        out, stats = encoded_attention(
            AttentionSink(), {"sink": sink}, *arrays, mask=mask, implementation=implementation, return_stats=True
        )
        return total(out, *stats)

    def with_a_column(sink, query, key, value):
        logits = jnp.einsum("btnh,bsnh->bnts", query, key) / 8**0.5
        logits = jnp.where(np.tri(LENGTH, dtype=bool) & mask, logits, -1e9)
        column = jnp.broadcast_to(sink[:, None, None], (*logits.shape[:3], 1))
        logits = jnp.concatenate([logits, column], axis=-1)
        weights = jax.nn.softmax(logits)
        entropy = -(weights * jax.nn.log_softmax(logits)).sum(-1)
        return total(jnp.einsum("bnts,bsnh->btnh", weights[..., :-1], value), entropy, jax.nn.logsumexp(logits, -1))

    sink = np.float32([-1.0, 0.0, 1.5, 3.0])
    gradients = jax.jit(lambda *arrays: [jax.grad(f, argnums=(0, 1, 2, 3))(*arrays) for f in (loss, with_a_column)])
    found, wanted = gradients(sink, *arrays)
    jax.tree.map(lambda x, y: assert_close(x, y, tolerance=5e-5), found, wanted)


def test_it_wraps_an_encoding_and_its_wrappers():
    params = {"sink": np.full(4, -np.float32(80)), "head_scale": np.ones(4, np.float32)}

    @jax.jit
    def outputs(*arrays):
        wrapped = AttentionSink(HeadScale(Windowed(ALiBi(), 5))), HeadScale(AttentionSink(Windowed(ALiBi(), 5)))
        return alibi_attention(*arrays, window=5), *(encoded_attention(x, params, *arrays) for x in wrapped)

    without, outermost, within = outputs(*inputs())
    assert_close(outermost, without)  # next to nothing goes to such a sink
    np.testing.assert_array_equal(outermost, within)
    dims = ModelDims(num_heads=4, head_dim=8, model_dim=32)
    assert AttentionSink(HeadScale(), start=-0.5).init_layer(jax.random.key(0), dims)["sink"].tolist() == [-0.5] * 4
    with pytest.raises(ValueError, match="encoding must not have a sink of its own: apply this wrapper only once"):
        AttentionSink(HeadScale(AttentionSink())).init_layer(jax.random.key(0), dims)
    with pytest.raises(ValueError, match=r"\Astart must be a finite number, not inf\Z"):
        AttentionSink(start=float("inf"))


def test_a_decoder_attends_to_its_sinks():
    model = small_model(encoding="attention_sink:rope")
    tokens = np.arange(12)[None]
    logits, sink = np.asarray(model(tokens)), model.blocks[0].attention.position["sink"]
    sink[...] = np.asarray(sink[...]) - np.float32(100)
    assert np.abs(np.asarray(model(tokens)) - logits).max() > 1e-2


@pytest.mark.slow  # in float32 test_every_encoding.py has one
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_a_decoder_with_sinks_decodes_as_in_one_pass(dtype, tolerance):
    encoding = (*resolve("attention_sink:rope"), AttentionSink(Windowed(ALiBi(), 5), start=1.0))
    model = small_model(num_layers=3, encoding=encoding, dtype=dtype)
    tokens = np.random.default_rng(1).integers(0, 32, (2, 12))
    logits = model(tokens)
    first, cache = model.decode_step(tokens[:, :7], model.init_cache(2, 12))
    rest, _ = model.decode_step(tokens[:, 7:8], cache)
    np.testing.assert_allclose(np.concatenate([first, rest], 1), logits[:, :8], atol=tolerance)
