"""Draws the pictures of docs/encodings.md: `python -m benchmarks.pictures [NAME ...]`; without a name, all of them.

The effect of an encoding within attention is computed by the attention functions, not from its formula: if the values
are the identity, the outputs are the weights, and ln weight + logsumexp is the logit. Unless a picture says otherwise,
all tokens are identical, so that only positions distinguish them. Random values are seeded.

Shapes: T length, N heads, H head dim, D model width.
"""

import io
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from PIL import Image

import nope_jax.encodings as e
from nope_jax.attention import attention_weights, encoded_attention
from nope_jax.evaluation.common.plots import COLOURS, INK, QUIET

FOLDER = Path(__file__).parents[1] / "docs/images/encodings"
STYLES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.5, 1.5)))
CMAP = "cividis"  # even to all eyes
PALE = "#d8d8d8"

PICTURES: dict[str, Callable[[Figure], None]] = {}
"""The function that draws each picture, by name."""


def picture(name: str):
    def register(function):
        PICTURES[name] = function
        return function

    return register


def draw(name: str, folder: Path = FOLDER) -> Path:
    """Draws one picture, byte for byte the same every time."""
    figure = Figure(figsize=(3.2, 1.8), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03)
    FigureCanvasAgg(figure)
    PICTURES[name](figure)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", facecolor="white", metadata={"Software": None})
    path = folder / f"{name}.png"
    Image.open(drawn).convert("RGB").quantize(96).save(path, optimize=True)  # a quarter of the bytes
    return path


# --- Axes


def plot(figure: Figure, title: str, x: str = "", y: str = "", **settings) -> Axes:
    """Creates the single axes of a picture."""
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=8, color=INK, loc="left", pad=4)
    axes.set_xlabel(x, fontsize=8, color=INK, labelpad=1)
    axes.set_ylabel(y, fontsize=8, color=INK, labelpad=1)
    axes.tick_params(labelsize=7, color=QUIET, length=2, pad=1.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.set(**settings)
    return axes


def lines(axes: Axes, x, rows, labels=None, **settings) -> None:
    """Draws one line per row, with its label at its end in the same colour."""
    for i, row in enumerate(rows):
        axes.plot(x, row, color=COLOURS[i], linestyle=STYLES[i % 4], linewidth=1.3, **settings)
        if labels:
            note(axes, labels[i], (x[-1], row[-1]), COLOURS[i])


def note(axes: Axes, text: str, at, colour=INK, offset=(3, 0), **settings) -> None:
    settings = {"fontsize": 7, "va": "center", "ha": "left"} | settings
    axes.annotate(text, at, offset, textcoords="offset points", color=colour, annotation_clip=False, **settings)


def trained(axes: Axes, length: float) -> None:
    """Marks the training length."""
    axes.axvline(length, color=QUIET, linewidth=0.8, linestyle=(0, (2, 2)))
    note(axes, "L", (length, 1), QUIET, (2, -1), xycoords=("data", "axes fraction"), va="top")


def heat(axes: Axes, rows, cmap: str = CMAP, **settings) -> None:
    """Draws an array [y, x] as a heat map; NaN stays white."""
    axes.imshow(rows, aspect="auto", origin="lower", interpolation="nearest", cmap=cmap, **settings)
    axes.spines[["top", "right"]].set_visible(True)
    axes.spines[:].set_color(QUIET)


# --- What the encodings give


def dims(heads: int = 3, dim: int = 32, width: int = 64, length: int = 64) -> e.ModelDims:
    return e.ModelDims(heads, dim, width, train_length=length, num_kv_heads=1, vocab_size=8)


def parameters(encoding: e.Encoding, of: e.ModelDims, seed: int = 0, spread: float = 0.0) -> dict:
    """Initial parameters, plus noise of scale `spread` in place of training."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = encoding.init_shared(keys[0], of) | encoding.init_layer(keys[1], of)
    return {
        name: x + spread * jax.random.normal(jax.random.fold_in(keys[2], i), x.shape)
        for i, (name, x) in enumerate(sorted(params.items()))
    }


def logits(encoding: e.Encoding, params: dict, query, key, **common) -> np.ndarray:
    """Logits [N, T, S] of queries [T, N, H] and keys [S, K, H]."""
    weights, stats = attention_weights(
        encoding, params, query[None], key[None], return_stats=True, precision="highest", **common
    )
    weights, normaliser = np.asarray(weights[0], np.float64), np.asarray(stats.logsumexp[0])
    return np.where(weights > 0, np.log(np.maximum(weights, 1e-300)), np.nan) + normaliser[..., None]


def alike(length: int, heads: int = 3, dim: int = 32, seed: int = 1):
    """Queries and keys of identical tokens."""
    draws = np.random.default_rng(seed)
    query, key = draws.standard_normal((1, heads, dim)), draws.standard_normal((1, 1, dim))
    return [jnp.asarray(np.repeat(x, length, axis=0), jnp.float32) for x in (query, key)]


def by_distance(encoding: e.Encoding, length: int, params: dict | None = None, heads: int = 3) -> np.ndarray:
    """[N, distance]: what an encoding adds to the content logits of the last query."""
    params = parameters(encoding, dims(heads)) if params is None else params
    query, key = alike(length, heads)
    added = logits(encoding, params, query[-1:], key) - logits(e.NoPE(), {}, query[-1:], key)
    return added[:, 0, ::-1]


def entering(encoding: e.Encoding, params: dict, length: int, embedding) -> np.ndarray:
    """[T, D]: the output of the input place for one token at every position."""
    x = jnp.broadcast_to(jnp.asarray(embedding, jnp.float32), (1, length, len(embedding)))
    tokens = e.TokenInputs(jnp.zeros((1, length), int), jnp.arange(length)[None], None, length)
    return np.asarray(encoding.input(params, x, tokens)[0])


def factors(encoding: e.Encoding, positions, params: dict | None = None) -> np.ndarray:
    """[N or 1, T]: logit scale of the queries at these positions."""
    at = jnp.asarray(positions)[None]
    return np.atleast_2d(np.asarray(encoding.logit_scale(params or {}, at, at))[0])


def seen(reach: e.AttentionSpan, length: int) -> np.ndarray:
    """[T, S]: which keys each query of a layer sees."""
    query, key = alike(length, 1, 2)
    encoding = e.NoPE()
    if reach.window:
        encoding = e.Windowed(encoding, reach.window)
    if reach.chunk_size:
        encoding = e.Chunked(encoding, reach.chunk_size)
    return np.isfinite(logits(encoding, {}, query, key)[0])


# --- Nothing, and the input place


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


# --- Rotary


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


# --- Biases


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


# --- Relative positions that meet content


def _bias_picture(figure, title, encoding, length):
    axes = plot(figure, title, "distance", "added to the logit")
    lines(axes, np.arange(length), by_distance(encoding, length))


@picture("shaw")
def _(figure):
    _bias_picture(figure, "Three queries: from distance 16 on, one row", e.Shaw(), 32)


@picture("nezha")
def _(figure):
    _bias_picture(figure, "Sinusoids of the distance, up to 64", e.NEZHA(), 96)


@picture("transformer_xl")
def _(figure):
    encoding = e.TransformerXL()
    params = parameters(encoding, dims(), seed=3)
    params = {name: 5 * x for name, x in params.items()}  # from 0.02, as it starts, to 0.1
    rows = by_distance(encoding, 96, params)
    axes = plot(figure, "(q + v) · W r, three heads", "distance", "added to the logit")
    lines(axes, np.arange(96), rows - rows.mean(axis=1, keepdims=True))


@picture("tupe")
def _(figure):
    length, of, encoding = 48, dims(1, length=48), e.TUPE()
    params = parameters(encoding, of, seed=5)
    # A table as smooth as training makes it, and projections past their first 0.02.
    params["positions"] = e.sinusoidal_positions(jnp.arange(length), 64, layout="halves")
    params |= {name: 6 * params[name] for name in ("query_kernel", "key_kernel")}
    query, key = alike(length, 1)
    rows = logits(encoding, params, 0 * query, 0 * key)[0]
    axes = plot(figure, "Positions alone: U p · V p + bias", "key position", "query position")
    heat(axes, rows)
    axes.invert_yaxis()


@picture("deberta")
def _(figure):
    k, of = 32, dims(1)
    encoding = e.DeBERTa(max_distance=k)
    params = parameters(encoding, of, seed=2)
    params["relative"] = e.sinusoidal_positions(jnp.arange(2 * k), 64, layout="halves")
    params |= {name: 4 * params[name] for name in ("query_kernel", "key_kernel")}
    query, key = alike(64, 1)
    content = logits(encoding, params | {n: 0 * params[n] for n in ("query_kernel", "key_kernel")}, query[-1:], key)
    axes = plot(figure, "One head; from distance k = 32 on, one row", "distance", "added to the logit")
    rows = [
        (logits(encoding, params | {n: 0 * params[n] for n in off}, query[-1:], key) - content)[0, 0, ::-1]
        for off in (["query_kernel"], ["key_kernel"])
    ]
    lines(axes, np.arange(64), rows, ["c2p", "p2c"])


# --- Contextual positions


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


# --- Logit scale


def _log_positions(axes, last):
    axes.set_xscale("log", base=2)
    axes.set_xlim(left=16, right=last)
    axes.xaxis.set_minor_locator(NullLocator())
    ticks = [2**k for k in range(5, 20, 2) if 2**k <= last]
    axes.set_xticks(ticks, [f"{t:,}" if t < 1024 else f"{t // 1024}K" for t in ticks])


@picture("log_n")
def _(figure):
    positions = np.unique(np.geomspace(1, 16_384, 200).astype(int)) - 1
    axes = plot(figure, "1 within L = 512, then log_L n", "keys seen (log scale)", "factor", ylim=(0.9, 1.65))
    axes.plot(positions + 1, factors(e.LogN(length=512), positions)[0], color=COLOURS[0], linewidth=1.8)
    _log_positions(axes, 16_384)
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
    _log_positions(axes, length)
    axes.plot(middle, np.log(middle), color=PALE, linewidth=1)
    lines(axes, middle, np.array(rows), [f"λ = {x:g}" for x in scales.tolist()])


@picture("ssmax")
def _(figure):
    positions = np.unique(np.geomspace(1, 16_384, 200).astype(int)) - 1
    axes = plot(figure, "s · ln n, three heads", "keys seen (log scale)", "factor")
    params = {"ssmax": jnp.array([0.1, 0.168, 0.25])}
    lines(axes, positions + 1, factors(e.SSMax(), positions, params), ["s = 0.1", "0.168", "0.25"])
    axes.axhline(1, color=PALE, linewidth=1, zorder=-1)
    _log_positions(axes, 16_384)
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
    _log_positions(axes, 16_384)


# --- Reach and schedules

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
    _log_positions(axes, length)
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


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in PICTURES]
    if unknown:
        sys.exit(f"no picture is called {', '.join(unknown)}: choose from {', '.join(PICTURES)}")
    FOLDER.mkdir(exist_ok=True)
    for name in names or PICTURES:
        print(draw(name))


if __name__ == "__main__":
    main(sys.argv[1:])
