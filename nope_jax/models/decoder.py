"""The decoder: token embedding, layers stacked on a leading axis and scanned, and head.

Shapes: B batch, T length, L layers, N query heads, D model width, V vocabulary; P the encodings' period.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Integer, Shaped

from nope_jax.attention import AttentionStats
from nope_jax.attention.blocks import Leaf
from nope_jax.attention.mask_spec import per_token
from nope_jax.attention.softcap import softcapped
from nope_jax.config import Config, ModelConfig
from nope_jax.encodings import Encoding, ModelDims, Params, TokenInputs, resolve
from nope_jax.encodings.checks import as_array, integer_at_least
from nope_jax.models.cross_entropy import nll_in_chunks, total_in_chunks
from nope_jax.models.kv_cache import CacheStep, KVCache, LayerCache, check_kv_caches, empty_kv_cache
from nope_jax.models.layers import RESIDUAL, Block, add_norm, apply_norm, bias, encoding_params, kernel, row_of
from nope_jax.models.remat import LAYER_INPUT, rematerialized
from nope_jax.sharding import auto_axes, gathered, num_shards, with_logical_constraint

LOGITS_AT_ONCE = 2**26
"""Maximum number of logits materialized at a time on a device when computing losses: 256 MiB in float32."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The state of autoregressive decoding."""

    length: Int[Array, ""] | Int[Array, "B"] | Leaf
    """Number of tokens so far, in every row or in each."""
    inputs: list[Shaped[Array, "B context D"] | Leaf]
    """The last embeddings before each encoding's input place, `input_context` of them."""
    kv_caches: list[KVCache]
    """One per place in the encodings' period."""
    room: int = dataclasses.field(metadata={"static": True})
    """Capacity, in tokens per row."""
    is_empty: bool = dataclasses.field(default=False, metadata={"static": True})
    """Whether there are no tokens yet; attention over a prompt then reads no cache."""


def _compiled(method: Callable) -> Callable:
    """Compile a method of the decoder, also outside jit, once for all decoders with the same structure.

    jit caches on the structure and holds none of the parameters.
    """

    @functools.partial(jax.jit, static_argnums=0, static_argnames=("length", "return_stats", "last_only"))
    def program(structure, state, *args, **keywords):
        return method(nnx.merge(structure, state), *args, **keywords)

    @functools.wraps(method)
    def wrapped(self, *args, **keywords):
        return program(*nnx.split(self), *args, **keywords)

    return wrapped


class Decoder(nnx.Module):
    """A causal transformer; its config's `encoding` sets the positional encoding.

    Args:
        config: Architecture of the model.
        rngs: Keys for the initial parameters.

    Raises:
        ValueError: The encoding is unknown, there are more encodings than layers, or numbers of heads do not divide.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        Config(model=config)  # validates the fields
        self.config = config = dataclasses.replace(config, vocab_size=config.num_tokens)
        dims = ModelDims(
            num_heads=config.num_heads,
            head_dim=config.head_dim or config.model_dim // config.num_heads,
            model_dim=config.model_dim,
            train_length=config.train_length,
            num_kv_heads=config.num_kv_heads or config.num_heads,
            vocab_size=config.num_tokens,
        )
        self.encodings = tuple(encoding.bind(dims) for encoding in resolve(config.encoding))
        self.base_encodings = tuple(dict.fromkeys(encoding.unwrapped for encoding in self.encodings))
        period = len(self.encodings)
        limits = [limit for encoding in self.encodings if (limit := encoding.max_length(dims)) is not None]
        self.max_length = min(limits, default=None)

        embedding = jax.nn.initializers.normal(config.model_dim**-0.5)
        self.embedding = nnx.Param(
            embedding(rngs.params(), (config.num_tokens, config.model_dim), jnp.float32), axes=("vocab", "embed")
        )
        if config.embedding_norm:
            add_norm(self, "embedding_norm", config)
        self.positions = nnx.List([encoding_params(e.init_shared(rngs.params(), dims)) for e in self.base_encodings])

        def stack(slot: int) -> Block:
            """Create all layers at one place in the period, with parameters stacked on a leading axis."""
            count = len(range(slot, config.num_layers, period))

            @nnx.split_rngs(splits=count)
            @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: "layers", "axes": "layers"})
            def blocks(rngs: nnx.Rngs) -> Block:
                return Block(config, self.encodings[slot], dims, rngs=rngs)

            return blocks(rngs)

        self.blocks = nnx.List([stack(slot) for slot in range(period)])
        add_norm(self, "norm", config)
        shape = (config.model_dim, config.num_tokens)
        self.head = None if config.tie_embeddings else kernel(rngs, shape, ("embed", "vocab"), inputs=shape[0])
        self.head_bias = bias(config, "head", (config.num_tokens,), ("vocab",))

    @auto_axes
    def __call__(
        self,
        tokens: Integer[Array | np.ndarray, "B T"],
        *,
        positions: Integer[ArrayLike, "T"] | Integer[ArrayLike, "#B T"] | None = None,
        segment_ids: Integer[ArrayLike, "T"] | Integer[ArrayLike, "#B T"] | None = None,
        logit_scale: Any = None,
        key: Array | None = None,
        return_stats: bool = False,
    ) -> Any:
        """Compute the logits of the next token at every position.

        Args:
            tokens: Token ids below V; traced under jit, an id outside the vocabulary gives NaN instead of an error.
            positions: Positions of the tokens; None for 0..T-1. Traced under jit, encodings that compute a table of
                positions (recursive, floater) assume them to be below T or the training length, and give NaN beyond.
            segment_ids: Tokens attend only within their segment.
            logit_scale: Factor of every content logit, in addition to the encoding's own: a number, [N], [L, N] or
                [B or 1, N or 1, T].
            key: Random key of a training step, for randomized encodings; None outside training.
            return_stats: Also return entropy and logsumexp, [L, B, N, T] each.

        Returns:
            Logits [B, T, V] in float32, or a pair (logits, AttentionStats).

        Raises:
            ValueError: Tokens outside the vocabulary, positions that the encoding does not support, or invalid shapes.
        """
        hidden, stats = self.hidden(
            tokens,
            positions=positions,
            segment_ids=segment_ids,
            logit_scale=logit_scale,
            key=key,
            return_stats=return_stats,
        )
        logits = self.logits(hidden)
        return (logits, stats) if return_stats else logits

    @auto_axes
    def hidden(
        self,
        tokens: Integer[Array | np.ndarray, "B T"],
        *,
        positions: Any = None,
        segment_ids: Any = None,
        logit_scale: Any = None,
        key: Array | None = None,
        return_stats: bool = False,
    ) -> tuple[Shaped[Array, "B T D"], AttentionStats | None]:
        """Return the input of the head, which is the normalized output of the last layer, and the statistics.

        Args as `__call__`.
        """
        x, arguments = self.embed(tokens, positions=positions, segment_ids=segment_ids, key=key)
        x, stats, _ = self._layers(x, arguments, logit_scale=logit_scale, return_stats=return_stats)
        return x, stats

    def embed(
        self,
        tokens: Integer[Array | np.ndarray, "B T"],
        *,
        positions: Any = None,
        segment_ids: Any = None,
        key: Array | None = None,
    ) -> tuple[Shaped[Array, "B T D"], list[tuple[Params, dict[str, Any]]]]:
        """Return the input of the first layer, and the other arguments of the layers at each place in the period.

        Use it with `layer` to inspect activations: `x, _, _ = model.layer(i)(x, shared, **keywords)`. Args as
        `__call__`.

        Returns:
            The embeddings after the input places and, for each place in the period, the shared parameters of its
            encoding and the keyword arguments of attention.
        """
        tokens = as_array("tokens", tokens)
        self.check_tokens(tokens, positions)
        positions = per_token("positions", positions, *tokens.shape)
        segment_ids = per_token("segment_ids", segment_ids, *tokens.shape)
        return self._embed(tokens, positions, segment_ids, key, length=self._bound(tokens, positions))

    @_compiled
    def _embed(self, tokens, positions, segment_ids, key, *, length: int):
        """`embed` after its checks; all positions are below `length`."""
        where = jnp.arange(tokens.shape[1])[None] if positions is None else positions
        seen = TokenInputs(tokens, where, segment_ids, length)

        shared = self._shared()
        x = self._token_embeddings(tokens)
        for encoding, params in shared.items():
            told = seen._replace(positions=encoding.positions(where, seen.length, key))
            x = encoding.input(params, x, told)

        arguments: list[tuple[Params, dict[str, Any]]] = []
        for encoding in self.encodings:
            at: Array | None = encoding.positions(where, seen.length, key)
            # Leave consecutive positions implicit, because attention is faster when it knows they are.
            at = None if positions is None and at is where else at
            keywords = {"query_positions": at, "key_positions": at, "segment_ids": segment_ids}
            arguments.append((shared[encoding.unwrapped], keywords))
        return x, arguments

    def layer(self, index: int) -> Block:
        """Return one layer, sliced from its stack.

        Raises:
            ValueError: index is not an integer from 0 to num_layers − 1.
        """
        integer_at_least(0, index=index)
        if index is None or index >= self.config.num_layers:
            raise ValueError(f"index must be below num_layers, {self.config.num_layers}, not {index}")
        row, slot = divmod(int(index), len(self.encodings))
        structure, state = nnx.split(self.blocks[slot])
        return nnx.merge(structure, row_of(state, row))

    def init_cache(self, batch_size: int, length: int) -> DecodeState:
        """Create an empty cache for `decode_step`, with capacity for `length` tokens per row.

        That it is empty is part of its structure: a `jax.lax.scan` over steps begins after the first of them.

        Raises:
            ValueError: A size is below 1, or length exceeds the positions that the encoding supports.
        """
        integer_at_least(1, batch_size=batch_size, length=length)
        self.check_room(length)
        config, dtype, shared = self.config, jnp.dtype(self.config.dtype), self._shared()
        heads = config.num_heads, config.num_kv_heads or config.num_heads
        x = jax.ShapeDtypeStruct((batch_size, 1, config.model_dim), dtype)

        def kv_cache(slot: int, encoding: Encoding) -> KVCache:
            attention = self.blocks[slot].attention
            own = {name: jax.eval_shape(lambda x: x[0], param[...]) for name, param in attention.position.items()}
            params, (layers, *_, head_dim) = {**shared[encoding.unwrapped], **own}, attention.key.shape
            return empty_kv_cache(encoding, params, layers, batch_size, length, (*heads, head_dim), x)

        inputs = [
            jnp.zeros((batch_size, encoding.input_context(), config.model_dim), dtype)
            for encoding in self.base_encodings
        ]
        kv_caches = [kv_cache(slot, encoding) for slot, encoding in enumerate(self.encodings)]
        return DecodeState(jnp.zeros((), jnp.int32), inputs, kv_caches, room=length, is_empty=True)

    @auto_axes
    def decode_step(
        self,
        tokens: Integer[Array | np.ndarray, "B T"],
        cache: DecodeState,
        *,
        logit_scale: Any = None,
        return_stats: bool = False,
    ) -> Any:
        """Compute the logits of one more token, or of a whole prompt, given the tokens in the cache.

        They equal those of one pass over the same tokens. A few encodings depend on the total length (dynamic scalings
        of RoPE, randomized positions). In decoding, that is the capacity of the cache: a cache with capacity T gives
        the logits of one pass over T tokens.

        Args:
            tokens: The next tokens of every row.
            cache: The result of `init_cache` or of the previous step.
            logit_scale: As `__call__`.
            return_stats: Also return the statistics, [L, B, N, T] each.

        Returns:
            Logits [B, T, V] in float32 and the new cache; with return_stats (logits, stats, cache). If the length is
            traced under jit, tokens beyond the cache's capacity give NaN.

        Raises:
            ValueError: Tokens outside the vocabulary, the cache of a model with other layers, another batch size, or
                more tokens than the cache can hold.
        """
        self.check_tokens(tokens, np.zeros(1, int))
        heads = self.config.num_kv_heads or self.config.num_heads
        shapes = [(key.shape[0], heads, key.shape[-1]) for key in (block.attention.key for block in self.blocks)]
        check_kv_caches(cache.kv_caches, self.encodings, shapes)
        (batch, steps), rows, room = tokens.shape, cache.kv_caches[0].key.shape[1], cache.room
        if batch != rows:
            raise ValueError(f"tokens must have the batch size of the cache, {rows}, not {batch}")
        length = _values(cache.length)
        used = 0 if length is None else int(length.max())
        if steps + used > room:
            raise ValueError(f"tokens: {steps} more do not fit the cache, which has room for {room} and holds {used}")
        return self._decode_step(jnp.asarray(tokens), cache, steps, logit_scale, return_stats=return_stats)

    @_compiled
    def _decode_step(self, tokens, cache, lengths, logit_scale=None, *, return_stats=False, last_only=False):
        """`decode_step` after its checks.

        Only the first `lengths` tokens (a number, or one per row) of a row are its own; the rest is padding. With
        last_only, the logits are those of a row's last own token alone, [B, 1, V].
        """
        steps, room = tokens.shape[1], cache.room
        step = CacheStep(cache.length, lengths, room, cache.is_empty)

        def rows_at(x, first, count: int):
            """`count` entries of [B, T, ...] from `first` on, a number or one per row."""
            index = jnp.atleast_1d(first)[:, None] + jnp.arange(count)
            return jnp.take_along_axis(x, index[..., None], axis=1)

        shared = self._shared()
        x = self._token_embeddings(tokens)
        inputs = []
        for (encoding, params), before in zip(shared.items(), cache.inputs, strict=True):
            back = encoding.input_context()
            window = jnp.concatenate([before, x], axis=1)
            ids = jnp.pad(tokens, ((0, 0), (back, 0)), constant_values=-1)
            at = encoding.positions(step.positions(steps, back), room, None)
            x = encoding.input(params, window, TokenInputs(ids, at, None, room))[:, back:]
            inputs.append(rows_at(window, lengths, back))

        arguments: list[tuple[Params, dict[str, Any]]] = [(shared[e.unwrapped], {}) for e in self.encodings]
        x, stats, kv_caches = self._layers(
            x,
            arguments,
            logit_scale=logit_scale,
            return_stats=return_stats,
            kv_caches=cache.kv_caches,
            step=step,
        )
        total = cache.length + lengths
        logits = self.logits(rows_at(x, lengths - 1, 1) if last_only else x)
        logits = jnp.where((total <= room).reshape(-1, 1, 1), logits, jnp.nan)
        cache = DecodeState(total, inputs, kv_caches, room)
        return (logits, stats, cache) if return_stats else (logits, cache)

    def _bound(self, tokens, positions) -> int:
        """Upper bound (exclusive) of the positions; traced positions are assumed to be those of a training batch."""
        if positions is None:
            return tokens.shape[1]
        known = _values(positions)
        seen = self.config.train_length or 0 if known is None else int(known.max(initial=0)) + 1
        return max(tokens.shape[1], seen)

    def _shared(self) -> dict[Encoding, Params]:
        """The shared parameters by encoding."""
        return {
            e: {k: p[...] for k, p in params.items()}
            for e, params in zip(self.base_encodings, self.positions, strict=True)
        }

    def _token_embeddings(self, tokens) -> Shaped[Array, "B T D"]:
        # Constrained again so that its gradient is too: it is summed over rows before it is split along the width.
        table = with_logical_constraint(gathered(self.embedding[...], ("vocab", "embed")), ("vocab", None))
        rows = table.at[tokens].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        config = self.config
        # By default scaled to the size of a sinusoid, as in Vaswani et al. 2017.
        scale = config.model_dim**0.5 if config.embedding_scale is None else config.embedding_scale
        x = with_logical_constraint((rows * scale).astype(config.dtype), RESIDUAL)
        return apply_norm(self, "embedding_norm", config, x)

    @_compiled
    def _layers(self, x, arguments, *, logit_scale, return_stats, kv_caches=None, step=None):
        """Run all layers and the final norm; return output, statistics [L, B, N, T] and updated KV caches.

        `arguments` are those of `embed`.
        """
        decodes = kv_caches is not None
        config = self.config
        structures, states = zip(*(nnx.split(block) for block in self.blocks), strict=True)

        def layer(x, slot: int, state, logit_scale, kv_cache):
            block = nnx.merge(structures[slot], state)
            shared, keywords = arguments[slot]
            return block(
                checkpoint_name(x, LAYER_INPUT),
                shared,
                logit_scale=logit_scale,
                return_stats=return_stats,
                kv_cache=kv_cache,
                **keywords,
            )

        if not decodes:
            layer = rematerialized(layer, config.remat, static_argnums=1)

        def period(carry, period_layers, index=None):
            (x, kv_caches), stats = carry, []
            for slot, (state, logit_scale) in enumerate(period_layers):
                kv_cache = LayerCache(kv_caches[slot], index, step) if decodes else None
                x, s, kv_cache = layer(x, slot, state, logit_scale, kv_cache)
                kv_caches = [*kv_caches[:slot], kv_cache, *kv_caches[slot + 1 :]]
                stats.append(s)
            return (x, kv_caches), stats

        slots, whole = len(states), config.num_layers // len(states)
        per_layer = _per_layer(logit_scale, config.num_layers)
        layers = [(state, per_layer[slot::slots]) for slot, state in enumerate(states)]

        def decoded_period(carry, index):
            # Without the barrier, XLA would convert the 16-bit weights of all layers to float32 first, on a CPU.
            stacks, index = jax.lax.optimization_barrier((layers, index))
            here = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), stacks)
            return period(carry, here, index)

        # The caches of all layers are carried, so that a token is written into them in place.
        carry = x, kv_caches if decodes else [None] * slots
        if decodes:
            carry, stats = jax.lax.scan(decoded_period, carry, jnp.arange(whole))
        else:
            carry, stats = jax.lax.scan(period, carry, jax.tree.map(lambda a: a[:whole], layers))
        incomplete = jax.tree.map(lambda a: a[whole], layers[: config.num_layers % slots])
        (x, new), rest = period(carry, incomplete, whole)

        x = apply_norm(self, "norm", config, x)
        if not return_stats:
            return x, None, new
        # From [periods, ...] per slot to one axis of layers in order, followed by those of an incomplete last period.
        stats = jax.tree.map(lambda *s: jnp.stack(s, axis=1).reshape(-1, *s[0].shape[1:]), *stats)
        return x, jax.tree.map(lambda *s: jnp.concatenate([s[0], *(r[None] for r in s[1:])]), stats, *rest), new

    @auto_axes
    def logits(self, hidden: Shaped[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The head: compute logits in float32."""
        products = jnp.einsum("btd,dv->btv", hidden, self._head(hidden.dtype), preferred_element_type=jnp.float32)
        products = with_logical_constraint(products, ("batch", "length", "vocab"))
        return _finished(self.config, products, self._head_bias())

    @auto_axes
    def total_loss(
        self,
        hidden: Shaped[Array, "B T D"],
        targets: Integer[Array | np.ndarray, "B T"],
        counted: Bool[Array | np.ndarray, "B T"] | None = None,
        z_loss: float = 0.0,
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The loss of training: the sum of nll + z_loss · logsumexp² over the targets that count, all if None.

        Also the sum of nll alone; use the gradient of the first only. Large logits are computed in chunks of tokens
        (`LOGITS_AT_ONCE`), and once.
        """
        chunks = self._chunks(targets)
        if chunks > 1:
            return total_in_chunks(
                hidden, targets=targets, counted=counted, z_loss=z_loss, **self._in_chunks(hidden, chunks)
            )
        losses = self.nll_and_logsumexp(hidden, targets)
        nll, square = losses[0], losses[1] ** 2
        if counted is not None:
            nll, square = (jnp.where(counted, loss, 0) for loss in (nll, square))
        total = nll.sum()
        return (total + z_loss * square.sum() if z_loss else total), total

    @auto_axes
    def nll(self, hidden: Shaped[Array, "B T D"], targets: Integer[Array | np.ndarray, "B T"]) -> Float[Array, "B T"]:
        """Negative log-likelihood of each target, nats.

        Differentiable. Large logits are computed in chunks of tokens (`LOGITS_AT_ONCE`).
        """
        return self.nll_and_logsumexp(hidden, targets)[0]

    @auto_axes
    def nll_and_logsumexp(
        self, hidden: Shaped[Array, "B T D"], targets: Integer[Array | np.ndarray, "B T"]
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        """`nll`, and the logsumexp of the logits that each was computed from: the log of the softmax's normalizer."""
        chunks = self._chunks(targets)
        if chunks > 1:
            return nll_in_chunks(hidden, targets=targets, **self._in_chunks(hidden, chunks))
        logits = self.logits(hidden)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets), jax.nn.logsumexp(logits, axis=-1)

    def _chunks(self, targets: Integer[Array | np.ndarray, "B T"]) -> int:
        """The number of chunks in which the logits of these targets are computed."""
        axes = zip(("batch", "length", "vocab"), (*targets.shape, self.config.num_tokens), strict=True)
        total = math.prod(size // num_shards(name, size) for name, size in axes)
        chunks = 1
        while total > chunks * LOGITS_AT_ONCE:  # a power of two, which usually divides the tokens of a device
            chunks *= 2
        return chunks

    def _in_chunks(self, hidden: Shaped[Array, "B T D"], chunks: int) -> dict[str, Any]:
        """The head as keywords of a loss in chunks."""
        finish = functools.partial(_finished, self.config)
        return {"weights": self._head(hidden.dtype), "chunks": chunks, "bias": self._head_bias(), "finish": finish}

    def _head(self, dtype: Any) -> Shaped[Array, "D V"]:
        weights = self.embedding[...].T if self.head is None else self.head[...]
        return gathered(weights.astype(dtype), ("embed", "vocab"))

    def _head_bias(self) -> Float[Array, "V"] | None:
        return None if self.head_bias is None else self.head_bias[...]

    def check_room(self, length: int) -> None:
        """Check that the encoding supports `length` positions.

        Raises:
            ValueError: It does not.
        """
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"length must be at most {self.max_length}, all the positions that {self.config.encoding!r} has, "
                f"not {length}"
            )

    def check_tokens(self, tokens: Any, positions: Any = None) -> None:
        """Check tokens and positions; values traced under jit are not checked.

        Raises:
            ValueError: tokens are not [B, T] or outside the vocabulary, or positions are not supported by the encoding.
        """
        if tokens.ndim != 2:
            raise ValueError(f"tokens must have shape [batch, length], not {list(tokens.shape)}")
        if not tokens.size or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens must be integers, at least one per row, not {tokens.dtype} {list(tokens.shape)}")
        seen = _values(tokens)
        if seen is not None and seen.size and (seen.min() < 0 or seen.max() >= self.config.num_tokens):
            bad = seen.min() if seen.min() < 0 else seen.max()
            raise ValueError(f"tokens must be between 0 and {self.config.num_tokens - 1} (vocab_size), not {bad}")
        if self.max_length is None:
            return
        where = np.arange(tokens.shape[1]) if positions is None else _values(positions)
        if where is not None and where.size and (where.min() < 0 or where.max() >= self.max_length):
            bad = where.min() if where.min() < 0 else where.max()
            encoding = self.config.encoding
            raise ValueError(
                f"positions must be between 0 and {self.max_length - 1}, all that {encoding!r} has, not {bad}"
            )


def abstract_decoder(config: ModelConfig) -> Decoder:
    """Return the decoder of a config with a `jax.ShapeDtypeStruct` in place of each array.

    It is the caller's own. Of each config, only the first is traced.

    Raises:
        ValueError: As `Decoder`.
    """
    return nnx.merge(*_traced(config, resolve(config.encoding), jax.sharding.get_abstract_mesh()), copy=True)


# A name may come to stand for another encoding, and on a mesh shapes have shardings.
@functools.lru_cache(maxsize=256)
def _traced(config: ModelConfig, encodings: tuple[Encoding, ...], mesh: Any) -> tuple[Any, Any]:
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))


def _finished(
    config: ModelConfig, products: Float[Array, "*B V"], bias: Float[Array, "V"] | None
) -> Float[Array, "*B V"]:
    """From the products of the head to logits: cap((products + bias) · scale)."""
    logits = products if bias is None else products + bias
    if config.logits_scale != 1:
        logits *= config.logits_scale
    return softcapped(logits, config.logits_softcap)


def _values(x: Any) -> np.ndarray | None:
    """The values of an array, or None if they are traced under jit or on other hosts."""
    if isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True):
        return None
    return np.asarray(x)


def _per_layer(logit_scale: Any, num_layers: int) -> Array:
    """Expand a logit scale to one entry per layer."""
    logit_scale = jnp.asarray(1.0 if logit_scale is None else logit_scale, jnp.float32)
    if logit_scale.ndim == 2:
        if logit_scale.shape[0] != num_layers:
            raise ValueError(f"logit_scale [L, N] must have L = {num_layers} rows, not {logit_scale.shape[0]}")
        return logit_scale
    return jnp.broadcast_to(logit_scale, (num_layers, *logit_scale.shape))
