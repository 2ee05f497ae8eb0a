"""Run a function over all blocks of queries and keys that meet, as one kernel.

The grid of a kernel runs through its indices in order, the last one fastest. A kernel accumulates in memory of its own
along the last axis, and writes its results at the end of that axis.

Shapes as in `pallas`, with q = k.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from nope_jax.attention.backends.pallas.block import Block
from nope_jax.attention.backends.pallas.call import Call, Operands, Tokens
from nope_jax.attention.backends.pallas.tpu.inputs import Inputs, block_at
from nope_jax.attention.backends.pallas.tpu.terms import memory_of, table_blocks, term_at, value_term_at
from nope_jax.attention.backends.pallas.tpu.vectors import pieces_of


class Walk(NamedTuple):
    """The order in which a kernel visits blocks."""

    grid: tuple[int, ...]
    at: Callable[..., tuple[Any, Any, Any, Any, Any]]
    """From indices of the grid and the offset: batch row, query head, query block, key block, and whether they meet.
    If they do not, the blocks are those of the step before, or of the step after, so that nothing is fetched."""
    parallel: int
    """The number of leading axes whose results do not depend on each other."""
    keys_change: bool
    """Whether keys, rather than queries, change along the last axis."""


def along_keys(call: Call, batch: int, heads: int, *, heads_first: bool = False) -> Walk:
    """All keys of a block of queries, then the next. With `heads_first`, all batch rows of a head, then the next."""
    steps = _steps(call, call.key_blocks)

    def at(first, second, i, step, offset):
        low, high = call.keys_of(i, offset)
        b, n = (second, first) if heads_first else (first, second)
        return b, n, i, jnp.clip(low + step, 0, jnp.maximum(high, 0)), low + step <= high

    outer = (heads, batch) if heads_first else (batch, heads)
    return Walk((*outer, call.query_blocks, steps), at, 1 if heads_first else 3, keys_change=True)


def along_queries(call: Call, batch: int, kv_heads: int) -> Walk:
    """All queries, of all heads of the group, of a block of keys, then the next."""
    steps = _steps(call, call.query_blocks)

    def at(b, c, j, step, offset):
        low, high = call.queries_of(j, offset)
        i, n = low + lax.rem(step, steps), c * call.groups + lax.div(step, steps)
        last = jnp.clip(high, 0, call.query_blocks - 1)
        return b, n, jnp.clip(i, 0, last), j, i <= high

    return Walk((batch, kv_heads, call.key_blocks, call.groups * steps), at, 3, keys_change=False)


def along_diagonals(call: Call, batch: int, heads: int, *, add_heads: bool = False) -> Walk:
    """All blocks of a diagonal, of all batch rows and with `add_heads` of all heads, then the next diagonal."""
    steps = min(call.query_blocks, call.key_blocks)
    outer, added = (1, heads * batch) if add_heads else (heads, batch)

    def at(head, diagonal, step, offset):
        row, step = lax.div(step, steps), lax.rem(step, steps)
        b, n = (lax.rem(row, batch), lax.div(row, batch)) if add_heads else (row, head)
        diagonal = diagonal - (call.key_blocks - 1)
        last = jnp.minimum(call.query_blocks, call.key_blocks + diagonal) - 1
        i = jnp.maximum(diagonal, 0) + step
        low, high = call.keys_of(i, offset)
        j = i - diagonal
        meet = (i <= last) & (low <= j) & (j <= high)
        i = jnp.minimum(i, last)
        return b, n, i, i - diagonal, meet

    return Walk((outer, call.query_blocks + call.key_blocks - 1, added * steps), at, 2, keys_change=True)


def _steps(call: Call, blocks: int) -> int:
    """The largest number of blocks, of `blocks`, that a block of the other kind meets."""
    if not call.contiguous or call.reach is None:
        return blocks
    sides = 1 if call.rule.is_causal else 2
    return min(blocks, -(-(sides * call.reach + call.key_size) // call.key_size) + 1)


@dataclasses.dataclass(frozen=True)
class Output:
    """A result of a kernel."""

    shape: tuple[int, ...]
    dtype: Any
    block: tuple[int, ...]
    place: Callable[..., tuple]
    """From batch row, query head, query block and key block to the place of its block."""


def of_queries(call: Call, shape: tuple[int, ...], dtype: Any) -> Output:
    """A result [B, N, T, dim] or [B, N, 1, T]."""
    if shape[2] == 1:
        return Output(shape, dtype, (1, 1, 1, call.query_size), lambda b, n, i, j: (b, n, 0, i))
    return Output(shape, dtype, (1, 1, call.query_size, shape[3]), lambda b, n, i, j: (b, n, i, 0))


def of_keys(call: Call, shape: tuple[int, ...], dtype: Any) -> Output:
    """A result [B, K, S, dim]."""
    return Output(shape, dtype, (1, 1, call.key_size, shape[3]), lambda b, n, i, j: (b, lax.div(n, call.groups), j, 0))


def run(
    name: str,
    call: Call,
    walk: Walk,
    operands: Operands,
    tokens: Tokens,
    rows: tuple[Array, ...],
    outputs: tuple[Output, ...],
    sums: tuple[tuple[int, ...], ...],
    *,
    visit: Callable[[Block, Any, Any, Any], None],
    end: Callable[[Any, Any], None],
    begin: Callable[[Any, Any, Any], None] | None = None,
    products: int,
) -> list[Array]:
    """Run a kernel.

    Args:
        name: Its name in profiles and compiled programs.
        rows: More inputs of queries.
        outputs: Its results.
        sums: Shapes of float32 memory that is zero at the start of the last axis of the grid.
        visit: Called with each block of queries and keys that meet, the term of its logit, and the references to
            outputs and sums.
        end: Called with outputs and sums at the end of the last axis.
        begin: Called with the indices of the grid, outputs and sums at its start.
        products: Those of a pair, each with an addition, for estimates of cost: head dims of all matrix products, and
            what a logit of pairs takes.
    """
    size = call.key_size

    def spec(block: tuple[int, ...], place: Callable[..., tuple]) -> pl.BlockSpec:
        def index(*indices):
            *of_grid, offset = indices
            return place(*walk.at(*of_grid, offset[0])[:4])

        return pl.BlockSpec(block, index)

    def like(output: Output) -> pl.BlockSpec:
        return spec(output.block, output.place)

    def of_token(x: Array, is_query: bool) -> pl.BlockSpec:
        shared = x.shape[0] == 1
        return spec((1, 1, size), lambda b, n, i, j: (0 if shared else b, 0, i if is_query else j))

    of_table = table_blocks(call, operands.table, spec)
    of_vectors = pieces_of(call, operands.vectors, spec)
    query, factor, key, value, table, query_features, key_features, vectors = operands
    inputs = Inputs(
        query=query,
        factor=factor,
        key=key,
        value=value,
        table=(table,) * len(of_table),
        query_features=query_features,
        key_features=key_features,
        vectors=jax.tree.map(lambda x: (x, x), vectors),
        of_queries=tokens.of_queries,
        of_keys=tokens.of_keys,
        rows=rows,
    )
    specs = Inputs(
        query=like(of_queries(call, query.shape, query.dtype)),
        factor=like(of_queries(call, factor.shape, factor.dtype)),
        key=like(of_keys(call, key.shape, key.dtype)),
        value=like(of_keys(call, value.shape, value.dtype)),
        table=of_table,
        query_features=tuple(like(of_queries(call, x.shape, x.dtype)) for x in inputs.query_features),
        key_features=(spec((1, 1, 1, size), lambda b, n, i, j: (b, n, 0, j)),) * len(inputs.key_features),
        vectors=of_vectors,
        of_queries=tuple(of_token(x, True) for x in tokens.of_queries),
        of_keys=tuple(of_token(x, False) for x in tokens.of_keys),
        rows=tuple(like(of_queries(call, x.shape, x.dtype)) for x in rows),
    )
    arrays, structure = jax.tree.flatten(inputs)
    own_memory, of_memory = jax.tree.flatten(memory_of(call, inputs))

    def kernel(offset, *references):
        own = jax.tree.unflatten(structure, references[: len(arrays)])
        rest = references[len(arrays) :]
        results, rest = rest[: len(outputs)], rest[len(outputs) :]
        own_sums, memory = rest[: len(sums)], jax.tree.unflatten(of_memory, rest[len(sums) :])
        indices = [pl.program_id(axis) for axis in range(len(walk.grid))]
        _, _, i, j, meet = walk.at(*indices, offset[0])

        @pl.when(indices[-1] == 0)
        def _():
            for reference in own_sums:
                reference[...] = jnp.zeros(reference.shape, jnp.float32)
            if begin is not None:
                begin(indices, results, own_sums)

        def visit_if(condition, masked):
            @pl.when(condition)
            def _():
                term, value_term = term_at(call, own, memory, offset, i, j, masked), value_term_at(call, own)
                visit(block_at(call, own, term, value_term, offset[0], i, j, masked), term, results, own_sums)

        if tokens.of_queries:
            visit_if(meet, masked=True)
        else:
            first, last = call.seen_whole_by(i, offset[0])
            whole = (first <= j) & (j <= last)
            visit_if(meet & whole, masked=False)
            visit_if(meet & jnp.logical_not(whole), masked=True)

        @pl.when(indices[-1] == walk.grid[-1] - 1)
        def _():
            end(results, own_sums)

    semantics: list[Any] = ["parallel" if axis < walk.parallel else "arbitrary" for axis in range(len(walk.grid))]
    compute = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(output.shape, output.dtype) for output in outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=walk.grid,
            in_specs=jax.tree.leaves(specs),
            out_specs=[like(output) for output in outputs],
            scratch_shapes=[*(pltpu.VMEM(shape, jnp.float32) for shape in sums), *own_memory],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
        cost_estimate=_cost(call, walk, inputs, outputs, products),
        interpret=call.interpret,
        name=name,
    )
    return list(compute(tokens.offset, *arrays))


def _cost(call: Call, walk: Walk, inputs: Inputs, outputs: tuple[Output, ...], products: int) -> pl.CostEstimate:
    """What a kernel does, for the compiler's schedule and for `nope_jax.compile`."""
    of_queries = inputs.query, inputs.factor, *inputs.query_features, *inputs.rows
    of_keys = inputs.key, inputs.value, *inputs.key_features
    changing, fixed = (of_keys, of_queries) if walk.keys_change else (of_queries, of_keys)
    pairs = inputs.query.shape[0] * inputs.query.shape[1] * call.pairs
    once = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in (*fixed, *outputs))
    per_token = sum((1 if x.shape[2] == 1 else x.shape[3]) * x.dtype.itemsize for x in changing)
    return pl.CostEstimate(
        flops=2 * products * pairs, transcendentals=pairs, bytes_accessed=once + pairs // call.query_size * per_token
    )
