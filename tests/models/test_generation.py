"""Text from a decoder: what is drawn, from how many, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nope_jax import Decoder, ModelConfig, generate

MODEL = Decoder(
    ModelConfig(
        vocab_size=32, num_layers=2, num_heads=2, model_dim=16, mlp_dim=24, encoding="learned", train_length=64
    ),
    rngs=nnx.Rngs(0),
)
PROMPT = jax.random.randint(jax.random.key(1), (2, 5), 0, 32)


def test_no_temperature_takes_the_likeliest_token():
    out = generate(MODEL, PROMPT, max_new_tokens=6)
    assert out.shape == (2, 11) and out.dtype == PROMPT.dtype
    np.testing.assert_array_equal(out[:, :5], PROMPT)
    # No logit depends on a later token: one pass over all of them has the likeliest at every step.
    np.testing.assert_array_equal(out[:, 5:], MODEL(out)[:, 4:-1].argmax(-1))


def test_draws_follow_the_softmax_of_the_logits_over_the_temperature():
    prompt = jnp.tile(PROMPT[:1], (4000, 1))
    drawn = generate(MODEL, prompt, max_new_tokens=1, temperature=0.5, key=jax.random.key(2))[:, -1]
    counts = np.bincount(drawn, minlength=32) / len(drawn)
    wanted = jax.nn.softmax(MODEL(PROMPT[:1])[0, -1] / 0.5)
    # Six standard deviations of a frequency.
    assert (np.abs(counts - wanted) < 6 * np.sqrt(wanted * (1 - wanted) / len(drawn)) + 1e-9).all()


def test_rows_and_steps_draw_apart_and_the_key_decides():
    prompt = jnp.tile(PROMPT[:1], (2, 1))
    first = generate(MODEL, prompt, max_new_tokens=20, temperature=1.0, key=jax.random.key(3))
    again = generate(MODEL, prompt, max_new_tokens=20, temperature=1.0, key=jax.random.key(3))
    other = generate(MODEL, prompt, max_new_tokens=20, temperature=1.0, key=jax.random.key(4))
    np.testing.assert_array_equal(first, again)
    assert (first[0] != first[1]).any() and (first != other).any()


@pytest.mark.parametrize("top_k", [1, 3])
def test_top_k_draws_among_the_likeliest_only(top_k):
    prompt = jnp.tile(PROMPT[:1], (500, 1))
    drawn = generate(MODEL, prompt, max_new_tokens=1, temperature=5.0, top_k=top_k, key=jax.random.key(5))[:, -1]
    likeliest = np.argsort(-MODEL(PROMPT[:1])[0, -1])[:top_k]
    assert set(drawn.tolist()) == set(likeliest.tolist())


def test_a_table_can_be_used_to_its_last_row():
    assert generate(MODEL, PROMPT, 60).shape == (2, 65)  # the last token is not read


def test_the_lowest_temperature_takes_the_likeliest():
    cold = generate(MODEL, PROMPT, 3, temperature=1e-40, top_k=2, key=jax.random.key(0))
    np.testing.assert_array_equal(cold, generate(MODEL, PROMPT, 3))


def test_no_new_tokens_are_the_prompt():
    np.testing.assert_array_equal(generate(MODEL, PROMPT, max_new_tokens=0), PROMPT)


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
        ({"prompt": jnp.zeros((1, 0), int)}, "prompt must have shape"),
        ({"prompt": jnp.zeros(3, int)}, "prompt must have shape"),
        ({"prompt": jnp.full((1, 3), 32)}, "tokens must be between 0 and 31"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    arguments = {"prompt": PROMPT, "max_new_tokens": 2} | changes
    with pytest.raises(ValueError, match=message):
        generate(MODEL, **arguments)


@pytest.mark.parametrize(("batch_size", "length", "message"), [(0, 4, "batch_size"), (2, 0, "length"), (1, 65, "64")])
def test_a_cache_that_cannot_be_is_refused(batch_size, length, message):
    with pytest.raises(ValueError, match=message):
        MODEL.init_cache(batch_size, length)


def test_tokens_of_another_batch_are_refused():
    with pytest.raises(ValueError, match="batch size of the cache, 3, not 2"):
        MODEL.decode_step(PROMPT, MODEL.init_cache(3, 8))


def test_past_the_room_of_the_cache_logits_are_nan_under_jit():
    graph, state = nnx.split(MODEL)
    step = jax.jit(lambda state, cache: nnx.merge(graph, state).decode_step(PROMPT[:, :3], cache))
    logits, cache = step(state, MODEL.init_cache(2, 4))
    assert np.isfinite(logits).all()
    assert np.isnan(step(state, cache)[0]).all()
