"""KV caches: what the attention layers of a decoder keep of the tokens so far, and attention over it.

Keys are cached after the query/key place if that place treats each key by itself (`Encoding.keys_apart`). Otherwise
they are cached as projected, and every step transforms all of them, as a single pass does. A layer with a window or
chunks keeps only that many tokens: the token at position p is in slot p mod S.

Shapes: B batch, T new tokens, S slots of a cache, L layers at one place of the encodings' period, N query heads,
K key/value heads, H head dim, D model width.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Shaped

from nope_jax.attention.blocks import CachedLayer, Leaf, to_storage, whole
from nope_jax.attention.encoded import Encoded, attend_encoded
from nope_jax.encodings import Encoding, Params, ScanLogit

_NEVER = 2**30
"""Position of the key in an empty slot: later than that of any query."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The cache of the layers at one place of the encodings' period."""

    key: Shaped[Array, "L B K S H"] | Leaf
    value: Shaped[Array, "L B K S H"] | Leaf
    features: Any
    """The encoding's features of the tokens, [L, B, S, ...]."""
    dtypes: tuple[Any, Any] = dataclasses.field(metadata={"static": True})
    """Of keys and values, which are stored as `nope_jax.attention.blocks.to_storage` says."""
    rolls: bool = dataclasses.field(metadata={"static": True})
    """Whether it holds only the last tokens, each in slot position mod S."""

    @property
    def slots(self) -> int:
        return self.key.shape[3]

    def layer(self, index: Any) -> tuple[CachedLayer, CachedLayer]:
        """The keys and values of one layer."""
        keys, values = self.dtypes
        return CachedLayer(self.key, index, keys), CachedLayer(self.value, index, values)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CacheStep:
    """Where a step of decoding stands; the same for all layers."""

    start: Int[Array, ""] | Int[Array, "B"] | Leaf
    """Position of the first new token, in all rows or in each."""
    lengths: Int[Array, ""] | Int[Array, "B"] | Leaf
    """How many of the new tokens are a row's own; padding follows them."""
    room: int = dataclasses.field(metadata={"static": True})
    """Capacity of the caches, in tokens."""
    is_first: bool = dataclasses.field(metadata={"static": True})
    """Whether the caches are still empty."""

    def positions(self, length: int, back: int = 0) -> Int[Array, "#B T"]:
        """Positions of `back` tokens before the new ones and of `length` new ones; padding stays within the room."""
        where = jnp.atleast_1d(self.start)[:, None] + jnp.arange(-back, length)
        return jnp.minimum(where, self.room - 1)


def empty_kv_cache(
    encoding: Encoding, params: Params, layers: int, batch_size: int, room: int, heads: tuple[int, int, int], x: Any
) -> KVCache:
    """An empty cache with capacity for `room` tokens.

    Args:
        encoding: The encoding of the layers.
        params: The encoding's parameters in one layer.
        layers: Number of layers.
        batch_size: Number of rows.
        room: Number of tokens.
        heads: N, K and H.
        x: The shape and dtype of one token's input of a layer, [B, 1, D].
    """
    num_heads, kv_heads, dim = heads
    query, key = (jax.ShapeDtypeStruct((batch_size, 1, n, dim), x.dtype) for n in (num_heads, kv_heads))
    position = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    features = jax.eval_shape(lambda params, x: encoding.features(params, x, None), params, x)
    term = jax.eval_shape(encoding.logit, params, query, key, features, features)
    cached = key
    if encoding.keys_apart:
        cached = jax.eval_shape(encoding.query_key, params, query, key, position, position)[1]
    span = min((n for n in encoding.span() if n is not None), default=room)
    rolls = span < room and encoding.keys_apart and not isinstance(term, ScanLogit)
    slots = span if rolls else room

    def zeros(x, *shape):
        return jnp.zeros((layers, *shape), x.dtype)

    return KVCache(
        key=to_storage(zeros(cached, batch_size, kv_heads, slots, cached.shape[3])),
        value=to_storage(zeros(key, batch_size, kv_heads, slots, dim)),
        features=jax.tree.map(lambda x: zeros(x, batch_size, slots, *x.shape[2:]), features),
        dtypes=(cached.dtype, key.dtype),
        rolls=rolls,
    )


def check_kv_caches(
    caches: Sequence[KVCache], encodings: Sequence[Encoding], shapes: Sequence[tuple[int, int, int]]
) -> None:
    """Check that caches are of layers with these encodings.

    Args:
        caches: The caches, one for each place of the encodings' period.
        encodings: The encodings of one period.
        shapes: L, K and H at each of its places.

    Raises:
        ValueError: They are the caches of another model.
    """
    found = [(len(kv.value), *kv.value.shape[2::2]) for kv in caches]
    if found != shapes:
        raise ValueError(
            "cache must be from init_cache of this model, whose layers, KV heads and head dim at each place of its "
            f"period are {shapes}, not {found}"
        )
    for encoding, kv in zip(encodings, caches, strict=True):
        span = min((n for n in encoding.span() if n is not None), default=None)
        if kv.rolls and kv.slots != span:
            raise ValueError(
                f"cache must be from init_cache of this model: it keeps the last {kv.slots} tokens, but {encoding} "
                f"sees {span or 'all'}"
            )


class LayerCache(NamedTuple):
    """One layer of a cache in one step of decoding."""

    cache: KVCache
    layer: Int[Array, ""] | int
    step: CacheStep

    def before(self) -> Any:
        """The features of the token before the new ones; zeros if there is none."""
        rows, slots = self.step.start, self.cache.slots
        index = jnp.atleast_1d(jnp.maximum(rows - 1, 0) % slots)

        def entry(x):
            x = lax.dynamic_index_in_dim(x, self.layer, keepdims=False)
            found = jnp.take_along_axis(x, index.reshape(-1, *[1] * (x.ndim - 1)), axis=1)[:, 0]
            return jnp.where(jnp.atleast_1d(rows).reshape(-1, *[1] * (found.ndim - 1)) > 0, found, 0)

        return jax.tree.map(entry, self.cache.features)

    def attend(
        self,
        encoding: Encoding,
        params: Params,
        query: Shaped[Array, "B T N H"],
        key: Shaped[Array, "B T K H"],
        value: Shaped[Array, "B T K H"],
        features: Any,
        **common: Any,
    ) -> tuple[Any, KVCache]:
        """Attention of new tokens over themselves and those before; also return the cache with them in it.

        Args:
            encoding: The encoding.
            params: Its parameters.
            query: Queries of the new tokens, before the query/key place.
            key: Their keys, likewise.
            value: Their values.
            features: Their features.
            **common: Keywords of `dot_product_attention` other than positions.
        """
        length, room = query.shape[1], self.step.room
        where = self.step.positions(length)
        at = encoding.positions(where, room, None)
        if not encoding.keys_apart:
            cache = self._written(key, value, features)
            everywhere = encoding.positions(jnp.arange(room)[None], room, None)
            encoded = Encoded(encoding, params, features, self._features(cache))
            own = map(whole, cache.layer(self.layer))
            common |= {"query_positions": at, "key_positions": everywhere}
            return attend_encoded(encoded, query, *own, **common), cache

        # The ends of the room are in use, too: a place may depend on the smallest and the largest position.
        ends = jnp.broadcast_to(encoding.positions(jnp.array([[0, room - 1]]), room, None), (len(at), 2))
        padded = jnp.pad(key, ((0, 0), (0, 2), (0, 0), (0, 0)))
        query, key = encoding.query_key(params, query, padded, at, jnp.concatenate([at, ends], axis=1))
        key = key[:, :length]
        cache = self._written(key, value, features)
        seen: tuple[Any, Any, Any]
        if self.step.is_first:
            # Consecutive positions are left implicit, because attention is faster when it knows they are.
            common |= {} if at is where else {"query_positions": at, "key_positions": at}
            seen = key, value, features
        elif cache.rolls and length > 1:
            # The new tokens overwrite slots that the first of them still see.
            old = (*map(whole, self.cache.layer(self.layer)), self._features(self.cache))
            seen = jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis=1), old, (key, value, features))
            before = jnp.broadcast_to(self._slot_positions(encoding, self.step.start - 1), (len(at), cache.slots))
            common |= {"query_positions": at, "key_positions": jnp.concatenate([before, at], axis=1)}
        else:
            seen = *cache.layer(self.layer), self._features(cache)
            last = self.step.start + length - 1
            common |= {"query_positions": at, "key_positions": self._slot_positions(encoding, last)}
        keys, values, key_features = seen
        encoded = Encoded(encoding, params, features, key_features, transformed=True)
        return attend_encoded(encoded, query, keys, values, **common), cache

    def _features(self, cache: KVCache) -> Any:
        return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, self.layer, keepdims=False), cache.features)

    def _slot_positions(self, encoding: Encoding, last: Array) -> Int[Array, "#B S"]:
        """The positions of the keys in the slots, once the token at position `last` has been written."""
        slots = jnp.arange(self.cache.slots)[None]
        if not self.cache.rolls:
            return encoding.positions(slots, self.step.room, None)
        last = jnp.atleast_1d(last)[:, None]
        where = last - (last - slots) % self.cache.slots
        return jnp.where(where < 0, _NEVER, encoding.positions(jnp.maximum(where, 0), self.step.room, None))

    def _written(self, key, value, features) -> KVCache:
        """The cache with the new tokens written into it."""
        start, lengths, slots, length = self.step.start, self.step.lengths, self.cache.slots, key.shape[1]

        def write(stack, new, axis):
            """Write [B, T, ...] into [L, B, ..., S, ...], whose axis `axis` counts slots."""
            new = jnp.moveaxis(new, 1, axis - 1)
            if self.cache.rolls and length > 1:
                last = jnp.atleast_1d(start + lengths - 1)[:, None]
                index = last - (last - jnp.arange(slots)) % slots - jnp.atleast_1d(start)[:, None]
                shape = [1] * new.ndim
                shape[0], shape[axis - 1] = index.shape
                index = index.reshape(shape)
                old = lax.dynamic_index_in_dim(stack, self.layer, keepdims=False)
                newest = jnp.take_along_axis(new, jnp.clip(index, 0, length - 1), axis=axis - 1)
                new, slot = jnp.where(index >= 0, newest, old), 0
            else:
                slot = start % slots if self.cache.rolls else start
            if jnp.ndim(slot) == 0:
                at = [0] * stack.ndim
                at[0], at[axis] = self.layer, slot
                return lax.dynamic_update_slice(stack, new[None], at)
            rows, tokens = jnp.arange(new.shape[0])[:, None], slot[:, None] + jnp.arange(length)
            places = self.layer, rows, *[slice(None)] * (axis - 2), tokens
            return stack.at[places].set(jnp.moveaxis(new, axis - 1, 1), mode="drop")

        return dataclasses.replace(
            self.cache,
            key=write(self.cache.key, to_storage(key), 3),
            value=write(self.cache.value, to_storage(value), 3),
            features=jax.tree.map(lambda stack, new: write(stack, new, 2), self.cache.features, features),
        )
