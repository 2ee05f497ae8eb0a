"""Terms of one vector per distance: both pieces of a table are blocks of their own, and products rotated into place.

Shapes as in `pallas`, with q = k; d distances of a table, a multiple of q; W head dim of the vectors.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from nope_jax.attention.backends.pallas.call import Call
from nope_jax.attention.backends.pallas.tpu.shear import sheared, unsheared
from nope_jax.attention.backends.pallas.vectors import ASCENDING, BlockVectors, Vectors, of_diagonals


def pieces_of(call: Call, tables: Vectors | None, spec: Any) -> Vectors | None:
    """The BlockSpecs of two pieces of each table, made by a function of a block and its place."""
    if tables is None:
        return None

    def pieces(table: Array, ascending: bool) -> tuple[Any, Any]:
        heads, in_lanes = len(table), table.shape[1] == 1

        def piece(back: int) -> Any:
            def place(b, n, i, j):
                index = (call.key_blocks + i - j if ascending else call.query_blocks - i + j) - back
                return jnp.minimum(n, heads - 1), *((0, index) if in_lanes else (index, 0))

            shape = (1, call.key_size) if in_lanes else (call.key_size, table.shape[2])
            return spec((1, *shape), place)

        return piece(0), piece(1)

    return Vectors(*(None if x is None else pieces(x, up) for x, up in zip(tables, ASCENDING, strict=True)))


@dataclasses.dataclass(frozen=True)
class RotatedVectors(BlockVectors):
    """Those of a block, from references to two pieces of each table."""

    def vectors(self, name: str) -> Float[Array, "distances W"]:
        return self._joined(name, axis=0)

    def constant(self) -> Float[Array, "k q"]:
        constant = self._joined("constant", axis=1)
        return sheared(jnp.broadcast_to(constant, (constant.shape[1] // 2, constant.shape[1])))

    def _joined(self, name: str, axis: int) -> Float[Array, "..."]:
        return jnp.concatenate([piece[0] for piece in getattr(self.tables, name)], axis=axis)

    def from_queries(self, rows: Float[Array, "q distances"]) -> Float[Array, "k q"]:
        return sheared(rows).T

    def from_keys(self, rows: Float[Array, "k distances"]) -> Float[Array, "k q"]:
        return sheared(rows)

    def to_queries(self, block: Float[Array, "k q"]) -> Float[Array, "q distances"]:
        return unsheared(block.T)

    def to_keys(self, block: Float[Array, "k q"]) -> Float[Array, "k distances"]:
        return unsheared(block)


def of_tables(by_diagonal: Vectors, tables: Vectors) -> Vectors:
    """The gradients of tables, from those of both pieces of each diagonal, [N, diagonals, 2*q, W or 1, 2*q].

    They are in the order of the second piece, which the first follows.
    """

    def of_table(x, table):
        if table is None:
            return None
        first, second = jnp.split(x, 2, axis=3 if table.shape[1] == 1 else 2)
        return of_diagonals(second, first, table)

    return Vectors(*map(of_table, by_diagonal, tables))
