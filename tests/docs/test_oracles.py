"""The oracles and the committed goldens against torch and Hugging Face transformers, live.

Needs an environment with both (see goldens/regenerate.py), and therefore runs only when asked for:

    pytest tests/docs/test_oracles.py -m oracle
"""

import os

import numpy as np
import pytest

from tests.goldens import regenerate
from tests.support import oracles

pytestmark = pytest.mark.oracle


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def flat(tree, path=()):
    """{path: array or value} of a tree of dicts and lists."""
    if isinstance(tree, dict):
        return {k: x for name, part in tree.items() for k, x in flat(part, (*path, name)).items()}
    if isinstance(tree, list) and tree and isinstance(tree[0], dict):
        return {k: x for i, part in enumerate(tree) for k, x in flat(part, (*path, i)).items()}
    return {path: tree}


@pytest.mark.parametrize("family", regenerate.FAMILIES)
def test_the_committed_goldens_are_what_independent_code_computes_today(family):
    if family in ("ruler", "longbench") and family.upper() not in os.environ:
        pytest.skip(f"needs a checkout, named by the environment variable {family.upper()}")
    today, committed = flat(regenerate.make(family)), flat(regenerate.load(family))
    assert today.keys() == committed.keys()
    for path, x in committed.items():
        if family == "ruler":
            assert today[path] == x, path
            continue
        np.testing.assert_allclose(today[path], x, rtol=1e-6, atol=1e-6, err_msg=str(path))


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("is_causal", [True, False])
def test_attention_is_that_of_torch_in_float64(kv_heads, is_causal):
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    B, T, S, N, H = 2, 5, 9, 6, 8
    query, key, value = random(B, T, N, H), random(B, S, kv_heads, H, seed=1), random(B, S, kv_heads, H, seed=2)
    bias = random(B, N, T, S, seed=3)
    mask = np.random.default_rng(4).random((B, 1, T, S)) < 0.8
    mask[..., 0] = True
    logit_scale = random(N, seed=5)
    may = mask & ((np.arange(S) <= np.arange(S - T, S)[:, None]) | (not is_causal))
    out = scaled_dot_product_attention(
        *(torch.tensor(x.swapaxes(1, 2).copy()) for x in (query * logit_scale[:, None], key, value)),
        attn_mask=torch.tensor(np.where(may, bias, -np.inf)),
        enable_gqa=True,
    )
    wanted = oracles.attention(query, key, value, bias=bias, mask=mask, is_causal=is_causal, logit_scale=logit_scale)
    np.testing.assert_allclose(wanted.output, out.numpy().swapaxes(1, 2), rtol=1e-12, atol=1e-12)


def test_entropy_and_logsumexp_are_those_of_torch_in_float64():
    import torch

    query, key, value = random(1, 7, 2, 4), random(1, 7, 2, 4, seed=1), random(1, 7, 2, 4, seed=2)
    logits = torch.tensor(np.einsum("btnh,bsnh->bnts", query, key) / 2)
    logits = logits.masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), -torch.inf)
    wanted = oracles.attention(query, key, value)
    np.testing.assert_allclose(wanted.logsumexp, logits.logsumexp(-1), rtol=1e-12)
    weights = logits.softmax(-1)
    np.testing.assert_allclose(wanted.entropy, torch.special.entr(weights).sum(-1), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(wanted.weights, weights, rtol=1e-12)


def test_segments_window_and_explicit_positions_are_a_mask():
    B, T, S = 2, 6, 8
    query, key, value = random(B, T, 2, 4), random(B, S, 2, 4, seed=1), random(B, S, 2, 4, seed=2)
    draws = np.random.default_rng(3)
    at, to = draws.integers(0, 9, (B, T)), draws.integers(0, 9, (B, S))
    segments = draws.integers(0, 2, (B, T)), draws.integers(0, 2, (B, S))
    mask = np.zeros((B, 1, T, S), bool)
    for b, t, s in np.ndindex(B, T, S):
        mask[b, 0, t, s] = to[b, s] <= at[b, t] < to[b, s] + 4 and segments[0][b, t] == segments[1][b, s]
    ruled = oracles.attention(query, key, value, query_positions=at, key_positions=to, segment_ids=segments, window=4)
    masked = oracles.attention(query, key, value, mask=mask, is_causal=False)
    assert not mask.any(-1).all()
    for ours, theirs in zip(ruled, masked, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_buckets_are_those_of_transformers_far_and_wide(bidirectional):
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    relative = np.arange(-3000, 3001)
    theirs = T5Attention._relative_position_bucket(torch.tensor(relative), bidirectional)
    np.testing.assert_array_equal(oracles.t5_bucket(relative, bidirectional=bidirectional), theirs.numpy())
