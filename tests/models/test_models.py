"""The decoder: schedules, statistics, dtypes, packing, and encodings of a user's own."""

import dataclasses
import functools
import gc
import math
import re
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from nope_jax import Decoder, ModelConfig
from nope_jax.attention import encoded_attention
from nope_jax.compile.program import arrays
from nope_jax.encodings import ENCODINGS, BlockLogit, BlockValue, Encoding, Learned, ModelDims, RoPE, registry
from nope_jax.models import abstract_decoder, transfer_weights
from nope_jax.models import decoder as decoder_module
from nope_jax.models.layers import project
from tests.support.attention_cases import ONE_OF_EACH, others_slow
from tests.support.drawn_model import drawn_model

TINY = ModelConfig(
    vocab_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    model_dim=32,
    mlp_dim=48,
    tie_embeddings=True,
    train_length=24,
)
TOKENS = np.random.default_rng(1).integers(0, 32, (2, 24))


def decoder(**changes) -> Decoder:
    return drawn_model(dataclasses.replace(TINY, **changes))


@dataclasses.dataclass(frozen=True)
class Shaw(Encoding):
    """Relative vectors added to keys and to values: content-dependent logits and a value term."""

    clip: int = 4

    def init_layer(self, key, dims: ModelDims):
        shape = (self.clip + 1, dims.head_dim)
        return {
            name: jax.random.normal(k, shape) for name, k in zip(("keys", "values"), jax.random.split(key), strict=True)
        }

    def _rows(self, table, block):
        return table[jnp.clip(block.distance, 0, self.clip)]

    def _logit(self, table, block):
        return jnp.einsum("bnqh,bqkh->bnqk", block.query, self._rows(table, block))

    def _value(self, table, weights, block):
        return jnp.einsum("bnqk,bqkh->bnqh", weights, self._rows(table, block))

    def logit(self, params, query, key, query_features=None, key_features=None):
        return BlockLogit(self._logit, params["keys"])

    def value(self, params):
        return BlockValue(self._value, params["values"])


@dataclasses.dataclass(frozen=True)
class Forgetting(Encoding):
    """Gates from the layer's input, whose running log-sum is subtracted: a logit with features per token."""

    def init_layer(self, key, dims: ModelDims):
        return {"gate": jax.random.normal(key, (dims.model_dim, dims.num_heads)) / dims.model_dim**0.5}

    def features(self, params, inputs, previous):
        kept = jnp.cumsum(jax.nn.log_sigmoid(inputs.astype(jnp.float32) @ params["gate"]), axis=1)
        return kept if previous is None else kept + previous[:, None]

    def _logit(self, _, block):
        difference = block.query_features[:, :, None] - block.key_features[:, None]
        return jnp.moveaxis(difference, -1, 1)

    def logit(self, params, query, key, query_features=None, key_features=None):
        return BlockLogit(self._logit, None, query_features, key_features)


def test_shaw_is_its_formula():
    draws = np.random.default_rng(0)
    query, key, value = draws.standard_normal((3, 1, 7, 2, 4), np.float32)
    params = dict(zip(("keys", "values"), draws.standard_normal((2, 5, 4), np.float32), strict=True))
    out = encoded_attention(Shaw(), params, query, key, value)
    expected = np.zeros(out.shape)
    for n in range(2):
        for i in range(7):
            rows = [min(i - j, 4) for j in range(i + 1)]
            logits = np.array([query[0, i, n] @ (key[0, j, n] + params["keys"][r]) / 2 for j, r in enumerate(rows)])
            weights = np.exp(logits) / np.exp(logits).sum()
            expected[0, i, n] = sum(
                w * (value[0, j, n] + params["values"][r]) for j, (w, r) in enumerate(zip(weights, rows, strict=True))
            )
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.slow  # its parts are held by test_every_encoding.py
@pytest.mark.parametrize("encoding", [(Shaw(), "learned"), (Forgetting(), "t5")], ids=str)
def test_both_implementations_agree_in_value_statistics_and_gradient(encoding):
    tokens = np.tile(TOKENS[:1], 12)[:, :280]  # more than one block

    def run(implementation):
        model = decoder(encoding=encoding, num_layers=3, attention=implementation, train_length=280)
        graph, state = nnx.split(model)

        @jax.jit
        def loss(state):
            logits, stats = nnx.merge(graph, state)(tokens, return_stats=True)
            return jax.nn.logsumexp(logits, axis=-1).mean() + stats.entropy.mean(), (logits, stats)

        (_, (logits, stats)), gradient = jax.value_and_grad(loss, has_aux=True)(state)
        return logits, stats, gradient

    reference, streaming = run("reference"), run("streaming")
    chex.assert_trees_all_close(streaming, reference, rtol=2e-4, atol=2e-5)


# What acts before attention, or wraps it. Of the others test_attention.py and test_every_encoding.py find the gradient
# from the future to be zero, and have segments.
BEFORE = ("learned", "recursive", "convolution", "log_n", Shaw(), Forgetting())
"""A layer of each: one alone is a slow test."""


@functools.cache
def compiled(encoding):
    """A decoder with these layers as a function of tokens, positions and segments."""
    model = decoder(encoding=encoding, num_layers=max(2, len(encoding) if isinstance(encoding, tuple) else 1))
    return jax.jit(lambda tokens, positions, segments: model(tokens, positions=positions, segment_ids=segments))


@pytest.mark.parametrize("encoding", [BEFORE, *others_slow(ENCODINGS, but=ONE_OF_EACH)], ids=str)
def test_no_logit_depends_on_a_later_token(encoding):
    changed = np.where(np.arange(24) < 11, TOKENS, (TOKENS + 1) % 32)
    before, after = (np.asarray(compiled(encoding)(tokens, None, None)) for tokens in (TOKENS, changed))
    np.testing.assert_array_equal(before[:, :11], after[:, :11])
    assert not np.allclose(before[:, 11:], after[:, 11:])


def test_a_schedule_gives_each_layer_its_encoding():
    scheduled = decoder(encoding=("rope", "nope"), num_layers=3)
    params = nnx.state(scheduled)
    slots = params["blocks"]
    graph, state = nnx.split(decoder(encoding="nope", num_layers=3))
    order = [(0, 0), (1, 0), (0, 1)]
    state["blocks"][0] = jax.tree.map(
        lambda even, odd: jnp.asarray(np.stack([(even, odd)[slot][row] for slot, row in order])),
        *jax.tree.map(np.asarray, (slots[0], slots[1])),
    )
    state["embedding"], state["norm"] = params["embedding"], params["norm"]
    plain = nnx.merge(graph, state)
    # At position 0 alone every rotation is the identity, so RoPE and NoPE in turn are NoPE with the same weights ...
    zeros, places = np.zeros(24, int), np.arange(24)
    expected = plain(TOKENS, positions=zeros)
    np.testing.assert_allclose(scheduled(TOKENS, positions=zeros), expected, rtol=1e-5, atol=1e-5)
    # ... and elsewhere it is not.
    assert not np.allclose(scheduled(TOKENS, positions=places), plain(TOKENS, positions=places), atol=1e-3)


def test_a_layer_is_the_slice_of_its_stack_and_there_are_no_others():
    model = decoder(encoding=("nope", "alibi"), num_layers=3)
    first, second = (block.attention.query[...] for block in model.blocks)
    for index, weights in (0, first[0]), (1, second[0]), (np.int64(2), first[1]):
        np.testing.assert_array_equal(model.layer(index).attention.query[...], weights)
    for index in (-1, 3, 1.0, True, None):
        with pytest.raises(ValueError, match=r"index must be (below num_layers, 3|(an integer of )?at least 0), not"):
            model.layer(index)


def test_statistics_come_in_the_order_of_the_layers():
    model = decoder(encoding=("nope", "alibi"), num_layers=5)
    scale = np.repeat([[1.0], [0.0], [0.0], [0.0], [0.0]], 4, axis=1)
    _, stats = model(TOKENS, return_stats=True, logit_scale=scale)
    assert stats.entropy.shape == stats.logsumexp.shape == (5, 2, 4, 24)
    ceiling = np.log(np.arange(1, 25))
    uniform = [np.allclose(layer, ceiling[None, None], atol=1e-5) for layer in np.asarray(stats.entropy)]
    # Logit scale 0 leaves NoPE uniform (layers 2 and 4), ALiBi not (1 and 3); layer 0 kept its content.
    assert uniform == [False, False, True, False, True]


def traced_with(policy):
    """A loss and its gradient with a policy of rematerialization, and parameters for it."""
    sizes = {"num_layers": 8, "attention": "streaming"}
    graph = nnx.graphdef(nnx.eval_shape(lambda: decoder(**sizes, remat=policy)))
    state = nnx.state(decoder(**sizes))

    def loss(state):
        model = nnx.merge(graph, state)
        return model.nll(model.hidden(TOKENS)[0], TOKENS).mean()

    return jax.jit(jax.value_and_grad(loss)).trace(state), state


def test_a_policy_of_rematerialization_says_what_is_kept_and_changes_no_number():
    temporaries, products, results = {}, {}, {}
    for policy in "none", "dots", "full":
        traced, state = traced_with(policy)
        program = traced.lower().compile()
        temporaries[policy] = program.memory_analysis().temp_size_in_bytes
        products[policy] = program.as_text().count(" dot(")
        results[policy] = program(state)
    assert temporaries["full"] < 0.6 * temporaries["dots"] < 0.6 * 0.7 * temporaries["none"]
    assert products["none"] == products["dots"] < products["full"]  # it runs layers and attention again
    for policy in "dots", "full":
        assert results[policy][0] == results["none"][0]
        chex.assert_trees_all_close(results[policy][1], results["none"][1], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_offloaded_activations_change_no_number():
    (dots, state), (offload, _) = map(traced_with, ("dots", "offload"))
    assert "<host>" not in str(dots.jaxpr) and "<host>" in str(offload.jaxpr)
    results = [traced.lower().compile()(state) for traced in (dots, offload)]
    chex.assert_trees_all_equal(*results)


# Randomized positions are drawn for all tokens of a row at once, however they are packed.
@pytest.mark.parametrize(
    "encoding", [BEFORE, *others_slow([name for name in ENCODINGS if name != "randomized"], but=ONE_OF_EACH)], ids=str
)
def test_documents_packed_behind_masks_are_the_documents_alone(encoding):
    run = compiled(encoding)
    lengths = [9, 9, 6]  # the last one is cut off
    positions = np.concatenate([np.arange(n) for n in lengths])[None].repeat(2, 0)
    segments = np.repeat(np.arange(3), lengths)[None].repeat(2, 0)
    packed = np.asarray(run(TOKENS, positions, segments))
    for start in 0, 9:
        alone = np.asarray(run(np.roll(TOKENS, -start, axis=1), None, None))  # what follows it makes no difference
        np.testing.assert_allclose(packed[:, start : start + 9], alone[:, :9], rtol=1e-4, atol=1e-5)


def test_grouped_queries_have_fewer_key_heads():
    model = decoder(encoding="nope")
    assert nnx.state(model)["blocks"][0]["attention"]["key"].shape == (2, 32, 2, 8)


def test_untied_and_plain_variants():
    model = decoder(tie_embeddings=False, mlp="plain")
    assert model.head is not None
    assert nnx.state(model)["head"].shape == (32, 32)
    assert "gate" not in nnx.state(model)["blocks"][0]["mlp"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoding": "ropee"}, "did you mean 'rope'"),
        ({"encoding": ("rope", "nope", "nope")}, "period of 3 layers"),
        ({"encoding": ()}, "non-empty tuple"),
        ({"num_kv_heads": 3}, "num_kv_heads 3 must divide model.num_heads 4"),
        ({"num_heads": 6}, "num_heads 6 must divide model.model_dim 32"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
        ({"mlp": "swiglu"}, "model.mlp must be one of gated, plain"),
        ({"head_dim": 0}, "model.head_dim must be at least 1"),
        ({"encoding": RoPE(rotary_dim=16)}, "rotary_dim"),
    ],
)
def test_a_model_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        decoder(**changes)(TOKENS)


def test_tokens_and_positions_that_do_not_exist_are_refused_or_poison_the_answer():
    model = decoder(encoding="learned")
    with pytest.raises(ValueError, match=r"tokens must be between 0 and 31 .* not 32"):
        model(np.where(np.arange(24) == 3, 32, TOKENS))
    with pytest.raises(ValueError, match=r"tokens must be at most 2147483647, which fits int32, not 4294967296"):
        model(np.where(np.arange(24) == 3, 2**32, TOKENS))
    for positions in (None, jnp.arange(1, 26), jnp.arange(-1, 24)):
        with pytest.raises(ValueError, match="positions must be between 0 and 23"):
            model(jnp.zeros((1, 25), int), positions=positions)
    run = jax.jit(lambda tokens, positions: jnp.isnan(model(tokens, positions=positions)))
    assert np.asarray(run(np.where(np.arange(24) == 3, -1, TOKENS), np.arange(24)))[0, 3:].all()
    assert np.asarray(run(TOKENS, np.arange(1, 25)))[:, -1].all()


def test_an_encoding_of_the_users_own_compiles_once():
    model = decoder(encoding=Shaw())
    traces = []

    @jax.jit
    def logits(state, tokens):
        traces.append(None)
        return nnx.merge(graph, state)(tokens)

    graph, state = nnx.split(model)
    logits(state, TOKENS)
    logits(state, TOKENS + 0)
    assert len(traces) == 1


def test_on_a_cpu_products_of_bfloat16_have_float32_results():
    """XLA multiplies bfloat16 by the instructions of a CPU only then, in half the time."""
    x, weights = jax.ShapeDtypeStruct((2, 8, 16), jnp.bfloat16), jax.ShapeDtypeStruct((16, 24), jnp.float32)

    def total(x, weights):
        return jnp.square(project(x, weights, ("embed", "mlp"))).astype(jnp.float32).sum()

    text = jax.jit(jax.grad(total, argnums=(0, 1))).lower(x, weights).as_text()
    products = re.findall(r"dot_general .* : \((.*)\) -> (\S+)", text)
    assert len(products) == 3
    assert all(operands.count("bf16>") == 2 and result.endswith("xf32>") for operands, result in products)


def test_losses_in_chunks_are_the_losses(monkeypatch):
    graph, state = nnx.split(decoder(encoding="rope"))
    hidden = np.random.default_rng(0).normal(size=(2, 24, 32)).astype(np.float32)
    targets = np.roll(TOKENS, -1, axis=1)
    monkeypatch.setattr(decoder_module, "LOGITS_AT_ONCE", 2 * 32 * 7)  # 7 positions: the last chunk is padded

    def chunked(state, hidden):
        nll = nnx.merge(graph, state).nll(hidden, targets)
        return nll.sum(), nll

    def whole(state, hidden):
        logits = nnx.merge(graph, state).logits(hidden)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return nll.sum(), nll

    def total(state, hidden):
        return nnx.merge(graph, state).total_loss(hidden, targets)

    def with_gradient(loss):
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(state, hidden)

    ((_, nll), gradient), ((whole_total, whole_nll), whole_gradient) = with_gradient(chunked), with_gradient(whole)
    np.testing.assert_allclose(nll, whole_nll, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(gradient, whole_gradient, rtol=1e-4, atol=1e-5)
    (loss, nll), gradient = with_gradient(total)
    np.testing.assert_allclose([loss, nll], whole_total, rtol=1e-5)
    chex.assert_trees_all_close(gradient, whole_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_training_loss_computes_large_logits_once_and_a_part_at_a_time(dtype):
    """2^27 logits, 2^26 of them at a time, and three products with the head: the logits and their two gradients."""
    shape, vocab = (4, 1024), 2**15
    graph, state = nnx.split(nnx.eval_shape(lambda: decoder(vocab_size=vocab, num_layers=1, dtype=dtype)))
    targets, hidden = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct((*shape, 32), dtype)
    counted = jax.ShapeDtypeStruct(shape, jnp.bool_)

    def loss(state, hidden, targets, counted):
        return nnx.merge(graph, state).total_loss(hidden, targets, counted, z_loss=1e-4)[0]

    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(state, hidden, targets, counted).compile()
    sizes = [math.prod(map(int, size.split(","))) for _, size in arrays(program.as_text()) if str(vocab) in size]
    assert max(sizes) == 2**26
    assert program.as_text().count(" dot(") == 3


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) for n in ("nope", "t5", "cope")] + ["recursive"]
)
def test_what_is_called_again_outside_of_jit_is_not_compiled_again(name, compilations):
    model = decoder(encoding=name)

    def call():
        model(TOKENS, return_stats=True)
        _, cache = model.decode_step(TOKENS[:, :3], model.init_cache(2, 24))
        model.decode_step(TOKENS[:, 3:4], cache)

    call()
    before = compilations()
    call()
    assert compilations() == before


def test_decoders_of_one_structure_share_what_is_compiled_which_keeps_none_of_them(compilations, few_objects):
    first, second = (drawn_model(TINY, seed) for seed in (0, 1))
    logits = first(TOKENS)
    before = compilations()
    assert not np.array_equal(second(TOKENS), logits)
    assert compilations() == before
    parameter = weakref.ref(first.embedding[...])
    del first
    gc.collect()
    assert parameter() is None


def test_abstract_decoders_are_traced_once_for_what_an_encoding_is_and_are_the_callers_own(monkeypatch):
    config, traced, init = dataclasses.replace(TINY, train_length=77), [], Decoder.__init__
    monkeypatch.setattr(Decoder, "__init__", lambda self, *a, **kw: (traced.append(a), init(self, *a, **kw))[-1])
    first, second = abstract_decoder(config), abstract_decoder(config)
    assert len(traced) == 1 and nnx.graphdef(first) == nnx.graphdef(second)
    transfer_weights(first, drawn_model(config))
    assert isinstance(first.embedding.get_value(), jax.Array)
    for other in second, abstract_decoder(config):
        assert isinstance(other.embedding.get_value(), jax.ShapeDtypeStruct)
    monkeypatch.setattr(registry, "ENCODINGS", {**registry.ENCODINGS, "nope": Learned})
    assert abstract_decoder(config).encodings == (Learned(),) != second.encodings
