"""Text from a decoder: what is drawn, from how many, and what is refused."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nope_jax import ModelConfig, generate, generate_stream
from nope_jax.encodings import DynamicNTKScaling, RoPE, Windowed
from nope_jax.models import abstract_decoder, generation
from tests.support.drawn_model import drawn_model

PROMPT = np.random.default_rng(1).integers(0, 32, (2, 5)).astype(np.int32)


def config(encoding, **changes):
    settings = {"vocab_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "model_dim": 32, "mlp_dim": 24}
    return ModelConfig(**(settings | changes), encoding=encoding, train_length=64)


def small(encoding, **changes):
    return drawn_model(config(encoding, **changes))


@functools.cache
def learned():
    return small("learned")


def test_no_temperature_takes_the_likeliest_token_to_the_last_row_of_a_table():
    out = np.asarray(generate(learned(), PROMPT, max_new_tokens=60))
    assert out.shape == (2, 65) and out.dtype == PROMPT.dtype
    np.testing.assert_array_equal(out[:, :5], PROMPT)
    # No logit depends on a later token: one pass over all of them, the last of which is not read, has the likeliest.
    np.testing.assert_array_equal(out[:, 5:], np.asarray(learned()(out[:, :-1]))[:, 4:].argmax(-1))


def drawn_often(new=1, **options):
    """The new tokens of 500 rows with the same prompt, drawn among the 8 likeliest."""
    return np.asarray(generate(learned(), np.tile(PROMPT[:1], (500, 1)), new, top_k=8, **options))[:, 5:]


def test_draws_among_the_top_k_follow_the_softmax_of_their_logits_over_the_temperature():
    drawn = drawn_often(temperature=0.5, key=jax.random.key(2))[:, 0]
    frequencies = np.bincount(drawn, minlength=32) / len(drawn)
    logits = np.asarray(learned()(PROMPT), np.float64)[0, -1] / 0.5
    wanted = np.where(logits >= np.sort(logits)[-8], np.exp(logits - logits.max()), 0)
    wanted /= wanted.sum()
    # Six standard deviations of a frequency.
    assert (np.abs(frequencies - wanted) < 6 * np.sqrt(wanted * (1 - wanted) / len(drawn)) + 1e-9).all()


def test_rows_and_steps_draw_apart_and_the_key_decides():
    first, again = (drawn_often(10, temperature=1.0, key=jax.random.key(3)) for _ in range(2))
    other = drawn_often(10, temperature=1.0, key=jax.random.key(4))
    np.testing.assert_array_equal(first, again)
    assert (first[0] != first[1]).any() and (first[0] != other[0]).any()
    even = drawn_often(10, temperature=1e6, key=jax.random.key(3))
    assert all(len(set(row.tolist())) > 1 for row in even)  # though the likeliest are as likely at every step


def test_the_lowest_temperature_takes_the_likeliest():
    cold = drawn_often(3, temperature=1e-40, key=jax.random.key(0))
    np.testing.assert_array_equal(cold[0], np.asarray(generate(learned(), PROMPT, 60))[0, 5:8])
    assert (cold == cold[0]).all()


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


DRAWN = {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "stop_tokens": [31]}
LENGTHS = np.array([9, 2])
PROMPTS = np.random.default_rng(2).integers(0, 32, (2, 9))


COLD = DRAWN | {"temperature": 1e-40, "key": jax.random.key(7), "prompt_lengths": LENGTHS}
"""Which takes the likeliest tokens, by the same program."""


def test_rows_with_prompts_of_different_lengths_go_on_as_one_pass():
    text = np.asarray(generate(learned(), PROMPTS, 56, **COLD))
    likeliest = np.asarray(learned()(text[:, :-1])).argmax(-1)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(text[row, length : length + 56], likeliest[row, length - 1 : length + 55])
        assert (text[row, length + 56 :] == 0).all()


def test_a_row_with_its_own_key_draws_the_same_whatever_the_others():
    keys, others = jax.random.split(jax.random.key(7), 2), (PROMPTS + 1) % 32
    together = np.asarray(generate(learned(), PROMPTS, 56, prompt_lengths=LENGTHS, key=keys, **DRAWN))
    prompts, lengths = np.stack([PROMPTS[1], others[0]]), np.array([LENGTHS[1], 5])
    apart = np.asarray(generate(learned(), prompts, 56, prompt_lengths=lengths, key=keys[::-1], **DRAWN))
    assert len(set(together[1].tolist())) > 4
    np.testing.assert_array_equal(apart[0], together[1])


# What depends on the total length is read by rows of the same length at a time.
@pytest.mark.parametrize(
    ("encoding", "options"),
    [
        (RoPE(scaling=DynamicNTKScaling(2.0, 8)), {}),
        *(
            pytest.param(encoding, options, marks=pytest.mark.slow)
            for encoding, options in [
                *itertools.product(("learned", "forgetting", "convolution"), ({}, DRAWN)),
                (Windowed(RoPE(), 4), {}),
                (Windowed(RoPE(), 4), DRAWN),
                (RoPE(scaling=DynamicNTKScaling(2.0, 8)), DRAWN),
            ]
        ),
    ],
    ids=lambda x: str(x) if not isinstance(x, dict) else "drawn" if x else "greedy",
)
def test_rows_with_prompts_of_different_lengths_are_as_alone(encoding, options):
    model = small(encoding)
    keys = jax.random.split(jax.random.key(7), 2)
    options = options | ({"key": keys} if options else {})
    together = np.asarray(generate(model, PROMPTS, 8, prompt_lengths=LENGTHS, **options))
    assert together.shape == (2, 17) and len(set(together[0].tolist())) > 4
    for row, length in enumerate(LENGTHS):
        own = options | ({"key": keys[row : row + 1]} if "key" in options else {})
        alone = generate(model, PROMPTS[row : row + 1, :length], 8, **own)
        np.testing.assert_array_equal(together[row, : length + 8], np.asarray(alone)[0])
        assert (together[row, length + 8 :] == 0).all()


@pytest.mark.parametrize(("encoding", "exact"), [("rope", False), (RoPE(scaling=DynamicNTKScaling(2.0, 8)), True)])
def test_the_room_is_that_of_the_text_where_an_encoding_depends_on_it(encoding, exact):
    options = {"temperature": 0.0, "top_k": None, "top_p": None, "min_p": None, "key": None}
    assert generation._checked(small(encoding), PROMPT, 4, None, (), **options).exact == exact


def test_a_row_ends_at_a_stop_token_and_the_others_go_on():
    free = np.asarray(generate(learned(), PROMPTS, 56, **COLD))
    stop = int(free[0, LENGTHS[0] + 3])  # the fourth new token of the first row
    stopped = np.asarray(generate(learned(), PROMPTS, 56, **COLD | {"stop_tokens": [stop]}))
    ends = [
        length + int(np.argmax([*(row[length:] == stop), True])) + 1 for row, length in zip(free, LENGTHS, strict=True)
    ]
    assert ends[0] == LENGTHS[0] + 4 < ends[1]
    for row, end in enumerate(ends):
        np.testing.assert_array_equal(stopped[row, :end], free[row, :end])
        assert (stopped[row, end:] == 0).all()


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
    options = options | {"prompt_lengths": LENGTHS, "stop_tokens": [1, 2, 3]}
    text = np.asarray(generate(model, PROMPTS, 56, **options))
    steps = np.stack(list(generate_stream(model, PROMPTS, 56, **options)))
    for row, length in enumerate(LENGTHS):
        new = [token for token in steps[:, row] if token != -1]
        np.testing.assert_array_equal(text[row, length : length + len(new)], new)
        assert (text[row, length + len(new) :] == 0).all()
    with pytest.raises(ValueError, match="top_k must be between"):
        generate_stream(model, PROMPTS, 2, top_k=0)  # at once, not at the first token
    with pytest.raises(ValueError, match="top_p must be None at temperature 0, which draws nothing, not 0.5"):
        generate(model, PROMPTS, 2, top_p=0.5)
    with pytest.raises(TypeError, match="unexpected keyword 'beams'"):
        generate_stream(model, PROMPTS, 2, beams=4)


def test_a_program_serves_all_lengths_of_a_bucket(compilations):
    generate(learned(), PROMPT, 60)
    before = compilations()
    for length, new in ((5, 58), (3, 47), (4, 61), (1, 64)):
        generate(learned(), PROMPT[:, :length], new)
    assert compilations() == before  # neither these programs nor others around them
    list(generate_stream(learned(), PROMPT, 50))
    assert compilations() == before
    generate(learned(), PROMPT, 30)
    assert compilations() > before


@pytest.mark.slow  # the program of the last test is one
def test_bfloat16_parameters_generate():
    model = small("rope", dtype="bfloat16")
    graph, state = nnx.split(model)
    model = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state))
    assert generate(model, PROMPT, 5).shape == (2, 10)


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
        ({"key": 0, "temperature": 1.0}, r"key must be a random key, as in key=jax.random.key\(0\), not 0"),
        ({"prompt": np.zeros((1, 0), int)}, "prompt must have shape"),
        ({"prompt": np.zeros(3, int)}, "prompt must have shape"),
        ({"prompt": np.full((1, 3), 32)}, "tokens must be between 0 and 31"),
        ({"prompt": np.full((1, 3), 2**32)}, "tokens must be between 0 and 31 .* not 4294967296"),
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
    logits, cache = step(state, dataclasses.replace(learned().init_cache(2, 4), is_empty=False))
    assert np.isfinite(logits).all()
    assert np.isnan(step(state, cache)[0]).all()


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_a_step_copies_neither_the_caches_nor_the_weights(dtype):
    """With more room and more layers the program needs hardly more memory of its own."""

    def memory(layers, max_new_tokens):
        graph, state = nnx.split(abstract_decoder(config("rope", dtype=dtype, num_layers=layers, mlp_dim=1024)))
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), state)

        def start(state):
            sampling = dict.fromkeys(("top_k", "top_p", "min_p", "key"))
            model = nnx.merge(graph, state)
            call = generation._checked(model, PROMPT, max_new_tokens, None, (), temperature=0.0, **sampling)
            return call.start(np.arange(2))

        cache, text = jax.eval_shape(start, state)
        return generation._continue.lower(graph, state, cache, text, 4).compile().memory_analysis().temp_size_in_bytes

    item = jnp.dtype(dtype).itemsize
    cache, weights = 2 * 2 * 4096 * 16 * item, 3 * 32 * 1024 * item  # of one layer
    assert memory(6, 8000) < memory(2, 4000) + min(cache, weights) / 4
