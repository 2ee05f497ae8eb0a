"""Text from a decoder: what is drawn, from how many, and what is refused."""

import functools
import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nope_jax import Decoder, ModelConfig, generate, generate_stream
from nope_jax.encodings import DynamicNTKScaling, RoPE, Windowed
from nope_jax.models import generation

PROMPT = np.random.default_rng(1).integers(0, 32, (2, 5)).astype(np.int32)


def small(encoding, **changes):
    settings = {"vocab_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "model_dim": 32, "mlp_dim": 24}
    return Decoder(ModelConfig(**(settings | changes), encoding=encoding, train_length=64), rngs=nnx.Rngs(0))


@functools.cache
def learned():
    return small("learned")


def test_no_temperature_takes_the_likeliest_token():
    out = generate(learned(), PROMPT, max_new_tokens=6)
    assert out.shape == (2, 11) and out.dtype == PROMPT.dtype
    np.testing.assert_array_equal(out[:, :5], PROMPT)
    # No logit depends on a later token: one pass over all of them has the likeliest at every step.
    np.testing.assert_array_equal(out[:, 5:], learned()(out)[:, 4:-1].argmax(-1))


def test_draws_follow_the_softmax_of_the_logits_over_the_temperature():
    prompt = np.tile(PROMPT[:1], (4000, 1))
    drawn = generate(learned(), prompt, max_new_tokens=1, temperature=0.5, key=jax.random.key(2))[:, -1]
    counts = np.bincount(drawn, minlength=32) / len(drawn)
    wanted = jax.nn.softmax(learned()(PROMPT[:1])[0, -1] / 0.5)
    # Six standard deviations of a frequency.
    assert (np.abs(counts - wanted) < 6 * np.sqrt(wanted * (1 - wanted) / len(drawn)) + 1e-9).all()


def test_rows_and_steps_draw_apart_and_the_key_decides():
    prompt = np.tile(PROMPT[:1], (2, 1))
    first = generate(learned(), prompt, max_new_tokens=20, temperature=1.0, key=jax.random.key(3))
    again = generate(learned(), prompt, max_new_tokens=20, temperature=1.0, key=jax.random.key(3))
    other = generate(learned(), prompt, max_new_tokens=20, temperature=1.0, key=jax.random.key(4))
    np.testing.assert_array_equal(first, again)
    assert (first[0] != first[1]).any() and (first != other).any()
    even = generate(learned(), prompt, max_new_tokens=20, temperature=1e6, key=jax.random.key(3))
    assert len(set(even[0, 5:].tolist())) > 5  # though all tokens are as likely at every step


@pytest.mark.parametrize("top_k", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_top_k_draws_among_the_likeliest_only(top_k):
    prompt = np.tile(PROMPT[:1], (500, 1))
    drawn = generate(learned(), prompt, max_new_tokens=1, temperature=5.0, top_k=top_k, key=jax.random.key(5))[:, -1]
    likeliest = np.argsort(-learned()(PROMPT[:1])[0, -1])[:top_k]
    assert set(drawn.tolist()) == set(likeliest.tolist())


def numpy_candidates(logits, temperature, top_k, top_p, min_p):
    """The probabilities that tokens are drawn with, one rule after the other."""
    shares = np.exp(logits / temperature - np.max(logits / temperature))
    order = np.argsort(-shares)
    if top_k is not None:
        shares[order[top_k:]] = 0
    if top_p is not None:
        total, kept = 0.0, []
        for token in order:
            if total >= top_p * shares.sum():
                break
            total += shares[token]
            kept.append(token)
        shares[np.setdiff1d(np.arange(len(shares)), kept)] = 0
    if min_p is not None:
        shares[shares < min_p * shares.max()] = 0
    return shares / shares.sum()


@pytest.mark.parametrize("top_k", [None, 7])
@pytest.mark.parametrize("top_p", [None, 1e-6, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("min_p", [None, 0.05, 0.5, 1.0])
def test_candidates_are_their_definition(top_k, top_p, min_p):
    logits = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32) * 2
    got = jax.nn.softmax(generation.candidates(jnp.asarray(logits), 0.7, top_k=top_k, top_p=top_p, min_p=min_p))
    wanted = np.stack([numpy_candidates(row, 0.7, top_k, top_p, min_p) for row in logits])
    np.testing.assert_array_equal(got > 0, wanted > 0)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)


DRAWN = {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "min_p": 0.01}


# How a token is drawn is the same whatever the encoding.
@pytest.mark.parametrize(
    ("encoding", "options"),
    [
        ("learned", DRAWN),
        (RoPE(scaling=DynamicNTKScaling(2.0, 8)), {}),
        *(
            pytest.param(encoding, options, marks=pytest.mark.slow)
            for encoding, options in [
                ("learned", {}),
                (Windowed(RoPE(), 4), {}),
                (Windowed(RoPE(), 4), DRAWN),
                (RoPE(scaling=DynamicNTKScaling(2.0, 8)), DRAWN),
                *itertools.product(("forgetting", "convolution"), ({}, DRAWN)),
            ]
        ),
    ],
    ids=lambda x: str(x) if not isinstance(x, dict) else "drawn" if x else "greedy",
)
def test_rows_with_prompts_of_different_lengths_are_as_alone(encoding, options):
    model = small(encoding)
    lengths, keys = [2, 9, 5], jax.random.split(jax.random.key(7), 3)
    prompt = np.random.default_rng(2).integers(0, 32, (3, 9))
    options = options | ({"key": keys} if options else {})
    together = np.asarray(generate(model, prompt, 8, prompt_lengths=np.array(lengths), **options))
    assert together.shape == (3, 17)
    for row, length in enumerate(lengths):
        own = options | ({"key": keys[row : row + 1]} if options else {})
        alone = generate(model, prompt[row : row + 1, :length], 8, **own)
        np.testing.assert_array_equal(together[row, : length + 8], np.asarray(alone)[0])
        assert (together[row, length + 8 :] == 0).all()


@pytest.mark.parametrize(("encoding", "exact"), [("rope", False), (RoPE(scaling=DynamicNTKScaling(2.0, 8)), True)])
def test_the_room_is_that_of_the_text_where_an_encoding_depends_on_it(encoding, exact):
    options = {"temperature": 0.0, "top_k": None, "top_p": None, "min_p": None, "key": None}
    assert generation._checked(small(encoding), PROMPT, 4, None, (), **options).exact == exact


def test_a_row_ends_at_a_stop_token_and_the_others_go_on():
    free = np.asarray(generate(learned(), PROMPT, 12))
    stop = free[0, 8]  # the fourth new token of the first row
    first = [int(np.argmax([*(row[5:] == stop), True])) + 1 for row in free]  # new tokens of each row
    stopped = np.asarray(generate(learned(), PROMPT, 12, stop_tokens=[int(stop)]))
    for row, number in enumerate(first):
        np.testing.assert_array_equal(stopped[row, : 5 + number], free[row, : 5 + number])
        assert (stopped[row, 5 + number :] == 0).all()


@pytest.mark.parametrize(
    ("encoding", "options"),
    [
        ("learned", DRAWN | {"key": jax.random.key(1)}),
        pytest.param(RoPE(scaling=DynamicNTKScaling(2.0, 8)), {}, marks=pytest.mark.slow),
    ],
    ids=["drawn", "greedy"],
)
def test_a_stream_is_the_text_token_by_token(encoding, options):
    model = small(encoding)
    lengths = np.array([3, 5])
    options = options | {"prompt_lengths": lengths, "stop_tokens": [1, 2, 3]}
    text = np.asarray(generate(model, PROMPT, 10, **options))
    steps = np.stack(list(generate_stream(model, PROMPT, 10, **options)))
    for row, length in enumerate(lengths):
        new = [token for token in steps[:, row] if token != -1]
        np.testing.assert_array_equal(text[row, length : length + len(new)], new)
        assert (text[row, length + len(new) :] == 0).all()
    with pytest.raises(ValueError, match="top_k must be between"):
        generate_stream(model, PROMPT, 2, top_k=0)  # at once, not at the first token
    with pytest.raises(TypeError, match="unexpected keyword 'beams'"):
        generate_stream(model, PROMPT, 2, beams=4)


def test_a_program_serves_all_lengths_of_a_bucket():
    model, compiled = small("nope"), []
    with jax.log_compiles():
        handler = _Collect(compiled)
        logger = logging.getLogger("jax._src.interpreters.pxla")
        logger.addHandler(handler)
        try:
            generate(model, PROMPT, 6)
            assert compiled
            compiled.clear()
            for length, new in ((5, 6), (3, 9), (4, 1), (1, 28)):
                generate(model, PROMPT[:, :length], new)
            assert compiled == []  # neither these programs nor others around them
            list(generate_stream(model, PROMPT, 7))
            assert compiled == []
            generate(model, PROMPT, 40)
            assert compiled
        finally:
            logger.removeHandler(handler)


class _Collect(logging.Handler):
    """Collects the messages of compilations."""

    def __init__(self, messages):
        super().__init__(logging.DEBUG)
        self.messages = messages

    def emit(self, record):
        if "Compiling" in record.getMessage():
            self.messages.append(record.getMessage())


@pytest.mark.slow  # the program of the last test is one
def test_bfloat16_parameters_generate():
    model = small("rope", dtype="bfloat16")
    graph, state = nnx.split(model)
    model = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state))
    assert generate(model, PROMPT, 5).shape == (2, 10)


def test_a_table_can_be_used_to_its_last_row():
    assert generate(learned(), PROMPT, 60).shape == (2, 65)  # the last token is not read


def test_the_lowest_temperature_takes_the_likeliest():
    cold = generate(learned(), PROMPT, 3, temperature=1e-40, top_k=2, key=jax.random.key(0))
    np.testing.assert_array_equal(cold, generate(learned(), PROMPT, 3))


def test_no_new_tokens_are_the_prompt():
    np.testing.assert_array_equal(generate(learned(), PROMPT, max_new_tokens=0), PROMPT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0, an integer, not -1"),
        ({"temperature": -0.5}, "temperature must be at least 0 and finite, not -0.5"),
        ({"temperature": float("nan")}, "temperature must be at least 0"),
        ({"temperature": 1.0}, "key must be given"),
        ({"top_k": 0}, "top_k must be between 1 and the vocabulary 32, not 0"),
        ({"top_k": 33}, "top_k must be between 1 and the vocabulary 32, not 33"),
        ({"max_new_tokens": 61}, "length must be at most 64"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be at least 0, an integer, not 2.5"),
        ({"temperature": float("inf"), "key": jax.random.key(0)}, "temperature must be at least 0 and finite"),
        ({"top_k": 2.5}, "top_k must be between 1 and the vocabulary 32, not 2.5"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, not 0.0"),
        ({"min_p": 1.5}, "min_p must be above 0 and at most 1, not 1.5"),
        ({"stop_tokens": [32]}, r"stop_tokens must be integers between 0 and 31 \(vocab_size\), not \[32\]"),
        ({"stop_tokens": [0.5]}, "stop_tokens must be integers"),
        ({"prompt_lengths": np.array([5, 6])}, "prompt_lengths must be between 1 and the prompt's 5 columns, not 6"),
        ({"prompt_lengths": np.array([0, 5])}, "prompt_lengths must be between 1 and the prompt's 5 columns, not 0"),
        ({"prompt_lengths": np.array([5])}, r"prompt_lengths must be integers, one per row \[2\]"),
        ({"key": jax.random.split(jax.random.key(0), 3)}, r"key must be one key, or one per row \[2\], not \[3\]"),
        ({"prompt": np.zeros((1, 0), int)}, "prompt must have shape"),
        ({"prompt": np.zeros(3, int)}, "prompt must have shape"),
        ({"prompt": np.full((1, 3), 32)}, "tokens must be between 0 and 31"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    arguments = {"prompt": PROMPT, "max_new_tokens": 2} | changes
    with pytest.raises(ValueError, match=message):
        generate(learned(), **arguments)


@pytest.mark.parametrize(("batch_size", "length", "message"), [(0, 4, "batch_size"), (2, 0, "length"), (1, 65, "64")])
def test_a_cache_that_cannot_be_is_refused(batch_size, length, message):
    with pytest.raises(ValueError, match=message):
        learned().init_cache(batch_size, length)


def test_tokens_of_another_batch_are_refused():
    with pytest.raises(ValueError, match="batch size of the cache, 3, not 2"):
        learned().decode_step(PROMPT, learned().init_cache(3, 8))


def test_past_the_room_of_the_cache_logits_are_nan_under_jit():
    graph, state = nnx.split(learned())
    step = jax.jit(lambda state, cache: nnx.merge(graph, state).decode_step(PROMPT[:, :3], cache))
    logits, cache = step(state, learned().init_cache(2, 4))
    assert np.isfinite(logits).all()
    assert np.isnan(step(state, cache)[0]).all()


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_a_step_copies_neither_the_caches_nor_the_weights(dtype):
    """With more room, or more layers, the program needs hardly more memory of its own."""

    def memory(layers, max_new_tokens):
        model = small("rope", dtype=dtype, num_layers=layers, mlp_dim=1024)
        graph, state = nnx.split(model)
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), state)
        call = generation._checked(
            model, PROMPT, max_new_tokens, None, (), temperature=0.0, top_k=None, top_p=None, min_p=None, key=None
        )
        cache, text = jax.eval_shape(lambda: call.start(np.arange(2)))
        return generation._continue.lower(graph, state, cache, text, 4).compile().memory_analysis().temp_size_in_bytes

    least, item = memory(2, 4000), jnp.dtype(dtype).itemsize
    cache, weights = 2 * 2 * 4096 * 16 * item, 3 * 32 * 1024 * item  # of one layer
    assert memory(2, 8000) < least + cache / 4
    assert memory(6, 4000) < least + min(cache, weights) / 4
