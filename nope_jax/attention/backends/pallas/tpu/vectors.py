"""Terms of one vector per distance within a kernel: `DistanceVectors` of a logit, and the vectors of a `BlockValue`.

A block of queries and keys meets 2·size - 1 distances, whose vectors are two neighbouring pieces of a table. Queries or
keys are multiplied by both pieces, and the products, of each query or key with each distance, sheared into the block.
What belongs to pairs is sheared back before it is multiplied by vectors, or summed into their gradient.

The gradients of the vectors have a kernel of their own, which visits blocks by diagonals: those of a diagonal meet the
same two pieces, so it adds them up in memory that does not grow with the length.

Shapes as in `pallas`, with q = k; d distances of a table, a multiple of q; W head dim of the vectors.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from nope_jax.attention.backends.pallas.block import product
from nope_jax.attention.backends.pallas.call import Call, Tokens
from nope_jax.attention.backends.pallas.served import vectors_of, wide
from nope_jax.attention.backends.pallas.tpu.shear import sheared, unsheared
from nope_jax.encodings import BlockValue
from nope_jax.encodings.encoding import MASKED, Logit


class Vectors(NamedTuple):
    """Tables of vectors, those of their gradients, their BlockSpecs, or two pieces of each; None where there is none.

    A query's distances from the keys of a block descend, and a key's from the queries ascend. So do the tables by what
    they are multiplied with: `query` and `value` begin with the largest distance, `key` and `constant` with the
    smallest.
    """

    query: Any = None
    """[#N, d, H]."""
    key: Any = None
    """[#N, d, H]."""
    constant: Any = None
    """[#N, 1, d]."""
    value: Any = None
    """[#N, d, H2]."""

    @property
    def in_logit(self) -> bool:
        """Whether a logit has some."""
        return self.query is not None or self.has_factor

    @property
    def has_factor(self) -> bool:
        """Whether a factor multiplies more than queries."""
        return self.key is not None or self.constant is not None


ASCENDING = Vectors(query=False, key=True, constant=True, value=False)


def tables_of(
    call: Call,
    query: Shaped[Array, "B T N H"],
    value: Shaped[Array, "B S K H2"],
    logit: Logit | None,
    value_term: BlockValue | None,
    tokens: Tokens,
) -> Vectors | None:
    """The tables of a call; None if neither term has vectors.

    Raises:
        ValueError: `by_distance` returned arrays of other shapes.
    """
    size = call.key_size
    distances = tokens.offset[0] + jnp.arange(-call.key_blocks * size, call.query_blocks * size + 1, dtype=jnp.int32)
    found = Vectors()
    of_logit = vectors_of(logit, distances)
    if of_logit is not None:
        found = Vectors(*of_logit)
    if value_term is not None:
        assert value_term.by_distance is not None  # or it were not served
        of_value = value_term.by_distance(wide(value_term.parameters), distances, value.shape[3])
        found = found._replace(value=of_value)
    if all(x is None for x in found):
        return None
    dims = Vectors((query.shape[3],), (query.shape[3],), (), (value.shape[3],))
    for name, x, dim in zip(Vectors._fields, found, dims, strict=True):
        per_head, shared = ((len(distances), heads, *dim) for heads in (query.shape[2], 1))
        if x is not None and x.shape not in (per_head, shared):
            raise ValueError(f"by_distance must return {name} vectors {per_head} or {shared}, not {x.shape}")

    # Those of padding, and those at which every key is hidden, may be anything.
    after_first = distances - (tokens.offset[0] - call.key_length)
    occurs = (after_first > 0) & (after_first < call.key_length + call.query_length) & call.rule.by_distance(distances)
    if call.reach is not None:
        occurs &= jnp.abs(distances) < call.reach

    def table(x: Float[Array, "distances n *W"], ascending: bool) -> Float[Array, "n _ _"]:
        x = jnp.where(occurs.reshape(-1, *[1] * (x.ndim - 1)), x.astype(jnp.float32), 0.0)
        x = x[:-1] if ascending else x[:0:-1]
        return jnp.moveaxis(x, 0, 1) if x.ndim == 3 else jnp.maximum(x, MASKED).T[:, None]

    return Vectors(*(None if x is None else table(x, up) for x, up in zip(found, ASCENDING, strict=True)))


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


def vector_products(vectors: Vectors | None, *gradients: str) -> int:
    """The products that a pair takes for vectors, and for these gradients: a block meets two pieces of each table."""
    if vectors is None:
        return 0
    dims = {name: x.shape[2] for name, x in vectors._asdict().items() if x is not None and name != "constant"}
    return 2 * sum(dims.values()) + 2 * sum(dims.get(name, 0) for name in gradients)


def joined(pieces: tuple[Any, Any], axis: int = 0) -> Float[Array, "..."]:
    """Both pieces, from references to them."""
    return jnp.concatenate([piece[0] for piece in pieces], axis=axis)


@dataclasses.dataclass(frozen=True)
class VectorTerm:
    """The logit of a block, factor · (query · query[d] + key · key[d] + constant[d])."""

    vectors: Vectors
    """References to two pieces of each."""
    query: Shaped[Array, "q H"]
    key: Shaped[Array, "k H"]
    """Both finite, where one may be hidden from the other."""
    factor: Float[Array, "1 q"]
    precision: Any

    def logits(self) -> Float[Array, "k q"]:
        return jnp.maximum(self.factor * (self._of_queries() + self._of_keys()), MASKED)

    def _of_queries(self) -> Float[Array, "k q"] | float:
        if self.vectors.query is None:
            return 0.0
        return sheared(product(self.query, joined(self.vectors.query), (1, 1), self.precision)).T

    def _of_keys(self) -> Float[Array, "k q"] | float:
        total: Any = 0.0
        if self.vectors.key is not None:
            total += sheared(product(self.key, joined(self.vectors.key), (1, 1), self.precision))
        if self.vectors.constant is not None:
            constant = joined(self.vectors.constant, axis=1)
            total += sheared(jnp.broadcast_to(constant, (len(self.key), constant.shape[1])))
        return total

    def factor_gradient(self, d_logits: Float[Array, "k q"]) -> Float[Array, "1 q"]:
        """That of the factor of keys and constants."""
        return (d_logits * self._of_keys()).sum(0, keepdims=True)

    def query_gradient(self, d_logits: Float[Array, "k q"]) -> Float[Array, "H q"] | float:
        """That of the queries times their factor."""
        if self.vectors.query is None:
            return 0.0
        return product(joined(self.vectors.query), unsheared(d_logits.T), (0, 1), self.precision)

    def key_gradient(self, d_logits: Float[Array, "k q"]) -> Float[Array, "k H"] | float:
        if self.vectors.key is None:
            return 0.0
        return product(unsheared(self.factor * d_logits), joined(self.vectors.key), (1, 0), self.precision)

    def vector_gradients(self, d_logits: Float[Array, "k q"]) -> Vectors:
        """Those of both pieces, [2*q, H] or [1, 2*q]."""
        d_logits = self.factor * d_logits
        of_queries = of_keys = constant = None
        if self.vectors.query is not None:
            of_queries = product(unsheared(d_logits.T), self.query, (0, 0), self.precision)
        if self.vectors.key is not None or self.vectors.constant is not None:
            by_key = unsheared(d_logits)
            if self.vectors.key is not None:
                of_keys = product(by_key, self.key, (0, 0), self.precision)
            if self.vectors.constant is not None:
                constant = by_key.sum(0, keepdims=True)
        return Vectors(of_queries, of_keys, constant)


@dataclasses.dataclass(frozen=True)
class ValueTerm:
    """What is added to the output of a block, weights · value[d]."""

    pieces: tuple[Any, Any]
    """References to them."""
    precision: Any

    def output(self, weights: Float[Array, "k q"]) -> Float[Array, "H2 q"]:
        return product(joined(self.pieces), unsheared(weights.T), (0, 1), self.precision)

    def weight_gradient(self, d_output: Shaped[Array, "q H2"]) -> Float[Array, "k q"]:
        return sheared(product(d_output, joined(self.pieces), (1, 1), self.precision)).T

    def vector_gradient(self, weights: Float[Array, "k q"], d_output: Shaped[Array, "q H2"]) -> Float[Array, "2*q H2"]:
        return product(unsheared(weights.T), d_output, (0, 0), self.precision)


def of_tables(by_diagonal: Vectors, tables: Vectors) -> Vectors:
    """The gradients of tables, from those of both pieces of each diagonal, [N, diagonals, 2*q, W or 1, 2*q].

    They are in the order of the second piece, which the first follows.
    """

    def of_table(x, table):
        if table is None:
            return None
        in_lanes = table.shape[1] == 1
        first, second = jnp.split(x, 2, axis=3 if in_lanes else 2)
        pieces = jnp.pad(second, [(0, 0), (0, 1), (0, 0), (0, 0)]) + jnp.pad(first, [(0, 0), (1, 0), (0, 0), (0, 0)])
        whole = pieces.reshape(len(x), 1, -1) if in_lanes else pieces.reshape(len(x), -1, x.shape[3])
        return whole.sum(0, keepdims=True) if len(table) == 1 else whole

    return Vectors(*map(of_table, by_diagonal, tables))
