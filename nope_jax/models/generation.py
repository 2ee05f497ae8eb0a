"""Autoregressive text generation.

Shapes: B batch, T prompt length, V vocabulary.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Float, Integer

from nope_jax.models.decoder import Decoder
from nope_jax.sharding import auto_axes


def generate(
    model: Decoder,
    prompt: Integer[ArrayLike, "B T"],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    key: Array | None = None,
) -> Integer[Array, "B T+{max_new_tokens}"]:
    """Extend a prompt by max_new_tokens tokens, greedily or by sampling.

    Args:
        model: The decoder.
        prompt: Tokens to continue, at least one per row.
        max_new_tokens: Number of tokens to add. Encodings that depend on the total length (see `Decoder.decode_step`)
            use T + max_new_tokens - 1, the number of tokens read.
        temperature: 0 selects the most likely token; above 0, tokens are sampled from softmax(logits / temperature).
        top_k: Sample from the top_k most likely tokens only.
        key: Random key for sampling; required if temperature is above 0.

    Returns:
        The prompt followed by the new tokens.

    Raises:
        ValueError: An argument is invalid, or the encoding does not support the length.
    """
    vocab = model.config.vocab_size
    if not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, an integer, not {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be at least 0 and finite, not {temperature}")
    if top_k is not None and not (isinstance(top_k, int) and 1 <= top_k <= vocab):
        raise ValueError(f"top_k must be between 1 and the vocabulary {vocab}, not {top_k}")
    if temperature > 0 and key is None:
        raise ValueError("key must be given when temperature is above 0, as in key=jax.random.key(0)")
    prompt = jnp.asarray(prompt)
    if prompt.ndim != 2 or not prompt.size:
        raise ValueError(f"prompt must have shape [batch, length], at least one token each, not {list(prompt.shape)}")
    max_new_tokens = int(max_new_tokens)
    if max_new_tokens == 0:
        return prompt
    cache = model.init_cache(prompt.shape[0], prompt.shape[1] + max_new_tokens - 1)
    model.check_tokens(prompt)
    graphdef, state = nnx.split(model)
    key = jax.random.key(0) if key is None else key
    sampled = (temperature > 0, max_new_tokens, top_k)
    return _continue(graphdef, *sampled, state, cache, prompt, jnp.float32(temperature), key)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
@auto_axes
def _continue(graphdef, draws: bool, count: int, top_k: int | None, state, cache, prompt, temperature, key):
    model = nnx.merge(graphdef, state)

    def choose(logits: Float[Array, "B V"], key) -> Integer[Array, "B"]:
        if not draws:
            return logits.argmax(-1).astype(prompt.dtype)
        if top_k is not None:
            least = jax.lax.top_k(logits, top_k)[0][:, -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        logits -= logits.max(-1, keepdims=True)  # keeps the most likely finite at low temperatures
        return jax.random.categorical(key, logits / temperature).astype(prompt.dtype)

    def step(carry, key):
        tokens, cache = carry
        logits, cache = model.decode_step(tokens[:, None], cache)
        tokens = choose(logits[:, -1], key)
        return (tokens, cache), tokens

    first, *keys = jax.random.split(key, count)
    logits, cache = model.decode_step(prompt, cache)
    tokens = choose(logits[:, -1], first)
    text = [prompt, tokens[:, None]]
    if count > 1:
        _, rest = jax.lax.scan(step, (tokens, cache), jnp.stack(keys))
        text.append(rest.T)
    return jnp.concatenate(text, axis=1)
