"""Relative positions that meet content."""

import jax.numpy as jnp
import numpy as np

import nope_jax.encodings as e
from benchmarks.pictures.axes import heat, lines, plot
from benchmarks.pictures.effects import alike, by_distance, dims, logits, parameters
from benchmarks.pictures.picture import picture


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
