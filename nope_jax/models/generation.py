"""Autoregressive text generation.

A prompt is padded to the next of a few sizes, and so is the KV cache, so that texts of similar lengths share compiled
programs: one reads the prompt, one continues it in a loop on the device. Encodings that depend on the total length
(`Encoding.depends_on_length`) get caches of exactly that length.

Shapes: B batch, T prompt length, V vocabulary; W columns of a text, prompt and continuation; E stop tokens.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Integer, Key

from nope_jax.attention.blocks import Leaf
from nope_jax.encodings.checks import as_array
from nope_jax.models.decoder import Decoder, DecodeState
from nope_jax.sharding import auto_axes, to_host


def generate(
    model: Decoder,
    prompt: Integer[ArrayLike, "B T"],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    key: Array | None = None,
    stop_tokens: Sequence[int] = (),
    prompt_lengths: Integer[ArrayLike, "B"] | None = None,
) -> Integer[Array, "B T+{max_new_tokens}"]:
    """Extend prompts by up to max_new_tokens tokens each, greedily or by sampling.

    Args:
        model: The decoder.
        prompt: Tokens to continue, at least one per row.
        max_new_tokens: Number of tokens to add. Encodings that depend on the total length (see `Decoder.decode_step`)
            use that of the row's prompt plus max_new_tokens - 1, the number of tokens read.
        temperature: 0 selects the most likely token; above 0, tokens are sampled from softmax(logits / temperature).
        top_k: Sample from the top_k most likely tokens only.
        top_p: Sample from the most likely tokens that together have at least this probability (nucleus sampling,
            Holtzman et al. 2020, arXiv 1904.09751), among those of top_k.
        min_p: Sample only from tokens at least this many times as likely as the most likely one (Nguyen et al. 2024,
            arXiv 2407.01082).
        key: Random key for sampling, required if temperature is above 0. A key per row, [B], makes a row's text
            independent of the other rows; one key is split into them.
        stop_tokens: Tokens that end a row. The loop ends when all rows have ended.
        prompt_lengths: Number of prompt tokens of each row, if they differ; the rest of a row of `prompt` is ignored.

    Returns:
        In each row the prompt, directly followed by the new tokens, the last of which may be a stop token. Zeros fill
        the rest.

    Raises:
        ValueError: An argument is invalid, or the encoding does not support the length.
    """
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "key": key}
    call = _checked(model, prompt, max_new_tokens, prompt_lengths, stop_tokens, **sampling)
    if call.max_new_tokens == 0:
        return jnp.asarray(call.prompt)
    groups = call.groups()
    parts = [call.text(rows, _continue(*call.model, *call.start(rows), call.max_new_tokens)[1]) for rows in groups]
    if len(parts) == 1:
        return parts[0]
    return jax.device_put(np.concatenate(parts)[np.argsort(np.concatenate(groups))])


def generate_stream(
    model: Decoder, prompt: Integer[ArrayLike, "B T"], max_new_tokens: int, **options: Any
) -> Iterator[Integer[np.ndarray, "B"]]:
    """Yield the tokens of `generate` as they come: at each step one per row, -1 for rows that have ended.

    Args:
        model: As `generate`.
        prompt: As `generate`.
        max_new_tokens: As `generate`.
        **options: The other arguments of `generate`.

    Raises:
        ValueError: As `generate`, before the first token.
    """
    sampling = {name: options.pop(name, None) for name in ("temperature", "top_k", "top_p", "min_p", "key")}
    sampling["temperature"] = sampling["temperature"] or 0.0
    given = [options.pop(name, default) for name, default in (("prompt_lengths", None), ("stop_tokens", ()))]
    if options:
        raise TypeError(f"generate_stream got an unexpected keyword {next(iter(options))!r}")
    return _stream(_checked(model, prompt, max_new_tokens, *given, **sampling))


def _stream(call: "_Call") -> Iterator[Integer[np.ndarray, "B"]]:
    groups = call.groups()
    states = [call.start(rows) for rows in groups] if call.max_new_tokens else []
    for step in range(call.max_new_tokens):
        now = [text for _, text in states]
        if step + 1 < call.max_new_tokens:  # the next step is under way while the tokens of this one are read
            states = [_continue(*call.model, *state, step + 2) for state in states]
        tokens = np.full(len(call.prompt), -1, np.int32)
        for rows, text in zip(groups, now, strict=True):
            tokens[rows] = np.where(text.ended_before | (text.count <= step), -1, text.tokens)
        if (tokens == -1).all():
            return
        yield tokens


class _Sampling(NamedTuple):
    """How tokens are drawn: numbers, or None for what is not used."""

    temperature: ArrayLike | None
    top_p: ArrayLike | None
    min_p: ArrayLike | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Text:
    """A continuation under way."""

    text: Integer[Array, "B W"] | Leaf
    """The new tokens, 0 where there are none yet."""
    tokens: Integer[Array, "B"] | Leaf
    """The last token of each row, not read yet."""
    count: Int[Array, ""] | Leaf
    """Number of new tokens."""
    ended_before: Bool[Array, "B"] | Leaf
    """Whether a row had ended before its last token."""
    ended: Bool[Array, "B"] | Leaf
    keys: Key[Array, "B"] | Leaf
    stop_tokens: Integer[Array, "E"] | Leaf
    sampling: _Sampling
    top_k: int | None = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass
class _Call:
    """The arguments of `generate`, checked."""

    decoder: Decoder
    prompt: Any
    lengths: Any
    max_new_tokens: int
    stop_tokens: np.ndarray
    keys: Key[Array, "B"]
    sampling: _Sampling
    top_k: int | None
    exact: bool
    """Whether the room of the cache must be that of the text, to the token."""

    def __post_init__(self):
        self.model = nnx.split(self.decoder)

    def groups(self) -> list[np.ndarray]:
        """Rows that are generated together: all, or those of each length if the encoding depends on it."""
        if not self.exact or self.lengths is None:
            return [np.arange(len(self.prompt))]
        return [np.flatnonzero(self.lengths == length) for length in np.unique(self.lengths)]

    def start(self, rows: np.ndarray) -> tuple[DecodeState, _Text]:
        """Read the prompts of some rows and choose their first tokens."""
        all_rows = len(rows) == len(self.prompt)
        prompt, keys = (self.prompt, self.keys) if all_rows else (self.prompt[rows], self.keys[rows])
        length, lengths = prompt.shape[1], self.lengths
        if self.lengths is not None:
            lengths = self.lengths[rows]
            length = int(lengths.max())
        room, size = length + self.max_new_tokens - 1, length
        if not self.exact:
            room, size = _bucket(room), _bucket(length)
            if self.decoder.max_length is not None:
                room = min(room, self.decoder.max_length)
        size = min(size, room)
        if length != size or length != prompt.shape[1]:
            pad = jnp.pad if isinstance(prompt, jax.Array) else np.pad
            prompt = pad(prompt[:, :length], ((0, 0), (0, size - length)))
        lengths = np.int32(length) if lengths is None or (lengths == length).all() else np.int32(lengths)
        given = prompt, lengths, keys, self.stop_tokens, self.sampling
        return _begin(self.model[0], room, self.top_k, self.model[1], *given)

    def text(self, rows: np.ndarray, continued: _Text) -> Array:
        """The prompts of some rows followed by their new tokens."""
        new: Any = continued.text
        if isinstance(new, jax.core.Tracer) or isinstance(self.prompt, jax.Array):
            return jnp.concatenate([jnp.asarray(self.prompt), new[:, : self.max_new_tokens]], axis=1)
        new = to_host(new)  # joined in NumPy, because JAX would compile that for every length
        if self.lengths is None:
            return jax.device_put(np.concatenate([self.prompt, new[:, : self.max_new_tokens]], axis=1))
        text = np.zeros((len(rows), self.prompt.shape[1] + self.max_new_tokens), self.prompt.dtype)
        for line, row, added in zip(text, rows, new, strict=True):
            length = self.lengths[row]
            line[:length] = self.prompt[row, :length]
            line[length : length + self.max_new_tokens] = added[: self.max_new_tokens]
        return jax.device_put(text)


def _bucket(length: int) -> int:
    """The next of the sizes 32, 48, 64, 96, 128, ...: at most half as much again."""
    size = 32
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size


def _checked(
    model, prompt, max_new_tokens, prompt_lengths, stop_tokens, *, temperature, top_k, top_p, min_p, key
) -> _Call:
    """Check the arguments of `generate`."""
    vocab = model.config.num_tokens
    if not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, an integer, not {max_new_tokens!r}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be at least 0 and finite, not {temperature}")
    if top_k is not None and not (isinstance(top_k, int) and 1 <= top_k <= vocab):
        raise ValueError(f"top_k must be between 1 and the vocabulary {vocab}, not {top_k}")
    for name, share in {"top_p": top_p, "min_p": min_p}.items():
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"{name} must be above 0 and at most 1, not {share}")
    if temperature == 0:
        for name, option in {"top_k": top_k, "top_p": top_p, "min_p": min_p}.items():
            if option is not None:
                raise ValueError(f"{name} must be None at temperature 0, which draws nothing, not {option}")
    if temperature > 0 and key is None:
        raise ValueError("key must be given when temperature is above 0, as in key=jax.random.key(0)")
    stop = np.asarray(stop_tokens).reshape(-1)
    if stop.size and not (np.issubdtype(stop.dtype, np.integer) and (stop >= 0).all() and (stop < vocab).all()):
        raise ValueError(f"stop_tokens must be integers between 0 and {vocab - 1} (vocab_size), not {stop_tokens}")
    traced = isinstance(prompt, jax.core.Tracer) or not getattr(prompt, "is_fully_addressable", True)
    prompt = jnp.asarray(prompt) if traced else np.asarray(prompt)
    if prompt.ndim != 2 or not prompt.size:
        raise ValueError(f"prompt must have shape [batch, length], at least one token each, not {list(prompt.shape)}")
    batch, length = prompt.shape
    if prompt_lengths is not None:
        prompt_lengths = np.asarray(prompt_lengths)
        if prompt_lengths.shape != (batch,) or not np.issubdtype(prompt_lengths.dtype, np.integer):
            shape, dtype = list(prompt_lengths.shape), prompt_lengths.dtype
            raise ValueError(f"prompt_lengths must be integers, one per row [{batch}], not {dtype} {shape}")
        if prompt_lengths.min() < 1 or prompt_lengths.max() > length:
            wrong = prompt_lengths[(prompt_lengths < 1) | (prompt_lengths > length)][0]
            raise ValueError(f"prompt_lengths must be between 1 and the prompt's {length} columns, not {wrong}")
        prompt = np.where(np.arange(length) < prompt_lengths[:, None], prompt, 0)
    max_new_tokens = int(max_new_tokens)
    longest = length if prompt_lengths is None else int(prompt_lengths.max())
    if max_new_tokens:
        model.check_room(longest + max_new_tokens - 1)
    model.check_tokens(prompt)
    if not traced:  # kept in NumPy, because JAX would compile a program for every length
        prompt = prompt.astype(jax.dtypes.canonicalize_dtype(prompt.dtype))
    keys = jax.random.key(0) if key is None else as_array("key", key)
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        if keys.dtype != jnp.uint32 or not keys.ndim:
            raise ValueError(f"key must be a random key, as in key=jax.random.key(0), not {key!r}")
        keys = jax.random.wrap_key_data(keys)
    if keys.shape not in ((), (batch,)):
        raise ValueError(f"key must be one key, or one per row [{batch}], not {list(keys.shape)}")
    keys = jax.random.split(keys, batch) if keys.ndim == 0 else keys
    draws = temperature > 0
    return _Call(
        model,
        prompt,
        prompt_lengths,
        max_new_tokens,
        np.concatenate([stop, np.full(-len(stop) % 8, -1)]).astype(np.int32),  # of few sizes, too
        keys,
        _Sampling(*(jnp.float32(x) if draws and x is not None else None for x in (temperature, top_p, min_p))),
        top_k if draws else None,
        exact=any(encoding.depends_on_length for encoding in model.encodings) or traced,
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
@auto_axes
def _begin(graphdef, room: int, top_k: int | None, state, prompt, lengths, keys, stop_tokens, sampling):
    """Read the prompts and choose the first token of each row."""
    model = nnx.merge(graphdef, state)
    batch = prompt.shape[0]
    logits, cache = model._decode_step(prompt, model.init_cache(batch, room), lengths, last_only=True)
    none = jnp.zeros(batch, bool)
    text = _Text(
        text=jnp.zeros((batch, room), prompt.dtype),
        tokens=jnp.zeros(batch, prompt.dtype),
        count=jnp.int32(0),
        ended_before=none,
        ended=none,
        keys=keys,
        stop_tokens=stop_tokens,
        sampling=sampling,
        top_k=top_k,
    )
    return cache, _add(text, logits[:, 0])


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
@auto_axes
def _continue(graphdef, state, cache: DecodeState, text: _Text, count):
    """Choose tokens until there are `count`, or all rows have ended."""

    def step(carry):
        # Without the barrier, XLA would convert weights of 16 bits to float32 before the loop, on a CPU.
        params, (cache, text) = jax.lax.optimization_barrier((state, carry))
        model = nnx.merge(graphdef, params)
        logits, cache = model._decode_step(text.tokens[:, None], cache, 1)
        return cache, _add(text, logits[:, 0])

    def goes_on(carry):
        return (carry[1].count < count) & ~carry[1].ended.all()

    return jax.lax.while_loop(goes_on, step, (cache, text))


def _add(text: _Text, logits: Float[Array, "B V"]) -> _Text:
    """Choose the next token of each row."""
    temperature, top_p, min_p = text.sampling
    if temperature is None:
        tokens = logits.argmax(-1)
    else:
        keys = jax.vmap(jax.random.fold_in, (0, None))(text.keys, text.count)
        tokens = jax.vmap(jax.random.categorical)(
            keys, candidates(logits, temperature, top_k=text.top_k, top_p=top_p, min_p=min_p)
        )
    tokens = jnp.where(text.ended, 0, tokens).astype(text.text.dtype)
    return dataclasses.replace(
        text,
        text=jax.lax.dynamic_update_slice(text.text, tokens[:, None], (0, text.count)),
        tokens=tokens,
        count=text.count + 1,
        ended_before=text.ended,
        ended=text.ended | (tokens[:, None] == text.stop_tokens).any(-1),
    )


def candidates(
    logits: Float[Array, "B V"],
    temperature: ArrayLike,
    *,
    top_k: int | None = None,
    top_p: ArrayLike | None = None,
    min_p: ArrayLike | None = None,
) -> Float[Array, "B V"]:
    """The logits divided by temperature, -inf for tokens that are not to be drawn; equally likely tokens stay together.

    Args: as `generate`.
    """
    logits = (logits - logits.max(-1, keepdims=True)) / temperature  # the most likely stays finite at any temperature
    if top_k is not None:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        ordered = -jnp.sort(-logits, axis=-1)
        shares = jax.nn.softmax(ordered, axis=-1)
        taken = (jnp.cumsum(shares, axis=-1) - shares < top_p).sum(-1, keepdims=True)
        least = jnp.take_along_axis(ordered, jnp.maximum(taken, 1) - 1, axis=-1)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if min_p is not None:
        logits = jnp.where(logits < jnp.log(min_p), -jnp.inf, logits)
    return logits
