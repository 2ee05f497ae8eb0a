"""Windows, chunks, sinks and schedules of layers."""

import jax.numpy as jnp
import numpy as np

import nope_jax.encodings as e
from benchmarks.pictures.axes import log_positions, plot
from benchmarks.pictures.effects import alike, seen
from benchmarks.pictures.picture import picture
from nope_jax.attention import attention_weights
from nope_jax.evaluation.common.plots import COLOURS, INK, QUIET

_MASK = 24


def _layers(figure, layers, titles, colours):
    """Draws which keys each layer sees."""
    for i, (reach, title, colour) in enumerate(zip(layers, titles, colours, strict=True)):
        axes = figure.add_subplot(1, len(layers), i + 1)
        pattern = seen(reach, _MASK)
        image = np.where(pattern[..., None], _rgb(colour), 1.0)
        axes.imshow(image, interpolation="nearest", extent=(0, _MASK, _MASK, 0))
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color(QUIET)
        axes.set_title(title, fontsize=7, color=colour, pad=3)
        axes.set_xlabel("keys", fontsize=7, color=INK, labelpad=2)
        if i == 0:
            axes.set_ylabel("queries", fontsize=7, color=INK, labelpad=2)


@picture("attention_sink")
def _(figure):
    length, sinks = 1024, jnp.array([0.0, 3.0, 6.0])
    query, key = (0 * x[None] for x in alike(length))
    share = np.asarray(attention_weights(e.AttentionSink(), {"sink": sinks}, query, key)[0].sum(-1))
    axes = plot(
        figure, "What a sink leaves, all logits 0", "keys seen (log scale)", "weight of all keys", ylim=(0, 1.1)
    )
    log_positions(axes, length)
    for sink, row, colour in zip(sinks.tolist(), share, COLOURS, strict=False):
        axes.plot(np.arange(1, length + 1), row, color=colour, linewidth=1.3, label=f"sink {sink:g}")
    axes.legend(fontsize=7, frameon=False, handlelength=1.2, borderpad=0, loc="lower right")


def _rgb(colour):
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255


@picture("windowed")
def _(figure):
    _layers(figure, [e.AttentionSpan(), e.AttentionSpan(window=7)], ["without", "window"], [QUIET, COLOURS[0]])


@picture("chunked")
def _(figure):
    _layers(figure, [e.AttentionSpan(), e.AttentionSpan(chunk_size=8)], ["without", "chunks"], [QUIET, COLOURS[0]])


def _schedule_picture(name):
    @picture(name)
    def _(figure):
        layers, titles, colours = [], [], []
        for encoding in e.SCHEDULES[name]:
            rotary, span = isinstance(encoding.unwrapped, e.RoPE), encoding.span()
            titles.append("RoPE" if rotary else "NoPE")
            colours.append(COLOURS[0] if rotary else COLOURS[1])
            # Windows and chunks in proportion, so that they can be seen.
            layers.append(e.AttentionSpan(span.window and 6, span.chunk_size and 8))
        _layers(figure, layers, titles, colours)


for _name in e.SCHEDULES:
    _schedule_picture(_name)


@picture("drope")
def _(figure):
    axes = plot(figure, "One model, three stages", "not to scale")
    axes.spines["left"].set_visible(False)
    axes.set_yticks([])
    axes.set_xticks([])
    stages = [
        (0, 5, COLOURS[0], "train with RoPE\nat length L"),
        (5, 1.6, COLOURS[1], "without,\nat L"),
        (6.9, 3.4, COLOURS[2], "use at s · L, logits\n× (1 + 0.412·ln s)"),
    ]
    for start, width, colour, text in stages:
        axes.broken_barh([(start, width)], (0, 1), facecolors=colour)
        axes.text(start + width / 2, 0.5, text, fontsize=7, color="white", ha="center", va="center")
    axes.set(xlim=(0, 10.4), ylim=(-0.1, 1.1))
