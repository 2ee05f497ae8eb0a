"""NoPE, and encodings at the input place."""

import jax
import jax.numpy as jnp
import numpy as np

import nope_jax.encodings as e
from benchmarks.pictures.axes import STYLES, heat, lines, note, plot, trained
from benchmarks.pictures.effects import alike, dims, entering, logits, parameters
from benchmarks.pictures.picture import picture
from nope_jax.evaluation.common.plots import COLOURS, INK, QUIET


@picture("nope")
def _(figure):
    length = 64
    query, key = alike(length, 1)
    rows = logits(e.NoPE(), {}, query, key)[0]
    first = np.exp(rows[:, 0] - np.log(np.nansum(np.exp(rows), axis=1)))
    axes = plot(figure, "Identical tokens: weight of the first one", "position of the query", "weight", ylim=(0, 1.05))
    axes.plot(np.arange(length), first, color=COLOURS[0], linewidth=0, marker="o", markersize=2.2)
    note(axes, "1/n: the causal mask counts", (8, first[8]), COLOURS[0], (4, 10), fontsize=8)


def _input_axes(figure, title):
    return plot(figure, title, "position", "dimension")


@picture("learned")
def _(figure):
    length, encoding = 48, e.Learned()
    rows = entering(encoding, parameters(encoding, dims(length=length)), length, np.zeros(64))
    axes = _input_axes(figure, "A row per position, and none past L")
    heat(axes, np.concatenate([rows, np.full((16, 64), np.nan)]).T)
    trained(axes, length - 0.5)


@picture("sinusoidal")
def _(figure):
    axes = _input_axes(figure, "Sines below, cosines above, fast to slow")
    heat(axes, entering(e.Sinusoidal(layout="halves"), {}, 96, np.zeros(64)).T)


@picture("hierarchical")
def _(figure):
    # A table as training would make it, near enough: smooth in position.
    n, encoding = 12, e.Hierarchical()
    table = e.sinusoidal_positions(jnp.arange(n) * 4, 64, layout="halves")
    axes = _input_axes(figure, "12 trained rows serve 144 positions")
    heat(axes, entering(encoding, {"positions": table}, 5 * n, np.zeros(64)).T)
    axes.set_xticks(np.arange(0, 5 * n + 1, n) - 0.5, np.arange(0, 5 * n + 1, n))
    for x in np.arange(1, 5) * n:
        axes.axvline(x - 0.5, color="white", linewidth=0.8, linestyle=(0, (2, 2)))


@picture("multiplicative")
def _(figure):
    # One dimension of three tokens. The rows are smooth, as training would make them.
    rows = 1 + 0.6 * jnp.sin(jnp.arange(64) / 2)[:, None]
    axes = plot(figure, "The larger the token, the more position does", "position", "one dimension of x · P")
    tokens = (2.0, 1.0, -0.5)
    lines(
        axes,
        np.arange(64),
        [entering(e.Multiplicative(), {"positions": rows}, 64, [x])[:, 0] for x in tokens],
        [f"x = {x:g}" for x in tokens],
    )


@picture("complex")
def _(figure):
    of, encoding = dims(width=6), e.ComplexOrder()
    params = parameters(encoding, of)
    token = np.array([1.0, 0.7, 0.4, 0.3, -0.5, 0.6])
    rows = entering(encoding, params, 64, token)
    axes = plot(figure, "One token: amplitude · cos(ω·position + phase)", "position", "real part")
    lines(axes, np.arange(64), rows[:, :3].T, ["dim 0", "dim 1", "dim 2"])


@picture("recursive")
def _(figure):
    encoding = e.Recursive()
    rows = entering(encoding, parameters(encoding, dims(width=16), seed=2), 64, np.zeros(16))
    axes = plot(figure, "p(k+1) = tanh(W·p(k) + b), as it starts", "position", "p (3 of 16)")
    lines(axes, np.arange(64), rows[:, :3].T)


@picture("floater")
def _(figure):
    encoding = e.FLOATER(step_size=0.1)
    params = parameters(encoding, dims(width=16), seed=1, spread=0.4)
    rows = entering(encoding, params, 64, np.zeros(16))
    axes = plot(figure, "dp/dt = h(t, p), four dimensions", "position", "p")
    lines(axes, np.arange(64), rows[:, :4].T)


@picture("convolution")
def _(figure):
    encoding = e.Convolution()
    rows = entering(encoding, parameters(encoding, dims(width=3), seed=4), 12, np.ones(3))
    axes = plot(figure, "The same token everywhere: zeros tell the start", "position", "x + Σ w·x")
    for i, row in enumerate(rows.T):
        axes.plot(row, color=COLOURS[i], linestyle=STYLES[i], linewidth=1.1, marker="o", markersize=3)
    axes.axvspan(-0.3, 2.5, color="#f0f0ec", zorder=-1)
    note(axes, "kernel_size - 1\ntokens", (2.5, 0.83), QUIET)


@picture("randomized")
def _(figure):
    axes = plot(figure, "Each training step draws other positions", "token", "position it is told")
    tokens = np.arange(64)
    for i in range(3):
        sample = np.asarray(e.randomized_positions(jax.random.key(i), 64, 2048))
        axes.plot(tokens, sample, color=COLOURS[i], linestyle=STYLES[i], linewidth=1.3)
    axes.plot(tokens, tokens, color=INK, linewidth=1)
    note(axes, "without", (63, 63), INK, (0, 6), ha="right")
    axes.set_ylim(0, 2048)
