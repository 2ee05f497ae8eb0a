"""KV caches: what may be cached, how much of it, and that pieces of a text are as one pass, however they are cut."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from nope_jax import ModelConfig, generate
from nope_jax.encodings import (
    ENCODINGS,
    SCHEDULES,
    Chunked,
    CoPE,
    DynamicNTKScaling,
    Encoding,
    Forgetting,
    LinearScaling,
    LogN,
    Randomized,
    RoPE,
    Windowed,
)
from nope_jax.models import abstract_decoder
from tests.support.attention_cases import assert_close
from tests.support.drawn_model import drawn_model

LENGTH = 40
TOKENS = np.random.default_rng(1).integers(0, 32, (2, LENGTH))


def decoder(encoding, **changes):
    settings = {"vocab_size": 32, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "model_dim": 32, "mlp_dim": 24}
    return drawn_model(ModelConfig(**(settings | changes), encoding=encoding, train_length=LENGTH))


@dataclasses.dataclass(frozen=True)
class Centred(Encoding):
    """Keys minus their mean: every key depends on all others, so none can be cached after the query/key place."""

    def query_key(self, params, query, key, query_positions, key_positions):
        return query, key - 0.5 * key[:, :1]


@dataclasses.dataclass(frozen=True)
class CentredRoPE(RoPE):
    """Inherits what RoPE says of itself, which its own query/key place is not."""

    def query_key(self, params, query, key, query_positions, key_positions):
        query, key = super().query_key(params, query, key, query_positions, key_positions)
        return query, key - 0.5 * key[:, :1]


@dataclasses.dataclass(frozen=True)
class Counting(Encoding):
    """A logit scale that depends on the number of keys."""

    def logit_scale(self, params, query_positions, key_positions):
        return 1.0 + 0.01 * key_positions.max()


@dataclasses.dataclass(frozen=True)
class CentredCounting(Centred, Counting):
    """Both: no key is as it was, and all count."""


DYNAMIC = RoPE(scaling=DynamicNTKScaling(2.0, 8))


@pytest.mark.parametrize(
    ("encoding", "keys_apart", "depends_on_length"),
    [
        *[(name, True, name == "randomized") for name in ENCODINGS],
        (RoPE(scaling=LinearScaling(2.0)), True, False),
        (DYNAMIC, True, True),
        (LogN(Windowed(DYNAMIC, 4), 8), True, True),
        (Centred(), False, True),
        (Windowed(Centred()), False, True),
        (CentredRoPE(), False, True),
        (Counting(), False, True),
    ],
    ids=str,
)
def test_what_may_be_cached_and_what_follows_from_the_length(encoding, keys_apart, depends_on_length):
    encoding = ENCODINGS[encoding]() if isinstance(encoding, str) else encoding
    assert (encoding.keys_apart, encoding.depends_on_length) == (keys_apart, depends_on_length)


ROLLING = {Windowed(RoPE(), 6): 6, Windowed(Forgetting(), 9): 9}
ROLLING |= {Chunked(Windowed(Forgetting(), 30), 7): 7, Windowed(Randomized(RoPE(), 64), 6): 6}
ROLLING |= {Windowed(Randomized(Forgetting(), 64), 6): 6}
WHOLE = [Windowed(CoPE(), 6), Windowed(Centred(), 6), Counting()]
PIECES = [17, 1, 1, 21]


@pytest.mark.parametrize(
    ("encodings", "pieces"),
    [
        # Features that roll, at other positions; logits that ask for all keys; keys that change with the others.
        ((list(ROLLING)[-1], Windowed(CoPE(), 6), Windowed(CentredCounting(), 6)), PIECES),
        *(
            pytest.param(pair, PIECES, marks=pytest.mark.slow)
            for pair in itertools.zip_longest(ROLLING, WHOLE, fillvalue="nope")
        ),
        # Of which the test above says what it is; and cut otherwise.
        pytest.param((CentredRoPE(), "nope"), PIECES, marks=pytest.mark.slow),
        pytest.param((next(iter(ROLLING)), "nope"), [1, 1, 2, 4, 32], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_pieces_are_as_one_pass(encodings, pieces):
    """A layer of each encoding."""
    model = decoder(encodings, num_layers=len(encodings))
    logits, stats = jax.tree.map(np.asarray, model(TOKENS, return_stats=True))
    cache = model.init_cache(2, LENGTH)
    assert [kv_cache.slots for kv_cache in cache.kv_caches] == [ROLLING.get(e, LENGTH) for e in encodings]
    start = 0
    for piece in pieces:
        got, got_stats, cache = model.decode_step(TOKENS[:, start : start + piece], cache, return_stats=True)
        assert_close(got, logits[:, start : start + piece])
        assert_close(got_stats.entropy, stats.entropy[..., start : start + piece])
        start += piece
    assert cache.length == LENGTH and cache.room == LENGTH


@pytest.mark.parametrize(  # the others have less of the same
    "name", [n if n == "llama4" else pytest.param(n, marks=pytest.mark.slow) for n in SCHEDULES if n != "smollm3"]
)
def test_schedules_with_windows_generate_as_one_pass(name):
    """Its encodings once each, of which the first has two layers."""
    encodings = tuple(
        dataclasses.replace(e, window=5)
        if isinstance(e, Windowed)
        else Chunked(e.encoding, 5)
        if isinstance(e, Chunked)
        else e
        for e in dict.fromkeys(SCHEDULES[name])
    )
    model = decoder(encodings, num_layers=len(encodings) + 1)
    text = np.asarray(generate(model, TOKENS[:, :13], 20))
    np.testing.assert_array_equal(text[:, 13:], np.asarray(model(text))[:, 12:-1].argmax(-1))


def test_keys_are_transformed_once():
    """A step rotates its own key and not those of the cache."""
    model = decoder("rope")
    step = jax.jit(lambda cache: model.decode_step(TOKENS[:, :1], cache)[0])
    cache = dataclasses.replace(model.init_cache(2, 5000), is_empty=False)
    lines = step.lower(cache).as_text().splitlines()
    assert any("cosine" in line for line in lines)
    assert not [line for line in lines if "cosine" in line and "5000" in line]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 1}, r"\[\(2, 4, 4\)\], not \[\(1, 4, 4\)\]"),
        ({"num_kv_heads": 2}, r"not \[\(2, 2, 4\)\]"),
        ({"encoding": ("rope", "nope")}, r"not \[\(1, 4, 4\), \(1, 4, 4\)\]"),
        ({"encoding": Windowed(RoPE(), 4)}, "keeps the last 4 tokens, but .* sees all"),
    ],
)
def test_the_cache_of_another_model_is_refused(changes, message):
    sizes = {"vocab_size": 32, "num_layers": 2, "num_heads": 4, "model_dim": 16, "encoding": "rope"}
    model, other = (abstract_decoder(ModelConfig(**sizes | more)) for more in ({}, changes))
    with pytest.raises(ValueError, match=f"cache must be from init_cache of this model.*{message}"):
        model.decode_step(np.zeros((1, 3), int), other.init_cache(1, 8))
