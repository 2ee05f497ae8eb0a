"""Rotary encodings and their scalings."""

import math

import jax.numpy as jnp
import numpy as np
from matplotlib.ticker import NullLocator

import nope_jax.encodings as e
from benchmarks.pictures.axes import PALE, heat, lines, note, plot
from benchmarks.pictures.effects import logits
from benchmarks.pictures.picture import picture
from nope_jax.evaluation.common.plots import COLOURS, INK, QUIET


def _pair_waves(encoding, length, pairs, dim=64):
    """[pair, distance]: products of a query and a key that are 1 in one pair of dimensions, and the mean over pairs."""
    rows = []
    for pair in [*pairs, None]:
        x = np.zeros(dim)
        at = np.arange(dim // 2) if pair is None else [pair]
        x[at] = 1
        x = jnp.asarray(np.broadcast_to(x, (length, 1, dim)), jnp.float32)
        rows.append(logits(encoding, {}, x[-1:], x)[0, 0, ::-1] * math.sqrt(dim) / len(at))
    return np.stack(rows)


@picture("rope")
def _(figure):
    length = 128
    rows = _pair_waves(e.RoPE(), length, [0, 8, 16])
    axes = plot(figure, "Every pair is a wave; their mean falls", "distance", "q·k (of 1)", ylim=(-1.1, 1.1))
    for i, row in enumerate(rows[:3]):
        axes.plot(row, color=COLOURS[i + 4], linewidth=0.7, alpha=0.45 if i == 0 else 0.9)
    axes.plot(rows[3], color=COLOURS[0], linewidth=1.8)
    patch = {"facecolor": "white", "alpha": 0.85, "linewidth": 0, "pad": 1}
    note(axes, "mean of 32 pairs", (127, rows[3][-1]), COLOURS[0], (0, -9), ha="right", bbox=patch)


@picture("xpos")
def _(figure):
    length = 1024
    distance = np.arange(length)
    axes = plot(figure, "The waves fade with distance", "distance", "q·k (mean of pairs)")
    for i, (encoding, label) in enumerate([(e.RoPE(interleaved=True), "RoPE"), (e.XPos(), "xPos")]):
        x = jnp.ones((length, 1, 64))
        row = logits(encoding, {}, x[-1:], x)[0, 0, ::-1] / 8
        axes.plot(distance, row, color=[PALE, COLOURS[0]][i], linewidth=[1.0, 1.3][i], label=label)
    axes.legend(fontsize=7, frameon=False, handlelength=1.2, borderpad=0)


def _scaled(scalings, dim=64, base=10_000.0):
    plain = np.asarray(e.rope_frequencies(dim, base=base), np.float64)
    return [
        np.asarray(e.rope_frequencies(dim, base=base, scaling=scaling, length=length), np.float64) / plain
        for scaling, length in scalings
    ]


_FACTOR, _LENGTH = 4.0, 2048
_RIVALS = {
    "LinearScaling": e.LinearScaling(_FACTOR),
    "NTKScaling": e.NTKScaling(_FACTOR),
    "YaRNScaling": e.YaRNScaling(_FACTOR, _LENGTH),
    "Llama3Scaling": e.Llama3Scaling(_FACTOR, _LENGTH),
}


def _frequency_axes(figure, title):
    axes = plot(figure, title, "pair of dimensions, fast to slow", "frequency ×")
    axes.set_yscale("log", base=2)
    axes.set_yticks([0.25, 0.5, 1], ["1/4", "1/2", "1"])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(0.22, 1.12)
    return axes


def _scaling_picture(name, title):
    @picture(name)
    def _(figure):
        axes = _frequency_axes(figure, title)
        for rival, scaling in _RIVALS.items():
            if rival != name:
                axes.plot(_scaled([(scaling, 1)])[0], color=PALE, linewidth=1)
        axes.plot(_scaled([(_RIVALS[name], 1)])[0], color=COLOURS[0], linewidth=1.8)


_scaling_picture("LinearScaling", "s = 4: every pair to a quarter")
_scaling_picture("NTKScaling", "s = 4: by a larger base, fast pairs least")
_scaling_picture("YaRNScaling", "s = 4: fast pairs stay, slow ones to a quarter")
_scaling_picture("Llama3Scaling", "s = 4: the same idea, a narrower ramp")


@picture("ProportionalScaling")
def _(figure):
    axes = plot(figure, "A quarter of the pairs, as if all rotated", "pair of dimensions, fast to slow", "frequency")
    axes.set_yscale("log")
    rows = [
        np.asarray(e.rope_frequencies(64, scaling=scaling), np.float64)
        for scaling in (None, e.ProportionalScaling(fraction=0.25))
    ]
    partial = np.asarray(e.rope_frequencies(16), np.float64)
    axes.plot(rows[0], color=PALE, linewidth=1)
    axes.plot(partial, color=COLOURS[1], linewidth=1.2, label="rotary_dim=16")
    axes.plot(np.where(rows[1] > 0, rows[1], np.nan), color=COLOURS[0], linewidth=1.8, label="fraction=0.25")
    axes.legend(fontsize=7, frameon=False, handlelength=1.2, borderpad=0)


@picture("DynamicNTKScaling")
def _(figure):
    axes = _frequency_axes(figure, "s = 1: as much as the length asks for")
    times = (1, 2, 3, 4)
    rows = _scaled([(e.DynamicNTKScaling(1.0, _LENGTH), n * _LENGTH) for n in times])
    lines(axes, np.arange(32), rows, ["n = L", "2 L", "3 L", "4 L"])


@picture("LongRoPEScaling")
def _(figure):
    # Factors in the manner of a search's, which never come out smooth.
    draws = np.random.default_rng(0)
    long = np.sort(np.clip(np.geomspace(0.8, 6.0, 32) * draws.uniform(0.75, 1.25, 32), 1, 4))
    short = np.sort(np.clip(np.geomspace(0.9, 1.3, 32) * draws.uniform(0.95, 1.05, 32), 1, 4))
    scaling = e.LongRoPEScaling(tuple(short), tuple(long), _LENGTH, factor=4.0)
    axes = _frequency_axes(figure, "A factor per pair, and two sets of them")
    rows = _scaled([(scaling, _LENGTH), (scaling, _LENGTH + 1)])
    lines(axes, np.arange(32), rows, ["n ≤ L", "n > L"])


@picture("base_conversion")
def _(figure):
    # Four pairs as four digits: the phase of each, by position.
    dim, base, s, length = 8, 10_000.0, 4.0, 500
    panels = figure.subplots(2, 1)
    for axes, scaling, reach, label in [
        (panels[0], None, length, "base"),
        (panels[1], e.NTKScaling(s), int(s * length), "larger base"),
    ]:
        frequencies = np.asarray(e.rope_frequencies(dim, base=base, scaling=scaling))
        turns = np.outer(frequencies, np.linspace(0, reach, 481)) / (2 * np.pi)
        heat(axes, turns[::-1] % 1, "twilight", extent=(0, reach, 0, 4), vmin=0, vmax=1)
        axes.set_yticks([0.5, 3.5], ["slow", "fast"])
        axes.set_xticks([0, reach], ["0", "L" if scaling is None else "4 L"])
        axes.tick_params(labelsize=7, color=QUIET, length=2, pad=1.5)
        axes.set_ylabel(label, fontsize=7, color=INK)
    panels[0].set_title("Four digits (phases) of a position", fontsize=8, color=INK, loc="left", pad=4)
    panels[1].set_xlabel("position", fontsize=8, color=INK, labelpad=-6)
