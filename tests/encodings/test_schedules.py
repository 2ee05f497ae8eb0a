"""Schedules over layers: against the released models' layers, and how names, windows and chunks resolve."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from nope_jax import ModelConfig, config
from nope_jax.attention import encoded_attention
from nope_jax.encodings import (
    SCHEDULES,
    ALiBi,
    AttentionSpan,
    Chunked,
    HeadScale,
    Llama4Scale,
    NoPE,
    RoPE,
    Windowed,
    resolve,
)
from tests.goldens import regenerate
from tests.support import oracles
from tests.support.attention_cases import (
    assert_close,
    compiled,
    compiled_together,
    inputs,
    reference_and_some_streaming,
    reference_only,
)
from tests.support.drawn_model import small_model

GOLDENS = regenerate.load("schedules")


def resized(encoding, golden):
    """The schedule's entry with the sizes that the golden was made with."""
    names = {field.name for field in dataclasses.fields(encoding)} & golden.keys()
    return dataclasses.replace(encoding, **{name: golden[name] for name in names})


@functools.cache
def of_every_layer(implementation):
    """Of the goldens, by one program."""
    calls = {}
    for name, golden in GOLDENS.items():
        for place, kind in ((2, "rope"), (3, "nope")):
            encoding = resized(SCHEDULES[name][place], golden)
            attend = functools.partial(encoded_attention, encoding, {}, implementation=implementation)
            arrays = [np.array(golden[kind][x], np.float32) for x in ("query", "key", "value")]
            calls[name, kind] = attend, arrays, {}
    return compiled_together(calls)


# Windows and chunks by streaming are in test_attention.py.
@reference_only
@pytest.mark.parametrize("kind", ["rope", "nope"])
@pytest.mark.parametrize("name", GOLDENS)
def test_a_layer_attends_as_the_released_model_s_does(name, kind, implementation):
    out, _ = of_every_layer(implementation)[name, kind]
    assert_close(out, GOLDENS[name][kind]["out"])


@pytest.mark.parametrize("name", GOLDENS)
def test_the_layers_without_positions_are_the_released_model_s(name):
    """Without positions: shifting the queries' positions changes nothing that they see of the keys."""
    period, layers = SCHEDULES[name], GOLDENS[name]["layers"]
    query, key, _ = inputs(T=3)

    @jax.jit
    def turned(*arrays):
        return [encoding.query_key({}, *arrays)[0] for encoding in period]

    at = np.arange(5, 8)[None], np.arange(3)[None]
    turns = [int(not np.array_equal(x, query)) for x in turned(query, key, *at)]
    assert [turns[layer % len(period)] for layer in range(len(layers))] == layers


def test_the_sizes_are_the_released_models():
    assert [e.span() for e in SCHEDULES["smollm3"]] == [AttentionSpan()] * 4
    assert [e.span() for e in SCHEDULES["llama4"]] == [AttentionSpan(chunk_size=8192)] * 3 + [AttentionSpan()]
    assert [e.span() for e in SCHEDULES["rnope_swa"]] == [AttentionSpan(window=4096)] * 3 + [AttentionSpan()]
    assert [e.span() for e in SCHEDULES["swan_gpt"]] == [AttentionSpan()] + [AttentionSpan(window=512)] * 3
    assert SCHEDULES["swan_gpt"] == (NoPE(), *[Windowed(RoPE(), window=512)] * 3)
    assert SCHEDULES["llama4"][3] == Llama4Scale(floor_scale=8192, scale=0.1)


SPANS = {
    Windowed(ALiBi(), window=5): AttentionSpan(window=5),
    Chunked(ALiBi(), chunk_size=4): AttentionSpan(chunk_size=4),
    Windowed(Chunked(ALiBi(), chunk_size=8), window=3): AttentionSpan(3, 8),
    Chunked(Windowed(ALiBi(), window=3), chunk_size=8): AttentionSpan(3, 8),
    Windowed(Windowed(ALiBi(), window=3), window=5): AttentionSpan(window=3),
    Windowed(Windowed(ALiBi(), window=5), window=3): AttentionSpan(window=3),
    Chunked(Chunked(ALiBi(), chunk_size=8), chunk_size=4): AttentionSpan(chunk_size=4),
    Chunked(Chunked(ALiBi(), chunk_size=4), chunk_size=8): AttentionSpan(chunk_size=4),
    HeadScale(Windowed(ALiBi(), window=5)): AttentionSpan(window=5),
}


@pytest.mark.parametrize("encoding", SPANS, ids=str)
def test_a_window_and_chunks_narrow_that_of_the_encoding_within(encoding):
    assert encoding.span() == SPANS[encoding]


# Attention knows of an encoding's window and chunks by its span alone.
@reference_and_some_streaming("encoding", SPANS, [], slow=[*SPANS][3:-1])
def test_an_encoding_sees_its_span(encoding, implementation):
    span, params = SPANS[encoding], {"head_scale": np.ones(4, np.float32)} if isinstance(encoding, HeadScale) else {}
    arrays, (at, to) = inputs(T=7, S=21), oracles.positions(2, 7, 21)
    out, _ = compiled(functools.partial(encoded_attention, encoding, params), *arrays, implementation=implementation)
    common = {"bias": oracles.alibi_bias(oracles.alibi_slopes(4), at, to), **span._asdict()}
    assert_close(out, oracles.attention(*arrays, **common).output)


def test_a_window_given_beside_only_narrows():
    arrays, windows = inputs(T=9), {4: 4, 7: 5}

    @jax.jit
    def outputs(*arrays):
        return {given: encoded_attention(Windowed(window=5), {}, *arrays, window=given) for given in windows}

    for given, out in outputs(*arrays).items():
        assert_close(out, oracles.attention(*arrays, window=windows[given]).output)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Windowed(window=0), "window must be at least 1, not 0"),
        (lambda: Chunked(chunk_size=0), "chunk_size must be at least 1, not 0"),
        (lambda: Chunked(Chunked(chunk_size=6), chunk_size=4), "chunk_size must divide that of the encoding within, 6"),
        (lambda: Windowed(4), r"encoding must be an Encoding, such as RoPE\(\), not 4"),
    ],
)
def test_what_cannot_work_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_names_encodings_and_schedules_mix_in_a_tuple():
    mixed = resolve(("swan_gpt", "alibi", Windowed(RoPE(), window=8), "head_scale:rnope_swa", "windowed:alibi"))
    heads = tuple(HeadScale(encoding) for encoding in SCHEDULES["rnope_swa"])
    assert mixed == (*SCHEDULES["swan_gpt"], ALiBi(), Windowed(RoPE(), window=8), *heads, Windowed(ALiBi()))
    assert resolve("smollm3") == SCHEDULES["smollm3"]
    with pytest.raises(ValueError, match="unknown encoding 'smolm3': did you mean 'smollm3'"):
        resolve("smolm3")


def test_chunks_that_do_not_fit_the_encodings_own_are_refused():
    arrays = (np.ones((1, 12, 2, 4), np.float32),) * 3
    with pytest.raises(ValueError, match="chunk_size must divide the encoding's own, 6, or be a multiple of it: 4"):
        encoded_attention(Chunked(chunk_size=6), {}, *arrays, chunk_size=4)


def test_a_schedule_is_no_wrapper_though_its_first_encoding_may_be_one():
    with pytest.raises(ValueError, match="'llama4' in 'llama4:rope' must be a wrapper: choose from .*log_n, "):
        resolve("llama4:rope")


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_longer_than_the_layers_is_refused(name):
    message = r"model.encoding: its period of 4 layers is more than model.num_layers 3"
    with pytest.raises(ValueError, match=message):
        config.Config(model=ModelConfig(num_layers=3, encoding=name))
    assert config.Config(model=ModelConfig(num_layers=4, encoding=name)).model.encoding == name


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_survives_in_config_json(name, tmp_path):
    written = config.Config(model=ModelConfig(num_layers=8, encoding=("log_n:alibi", *SCHEDULES[name])))
    config.save(written, tmp_path)
    assert config.load(tmp_path) == written


@pytest.mark.parametrize("name", [n if n == "llama4" else pytest.param(n, marks=pytest.mark.slow) for n in SCHEDULES])
def test_a_decoder_s_layers_see_as_far_as_their_places_in_the_schedule(name):
    """Five layers: a period and one more. Entropy stays below that of the keys that a layer sees."""
    dims = {"window": 3, "chunk_size": 3}
    period = tuple(resized(encoding, dims) for encoding in SCHEDULES[name])
    tokens = np.random.default_rng(0).integers(0, 32, (1, 30))
    _, stats = small_model(num_layers=5, encoding=period, attention="reference")(tokens, return_stats=True)
    for layer, entropy in enumerate(np.asarray(stats.entropy)):
        near = period[layer % 4].span() != AttentionSpan()
        assert (entropy[0, :, 20:] <= np.log(3) + 1e-6).all() == near, layer
