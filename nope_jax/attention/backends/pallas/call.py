"""A call of the kernels: its static arguments, what visibility depends on, and which blocks meet.

Shapes as in `pallas`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from nope_jax.attention.backends.pallas.pairwise import Pairwise
from nope_jax.attention.backends.pallas.served import kernel_precision
from nope_jax.attention.blocks import CachedLayer
from nope_jax.attention.mask_spec import MaskSpec
from nope_jax.attention.mesh import platform
from nope_jax.encodings.encoding import Logit


@dataclasses.dataclass(frozen=True)
class Call:
    """The static arguments of a call."""

    query_size: int
    """Queries per block, a power of two."""
    key_size: int
    """Keys per block, a power of two."""
    query_length: int
    key_length: int
    groups: int
    """Query heads per key/value head."""
    rule: MaskSpec
    """Without its arrays."""
    contiguous: bool
    with_entropy: bool
    precision: Any
    softcap: float | None
    pairwise: Pairwise | None
    """The logit, if it is one of pairs."""
    interpret: bool

    @classmethod
    def of(
        cls,
        query: Shaped[Array, "B T N H"],
        key: Shaped[Array, "B S K H"] | CachedLayer,
        mask_spec: MaskSpec,
        precision: jax.lax.PrecisionLike,
        with_entropy: bool,
        softcap: float | None,
        logit: Logit | None = None,
        *,
        query_size: int,
        key_size: int,
    ) -> "Call":
        """The call of an `attend` with these arguments."""
        return cls(
            query_size,
            key_size,
            query_length=query.shape[1],
            key_length=key.shape[1],
            groups=query.shape[2] // key.shape[2],
            rule=MaskSpec(None, None, None, None, None, mask_spec.is_causal, mask_spec.window, mask_spec.chunk_size),
            contiguous=mask_spec.contiguous,
            with_entropy=with_entropy,
            precision=kernel_precision(precision),
            softcap=softcap,
            pairwise=Pairwise.of(logit),
            interpret=platform() == "cpu",
        )

    @property
    def query_blocks(self) -> int:
        return -(-self.query_length // self.query_size)

    @property
    def key_blocks(self) -> int:
        return -(-self.key_length // self.key_size)

    @property
    def reach(self) -> int | None:
        """The distance from which on nothing is visible."""
        return min((n for n in (self.rule.window, self.rule.chunk_size) if n is not None), default=None)

    def logit_products(self, *, gradient: bool = False) -> int:
        """The products that a pair takes for a logit of its own, and for its gradient, an addition with each."""
        if self.pairwise is None:
            return 0
        return (self.pairwise.operations() + (self.pairwise.operations(gradient=True) if gradient else 0)) // 2

    def keys_of(self, i: Any, offset: Any) -> tuple[Any, Any]:
        """First and last block of keys that the queries of block i may see; the last is before the first for none."""
        near = i * self.query_size + offset
        causal = self.rule.is_causal
        return self._meeting(near, self.query_size, self.key_size, self.key_blocks, before=True, after=not causal)

    def queries_of(self, j: Any, offset: Any) -> tuple[Any, Any]:
        """First and last block of queries that may see the keys of block j; likewise."""
        near = j * self.key_size - offset
        causal = self.rule.is_causal
        return self._meeting(near, self.key_size, self.query_size, self.query_blocks, before=not causal, after=True)

    def _meeting(self, low: Any, own: int, size: int, blocks: int, *, before: bool, after: bool) -> tuple[Any, Any]:
        """First and last of `blocks` blocks of this size within reach of `own` tokens that begin at index `low`."""
        first: Any = 0
        last: Any = blocks - 1
        if not self.contiguous:
            return first, last
        high = low + own - 1
        if not before:
            first = jnp.maximum(first, _block_of(low, size))
        elif self.reach is not None:
            first = jnp.maximum(first, _block_of(low - self.reach + 1, size))
        if not after:
            last = jnp.minimum(last, _block_of(high, size))
        elif self.reach is not None:
            last = jnp.minimum(last, _block_of(high + self.reach - 1, size))
        return first, last

    def seen_whole_by(self, i: Any, offset: Any) -> tuple[Any, Any]:
        """First and last block of keys of which the queries of block i see every one, by indices alone; likewise."""
        low = i * self.query_size + offset
        first: Any = 0
        stop: Any = self.key_length
        if self.rule.is_causal:
            stop = jnp.minimum(stop, low + 1)
        if self.rule.window is not None:
            first = _block_of(low + self.query_size - self.rule.window + self.key_size - 1, self.key_size)
            stop = jnp.minimum(stop, low + self.rule.window)
        return jnp.maximum(first, 0), _block_of(stop, self.key_size) - 1

    def seeing_whole(self, j: Any, offset: Any) -> tuple[Any, Any]:
        """First and last block of queries that see all keys of block j, by indices alone; likewise."""
        low = j * self.key_size - offset
        high = low + self.key_size - 1
        first: Any = 0
        stop: Any = self.query_blocks
        if self.rule.is_causal:
            first = _block_of(high + self.query_size - 1, self.query_size)
        if self.rule.window is not None:
            if not self.rule.is_causal:
                first = _block_of(high - self.rule.window + self.query_size, self.query_size)
            stop = jnp.minimum(stop, _block_of(low + self.rule.window, self.query_size))
        if self.key_length % self.key_size:
            stop = stop * jnp.int32(j < self.key_length // self.key_size)
        return jnp.maximum(first, 0), stop - 1

    def visible(
        self,
        query_index: Int[Array, "..."],
        key_index: Int[Array, "..."],
        offset: Any,
        of_queries: tuple[Int[Array, "..."], ...],
        of_keys: tuple[Int[Array, "..."], ...],
    ) -> Bool[Array, "..."]:
        """Visibility of keys to queries, given the indices and the `Tokens` of both, which broadcast."""
        visible = (key_index < self.key_length) & (query_index < self.query_length)
        if self.contiguous:
            distance = query_index + offset - key_index
        else:
            (query_positions, *of_queries), (key_positions, *of_keys) = of_queries, of_keys  # type: ignore[assignment]
            distance = query_positions - key_positions
        visible &= self.rule.by_distance(distance)
        for of_query, of_key in zip(of_queries, of_keys, strict=True):
            visible &= of_query == of_key
        return visible

    @property
    def pairs(self) -> int:
        """About how many pairs of a query and a key the blocks of one head have that meet, for estimates of cost."""
        keys = self.key_length
        if self.rule.is_causal:
            keys = max(keys - self.query_length // 2, keys // 2)
        if self.reach is not None:
            keys = min(keys, self.reach if self.rule.is_causal else 2 * self.reach)
        return self.query_length * min(keys + self.key_size // 2, self.key_blocks * self.key_size)


def _block_of(index: Any, size: int) -> Any:
    """The block of an index, which may be negative."""
    return index >> (size.bit_length() - 1)


class Operands(NamedTuple):
    """The differentiable arguments, laid out as the kernels read them."""

    query: Shaped[Array, "..."]
    factor: Float[Array, "..."]
    key: Shaped[Array, "..."]
    value: Shaped[Array, "..."]
    table: Float[Array, "..."] | None
    """Of a logit by distance: for each head, or for all, the values of consecutive distances. Of one of
    pairs: the parameters."""
    query_features: tuple[Float[Array, "..."], ...] = ()
    """Of a logit of pairs."""
    key_features: tuple[Float[Array, "..."], ...] = ()
    vectors: Any = None
    """Of terms of one vector per distance: `Vectors`."""


class Tokens(NamedTuple):
    """What visibility depends on besides the indices of a query and a key."""

    offset: Int[Array, "2"]
    """What is added to the index of a query to give its distance from the key of index 0, and that key's position."""
    of_queries: tuple[Int[Array, "..."], ...]
    """[#B, T]: positions, unless they are consecutive; then the numbers, segments and chunks, that a query has in
    common with the keys that it sees."""
    of_keys: tuple[Int[Array, "..."], ...]
    """[#B, S]."""


def tokens_of(call: Call, mask_spec: MaskSpec) -> Tokens:
    """What a `MaskSpec` says of each token."""
    positions = mask_spec.positions(call.query_length, call.key_length)
    pairs: list[tuple[Any, Any]] = [] if call.contiguous else [positions]
    if mask_spec.query_segments is not None:
        pairs.append((mask_spec.query_segments, mask_spec.key_segments))
    if mask_spec.chunk_size is not None:
        pairs.append((positions[0] // mask_spec.chunk_size, positions[1] // mask_spec.chunk_size))
    first = 0 if mask_spec.start is None else mask_spec.start
    offset = call.key_length - call.query_length + mask_spec.query_offset_or_0
    of_queries, of_keys = (tuple(pair[side].astype(jnp.int32) for pair in pairs) for side in (0, 1))
    return Tokens(jnp.stack([jnp.int32(offset), jnp.int32(first)]), of_queries, of_keys)
