"""Terms of one vector per distance within a kernel: `DistanceVectors` of a logit, and the vectors of a `BlockValue`.

A block of queries and keys meets 2·size - 1 distances, whose vectors are two neighbouring pieces of a table. Queries or
keys are multiplied by both pieces, and the products, of each query or key with each distance, sheared into the block.
What belongs to pairs is sheared back before it is multiplied by vectors, or summed into their gradient.

The gradients of the vectors have a kernel of their own, which visits blocks by diagonals: those of a diagonal meet the
same two pieces, so it adds them up in memory that does not grow with the length.

Shapes as in `pallas`, with q = k; d distances of a table, a multiple of q; W head dim of the vectors.
"""

import abc
import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from nope_jax.attention.backends.pallas.block import product
from nope_jax.attention.backends.pallas.call import Call, Tokens
from nope_jax.attention.backends.pallas.served import vectors_of, wide
from nope_jax.encodings import BlockValue
from nope_jax.encodings.encoding import MASKED, Logit


class Vectors(NamedTuple):
    """Tables of vectors, or what belongs to them (references, BlockSpecs, gradients); None where there is none.

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
    before: int,
    after: int,
) -> Vectors | None:
    """The tables of a call; None if neither term has vectors.

    Args:
        before, after: How many distances there are before that of the first query from the first key, and from it on.

    Raises:
        ValueError: `by_distance` returned arrays of other shapes.
    """
    distances = tokens.offset[0] + jnp.arange(-before, after + 1, dtype=jnp.int32)
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


def vector_products(vectors: Vectors | None, *gradients: str) -> int:
    """The products that a pair takes for vectors, and for these gradients: a block meets two pieces of each table."""
    if vectors is None:
        return 0
    dims = {name: x.shape[2] for name, x in vectors._asdict().items() if x is not None and name != "constant"}
    return 2 * sum(dims.values()) + 2 * sum(dims.get(name, 0) for name in gradients)


@dataclasses.dataclass(frozen=True)
class BlockVectors(abc.ABC):
    """The vectors that a block of pairs meets, and how products with them are sheared into it, on some platform.

    Rows have an entry for each of 2*q distances, in the order of the vectors.
    """

    tables: Vectors
    """References to them."""
    keys_first: bool
    """Whether [block] is [k, q] rather than [q, k], and [row] [1, q] rather than [q, 1]."""
    dtype: Any
    """Of vectors in products, and of what is multiplied by them."""
    precision: Any

    @abc.abstractmethod
    def vectors(self, name: str) -> Float[Array, "distances W"]:
        """Those of a table."""

    @abc.abstractmethod
    def constant(self) -> Float[Array, "..."]:
        """That of each pair, [block]."""

    @abc.abstractmethod
    def from_queries(self, rows: Float[Array, "q distances"]) -> Float[Array, "..."]:
        """[block], of which each pair is the entry of its query and its distance."""

    @abc.abstractmethod
    def from_keys(self, rows: Float[Array, "k distances"]) -> Float[Array, "..."]:
        """[block], of which each pair is the entry of its key and its distance."""

    @abc.abstractmethod
    def to_queries(self, block: Float[Array, "..."]) -> Float[Array, "q distances"]:
        """The transpose of `from_queries`."""

    @abc.abstractmethod
    def to_keys(self, block: Float[Array, "..."]) -> Float[Array, "k distances"]:
        """The transpose of `from_keys`."""

    def products(self, x: Shaped[Array, "q W"], name: str) -> Float[Array, "q distances"]:
        """Those of queries or keys with the vectors of a table."""
        return self._product(x, self.vectors(name), (1, 1))

    def over_distances(self, rows: Float[Array, "q distances"], name: str) -> Float[Array, "q W"]:
        """The sum of rows · vectors over distances."""
        return self._product(rows, self.vectors(name), (1, 0))

    def over_keys(self, block: Float[Array, "..."], name: str) -> Float[Array, "..."]:
        """The sum of block · vectors over keys: [W, q] if keys come first, else [q, W]."""
        rows = self.to_queries(block)
        return self._product(self.vectors(name), rows, (0, 1)) if self.keys_first else self.over_distances(rows, name)

    def gradient(self, rows: Float[Array, "q distances"], x: Shaped[Array, "q W"]) -> Float[Array, "distances W"]:
        """That of the vectors, from that of their products with x."""
        return self._product(rows, x, (0, 0))

    def _product(self, x: Shaped[Array, "a b"], y: Shaped[Array, "c d"], axes: tuple[int, int]) -> Float[Array, "e f"]:
        return product(x.astype(self.dtype), y.astype(self.dtype), axes, self.precision)


@dataclasses.dataclass(frozen=True)
class VectorTerm:
    """The logit of a block, factor · (query · query[d] + key · key[d] + constant[d])."""

    vectors: BlockVectors
    query: Shaped[Array, "q H"]
    key: Shaped[Array, "k H"]
    """Both finite, where one may be hidden from the other."""
    factor: Float[Array, "..."]
    """[row]."""

    def logits(self) -> Float[Array, "..."]:
        """[block]."""
        return jnp.maximum(self.factor * (self._of_queries() + self._of_keys()), MASKED)

    def _of_queries(self) -> Float[Array, "..."] | float:
        if self.vectors.tables.query is None:
            return 0.0
        return self.vectors.from_queries(self.vectors.products(self.query, "query"))

    def _of_keys(self) -> Float[Array, "..."] | float:
        total: Any = 0.0
        if self.vectors.tables.key is not None:
            total += self.vectors.from_keys(self.vectors.products(self.key, "key"))
        if self.vectors.tables.constant is not None:
            total += self.vectors.constant()
        return total

    def factor_gradient(self, d_logits: Float[Array, "..."]) -> Float[Array, "..."]:
        """That of the factor of keys and constants, [row]."""
        return (d_logits * self._of_keys()).sum(0 if self.vectors.keys_first else 1, keepdims=True)

    def query_gradient(self, d_logits: Float[Array, "..."]) -> Float[Array, "..."] | float:
        """That of the queries times their factor, as from `Block.over_keys`."""
        return 0.0 if self.vectors.tables.query is None else self.vectors.over_keys(d_logits, "query")

    def key_gradient(self, d_logits: Float[Array, "..."]) -> Float[Array, "k H"] | float:
        if self.vectors.tables.key is None:
            return 0.0
        return self.vectors.over_distances(self.vectors.to_keys(self.factor * d_logits), "key")

    def vector_gradient(self, name: str, d_logits: Float[Array, "..."]) -> Float[Array, "..."]:
        """That of the vectors of a table, [2*q, W] or [1, 2*q]."""
        d_logits = self.factor * d_logits
        if name == "query":
            return self.vectors.gradient(self.vectors.to_queries(d_logits), self.query)
        by_key = self.vectors.to_keys(d_logits)
        return by_key.sum(0, keepdims=True) if name == "constant" else self.vectors.gradient(by_key, self.key)


@dataclasses.dataclass(frozen=True)
class ValueTerm:
    """What is added to the output of a block, weights · value[d]."""

    vectors: BlockVectors

    def output(self, weights: Float[Array, "..."]) -> Float[Array, "..."]:
        """As from `Block.over_keys`."""
        return self.vectors.over_keys(weights, "value")

    def weight_gradient(self, d_output: Shaped[Array, "q H2"]) -> Float[Array, "..."]:
        """[block]."""
        return self.vectors.from_queries(self.vectors.products(d_output, "value"))

    def vector_gradient(self, weights: Float[Array, "..."], d_output: Shaped[Array, "q H2"]) -> Float[Array, "d H2"]:
        """That of the vectors, [2*q, H2]."""
        return self.vectors.gradient(self.vectors.to_queries(weights), d_output)


def of_diagonals(lower: Array, upper: Array, table: Array) -> Array:
    """The gradient of a table, from those of both pieces of each diagonal, in the order of the table.

    Args:
        lower, upper: Of the pieces with smaller and with larger indices, [N, diagonals, q, W] or [N, diagonals, 1, q].
    """
    pieces = jnp.pad(lower, [(0, 0), (0, 1), (0, 0), (0, 0)]) + jnp.pad(upper, [(0, 0), (1, 0), (0, 0), (0, 0)])
    whole = pieces.reshape(len(lower), 1, -1) if table.shape[1] == 1 else pieces.reshape(len(lower), -1, lower.shape[3])
    return whole.sum(0, keepdims=True) if len(table) == 1 else whole
