"""Attention as Pallas kernels for TPUs: output, entropy and logsumexp in one pass, differentiable.

The recurrences are those of `streaming.py`. What differs follows from the chip: a block of logits lies as [keys,
queries], so that what belongs to a row of attention (factor, largest logit, normaliser, entropy) is one vector along
the lanes, sums over keys run down the sublanes, and statistics need no transpose.

A term by distance is a vector per head. A block meets 2·size - 1 of its entries, two neighbouring pieces of the vector,
which a rotation by one lane more per sublane turns into the term of the block; the gradient is rotated back and summed.

Blocks in which no query sees a key are neither fetched nor computed; masks are computed only where something is hidden.

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, G = N/K, H and H2 the head dims;
n and m the numbers of query and key blocks, q = k the size of both.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int, Shaped

from nope_jax.attention.blocks import CachedLayer
from nope_jax.attention.mask_spec import MaskSpec
from nope_jax.attention.mesh import platform
from nope_jax.attention.nonfinite import finite
from nope_jax.attention.softcap import softcapped
from nope_jax.attention.softmax_state import SoftmaxState
from nope_jax.encodings import BlockValue, DistanceLogit
from nope_jax.encodings.encoding import MASKED, Logit

BLOCK_SIZE = 512
"""Queries and keys per block, fewer for short sequences. From the compiler's memory limits: not yet tuned on a TPU."""

LANES, SUBLANES = 128, 8


def supports(query, factor, key, value, logit, value_term, mask_spec, *_: Any) -> str | None:
    """Why a call cannot be served by these kernels; None if it can."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if isinstance(x, CachedLayer):
            return "keys of a KV cache are read by another backend"
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"{name} must be float32 or bfloat16, not {x.dtype}"
    if logit is not None and not isinstance(logit, DistanceLogit):
        return f"the logit must be a DistanceLogit or None, not a {type(logit).__name__}"
    if logit is not None and not mask_spec.contiguous:
        return "with a logit, positions must be consecutive (no query_positions or key_positions)"
    if value_term is not None:
        return "the encoding has a value place"
    if mask_spec.mask is not None:
        return "there is a mask; is_causal, window, chunk_size and segment_ids are served"
    if platform() not in ("tpu", "cpu"):
        return f"it needs a TPU (on a CPU it runs in interpret mode), not a {platform()}"
    return None


def pallas_tpu_attention(
    query: Shaped[Array, "B T N H"],
    factor: Float[Array, "#B #N T"],
    key: Shaped[Array, "B S K H"],
    value: Shaped[Array, "B S K H2"],
    logit: Logit | None,
    value_term: BlockValue | None,
    mask_spec: MaskSpec,
    precision: jax.lax.PrecisionLike = None,
    with_entropy: bool = True,
    softcap: float | None = None,
    *,
    block_size: int | None = None,
    final_rows: tuple[Array, Array, Array] | None = None,
) -> tuple[Array, Array, Array]:
    """The `attend` of a backend with `in_parts`; reverse-mode differentiable.

    Args:
        block_size: Queries and keys per block: a power of two, on a TPU at least 128. None: `BLOCK_SIZE`, or the
            smallest that holds the whole sequence.
    """
    (batch, query_length, num_heads, _), (key_length, kv_heads) = query.shape, key.shape[1:3]
    if block_size is None:
        longest = max(query_length, key_length)
        block_size = min(BLOCK_SIZE, max(LANES, 1 << (longest - 1).bit_length()))
    call = _Call(
        size=block_size,
        query_length=query_length,
        key_length=key_length,
        groups=num_heads // kv_heads,
        rule=MaskSpec(None, None, None, None, None, mask_spec.is_causal, mask_spec.window, mask_spec.chunk_size),
        contiguous=mask_spec.contiguous,
        with_entropy=with_entropy,
        precision=lax.Precision.HIGHEST if precision in _EXACT else precision,
        softcap=softcap,
        interpret=platform() == "cpu",
    )
    offset = jnp.asarray(key_length - query_length + mask_spec.query_offset_or_0, jnp.int32).reshape(1)
    table = None
    if isinstance(logit, DistanceLogit):
        distances = offset + jnp.arange(-call.key_blocks * block_size, call.query_blocks * block_size, dtype=jnp.int32)
        table = logit.values(distances)[:, None]
    operands = _Operands(
        query=call.padded(query.swapaxes(1, 2), 2, call.query_blocks),
        factor=call.padded(
            jnp.broadcast_to(factor, (batch, num_heads, query_length))[:, :, None], 3, call.query_blocks
        ),
        key=call.padded(key.swapaxes(1, 2), 2, call.key_blocks),
        value=call.padded(value.swapaxes(1, 2), 2, call.key_blocks),
        table=table,
    )
    tokens = _tokens(call, mask_spec, offset)
    if final_rows is None:
        out, entropy, logsumexp = _attend(call, operands, tokens)
    else:
        out, entropy, logsumexp = final_rows
        out = call.padded(out.swapaxes(1, 2), 2, call.query_blocks)
        entropy = call.padded(entropy[:, :, None], 3, call.query_blocks)
        logsumexp = call.padded(logsumexp[:, :, None], 3, call.query_blocks, -jnp.inf)  # padding sees no key
        out, entropy, logsumexp = _attend_part(call, operands, tokens, (out, entropy, logsumexp))
    out = out.swapaxes(1, 2)[:, :query_length]
    return out, entropy[:, :, 0, :query_length], logsumexp[:, :, 0, :query_length]


_EXACT = (lax.Precision.HIGH, lax.Precision.HIGHEST, "high", "highest", "float32", "tensorfloat32", "bfloat16_3x")
"""Precisions for which products of float32 are exact to float32: the compiler of kernels has none in between."""


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static arguments of a call."""

    size: int
    query_length: int
    key_length: int
    groups: int
    rule: MaskSpec
    """Without its arrays."""
    contiguous: bool
    with_entropy: bool
    precision: Any
    softcap: float | None
    interpret: bool

    @property
    def query_blocks(self) -> int:
        return -(-self.query_length // self.size)

    @property
    def key_blocks(self) -> int:
        return -(-self.key_length // self.size)

    @property
    def reach(self) -> int | None:
        """The distance at which nothing is seen any more."""
        return min((n for n in (self.rule.window, self.rule.chunk_size) if n is not None), default=None)

    def padded(self, x: Array, axis: int, blocks: int, fill: float = 0) -> Array:
        """Fill up an axis to whole blocks."""
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, blocks * self.size - x.shape[axis])
        return jnp.pad(x, padding, constant_values=fill)

    def block_of(self, index: Any) -> Any:
        """The block of an index, rounded down: sizes are powers of two."""
        return index >> (self.size.bit_length() - 1)

    def keys_of(self, i: Any, offset: Any) -> tuple[Any, Any]:
        """First and last block of keys of which the queries of block i may see one."""
        first, last = 0, self.key_blocks - 1
        if not self.contiguous:
            return first, last
        low = i * self.size + offset
        high = low + self.size - 1
        if self.rule.is_causal:
            last = jnp.minimum(last, self.block_of(high))
        if self.reach is not None:
            first = jnp.maximum(first, self.block_of(low - self.reach + 1))
            last = jnp.minimum(last, self.block_of(high + self.reach - 1))
        return first, last

    def queries_of(self, j: Any, offset: Any) -> tuple[Any, Any]:
        """First and last block of queries of which one may see a key of block j."""
        first, last = 0, self.query_blocks - 1
        if not self.contiguous:
            return first, last
        low = j * self.size - offset
        high = low + self.size - 1
        if self.rule.is_causal:
            first = jnp.maximum(first, self.block_of(low))
        if self.reach is not None:
            first = jnp.maximum(first, self.block_of(low - self.reach + 1))
            last = jnp.minimum(last, self.block_of(high + self.reach - 1))
        return first, last

    def steps(self, blocks: int) -> int:
        """Largest number of `blocks` that one block of the other kind meets."""
        if not self.contiguous or self.reach is None:
            return blocks
        sides = 1 if self.rule.is_causal else 2
        return min(blocks, -(-(sides * self.reach + self.size) // self.size) + 1)

    def all_visible(self, i: Any, j: Any, offset: Any, tokens: "_Tokens") -> Any:
        """Whether each query of block i sees each key of block j, by position alone."""
        if not self.contiguous or tokens.query_ids:
            return False
        nearest = i * self.size + offset - (j + 1) * self.size + 1
        farthest = nearest + 2 * (self.size - 1)
        seen = (j + 1) * self.size <= self.key_length
        if self.rule.is_causal:
            seen &= nearest >= 0
        if self.rule.window is not None:
            seen &= (farthest < self.rule.window) & (-nearest < self.rule.window)
        return seen

    def flops(self, head_dims: int, rows: int) -> int:
        """FLOPs of products over `head_dims` dimensions for all visible pairs of `rows` batch rows x heads."""
        pairs = self.query_length * min(self.key_length, self.reach or self.key_length)
        return 2 * rows * head_dims * (pairs // 2 if self.rule.is_causal and self.reach is None else pairs)


class _Operands(NamedTuple):
    """The differentiable arguments, heads first and filled up to whole blocks."""

    query: Shaped[Array, "B N T H"]
    factor: Float[Array, "B N 1 T"]
    key: Shaped[Array, "B K S H"]
    value: Shaped[Array, "B K S H2"]
    table: Float[Array, "#N 1 distances"] | None
    """The logit by distance, from -m·k on: piece m + i - j begins at the distance of the first query of block i from the
    first key of block j."""


class _Tokens(NamedTuple):
    """What visibility depends on besides the index of a query and a key."""

    offset: Int[Array, "1"]
    """What is added to the index of a query for its distance to a key."""
    query_positions: Int[Array, "#B 1 T"] | None
    key_positions: Int[Array, "#B 1 S"] | None
    query_ids: tuple[Int[Array, "#B 1 T"], ...]
    """A query sees only keys with the same numbers: segments, chunks."""
    key_ids: tuple[Int[Array, "#B 1 S"], ...]

    @property
    def of_queries(self) -> list[Array]:
        return [x for x in (self.query_positions, *self.query_ids) if x is not None]

    @property
    def of_keys(self) -> list[Array]:
        return [x for x in (self.key_positions, *self.key_ids) if x is not None]


def _tokens(call: _Call, mask_spec: MaskSpec, offset: Array) -> _Tokens:
    query_positions, key_positions = mask_spec.positions(call.query_length, call.key_length)
    query_ids, key_ids = [], []
    if mask_spec.query_segments is not None:
        query_ids.append(mask_spec.query_segments)
        key_ids.append(mask_spec.key_segments)
    if mask_spec.chunk_size is not None:
        query_ids.append(query_positions // mask_spec.chunk_size)
        key_ids.append(key_positions // mask_spec.chunk_size)
    of_queries, of_keys = (
        [call.padded(x.astype(jnp.int32)[:, None], 2, blocks) for x in xs]
        for xs, blocks in (
            ([query_positions, *query_ids], call.query_blocks),
            ([key_positions, *key_ids], call.key_blocks),
        )
    )
    explicit = slice(0, 0 if mask_spec.contiguous else 1)
    return _Tokens(
        offset,
        next(iter(of_queries[explicit]), None),
        next(iter(of_keys[explicit]), None),
        tuple(of_queries[1:]),
        tuple(of_keys[1:]),
    )


# --- One block, inside a kernel


def _dot(call: _Call, x: Array, y: Array, axes: tuple[int, int]) -> Float[Array, "a b"]:
    """The product of two matrices over one axis of each, in float32."""
    dtype = jnp.promote_types(x.dtype, y.dtype)
    return lax.dot_general(
        x.astype(dtype),
        y.astype(dtype),
        (((axes[0],), (axes[1],)), ((), ())),
        precision=call.precision,
        preferred_element_type=jnp.float32,
    )


def _finite(x: Shaped[Array, "k H"]) -> Shaped[Array, "k H"]:
    """`finite`, by way of float32, in which a TPU has the test."""
    wide = x.astype(jnp.float32)
    return jnp.where(jnp.isfinite(wide), wide, 0.0).astype(x.dtype)


def _column(row: Int[Array, "1 k"]) -> Int[Array, "k 1"]:
    return jnp.broadcast_to(row, (SUBLANES, row.shape[1])).T[:, :1]


class _Block:
    """Query block i and key block j in a kernel: the arrays of a block of `_Inputs`, and what they say together."""

    def __init__(self, call: _Call, inputs: "_Inputs", offset: Any, i: Any, j: Any, masked: bool):
        self.call, self.offset, self.i, self.j = call, offset, i, j
        self.visible = self._visible(inputs) if masked else None
        keep = _finite if masked else lambda x: x  # without a mask, every row sees every key, finite or not
        self.query, self.key, self.value = inputs.query[0, 0], inputs.key[0, 0], inputs.value[0, 0]
        self.finite_query, self.finite_key, self.finite_value = keep(self.query), keep(self.key), keep(self.value)
        self.factor = inputs.factor[0, 0]
        self.near = None if inputs.near is None else inputs.near[0]
        self.far = None if inputs.far is None else inputs.far[0]

    def _visible(self, inputs: "_Inputs") -> Bool[Array, "k q"]:
        call, size = self.call, self.call.size
        key_index = self.j * size + lax.broadcasted_iota(jnp.int32, (size, size), 0)
        visible = key_index < call.key_length
        if call.contiguous:
            query_index = self.i * size + lax.broadcasted_iota(jnp.int32, (size, size), 1)
            distance = query_index + self.offset - key_index
            query_ids, key_ids = inputs.of_queries, inputs.of_keys
        else:
            (query_positions, *query_ids), (key_positions, *key_ids) = inputs.of_queries, inputs.of_keys
            distance = query_positions[0] - _column(key_positions[0])
        visible &= call.rule.by_distance(distance)
        for of_query, of_key in zip(query_ids, key_ids, strict=True):
            visible &= of_query[0] == _column(of_key[0])
        return visible

    def logits(self) -> tuple[Float[Array, "k q"], Float[Array, "k q"] | None]:
        """The logits, and the derivative of their capped part with respect to the scaled q·k (None: 1)."""
        content = _dot(self.call, self.key, self.query, (1, 1)) * self.factor
        slope = None
        if self.call.softcap is not None:
            content = softcapped(content, self.call.softcap)
            slope = 1 - jnp.square(content / self.call.softcap)
        if self.near is not None:
            content += _sheared(self.near, self.far)
        return (content if self.visible is None else jnp.where(self.visible, content, MASKED)), slope

    def shown(self, x: Float[Array, "k q"]) -> Float[Array, "k q"]:
        """0 where a key is hidden, whatever was computed there."""
        return x if self.visible is None else jnp.where(self.visible, x, 0.0)


def _sheared(near: Float[Array, "1 q"], far: Float[Array, "1 q"]) -> Float[Array, "k q"]:
    """The term of a block, entry (a, b) being that of distance b - a from its first query and key.

    Args:
        near: The terms of distances 0..q-1.
        far: Those of -q..-1.
    """
    size = near.shape[1]
    rows = jnp.broadcast_to(jnp.concatenate([near, far], axis=1), (size, 2 * size))
    return pltpu.roll(rows, 0, 1, stride=1, stride_axis=0)[:, :size]


def _unsheared(block: Float[Array, "k q"]) -> Float[Array, "1 2*q"]:
    """The transpose of `_sheared`: the sums of a block along its diagonals, for the distances -q..q-1."""
    size = block.shape[0]
    sums = jnp.zeros((SUBLANES, 2 * size), jnp.float32)
    for row in range(0, size, SUBLANES):  # entry (a, b) moves to column size + b - a; first by the eights in a
        rows = jnp.concatenate([jnp.zeros((SUBLANES, size), jnp.float32), block[row : row + SUBLANES]], axis=1)
        sums += pltpu.roll(rows, (2 * size - row) % (2 * size), 1)
    row = lax.broadcasted_iota(jnp.int32, sums.shape, 0)
    for bit in (1, 2, 4):
        sums = jnp.where(row & bit != 0, pltpu.roll(sums, 2 * size - bit, 1), sums)
    return sums.sum(0, keepdims=True)


# --- Walking through the blocks


class _Inputs(NamedTuple):
    """What every kernel reads: arrays, their BlockSpecs or, inside a kernel, references."""

    query: Any
    factor: Any
    key: Any
    value: Any
    near: Any
    far: Any
    of_queries: Any
    of_keys: Any
    rows: Any
    """More arrays [B, N, 1, T] and [B, N, T, H2]."""


class _Walk(NamedTuple):
    """The order in which a kernel visits blocks: the last axis of the grid adds up what the others begin."""

    grid: tuple[int, ...]
    at: Callable[..., tuple[Any, Any, Any, Any, Any]]
    """From indices of the grid and the offset: batch row, query head, query block, key block, and whether they meet."""
    parallel: int
    """The number of leading axes whose results do not depend on each other."""


def _along_keys(call: _Call, batch: int, heads: int, *, heads_first: bool = False) -> _Walk:
    """All keys of one block of queries, then the next. With `heads_first`, a head is finished before the next."""
    steps = call.steps(call.key_blocks)

    def at(first, second, i, step, offset):
        low, high = call.keys_of(i, offset)
        b, n = (second, first) if heads_first else (first, second)
        return b, n, i, jnp.clip(low + step, 0, jnp.maximum(high, 0)), low + step <= high

    outer = (heads, batch) if heads_first else (batch, heads)
    return _Walk((*outer, call.query_blocks, steps), at, 1 if heads_first else 3)


def _along_queries(call: _Call, batch: int, kv_heads: int) -> _Walk:
    """All queries, of all heads of the group, of one block of keys, then the next."""
    steps = call.steps(call.query_blocks)

    def at(b, c, j, step, offset):
        low, high = call.queries_of(j, offset)
        i, n = low + lax.rem(step, steps), c * call.groups + lax.div(step, steps)
        last = jnp.clip(high, 0, call.query_blocks - 1)
        return b, n, jnp.clip(i, 0, last), j, i <= high

    return _Walk((batch, kv_heads, call.key_blocks, call.groups * steps), at, 3)


class _Output(NamedTuple):
    """A result of a kernel."""

    shape: tuple[int, ...]
    dtype: Any
    block: tuple[int, ...]
    place: Callable[..., tuple]
    """From batch row, query head, query block and key block to the place of its block."""


def _run(
    call: _Call,
    walk: _Walk,
    operands: _Operands,
    tokens: _Tokens,
    rows: tuple[Array, ...],
    outputs: tuple[_Output, ...],
    sums: tuple[tuple[int, ...], ...],
    *,
    visit: Callable[[_Block, _Inputs, tuple, tuple], None],
    end: Callable[[tuple, tuple], None],
    begin: Callable[[list, tuple, tuple], None] | None = None,
    flops: int,
) -> list[Array]:
    """Run a kernel.

    Args:
        sums: Shapes of float32 memory that is zero at the start of each walk along the last axis of the grid.
        visit: Called with a block of queries and keys that meet, the references to its inputs, outputs and sums.
        end: Called with outputs and sums after the last block of the axis.
        begin: Called with the indices of the grid, outputs and sums before the first.
        flops: What the matrix products take, for the compiler's estimates.
    """
    size, table = call.size, operands.table

    def spec(block: tuple[int, ...], place: Callable[..., tuple]) -> pl.BlockSpec:
        def index(*indices):
            *of_grid, offset = indices
            return place(*walk.at(*of_grid, offset[0])[:4])

        return pl.BlockSpec(block, index)

    def of_row(x: Array) -> pl.BlockSpec:
        if x.shape[2] == 1:
            return spec((1, 1, 1, size), lambda b, n, i, j: (b, n, 0, i))
        return spec((1, 1, size, x.shape[3]), lambda b, n, i, j: (b, n, i, 0))

    def of_key(x: Array) -> pl.BlockSpec:
        return spec((1, 1, size, x.shape[3]), lambda b, n, i, j: (b, lax.div(n, call.groups), j, 0))

    def of_table(back: int) -> pl.BlockSpec | None:
        if table is None:
            return None
        shared = table.shape[0] == 1
        return spec((1, 1, size), lambda b, n, i, j: (0 if shared else n, 0, i - j + call.key_blocks - back))

    def of_token(x: Array, is_query: bool) -> pl.BlockSpec:
        shared = x.shape[0] == 1
        return spec((1, 1, size), lambda b, n, i, j: (0 if shared else b, 0, i if is_query else j))

    query, factor, key, value, _ = operands
    inputs = _Inputs(query, factor, key, value, table, table, tokens.of_queries, tokens.of_keys, rows)
    specs = _Inputs(
        of_row(query),
        of_row(factor),
        of_key(key),
        of_key(value),
        of_table(0),
        of_table(1),
        [of_token(x, True) for x in tokens.of_queries],
        [of_token(x, False) for x in tokens.of_keys],
        tuple(of_row(x) for x in rows),
    )
    arrays, structure = jax.tree.flatten(inputs)

    def kernel(offset, *references):
        own, results = jax.tree.unflatten(structure, references[: len(arrays)]), references[len(arrays) :]
        results, own_sums = results[: len(outputs)], results[len(outputs) :]
        indices = [pl.program_id(axis) for axis in range(len(walk.grid))]
        _, _, i, j, meet = walk.at(*indices, offset[0])

        @pl.when(indices[-1] == 0)
        def _():
            for reference in own_sums:
                reference[...] = jnp.zeros(reference.shape, jnp.float32)
            if begin is not None:
                begin(indices, results, own_sums)

        whole = call.all_visible(i, j, offset[0], tokens)
        for masked in (True, False):

            @pl.when(meet & (jnp.logical_not(whole) if masked else whole))
            def _(masked=masked):
                visit(_Block(call, own, offset[0], i, j, masked), own, results, own_sums)

        @pl.when(indices[-1] == walk.grid[-1] - 1)
        def _():
            end(results, own_sums)

    bytes_accessed = sum(x.size * x.dtype.itemsize for x in arrays) * 2
    return pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(output.shape, output.dtype) for output in outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=walk.grid,
            in_specs=jax.tree.leaves(specs),
            out_specs=[spec(output.block, output.place) for output in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in sums],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * walk.parallel + ("arbitrary",) * (len(walk.grid) - walk.parallel)
        ),
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=flops // 256, bytes_accessed=bytes_accessed),
        interpret=call.interpret,
    )(tokens.offset, *arrays)


# --- Forward and backward


def _forward(call: _Call, operands: _Operands, tokens: _Tokens) -> tuple[Array, Array, Array]:
    (batch, heads, length, dim), value_dim, size = operands.query.shape, operands.value.shape[-1], call.size

    def begin(indices, results, sums):
        sums[0][...] = jnp.full((1, size), MASKED / 2, jnp.float32)

    def visit(block: _Block, own, results, sums):
        largest, normaliser, weighted, output = sums
        logits, _ = block.logits()
        before = largest[...]
        now = jnp.maximum(before, logits.max(0, keepdims=True))
        weights = jnp.exp(logits - now)
        moved = before - now
        decay = jnp.exp(moved)
        if call.with_entropy:
            relative = (weights * (logits - now)).sum(0, keepdims=True)
            weighted[...] = decay * (weighted[...] + moved * normaliser[...]) + relative
        largest[...] = now
        normaliser[...] = decay * normaliser[...] + weights.sum(0, keepdims=True)
        weights = weights.astype(block.value.dtype)
        kept, added = decay * output[...], _dot(call, block.value, weights, (0, 0))
        output[...] = kept + added
        if block.visible is not None:

            @pl.when(jnp.logical_not(jnp.isfinite(added).all()))
            def _():  # as `weighted_sum`: values that are not finite reach the queries that see them, and no other
                seen = _dot(call, _nonfinite(block.value), (weights != 0).astype(jnp.float32), (0, 0)) > 0
                output[...] = kept + jnp.where(seen, added, _dot(call, block.finite_value, weights, (0, 0)))

    def end(results, sums):
        largest, normaliser, weighted, output = (reference[...] for reference in sums)
        state = SoftmaxState(largest, normaliser, weighted if call.with_entropy else None)
        normaliser, entropy, logsumexp = state.end()
        results[0][0, 0] = (output / normaliser).T.astype(results[0].dtype)
        results[1][0, 0], results[2][0, 0] = entropy, logsumexp

    of_rows = _Output((batch, heads, 1, length), jnp.float32, (1, 1, 1, size), lambda b, n, i, j: (b, n, 0, i))
    output, entropy, logsumexp = _run(
        call,
        _along_keys(call, batch, heads),
        operands,
        tokens,
        (),
        (_of_queries(operands.query, value_dim, operands.value.dtype, size), of_rows, of_rows),
        ((1, size), (1, size), (1, size), (value_dim, size)),
        begin=begin,
        visit=visit,
        end=end,
        flops=call.flops(dim + value_dim, batch * heads),
    )
    return output, entropy, logsumexp


def _nonfinite(x: Array) -> Float[Array, "k H"]:
    return 1 - jnp.isfinite(x.astype(jnp.float32)).astype(jnp.float32)


def _of_queries(query: Array, dim: int, dtype: Any, size: int) -> _Output:
    """A result like the queries, with another head dim."""
    return _Output((*query.shape[:3], dim), dtype, (1, 1, size, dim), lambda b, n, i, j: (b, n, i, 0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: _Call, operands: _Operands, tokens: _Tokens):
    return _forward(call, operands, tokens)


def _attend_forward(call: _Call, operands: _Operands, tokens: _Tokens):
    results = _forward(call, operands, tokens)
    return results, (operands, tokens, results)


def _attend_backward(call: _Call, residuals, cotangents):
    operands, tokens, (output, entropy, logsumexp) = residuals
    d_output, d_entropy, d_logsumexp = cotangents
    (batch, heads, _, dim), (_, kv_heads, _, value_dim) = operands.query.shape, operands.value.shape
    size, table = call.size, operands.table

    seen = logsumexp != -jnp.inf
    # As in `streaming.py`: the part of ds/p that is one number per row.
    row_term = d_logsumexp - (output.astype(jnp.float32) * d_output.astype(jnp.float32)).sum(-1)[:, :, None]
    if call.with_entropy:
        row_term -= d_entropy * (entropy - logsumexp)
    # With a logsumexp of -MASKED, the weights of a row that sees no key are e^(s + MASKED) = 0.
    rows = d_output, jnp.where(seen, row_term, 0.0), jnp.where(seen, logsumexp, -MASKED), d_entropy

    def gradients(block: _Block, own: _Inputs):
        """Weights, and the gradients of logits and of the scaled q·k."""
        d_output, row_term, logsumexp, d_entropy = (reference[0, 0] for reference in own.rows)
        logits, slope = block.logits()
        weights = block.shown(jnp.exp(logits - logsumexp))
        d_logits = _dot(call, block.finite_value, d_output, (1, 1)) + row_term
        if call.with_entropy:
            d_logits -= d_entropy * logits
        d_logits = block.shown(d_logits * weights)
        return weights, d_logits, d_logits if slope is None else block.shown(d_logits * slope)

    product_dtype = jnp.promote_types(operands.query.dtype, operands.key.dtype)

    def visit_queries(block: _Block, own, results, sums):
        _, d_logits, d_product = gradients(block, own)
        sums[0][...] += _dot(call, block.finite_key, d_product.astype(product_dtype), (0, 0))
        if table is not None:
            start = pl.multiple_of((block.i - block.j + call.key_blocks - 1) * size, size)
            results[1][0, :, pl.ds(start, 2 * size)] += _unsheared(d_logits)

    def end_queries(results, sums):
        results[0][0, 0] = sums[0][...].T

    def begin_queries(indices, results, sums):
        if table is not None:

            @pl.when((indices[1] == 0) & (indices[2] == 0))
            def _():
                results[1][...] = jnp.zeros(results[1].shape, jnp.float32)

    def visit_keys(block: _Block, own, results, sums):
        weights, _, d_product = gradients(block, own)
        d_output = own.rows[0][0, 0]
        sums[0][...] += _dot(call, (d_product * block.factor).astype(product_dtype), block.finite_query, (1, 0))
        sums[1][...] += _dot(call, weights.astype(d_output.dtype), d_output, (1, 0))

    def end_keys(results, sums):
        for result, total in zip(results, sums, strict=True):
            result[0, 0] = total[...].astype(result.dtype)

    outputs = [_of_queries(operands.query, dim, jnp.float32, size)]
    if table is not None:
        span = table.shape[-1]
        outputs.append(_Output((heads, 1, span), jnp.float32, (1, 1, span), lambda b, n, i, j: (n, 0, 0)))
    flops = call.flops(2 * dim + value_dim, batch * heads)
    walk = _along_keys(call, batch, heads, heads_first=table is not None)
    d_scaled, *d_table = _run(
        call,
        walk,
        operands,
        tokens,
        rows,
        tuple(outputs),
        ((dim, size),),
        begin=begin_queries,
        visit=visit_queries,
        end=end_queries,
        flops=flops,
    )
    d_key, d_value = _run(
        call,
        _along_queries(call, batch, kv_heads),
        operands,
        tokens,
        rows,
        tuple(
            _Output(x.shape, x.dtype, (1, 1, size, x.shape[-1]), lambda b, n, i, j: (b, lax.div(n, call.groups), j, 0))
            for x in (operands.key, operands.value)
        ),
        ((size, dim), (size, value_dim)),
        visit=visit_keys,
        end=end_keys,
        flops=flops + call.flops(value_dim, batch * heads),
    )
    d_factor = (d_scaled * finite(operands.query)).sum(-1)[:, :, None]
    if table is not None and table.shape[0] != heads:
        d_table = [d_table[0].sum(0, keepdims=True)]
    gradients_ = _Operands(
        query=(d_scaled * operands.factor.swapaxes(2, 3)).astype(operands.query.dtype),
        factor=d_factor,
        key=d_key,
        value=d_value,
        table=d_table[0] if d_table else None,
    )
    return gradients_, None


_attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_part(call: _Call, operands: _Operands, tokens: _Tokens, final_rows):
    """Return the given results over all keys; the backward pass computes the gradient contribution of these keys."""
    return final_rows


_attend_part.defvjp(
    lambda call, operands, tokens, final_rows: (final_rows, (operands, tokens, final_rows)),
    lambda call, residuals, cotangents: (*_attend_backward(call, residuals, cotangents), None),
)
