"""Positions that depend on content."""

import jax
import jax.numpy as jnp
import numpy as np

import nope_jax.encodings as e
from benchmarks.pictures.axes import lines, note, plot
from benchmarks.pictures.effects import alike, logits
from benchmarks.pictures.picture import picture
from nope_jax.evaluation.common.plots import COLOURS


@picture("cope")
def _(figure):
    # Every eighth key opens the gate: what is counted are those. The embeddings fall with the count.
    length = 64
    ends = (np.arange(length) % 8 == 7) * 1.0
    keys = np.stack([np.where(ends, 12.0, -12.0), np.zeros(length)], axis=1)[:, None]
    query = np.array([[[1.0, 1.0]]])
    embeddings = jnp.stack([jnp.zeros(64), -0.5 * jnp.arange(64)], axis=1)
    query, keys = (jnp.asarray(x, jnp.float32) for x in (query, keys))
    encoding = e.CoPE()
    row = (logits(encoding, {"embeddings": embeddings}, query, keys) - logits(e.NoPE(), {}, query, keys))[0, 0]
    axes = plot(figure, "It counts the keys it picks out: every 8th here", "distance", "added to the logit")
    distance = np.arange(length)
    axes.plot(distance, row[::-1], color=COLOURS[0], linewidth=1.3, drawstyle="steps-mid")
    picked = np.flatnonzero(ends[::-1])
    axes.plot(distance[picked], row[::-1][picked], "o", color=COLOURS[1], markersize=3.5)
    note(axes, "keys that are counted", (picked[2], row[::-1][picked[2]]), COLOURS[1], (10, 9))


@picture("forgetting")
def _(figure):
    # Each token x is 1 in the dimension of the gates that it closes, and 0 else.
    length, encoding = 64, e.Forgetting()
    x = np.zeros((1, length, 3))
    x[0, 20, 1] = x[0, 44, 1] = 1
    x[0, :, 2] = np.random.default_rng(0).standard_normal(length)
    params = {"weights": jnp.diag(jnp.array([0.0, -7.0, 1.5])), "bias": jnp.array([3.0, 5.0, 2.5])}
    features = encoding.features(params, jnp.asarray(x, jnp.float32), None)
    query, key = alike(length)
    cut = jax.tree.map(lambda f: f[:, -1:], features)
    rows = logits(encoding, params, query[-1:], key, query_features=cut, key_features=features)
    rows = (rows - logits(e.NoPE(), {}, query[-1:], key))[:, 0, ::-1]
    axes = plot(figure, "Three heads; one closes at two tokens", "distance", "added to the logit")
    lines(axes, np.arange(length), rows)
