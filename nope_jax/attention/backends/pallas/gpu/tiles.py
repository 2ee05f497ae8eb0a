"""What a program of a kernel reads and writes, and its loops.

A matrix is an array [B, length, heads, dim], of which a program reads blocks [size, dim], with dim filled up to a power
of two; a vector is an array [B, heads, length], of which it reads blocks [size].

Shapes as in `pallas`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int

from nope_jax.attention.backends.pallas.block import Block
from nope_jax.attention.backends.pallas.call import Call, Operands, Tokens
from nope_jax.attention.backends.pallas.gpu.sizes import Blocks
from nope_jax.attention.backends.pallas.pairwise import Member

SMALLEST_DIM = 16
"""Of a matrix product on a tensor core."""
DISTANCES = 128
"""Distances in the table are filled up to a multiple of this at both ends: that of the largest block."""


def padded_dim(dim: int) -> int:
    """The head dim that a program computes with."""
    return max(SMALLEST_DIM, pl.next_power_of_2(dim))


def of_dim(padded: int) -> Any:
    """All of a row. (The interpreter has other indices of 32 bits, too, but would take a Python number for 64.)"""
    return pl.ds(jnp.int32(0), padded)


def padded_length(length: int) -> int:
    """The number of distances to one side in the table."""
    return -(-length // DISTANCES) * DISTANCES


class Inputs(NamedTuple):
    """What every kernel reads: arrays or, within a kernel, references to them."""

    query: Any
    key: Any
    value: Any
    factor: Any
    table: Any
    """By distance: [#N, distances], the first being that of query 0 from key `padded_length(S)`. Pair by pair: [N, P].
    None: there is nothing to be read."""
    query_features: Any
    """[B, N, T] each."""
    key_features: Any
    """[B, N, S] each."""
    offset: Any
    of_queries: Any
    of_keys: Any
    rows: Any
    """For gradients: d_output and, of each row, the term, the logsumexp and d_entropy."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What is static in a kernel."""

    name: str
    """In profiles and compiled programs."""
    call: Call
    blocks: Blocks
    keys_first: bool
    """Whether blocks of logits are [k, q] rather than [q, k]."""


class Side(NamedTuple):
    """One block of queries, or of keys, of one head."""

    indices: Int[Array, "size"]
    matrices: tuple[Any, ...]
    """[size, dim]."""
    vectors: tuple[Any, ...]
    """[size]."""
    tokens: tuple[Any, ...]
    """[size]."""
    features: tuple[Any, ...]
    """[size]: of the logit."""


class Head(NamedTuple):
    """A query head."""

    index: Any
    numbers: tuple[Any, ...]
    """The parameters of a logit of pairs."""


class Program:
    """A program within a kernel.

    A hidden key that is not finite makes a product NaN, even with a weight of 0. So a program notes whether its sums
    are finite, and if they are not, one of a second kernel computes them again with care.
    """

    def __init__(self, kernel: Kernel, arrays: Inputs, inputs: Inputs, indices: list[Any], strange: Any, careful: bool):
        """Create one from references to its inputs.

        Args:
            arrays: The inputs.
            indices: Its place in the grid.
            strange: A reference to whether the sums of each program are not finite; None: they may be.
            careful: Whether it is one of the second kernel.
        """
        self.kernel, self.call, self.arrays, self.inputs = kernel, kernel.call, arrays, inputs
        self.indices, self._strange, self.careful = indices, strange, careful
        self.offset = inputs.offset[0]
        self._again = strange[tuple(indices)] if careful else None

    def queries(self, b: Any, n: Any, i: Any) -> Side:
        """Block i of the queries of a head; with `rows`, also what the backward pass knows of them."""
        call, (arrays, inputs) = self.call, (self.arrays, self.inputs)
        at = Span(i * call.query_size, call.query_size, call.query_length)
        matrices, vectors = [at.matrix(arrays.query, inputs.query, b, n)], [at.vector(inputs.factor, b, n)]
        if inputs.rows:
            d_output, *rows = inputs.rows
            matrices.append(at.matrix(arrays.rows[0], d_output, b, n))
            vectors += [at.vector(row, b, n) for row in rows]
        tokens = tuple(at.tokens(x, b) for x in inputs.of_queries)
        features = tuple(at.vector(x, b, n) for x in inputs.query_features)
        return Side(at.index, tuple(matrices), tuple(vectors), tokens, features)

    def keys(self, b: Any, n: Any, j: Any) -> Side:
        """Block j of the keys and values that a query head sees."""
        call, (arrays, inputs), c = self.call, (self.arrays, self.inputs), lax.div(n, self.call.groups)
        at = Span(j * call.key_size, call.key_size, call.key_length)
        matrices = at.matrix(arrays.key, inputs.key, b, c), at.matrix(arrays.value, inputs.value, b, c)
        return self.of_head(Side(at.index, matrices, (), tuple(at.tokens(x, b) for x in inputs.of_keys), ()), b, n, j)

    def of_head(self, keys: Side, b: Any, n: Any, j: Any) -> Side:
        """The same keys for another query head of the group."""
        at = Span(j * self.call.key_size, self.call.key_size, self.call.key_length)
        return keys._replace(features=tuple(at.vector(x, b, n) for x in self.inputs.key_features))

    def head(self, n: Any) -> Head:
        """Query head n. Not to be called in a loop: Triton would pipeline the loads, and compile for minutes."""
        size = self.call.pairwise.size if self.call.pairwise else 0
        return Head(n, tuple(self.inputs.table[n, p] for p in range(size)))

    def block(self, queries: Side, keys: Side, head: Head, masked: bool) -> Block:
        """The block of some queries of a head and some keys."""
        of_query, of_key = self._axes
        visible = term = None
        query_index, key_index = of_query(queries.indices), of_key(keys.indices)
        if masked:
            of_queries, of_keys = map(of_query, queries.tokens), map(of_key, keys.tokens)
            visible = self.call.visible(query_index, key_index, self.offset, tuple(of_queries), tuple(of_keys))
        if self.call.pairwise is not None:
            term = self.call.pairwise(head.numbers, *self.members(queries, keys))
        elif self.inputs.table is not None:
            row = jnp.minimum(head.index, len(self.arrays.table) - 1)
            distance = query_index - key_index + padded_length(self.call.key_length)
            term = plgpu.load(self.inputs.table.at[row, distance])
        factor, *rows = map(of_query, queries.vectors)
        return Block(
            self.call,
            self.kernel.keys_first,
            query=queries.matrices[0],
            key=keys.matrices[0],
            value=keys.matrices[1],
            factor=factor,
            visible=visible,
            careful=self.careful,
            term=term,
            rows=(*queries.matrices[1:], *rows),
        )

    def members(self, queries: Side, keys: Side) -> tuple[Member, Member]:
        """What a logit knows of some queries and keys, which broadcast to their block."""
        of_query, of_key = self._axes
        if self.call.contiguous:
            start = self.inputs.offset[1]
            positions = of_query(queries.indices) + self.offset + start, of_key(keys.indices) + start
        else:
            positions = of_query(queries.tokens[0]), of_key(keys.tokens[0])
        features = tuple(map(of_query, queries.features)), tuple(map(of_key, keys.features))
        return Member(positions[0], features[0]), Member(positions[1], features[1])

    def term_gradient(self, queries: Side, keys: Side, head: Head, d_logits: Any) -> tuple[Any, Any, Any]:
        """Gradients of the parameters of a head, and of the features [size, 1] or [1, size] of queries and keys."""
        assert self.call.pairwise is not None
        return self.call.pairwise.gradient(head.numbers, *self.members(queries, keys), d_logits)

    @property
    def _axes(self) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
        """Functions that turn vectors of queries, and of keys, to the axis that they have in a block."""

        def first(x):
            return x[:, None]

        def last(x):
            return x[None]

        return (last, first) if self.kernel.keys_first else (first, last)

    def fold_keys(self, i: Any, visit: Callable[[Any, bool, Any], Any], sums: Any) -> Any:
        """Fold `visit(j, masked, sums)` over the key blocks that meet query block i."""
        return self._fold(self.call.keys_of(i, self.offset), self.call.seen_whole_by(i, self.offset), visit, sums)

    def fold_queries(self, j: Any, visit: Callable[[Any, bool, Any], Any], sums: Any) -> Any:
        """Fold `visit(i, masked, sums)` over the query blocks that meet key block j."""
        return self._fold(self.call.queries_of(j, self.offset), self.call.seeing_whole(j, self.offset), visit, sums)

    def _fold(self, meeting: tuple[Any, Any], whole: tuple[Any, Any], visit: Callable, sums: Any) -> Any:
        first, stop = meeting[0], meeting[1] + 1
        if self.careful:
            stop = first + (stop - first) * self._again
        elif not self.inputs.of_queries:  # first the blocks in which nothing is hidden
            start = jnp.clip(whole[0], first, jnp.maximum(stop, first))
            end = jnp.clip(whole[1] + 1, start, jnp.maximum(stop, start))
            sums = lax.fori_loop(start, end, lambda index, sums: visit(index, False, sums), sums)
            if not may_hide(self.call, self.inputs) and self.call.key_length % self.call.key_size == 0:
                return sums
            before, after = start - first, stop - end

            def at_edge(step, sums):
                # Not a `where`: of two constants, Triton cannot select.
                return visit(first + step + (end - start) * jnp.int32(step >= before), True, sums)

            return lax.fori_loop(0, before + after, at_edge, sums)
        return lax.fori_loop(first, stop, lambda index, sums: visit(index, True, sums), sums)

    def check(self, sums: Any) -> None:
        """Note whether the sums of this program are finite."""
        if self._strange is not None and not self.careful:
            strange = [jnp.where(jnp.isfinite(x), 0, 1).max() for x in jax.tree.leaves(sums)]
            self._strange[tuple(self.indices)] = functools.reduce(jnp.maximum, strange)

    def store_matrix(self, at: "Span", array: Any, reference: Any, b: Any, n: Any, x: Any, rows: Any = None) -> None:
        """Write what `Span.matrix` reads; of careful sums, those of some rows."""
        padded = padded_dim(array.shape[-1])
        masks = [at.mask(array.shape[-1], padded), None if rows is None else rows[:, None], self._written]
        plgpu.store(reference.at[b, at.slice, n, of_dim(padded)], x.astype(array.dtype), mask=all_masks(masks, x.shape))

    def store_vector(self, at: "Span", reference: Any, b: Any, n: Any, x: Any) -> None:
        """Write what `Span.vector` reads."""
        plgpu.store(reference.at[b, n, at.slice], x, mask=all_masks([at.within, self._written], x.shape))

    @property
    def _written(self) -> Any:
        return None if self._again is None else self._again > 0


def all_masks(masks: list[Any], shape: tuple[int, ...]) -> Any:
    """Where all of some masks, which broadcast to a shape, are true; None for none."""
    masks = [mask for mask in masks if mask is not None]
    return jnp.broadcast_to(functools.reduce(jnp.logical_and, masks), shape) if masks else None


def may_hide(call: Call, inputs: Inputs) -> bool:
    """Whether a key in a block may be hidden from a query, other than by not being there."""
    return bool(call.rule.is_causal or call.rule.window is not None or inputs.of_queries)


class Span:
    """`size` tokens from `start` on, of `length`."""

    def __init__(self, start: Any, size: int, length: int):
        self.size, self.slice, self.index = size, pl.ds(start, size), start + lax.iota(jnp.int32, size)
        self.within = None if length % size == 0 else self.index < length

    def mask(self, dim: int, padded: int) -> Any:
        """Which entries of a block of a matrix there are; None: all."""
        of_tokens = None if self.within is None else self.within[:, None]
        of_dim = None if dim == padded else (lax.iota(jnp.int32, padded) < dim)[None]
        return all_masks([of_tokens, of_dim], (self.size, padded))

    def _load(self, reference: Any, mask: Any) -> Any:
        return plgpu.load(reference, mask=mask, other=None if mask is None else 0)

    def matrix(self, array: Any, reference: Any, b: Any, n: Any) -> Any:
        """The block of head n, zero past its end."""
        padded = padded_dim(array.shape[-1])
        return self._load(reference.at[b, self.slice, n, of_dim(padded)], self.mask(array.shape[-1], padded))

    def vector(self, reference: Any, b: Any, n: Any) -> Any:
        """The block of head n, zero past its end."""
        return self._load(reference.at[b, n, self.slice], self.within)

    def tokens(self, reference: Any, b: Any) -> Any:
        """The block of an array [#B, length]."""
        return self._load(reference.at[jnp.minimum(b, reference.shape[0] - 1), self.slice], self.within)


def run(
    kernel: Kernel,
    grid: tuple[int, ...],
    body: Callable[..., None],
    operands: Operands,
    tokens: Tokens,
    rows: tuple[Array, ...],
    outputs: tuple[jax.ShapeDtypeStruct, ...],
    *,
    products: int,
    checked: bool = True,
) -> list[Array]:
    """Run a kernel.

    Args:
        grid: Numbers of programs; those along the first axis run next to each other.
        body: A function of a program and references to outputs.
        rows: `Inputs.rows`.
        outputs: Its results: matrices, vectors, or arrays of whole blocks.
        products: Those of a pair, each with an addition, for estimates of cost: head dims of all matrix products, and
            what a logit of pairs takes.
        checked: Whether the body checks its sums.
    """
    query, factor, key, value, table, of_queries, of_keys, _ = operands
    inputs = Inputs(query, key, value, factor, table, of_queries, of_keys, *tokens, rows)

    def compute(careful: bool, *others: Array, results: tuple[Any, ...]) -> list[Array]:
        """The results; with care, the others are those without, which are changed, and whether they are strange."""
        arrays, structure = jax.tree.flatten((inputs, others))

        def programs(*references):
            own, before = jax.tree.unflatten(structure, references[: len(arrays)])
            written = references[len(arrays) :]
            strange = before[-1] if careful else written[len(outputs)] if len(results) > len(outputs) else None
            indices = [pl.program_id(axis) for axis in range(len(grid))]
            body(Program(kernel, inputs, own, indices, strange, careful), written[: len(outputs)])

        programs.__name__ = kernel.name + "_with_care" * careful
        compiled = pl.pallas_call(
            programs,
            out_shape=list(results),
            grid=grid,
            in_specs=[_whole(x) for x in arrays],
            out_specs=[_whole(x) for x in results],
            input_output_aliases={len(arrays) - len(others) + k: k for k in range(len(outputs))} if careful else {},
            compiler_params=plgpu.CompilerParams(num_warps=kernel.blocks.warps, num_stages=kernel.blocks.stages),
            interpret=kernel.call.interpret,
            name=programs.__name__,
            metadata=_cost(kernel, inputs, others[-1:] if careful else results, 0 if careful else products),
        )
        return list(compiled(*arrays))

    if not (checked and may_hide(kernel.call, inputs)):
        return compute(False, results=outputs)
    found = compute(False, results=(*outputs, jax.ShapeDtypeStruct(grid, jnp.int32)))
    return compute(True, *found, results=outputs)


def _whole(x: Any) -> pl.BlockSpec:
    """All of an array, a matrix with its head dim filled up."""
    shape = (*x.shape[:-1], padded_dim(x.shape[-1])) if _is_matrix(x) else x.shape
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))


def _cost(kernel: Kernel, inputs: Inputs, others: tuple[Any, ...], products: int) -> dict[str, str]:
    """What a kernel does, for `nope_jax.compile`; without products, it only looks whether there is anything to do."""
    size = sum(x.size * x.dtype.itemsize for x in others)
    if products == 0:
        return {"flops": "0", "bytes": str(size)}
    call, (batch, _, heads, _) = kernel.call, inputs.query.shape
    of_queries = inputs.query, inputs.factor, *inputs.query_features, *inputs.rows
    of_keys = inputs.key, inputs.value, *inputs.key_features
    changing, fixed = (of_queries, of_keys) if kernel.keys_first else (of_keys, of_queries)
    pairs, own = batch * heads * call.pairs, call.key_size if kernel.keys_first else call.query_size
    once = size + sum(x.size * x.dtype.itemsize for x in fixed)
    per_token = sum((x.shape[3] if _is_matrix(x) else 1) * x.dtype.itemsize for x in changing)
    return {"flops": str(2 * products * pairs), "bytes": str(once + pairs // own * per_token)}


def _is_matrix(x: Any) -> bool:
    return len(x.shape) == 4
