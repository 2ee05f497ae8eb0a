"""Weights of one decoder under another encoding, in Python and in training."""

import dataclasses

import chex
import jax
import numpy as np
import pytest
from flax import nnx

from nope_jax import ModelConfig
from nope_jax.encodings import KERPLE, T5, TUPE, HeadScale, Multiplicative, NoPE, Randomized, RoPE
from nope_jax.models import transfer_weights
from tests.support.drawn_model import drawn_model

TINY = ModelConfig(vocab_size=32, num_layers=3, num_heads=2, model_dim=32, mlp_dim=32, train_length=24)
TOKENS = np.arange(48).reshape(2, 24) % 32


def decoder(encoding, seed, **changes):
    return drawn_model(dataclasses.replace(TINY, encoding=encoding, **changes), seed)


def test_the_same_layers_in_another_period_have_the_same_weights():
    source, model = decoder(("t5", "rope"), 0), decoder(("t5", "rope", "t5"), 1)
    transfer_weights(model, source)

    def by_layer(model):
        states = [jax.tree.map(np.asarray, nnx.state(block)) for block in model.blocks]
        layers = [jax.tree.map(lambda x, i=i: x[i // len(states)], states[i % len(states)]) for i in range(3)]
        return layers, {name: part for name, part in nnx.state(model).items() if name != "blocks"}

    chex.assert_trees_all_equal(by_layer(model), by_layer(source))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "model"),
    [("t5", "t5"), (("t5", "rope"), ("t5", "rope", "t5")), ("learned", ("learned", "learned"))],
    ids=str,
)
def test_the_same_encodings_give_the_same_logits(source, model):
    source, model = decoder(source, 0), decoder(model, 1)
    before = model(TOKENS)
    transfer_weights(model, source)
    np.testing.assert_allclose(model(TOKENS), source(TOKENS), rtol=1e-5, atol=1e-6)
    assert not np.allclose(before, source(TOKENS), atol=1e-3)


def test_dropping_rope_is_nope_with_its_weights():
    source, model = decoder("rope", 0), decoder(NoPE(), 1)
    transfer_weights(model, source)
    zeros, places = np.zeros(24, int), np.arange(24)
    assert not np.allclose(model(TOKENS, positions=places), source(TOKENS, positions=places), atol=1e-3)
    # Where every position is 0 nothing turns.
    np.testing.assert_allclose(model(TOKENS, positions=zeros), source(TOKENS, positions=zeros), rtol=1e-5, atol=1e-6)


def test_another_kind_of_encoding_keeps_what_it_has_itself():
    source, model = decoder("rope", 0), decoder("t5", 1)
    table = model.positions[0]["table"][...]
    transfer_weights(model, source)
    np.testing.assert_array_equal(model.positions[0]["table"][...], table)


def test_a_default_is_its_value_written_out():
    source, model = decoder("learned", 0), decoder("learned", 1)
    explicit = source.config.with_defaults()
    assert explicit.with_defaults() == explicit != source.config
    source = drawn_model(explicit)  # as a published model is read
    transfer_weights(model, source)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), nnx.state(source))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 2}, "its model.num_layers is 3, not 2"),
        ({"tie_embeddings": True}, "its model.tie_embeddings is False, not True"),
        ({"norm": "layer"}, "its model.norm is rms, not layer"),
        ({"logits_softcap": 30.0}, "its model.logits_softcap is None, not 30.0"),
        ({"train_length": 8}, r"its positions.0.positions has shape \[24, 32\], not \[8, 32\]"),
    ],
)
def test_another_shape_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        transfer_weights(decoder("learned", 1, **changes), decoder("learned", 0))


@pytest.mark.parametrize(
    ("source", "model", "adopted"),
    [
        (KERPLE(), Randomized(KERPLE()), True),
        (Randomized(T5()), T5(), True),
        (KERPLE(), KERPLE("power"), False),  # r1 alone would be half of it
        (Multiplicative(sinusoidal=True), Multiplicative(), False),
        (TUPE(relative=False), TUPE(), None),  # all but the bias
        (RoPE(), HeadScale(RoPE()), False),
    ],
    ids=str,
)
def test_what_encodings_have_learned_comes_along_whole_or_not_at_all(source, model, adopted):
    source, model = decoder(source, 0), decoder(model, 1)
    before, theirs = (dict(nnx.to_flat_state(nnx.state(m))) for m in (model, source))
    transfer_weights(model, source)
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if "position" in path or "positions" in path:
            comes = path in theirs if adopted is None else adopted
            np.testing.assert_array_equal(variable[...], (theirs if comes else before)[path][...])
