"""One block of queries and keys within a kernel: which keys are visible, the logits, and products.

Shapes as in `pallas_tpu`.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int, Shaped

from nope_jax.attention.backends.pallas_tpu.call import Call
from nope_jax.attention.softcap import softcapped
from nope_jax.encodings.encoding import MASKED

SUBLANES = 8


class Inputs(NamedTuple):
    """What every kernel reads: arrays, their BlockSpecs or, within a kernel, references to their blocks."""

    query: Any
    factor: Any
    key: Any
    value: Any
    near: Any
    """The piece of the table that begins with the distance of the first query from the first key."""
    far: Any
    """The piece before it."""
    of_queries: Any
    of_keys: Any
    rows: Any
    """More arrays of queries, [B, N, 1, T] or [B, N, T, H2]."""


class Block:
    """Query block i and key block j: their arrays, and what the forward and the backward pass compute of them."""

    def __init__(self, call: Call, inputs: Inputs, offset: Any, i: Any, j: Any, masked: bool):
        self.call, self.i, self.j = call, i, j
        self.visible = self._visible(inputs, offset) if masked else None
        self.query, self.key, self.value = inputs.query[0, 0], inputs.key[0, 0], inputs.value[0, 0]
        self.factor = inputs.factor[0, 0]
        self.rows = tuple(reference[0, 0] for reference in inputs.rows)
        self.term = None if inputs.near is None else (inputs.near[0], inputs.far[0])

    def _visible(self, inputs: Inputs, offset: Any) -> Bool[Array, "k q"]:
        call, shape = self.call, (self.call.size, self.call.size)
        key_index = self.j * call.size + lax.broadcasted_iota(jnp.int32, shape, 0)
        query_index = self.i * call.size + lax.broadcasted_iota(jnp.int32, shape, 1)
        visible = (key_index < call.key_length) & (query_index < call.query_length)
        if call.contiguous:
            distance = query_index + offset - key_index
            of_queries, of_keys = inputs.of_queries, inputs.of_keys
        else:
            (query_positions, *of_queries), (key_positions, *of_keys) = inputs.of_queries, inputs.of_keys
            distance = query_positions[0] - _column(key_positions[0])
        visible &= call.rule.by_distance(distance)
        for of_query, of_key in zip(of_queries, of_keys, strict=True):
            visible &= of_query[0] == _column(of_key[0])
        return visible

    def logits(self) -> tuple[Float[Array, "k q"], Float[Array, "k q"] | None]:
        """The logits, and the derivative of their capped part with respect to the scaled q·k (None: 1)."""
        content = self.product(self.key, self.query, (1, 1)) * self.factor
        slope = None
        if self.call.softcap is not None:
            content = softcapped(content, self.call.softcap)
            slope = 1 - jnp.square(content / self.call.softcap)
        if self.term is not None:
            content += sheared(*self.term)
        return (content if self.visible is None else jnp.where(self.visible, content, MASKED)), slope

    def hidden_is_zero(self, x: Float[Array, "k q"]) -> Float[Array, "k q"]:
        """Replace entries of hidden keys by 0, whatever they are."""
        return x if self.visible is None else jnp.where(self.visible, x, 0.0)

    def finite(self, x: Shaped[Array, "k H"]) -> Shaped[Array, "k H"]:
        """`finite` of `nonfinite.py`, where keys are hidden; elsewhere every query sees every key, finite or not."""
        if self.visible is None:
            return x
        wide = x.astype(jnp.float32)  # in which a TPU has the test
        return jnp.where(jnp.isfinite(wide), wide, 0.0).astype(x.dtype)

    def product(self, x: Shaped[Array, "a b"], y: Shaped[Array, "c d"], axes: tuple[int, int]) -> Float[Array, "e f"]:
        """The product of two matrices over one axis of each, in float32."""
        dtype = jnp.promote_types(x.dtype, y.dtype)
        return lax.dot_general(
            x.astype(dtype),
            y.astype(dtype),
            (((axes[0],), (axes[1],)), ((), ())),
            precision=self.call.precision,
            preferred_element_type=jnp.float32,
        )


def _column(row: Int[Array, "1 k"]) -> Int[Array, "k 1"]:
    return jnp.broadcast_to(row, (SUBLANES, row.shape[1])).T[:, :1]


def sheared(near: Float[Array, "1 q"], far: Float[Array, "1 q"]) -> Float[Array, "k q"]:
    """The term of a block, entry (a, b) being that of distance b - a from its first query and key.

    Args:
        near: The terms of distances 0..q-1.
        far: Those of -q..-1.
    """
    size = near.shape[1]
    rows = jnp.broadcast_to(jnp.concatenate([near, far], axis=1), (size, 2 * size))
    return pltpu.roll(rows, 0, 1, stride=1, stride_axis=0)[:, :size]


def unsheared(block: Float[Array, "k q"]) -> Float[Array, "1 2*q"]:
    """The transpose of `sheared`: the sums of a block along its diagonals, for the distances -q..q-1."""
    size = block.shape[0]
    sums = jnp.zeros((SUBLANES, 2 * size), jnp.float32)
    for row in range(0, size, SUBLANES):  # entry (a, b) moves to column size + b - a; first by the eights in a
        rows = jnp.concatenate([jnp.zeros((SUBLANES, size), jnp.float32), block[row : row + SUBLANES]], axis=1)
        sums += pltpu.roll(rows, (2 * size - row) % (2 * size), 1)
    sublane = lax.broadcasted_iota(jnp.int32, sums.shape, 0)
    for bit in (1, 2, 4):
        sums = jnp.where(sublane & bit != 0, pltpu.roll(sums, 2 * size - bit, 1), sums)
    return sums.sum(0, keepdims=True)
