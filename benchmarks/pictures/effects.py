"""What encodings do to logits and embeddings.

Effects within attention are computed by the attention functions, not from formulas: if the values are the identity, the
outputs are the weights, and ln weight + logsumexp is the logit.

Shapes: T length, N heads, S keys, N heads, H head dim, D model width.
"""

import jax
import jax.numpy as jnp
import numpy as np

import nope_jax.encodings as e
from nope_jax.attention import attention_weights


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
