"""Biases by distance or by both positions."""

import jax.numpy as jnp
import numpy as np
from matplotlib.ticker import NullLocator

import nope_jax.encodings as e
from benchmarks.pictures.axes import STYLES, lines, note, plot
from benchmarks.pictures.effects import by_distance, dims, parameters
from benchmarks.pictures.picture import picture
from nope_jax.evaluation.common.plots import COLOURS


@picture("alibi")
def _(figure):
    rows = by_distance(e.ALiBi(), 64, heads=8)[[0, 1, 3, 7]]
    axes = plot(figure, "A slope per head", "distance", "added to the logit")
    lines(axes, np.arange(64), rows, ["head 1", "2", "4", "8"])


@picture("t5")
def _(figure):
    buckets = np.arange(32)
    draws = np.random.default_rng(2)
    drop = np.stack([-0.13 * buckets, -0.03 * buckets, 0.5 - 0.3 * np.abs(buckets - 18) / 4], axis=1)
    table = jnp.asarray(drop + 0.12 * draws.standard_normal((32, 3)), jnp.float32)
    rows = by_distance(e.T5(), 300, {"table": table})
    axes = plot(figure, "A number per bucket and head", "distance (log scale)", "added to the logit")
    axes.set_xscale("symlog", linthresh=16, linscale=1.2)
    axes.set_xticks([0, 8, 16, 32, 64, 128], ["0", "8", "16", "32", "64", "128"])
    axes.xaxis.set_minor_locator(NullLocator())
    for i, row in enumerate(rows):
        axes.plot(np.arange(300), row, color=COLOURS[i], linestyle=STYLES[i], linewidth=1.3, drawstyle="steps-post")


@picture("kerple")
def _(figure):
    r1, r2 = jnp.array([0.4, 1.0, 2.0]), jnp.array([0.1, 0.5, 1.0])
    params = {"log_r1": jnp.log(r1), "log_r2": jnp.log(r2)}
    rows = by_distance(e.KERPLE(), 128, params)
    axes = plot(figure, "Three heads, r1 and r2 learned", "distance", "added to the logit")
    lines(axes, np.arange(128), rows)


@picture("fire")
def _(figure):
    encoding = e.FIRE()
    params = parameters(encoding, dims(1), seed=7, spread=0.4)
    axes = plot(figure, "One head, for queries at three positions", "distance", "added to the logit")
    axes.set_xscale("log")
    axes.set_xlim(1, 4096)
    axes.xaxis.set_minor_locator(NullLocator())
    for i, position in enumerate((256, 1024, 4095)):
        added = by_distance(encoding, position + 1, params, heads=1)[0]
        axes.plot(np.arange(position + 1), added, color=COLOURS[i], linestyle=STYLES[i], linewidth=1.3)
        note(axes, f"{position + position % 2:,}", (position, added[-1]), COLOURS[i], (2, 0))
