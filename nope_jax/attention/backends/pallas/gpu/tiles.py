"""What a program of a kernel reads and writes, and its loops.

Shapes as in `pallas`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int

from nope_jax.attention.backends.pallas.block import Block, only_finite
from nope_jax.attention.backends.pallas.call import Call, Operands, Tokens
from nope_jax.attention.backends.pallas.gpu.sizes import Blocks
from nope_jax.attention.backends.pallas.gpu.spans import Span, all_masks, of_dim, padded_dim, padded_length
from nope_jax.attention.backends.pallas.gpu.vectors import ShearedVectors, Slot
from nope_jax.attention.backends.pallas.pairwise import Member
from nope_jax.attention.backends.pallas.vectors import ValueTerm, Vectors, VectorTerm

PROGRAMS = 1024
"""About as many are enough for a GPU: of kernels whose programs need memory each, there are no more."""


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
    vectors: Any
    """`Vectors`, with the vectors as matrices [#N, d, 1, W]; None: no term has some."""
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

    block: Any
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

    def __init__(
        self,
        kernel: Kernel,
        arrays: Inputs,
        inputs: Inputs,
        indices: list[Any],
        strange: Any,
        careful: bool,
        slot: Slot | None = None,
    ):
        """Create one from references to its inputs.

        Args:
            arrays: The inputs.
            indices: Its place in the grid.
            strange: A reference to whether the sums of each program are not finite; None: they may be.
            careful: Whether it is one of the second kernel.
            slot: Memory of its own, for terms of vectors per distance.
        """
        self.kernel, self.call, self.arrays, self.inputs = kernel, kernel.call, arrays, inputs
        self.indices, self._strange, self.careful, self._slot = indices, strange, careful, slot
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
        return Side(i, at.index, tuple(matrices), tuple(vectors), tokens, features)

    def keys(self, b: Any, n: Any, j: Any) -> Side:
        """Block j of the keys and values that a query head sees."""
        call, (arrays, inputs), c = self.call, (self.arrays, self.inputs), lax.div(n, self.call.groups)
        at = Span(j * call.key_size, call.key_size, call.key_length)
        matrices = at.matrix(arrays.key, inputs.key, b, c), at.matrix(arrays.value, inputs.value, b, c)
        return self.of_head(
            Side(j, at.index, matrices, (), tuple(at.tokens(x, b) for x in inputs.of_keys), ()), b, n, j
        )

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
        elif self.inputs.vectors is not None and self.inputs.vectors.in_logit:
            term = self.vector_term(queries, keys, head, careful=self.careful).logits()
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
            value_term=self._value_term(queries, keys, head),
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

    def vector_term(self, queries: Side, keys: Side, head: Head, *, careful: bool) -> VectorTerm:
        """The term of vectors per distance; with care, a hidden key or query may be not finite."""
        query, key = queries.matrices[0], keys.matrices[0]
        vectors = self._vectors(queries, keys, head, jnp.promote_types(query.dtype, key.dtype))
        query, key = (only_finite(x) if careful else x for x in (query, key))
        return VectorTerm(vectors, query, key, self._axes[0](queries.vectors[0]))

    def _value_term(self, queries: Side, keys: Side, head: Head) -> ValueTerm | None:
        if self.inputs.vectors is None or self.inputs.vectors.value is None:
            return None
        return ValueTerm(self._vectors(queries, keys, head, keys.matrices[1].dtype))

    def _vectors(self, queries: Side, keys: Side, head: Head, dtype: Any) -> ShearedVectors:
        assert self._slot is not None
        return ShearedVectors(
            self.inputs.vectors,
            self.kernel.keys_first,
            dtype,
            self.call.precision,
            call=self.call,
            arrays=self.arrays.vectors,
            head=head.index,
            diagonal=queries.block - keys.block,
            slot=self._slot,
        )

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


def may_hide(call: Call, inputs: Inputs) -> bool:
    """Whether a key in a block may be hidden from a query, other than by not being there."""
    return bool(call.rule.is_causal or call.rule.window is not None or inputs.of_queries)


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
    query, factor, key, value, table, of_queries, of_keys, vectors = operands
    if vectors is not None:
        vectors = _as_matrices(vectors, jnp.promote_types(query.dtype, key.dtype), value.dtype)
    inputs = Inputs(query, key, value, factor, table, of_queries, of_keys, vectors, *tokens, rows)
    slots, size = min(math.prod(grid), PROGRAMS), kernel.call.key_size
    memory = () if vectors is None else (jax.ShapeDtypeStruct((slots, size, 2 * size), jnp.float32),)

    def compute(careful: bool, *others: Array, results: tuple[Any, ...]) -> list[Array]:
        """The results; with care, the others are those without, which are changed, and whether they are strange."""
        arrays, structure = jax.tree.flatten((inputs, others))

        def programs(*references):
            own, before = jax.tree.unflatten(structure, references[: len(arrays)])
            written = references[len(arrays) :]
            strange = before[-1] if careful else written[len(outputs)] if len(results) > len(outputs) else None

            def program(indices, slot=None):
                body(Program(kernel, inputs, own, indices, strange, careful, slot), written[: len(outputs)])

            if not memory:
                program([pl.program_id(axis) for axis in range(len(grid))])
                return
            first = pl.program_id(0)
            slot = Slot(written[-1], first, kernel.call.interpret)

            def visit(step, _):
                # Every other time in reverse order: rows of attention grow along the grid.
                place = step * slots + first + (step & 1) * (slots - 1 - 2 * first)
                program(_unraveled(place, grid), slot)

            full, rest = divmod(math.prod(grid), slots)
            last = first if full % 2 == 0 else slots - 1 - first
            lax.fori_loop(0, full + jnp.int32(last < rest), visit, None)

        programs.__name__ = kernel.name + "_with_care" * careful
        compiled = pl.pallas_call(
            programs,
            out_shape=[*results, *memory],
            grid=(slots,) if memory else grid,
            in_specs=[_whole(x) for x in arrays],
            out_specs=[_whole(x) for x in (*results, *memory)],
            input_output_aliases={len(arrays) - len(others) + k: k for k in range(len(outputs))} if careful else {},
            compiler_params=plgpu.CompilerParams(num_warps=kernel.blocks.warps, num_stages=kernel.blocks.stages),
            interpret=kernel.call.interpret,
            name=programs.__name__,
            metadata=_cost(kernel, inputs, others[-1:] if careful else results, 0 if careful else products),
        )
        return list(compiled(*arrays))[: len(results)]

    if not (checked and may_hide(kernel.call, inputs)):
        return compute(False, results=outputs)
    found = compute(False, results=(*outputs, jax.ShapeDtypeStruct(grid, jnp.int32)))
    return compute(True, *found, results=outputs)


def _as_matrices(tables: Vectors, logit_dtype: Any, value_dtype: Any) -> Vectors:
    """Tables as `Inputs` has them, in the dtypes of the products."""
    dtypes = Vectors(logit_dtype, logit_dtype, None, value_dtype)
    pairs = zip(tables, dtypes, strict=True)
    return Vectors(*(x if x is None or dtype is None else x[:, :, None].astype(dtype) for x, dtype in pairs))


def _unraveled(place: Any, grid: tuple[int, ...]) -> list[Any]:
    """The indices of a program of a grid, whose first axis runs fastest."""
    indices = []
    for size in grid:
        indices.append(lax.rem(place, size))
        place = lax.div(place, size)
    return indices


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
