"""The call of splash attention, and the rule by which a query sees a key, as a mask of splash attention.

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, H and H2 the head dims of keys and
values.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask import Mask, MultiHeadMask
from jaxtyping import Array

from nope_jax.attention.backends.borrowed import with_factor, without_statistics
from nope_jax.attention.backends.pallas.served import LANES
from nope_jax.attention.backends.pallas.tpu.inputs import filled
from nope_jax.attention.mesh import platform
from nope_jax.attention.softmax_state import RESULTS

BLOCK_SIZE = 512
"""Queries and keys per block, fewer for short sequences, as in `pallas_tpu`. Not tuned."""


def attend(
    query, factor, key, value, logit, value_term, mask_spec, precision=None, with_entropy=False, softcap=None
) -> tuple[Array, Array, Array]:
    (batch, query_length, num_heads, _), key_length = query.shape, key.shape[1]
    query_size, key_size = (min(BLOCK_SIZE, max(LANES, 1 << (x - 1).bit_length())) for x in (query_length, key_length))
    query, key, value = (x.swapaxes(1, 2) for x in (with_factor(query, factor), key, value))
    query, key, value = filled(query, 2, query_size), filled(key, 2, key_size), filled(value, 2, key_size)
    segments = None
    if mask_spec.query_segments is not None:
        of_tokens = filled(mask_spec.query_segments, 1, query_size), filled(mask_spec.key_segments, 1, key_size)
        segments = kernel.SegmentIds(*(jnp.broadcast_to(x, (batch, x.shape[1])) for x in of_tokens))
    # A sink below all logits, but above those of hidden keys: a row that sees no key gives 0.
    sinks = jnp.full(num_heads, kernel.DEFAULT_MASK_VALUE / 2, jnp.float32)
    rule = Rule(
        query_length,
        key_length,
        (query.shape[2], key.shape[2]),
        is_causal=mask_spec.is_causal,
        window=mask_spec.window,
        chunk_size=mask_spec.chunk_size,
    )
    sizes = {f"block_{name}": query_size for name in ("q", "q_dkv", "q_dq")}
    sizes |= {f"block_{name}": key_size for name in ("kv", "kv_compute", "kv_dkv", "kv_dkv_compute", "kv_dq")}
    attention = kernel.make_splash_mha(
        MultiHeadMask([rule] * num_heads),
        block_sizes=kernel.BlockSizes(**sizes),
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=RESULTS,
        interpret=platform() == "cpu",
    )
    output = jax.vmap(attention, in_axes=(0, 0, 0, 0, None))(query, key, value, segments, sinks)
    return without_statistics(output[:, :, :query_length].swapaxes(1, 2))


@dataclasses.dataclass(frozen=True)
class Rule(Mask):
    """Causality, window and chunks of consecutive positions, by which keys that fill up the last block are hidden.

    Splash attention's own masks compute each block whole to find out whether all or something of it is visible: with
    131,072 tokens, that takes them about a minute.
    """

    query_length: int
    key_length: int
    filled: tuple[int, int]
    """Both, in whole blocks."""
    is_causal: bool
    window: int | None
    chunk_size: int | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.filled

    @property
    def q_sequence(self) -> np.ndarray:
        """Positions of the queries, the first argument of `mask_function`."""
        return np.arange(self.filled[0], dtype=np.int32) + (self.key_length - self.query_length)

    def mask_function(self, query: Any, key: Any) -> Any:
        """Whether a query sees a key, from their positions: a part of the kernel."""
        visible = query >= key if self.is_causal else key < self.key_length
        if self.window is not None:
            visible &= query - key < self.window
            if not self.is_causal:
                visible &= key - query < self.window
        if self.chunk_size is not None:
            visible &= query // self.chunk_size == key // self.chunk_size
        return visible

    def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
        """An array [1, 2] of which `any` and `all` are those of the block. Only `any` may be true where it is not."""
        queries, keys = block
        offset = self.key_length - self.query_length
        first, last = queries.start + offset, queries.stop - 1 + offset
        nearest, farthest = first - (keys.stop - 1), last - keys.start
        most = np.inf if self.window is None else self.window - 1
        least = 0 if self.is_causal else -most
        some, every = nearest <= most and farthest >= least, nearest >= least and farthest <= most
        every &= self.is_causal or keys.stop <= self.key_length
        if self.chunk_size is not None:
            chunks = [x // self.chunk_size for x in (first, last, keys.start, keys.stop - 1)]
            some &= chunks[0] <= chunks[3] and chunks[2] <= chunks[1]
            every &= len(set(chunks)) == 1
        return np.array([[some, every]])
