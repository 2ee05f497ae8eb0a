"""Every family against transformers on CPU torch, live: `-m oracle`."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from nope_jax.interop import load_pretrained, published, save_pretrained
from nope_jax.interop.families import mpt
from tests.support.published import CONFIGS, LENGTH, padded, tokens
from tests.support.transformers_models import loaded, logits_of, model_of

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """A tiny random model of transformers, and the same folder loaded here."""
    import torch

    folder = tmp_path_factory.mktemp("published")
    config = CONFIGS[request.param]
    torch.manual_seed(0)
    theirs = model_of(config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            around_one = "norm" in name and name.endswith("weight") and "gemma" not in config["model_type"]
            parameter.normal_(std=0.3).add_(1.0 if around_one else 0.0)
    theirs.save_pretrained(folder)
    as_they_write_it = published(str(folder)).config.model
    (folder / "config.json").write_text(json.dumps(config))
    ours, _ = load_pretrained(str(folder))
    assert ours.config == as_they_write_it
    return folder, theirs, ours


def longest(ours):
    return ours.max_length or 3 * LENGTH


@pytest.mark.parametrize("length", [5, LENGTH, 3 * LENGTH])
def test_logits_agree(pair, length):
    _, theirs, ours = pair
    ids = tokens(2, min(length, longest(ours)))
    np.testing.assert_allclose(ours(ids), logits_of(theirs, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_padded_rows_agree(pair, side):
    _, theirs, ours = pair
    length = LENGTH - 3
    rows = list(padded(length, (length, length - 4, 6), side))
    ids, seen, positions = tokens(3, length), np.zeros((3, length), int), np.zeros((3, length), int)
    for row, own in enumerate(rows):
        seen[row, own] = 1
        positions[row, own] = np.arange(own.stop - own.start)
    expected = logits_of(theirs, ids, attention_mask=seen, position_ids=positions)
    got = ours(ids, positions=positions, segment_ids=seen)
    for row, own in enumerate(rows):
        np.testing.assert_allclose(got[row, own], expected[row, own], atol=1e-4, rtol=1e-4)


def test_token_by_token_agrees(pair):
    _, theirs, ours = pair
    ids = tokens(2, LENGTH)
    cache = ours.init_cache(2, LENGTH)
    steps = []
    for token in ids.T:
        logits, cache = ours.decode_step(jnp.asarray(token[:, None]), cache)
        steps.append(logits)
    np.testing.assert_allclose(jnp.concatenate(steps, 1), logits_of(theirs, ids), atol=1e-4, rtol=1e-4)


def test_a_saved_model_is_the_same_to_transformers(pair, tmp_path):
    _, theirs, ours = pair
    save_pretrained(ours, tmp_path / "saved")
    again, told = loaded(tmp_path / "saved", json.loads((tmp_path / "saved/config.json").read_text()))
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    ids = tokens(2, min(3 * LENGTH, longest(ours)))
    close = 1e-5 if type(again) is type(theirs) else 1e-4  # another family, whose code computes in another order
    np.testing.assert_allclose(logits_of(again, ids), logits_of(theirs, ids), atol=close, rtol=close)


def test_slopes_of_mpt():
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    for heads, largest in [(4, 8), (6, 8), (12, 16), (1, 8)]:
        bias = build_mpt_alibi_tensor(heads, 2, largest)
        np.testing.assert_allclose(-bias[:, 0, 0], mpt.slopes(heads, largest), rtol=1e-6)
