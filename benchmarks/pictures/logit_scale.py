"""Factors of the logits."""

import itertools
import math

import jax.numpy as jnp
import numpy as np

import nope_jax.encodings as e
from benchmarks.pictures.axes import PALE, lines, log_positions, note, plot, trained
from benchmarks.pictures.effects import factors
from benchmarks.pictures.picture import picture
from nope_jax.attention import encoded_attention
from nope_jax.evaluation.common.plots import COLOURS


@picture("log_n")
def _(figure):
    positions = np.unique(np.geomspace(1, 16_384, 200).astype(int)) - 1
    axes = plot(figure, "1 within L = 512, then log_L n", "keys seen (log scale)", "factor", ylim=(0.9, 1.65))
    axes.plot(positions + 1, factors(e.LogN(length=512), positions)[0], color=COLOURS[0], linewidth=1.8)
    log_positions(axes, 16_384)
    trained(axes, 512)


@picture("uniform_scale")
def _(figure):
    s = np.linspace(1, 8, 100)
    axes = plot(figure, "One λ for all, by how far it is to reach", "times the training length", "λ")
    axes.plot(s, 1 + 0.397 * np.log(s), color=COLOURS[0], linewidth=1.5)
    axes.plot([2, 4, 8], [1.2, 1.5, 1.8], "o", color=COLOURS[1], markersize=4)
    note(axes, "their best", (4, 1.5), COLOURS[1], (6, -8))
    note(axes, "1 + 0.397·ln s", (5.5, 1 + 0.397 * math.log(5.5)), COLOURS[0], (-6, 8), ha="right")


@picture("head_scale")
def _(figure):
    length, scales = 1024, jnp.array([1.0, 1.3, 1.8, 2.5])
    draws = np.random.default_rng(0)
    query, key = (jnp.asarray(draws.standard_normal((1, length, n, 64)) * 1.2, jnp.float32) for n in (4, 1))
    query = jnp.repeat(query[:, :, :1], 4, axis=2)
    params = {"head_scale": scales}
    _, stats = encoded_attention(e.HeadScale(), params, query, key, key, return_stats=True)
    entropy = np.asarray(stats.entropy[0])
    edges = np.unique(np.geomspace(16, length, 24).astype(int))
    middle = np.sqrt(edges[:-1] * edges[1:])
    rows = [[row[a:b].mean() for a, b in itertools.pairwise(edges)] for row in entropy]
    axes = plot(figure, "The same head under four λ", "keys seen (log scale)", "entropy (nats)")
    log_positions(axes, length)
    axes.plot(middle, np.log(middle), color=PALE, linewidth=1)
    lines(axes, middle, np.array(rows), [f"λ = {x:g}" for x in scales.tolist()])


@picture("ssmax")
def _(figure):
    positions = np.unique(np.geomspace(1, 16_384, 200).astype(int)) - 1
    axes = plot(figure, "s · ln n, three heads", "keys seen (log scale)", "factor")
    params = {"ssmax": jnp.array([0.1, 0.168, 0.25])}
    lines(axes, positions + 1, factors(e.SSMax(), positions, params), ["s = 0.1", "0.168", "0.25"])
    axes.axhline(1, color=PALE, linewidth=1, zorder=-1)
    log_positions(axes, 16_384)
    axes.set_xlim(left=1)


@picture("llama4_scale")
def _(figure):
    positions = np.arange(0, 131_072, 64)
    axes = plot(figure, "A step every 8,192 positions", "position", "factor")
    axes.plot(positions, factors(e.Llama4Scale(), positions)[0], color=COLOURS[0], linewidth=1.3)
    axes.set_xticks([0, 32_768, 65_536, 98_304, 131_072], ["0", "32K", "64K", "96K", "128K"])


@picture("swan_scale")
def _(figure):
    positions = np.unique(np.geomspace(1, 16_384, 200).astype(int)) - 1
    axes = plot(figure, "log_a(a + position), a = 362", "position (log scale)", "factor")
    axes.plot(positions + 1, factors(e.SwanScale(), positions)[0], color=COLOURS[0], linewidth=1.8)
    log_positions(axes, 16_384)
