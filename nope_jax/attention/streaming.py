"""Attention in one pass over blocks of keys: output, entropy and logsumexp together, in memory that grows with T.

A row's state after some keys is m (the largest logit s), l (Σ e^(s-m)), w (Σ (s-m)·e^(s-m)) and acc (Σ e^(s-m)·v).
A new block of keys multiplies it by a = e^(m_old - m_new) and adds its own; w also moves by (m_old - m_new)·l. At the end
output = acc/l, logsumexp = m + ln l, entropy = ln l - w/l. The backward pass computes each block again from the logsumexp
(Dao et al. 2022, arXiv 2205.14135), and adds to the gradient of a logit that of its row's entropy, -p·(s - logsumexp + entropy).

Blocks are visited diagonal by diagonal: the pairs (i, j) of query and key blocks with the same i - j. What depends on
distance alone (a bias, the causal mask, a window) is the same for a whole diagonal, so it is made once for all its blocks,
and diagonals that hold nothing visible are never visited.

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, G = N/K, H head dim;
n, c the number and size of query blocks, j and c those of key blocks (blocks are square).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from nope_jax.attention.reference import MASKED
from nope_jax.attention.visibility import Visibility
from nope_jax.encodings import Block, BlockLogit, BlockValue, DistanceLogit
from nope_jax.encodings.encoding import Logit

BLOCK_SIZE = 256
"""Queries and keys per block: 64 is 2.6 times slower on a CPU, 1,024 1.8 times (`python -m benchmarks.attention`)."""


def streaming_attention(
    query: Shaped[Array, "B T N H"],
    factor: Float[Array, "#B #N T"],
    key: Shaped[Array, "B S K H"],
    value: Shaped[Array, "B S K H2"],
    logit: Logit | None,
    value_term: BlockValue | None,
    visibility: Visibility,
    precision: jax.lax.PrecisionLike = None,
    *,
    with_entropy: bool = True,
    block_size: int = BLOCK_SIZE,
) -> tuple[Shaped[Array, "B T N H2"], Float[Array, "B N T"], Float[Array, "B N T"]]:
    """Same arguments and results as `reference_attention`; differentiable in reverse mode.

    Args:
        with_entropy: Whether to carry w; without it the entropy returned is 0.
        block_size: At most so many queries and keys per block.
    """
    batch, query_length, num_heads, _ = query.shape
    key_length, kv_heads = key.shape[1:3]
    largest = max(query_length, key_length)
    size = -(-largest // -(-largest // block_size))  # as few blocks as fit, and then as small as they can be
    size = min(-(-size // 8) * 8, max(block_size, 1))

    contiguous = visibility.query_positions is None and visibility.key_positions is None
    grid = _Grid(
        query_length=query_length,
        key_length=key_length,
        size=size,
        groups=num_heads // kv_heads,
        contiguous=contiguous,
        per_block=not contiguous
        or visibility.query_segments is not None
        or visibility.mask is not None
        or (not visibility.is_causal and key_length % size != 0),
        with_entropy=with_entropy,
        precision=precision,
    )
    distance_values = None
    if isinstance(logit, DistanceLogit):
        if contiguous:
            distance = grid.distances()
            distance = jnp.maximum(distance, 0) if visibility.is_causal else distance
            distance_values, logit = logit.function(logit.parameters, distance).astype(jnp.float32), None
        else:
            logit = BlockLogit(_distance_block, logit)

    query_positions, key_positions = visibility.positions(query_length, key_length)
    visibility = dataclasses.replace(
        visibility,
        query_positions=_cut(query_positions, grid.size, 1),
        key_positions=_cut(key_positions, grid.size, 1),
        query_segments=jax.tree.map(lambda x: _cut(x, grid.size, 1), visibility.query_segments),
        key_segments=jax.tree.map(lambda x: _cut(x, grid.size, 1), visibility.key_segments),
        mask=None if visibility.mask is None else _cut_mask(visibility.mask, grid),
    )
    if isinstance(logit, BlockLogit):
        logit = dataclasses.replace(
            logit,
            query_features=jax.tree.map(lambda x: _cut(x, grid.size, 1), logit.query_features),
            key_features=jax.tree.map(lambda x: _cut(x, grid.size, 1), logit.key_features),
        )
    factor = jnp.broadcast_to(factor, (factor.shape[0], num_heads, query_length))
    operands = _Operands(
        query=_heads_first(query, kv_heads, grid.size),
        factor=_cut(factor.reshape(factor.shape[0], kv_heads, grid.groups, -1), grid.size, 3),
        key=_heads_first(key, kv_heads, grid.size)[:, :, :, 0],
        value=_heads_first(value, kv_heads, grid.size)[:, :, :, 0],
        distance_values=distance_values,
        logit=logit,
        value_term=value_term,
    )
    out, entropy, logsumexp = _attend(grid, operands, visibility)
    out = jnp.moveaxis(out, 0, 3).reshape(batch, num_heads, -1, out.shape[-1])
    rows = [jnp.moveaxis(x, 0, 3).reshape(batch, num_heads, -1)[..., :query_length] for x in (entropy, logsumexp)]
    return jnp.swapaxes(out[:, :, :query_length], 1, 2).astype(value.dtype), *rows


@dataclasses.dataclass(frozen=True)
class _Grid:
    """The static side of a call: how queries and keys fall into blocks."""

    query_length: int
    key_length: int
    size: int
    groups: int
    contiguous: bool
    """Positions run on, so that the distance between two blocks follows from their indices."""
    per_block: bool
    """What is visible is not decided by distance alone, and is worked out for every block."""
    with_entropy: bool
    precision: Any

    @property
    def query_blocks(self) -> int:
        return -(-self.query_length // self.size)

    @property
    def key_blocks(self) -> int:
        return -(-self.key_length // self.size)

    def distance_range(self, diagonal: int) -> tuple[int, int]:
        """Smallest and largest distance within the blocks of a diagonal, when positions are contiguous."""
        middle = diagonal * self.size + self.key_length - self.query_length
        return middle - (self.size - 1), middle + (self.size - 1)

    def distances(self):
        """Every distance between a query and a key of the grid, in order: what `distance_values` holds a value of."""
        return jnp.arange(self.distance_range(1 - self.key_blocks)[0], self.distance_range(self.query_blocks - 1)[1] + 1)

    def diagonals(self, visibility: Visibility) -> list[tuple[int, int, bool]]:
        """Ranges (start, stop, masked) of neighbouring diagonals that hold something visible and are treated alike."""
        first, last = 1 - self.key_blocks, self.query_blocks - 1
        if not self.contiguous:
            return [(first, last + 1, False)]
        kinds = []
        for diagonal in range(first, last + 1):
            low, high = self.distance_range(diagonal)
            nearest = 0 if low <= 0 <= high else min(abs(low), abs(high))
            window = visibility.window or max(abs(low), abs(high)) + 1
            if not (visibility.is_causal and high < 0) and nearest < window:
                kinds.append((diagonal, (visibility.is_causal and low < 0) or max(abs(low), abs(high)) >= window))
        ranges: list[tuple[int, int, bool]] = []
        for diagonal, masked in kinds:
            if ranges and ranges[-1][2] == masked:
                ranges[-1] = (ranges[-1][0], diagonal + 1, masked)
            else:
                ranges.append((diagonal, diagonal + 1, masked))
        return ranges


class _Operands(NamedTuple):
    """The differentiable side of a call, cut into blocks."""

    query: Shaped[Array, "n B K G c H"]
    factor: Float[Array, "n #B K G c"]
    key: Shaped[Array, "j B K c H"]
    value: Shaped[Array, "j B K c H2"]
    distance_values: Float[Array, "N distances"] | None
    logit: BlockLogit | None
    value_term: BlockValue | None


class _Rows(NamedTuple):
    """What is known of each row after the blocks visited so far: m, l, w and acc."""

    largest: Float[Array, "*n B K G c"]
    normaliser: Float[Array, "*n B K G c"]
    weighted: Float[Array, "*n B K G c"] | None
    output: Float[Array, "*n B K G c H2"]


def _distance_block(logit: DistanceLogit, block: Block) -> Array:
    return logit.block(block)


def _cut(x: Array, size: int, axis: int) -> Array:
    """Cut an axis into blocks of a size, the last one padded by its edge, and move their index to the front."""
    blocks = -(-x.shape[axis] // size)
    if blocks * size != x.shape[axis]:
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, blocks * size - x.shape[axis])
        x = jnp.pad(x, padding, mode="edge")
    return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, size, *x.shape[axis + 1 :]), axis, 0)


def _heads_first(x: Shaped[Array, "B T N H"], kv_heads: int, size: int) -> Shaped[Array, "n B K G c H"]:
    x = _cut(x, size, 1)
    n, batch, c, heads, dim = x.shape
    return x.reshape(n, batch, c, kv_heads, heads // kv_heads, dim).transpose(0, 1, 3, 4, 2, 5)


def _cut_mask(mask: Array, grid: _Grid) -> Array:
    """A mask [B or 1, N or 1, T or 1, S or 1] as [j, n, B or 1, N or 1, c, c]."""
    mask = jnp.broadcast_to(mask, (*mask.shape[:2], grid.query_length, grid.key_length))
    return _cut(_cut(mask, grid.size, 2), grid.size, 4)


def _at(x: Any, index) -> Any:
    """Entry `index` of every leaf."""
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), x)


def _put(x: Any, entry: Any, index) -> Any:
    return jax.tree.map(lambda leaf, new: lax.dynamic_update_index_in_dim(leaf, new, index, 0), x, entry)


def _shear(values: Float[Array, "N 2c-1"]) -> Float[Array, "N c c"]:
    """A block whose entry (x, y) is the value of distance x - y, from the values of -(c-1)..c-1; no gather."""
    heads, span = values.shape
    size = (span + 1) // 2
    rows = jnp.tile(jnp.pad(values[:, ::-1], ((0, 0), (0, 1))), (1, size))
    return rows[:, : size * span].reshape(heads, size, span)[:, :, size - 1 :]


def _unshear(block: Float[Array, "N c c"]) -> Float[Array, "N 2c-1"]:
    """The transpose of `_shear`: sums of a block along its diagonals."""
    heads, size, _ = block.shape
    rows = jnp.pad(block, ((0, 0), (0, 0), (size - 1, 0))).reshape(heads, -1)
    rows = jnp.pad(rows, ((0, 0), (0, size))).reshape(heads, size, 2 * size)
    return rows.sum(1)[:, -2::-1]


def _tile(grid: _Grid, operands: _Operands, visibility: Visibility, diagonal, masked: bool):
    """What all blocks of a diagonal add to their logits, [K, G, c, c] or [c, c]; None when nothing."""
    c = grid.size
    tile = None
    if operands.distance_values is not None:
        heads = operands.distance_values.shape[0]
        start = (diagonal + grid.key_blocks - 1) * c
        values = lax.dynamic_slice_in_dim(operands.distance_values, start, 2 * c - 1, axis=1)
        tile = _shear(values).reshape(heads // grid.groups, grid.groups, c, c)
    if masked:
        middle = diagonal * c + grid.key_length - grid.query_length
        distance = middle + jnp.arange(c)[:, None] - jnp.arange(c)[None, :]
        tile = jnp.where(visibility.by_distance(distance), 0.0 if tile is None else tile, MASKED)
    return tile


def _visible(grid: _Grid, visibility: Visibility, i, j):
    """What the queries of block i see of the keys of block j, [B or 1, K or 1, G or 1, c, c]."""
    rule = dataclasses.replace(
        visibility,
        query_positions=_at(visibility.query_positions, i),
        key_positions=_at(visibility.key_positions, j),
        query_segments=_at(visibility.query_segments, i),
        key_segments=_at(visibility.key_segments, j),
        mask=_at(_at(visibility.mask, j), i),
    )
    visible = rule.matrix(grid.size, grid.size)
    visible &= j * grid.size + jnp.arange(grid.size) < grid.key_length
    batch, heads = visible.shape[:2]
    split = (1, 1) if heads == 1 else (heads // grid.groups, grid.groups)
    return visible.reshape(batch, *split, grid.size, grid.size)


def _sweep(grid: _Grid, visibility: Visibility, visit_diagonal, state):
    """Fold visit_diagonal(diagonal, masked, state) over the diagonals that hold something visible."""
    for start, stop, masked in grid.diagonals(visibility):
        state = lax.fori_loop(start, stop, lambda diagonal, s, masked=masked: visit_diagonal(diagonal, masked, s), state)
    return state


def _along(grid: _Grid, visibility: Visibility, diagonal, state, take, update, put):
    """Visit the blocks (i, j) of a diagonal: entries = take(state, i, j), state = put(state, update(...), i, j).

    Only the entries pass through the branch that skips a block with nothing visible: XLA may copy what a branch carries.
    """

    def visit(i, state):
        j = i - diagonal
        entries = take(state, i, j)
        if grid.per_block:
            visible = _visible(grid, visibility, i, j)
            entries = lax.cond(visible.any(), lambda e: update(i, j, visible, e), lambda e: e, entries)
        else:
            entries = update(i, j, None, entries)
        return put(state, entries, i, j)

    return lax.fori_loop(
        jnp.maximum(diagonal, 0), jnp.minimum(grid.query_blocks, grid.key_blocks + diagonal), visit, state
    )


def _merge_heads(x: Shaped[Array, "B K G ..."]) -> Shaped[Array, "B N ..."]:
    return x.reshape(x.shape[0], -1, *x.shape[3:])


class _Pair:
    """One pair of blocks: its logits and terms, as functions of what they are differentiated by."""

    def __init__(self, grid: _Grid, operands: _Operands, visibility: Visibility, i, j):
        self.grid, self.operands, self.visibility, self.i, self.j = grid, operands, visibility, i, j
        self.query, self.factor = _at((operands.query, operands.factor), i)
        self.key, self.value = _at((operands.key, operands.value), j)
        self.scaled = self.query.astype(jnp.float32) * self.factor[..., None]

    def einsum(self, subscripts: str, *operands):
        return jnp.einsum(
            subscripts, *operands, precision=self.grid.precision, preferred_element_type=jnp.float32
        )

    def block(self, query, key, logit: BlockLogit | None) -> Block:
        """The pair as an encoding's function sees it."""
        return Block(
            query=_merge_heads(query),
            key=jnp.repeat(key, self.grid.groups, axis=1),
            query_positions=_at(self.visibility.query_positions, self.i),
            key_positions=_at(self.visibility.key_positions, self.j),
            query_features=logit and _at(logit.query_features, self.i),
            key_features=logit and _at(logit.key_features, self.j),
        )

    def added(self, logit: BlockLogit, query, key):
        """What a `BlockLogit` adds, [B or 1, K, G, c, c]."""
        added = logit.block(self.block(query, key, logit))
        heads = self.grid.groups * key.shape[1]
        added = jnp.broadcast_to(added, (added.shape[0], heads, *added.shape[2:]))
        return added.reshape(-1, key.shape[1], self.grid.groups, *added.shape[2:])

    def value_added(self, term: BlockValue, weights, query, key):
        """What a `BlockValue` adds, [B, K, G, c, H2]."""
        added = term.block(_merge_heads(weights), self.block(query, key, self.operands.logit))
        return added.reshape(*query.shape[:-1], -1)

    def logits(self, tile, visible):
        if self.key.dtype == jnp.float32:
            logits = self.einsum("bkgqh,bksh->bkgqs", self.scaled, self.key)
        else:  # a scaled query would have to be rounded once more
            logits = self.einsum("bkgqh,bksh->bkgqs", self.query, self.key) * self.factor[..., None]
        if tile is not None:
            logits += tile
        if self.operands.logit is not None:
            logits += self.added(self.operands.logit, self.scaled, self.key)
        return logits if visible is None else jnp.where(visible, logits, MASKED)


def _forward(grid: _Grid, operands: _Operands, visibility: Visibility):
    def update(tile, i, j, visible, rows: _Rows) -> _Rows:
        pair = _Pair(grid, operands, visibility, i, j)
        logits = pair.logits(tile, visible)
        largest = jnp.maximum(rows.largest, logits.max(-1))
        relative = logits - largest[..., None]
        weights = jnp.exp(relative)
        moved = rows.largest - largest
        decay = jnp.exp(moved)
        weighted = rows.weighted
        if weighted is not None:
            weighted = decay * (weighted + moved * rows.normaliser) + (weights * relative).sum(-1)
        output = decay[..., None] * rows.output
        output += pair.einsum("bkgqs,bksh->bkgqh", weights.astype(pair.value.dtype), pair.value)
        if operands.value_term is not None:
            output += pair.value_added(operands.value_term, weights, pair.scaled, pair.key)
        return _Rows(largest, decay * rows.normaliser + weights.sum(-1), weighted, output)

    def visit_diagonal(diagonal, masked, rows):
        tile = _tile(grid, operands, visibility, diagonal, masked)
        return _along(
            grid,
            visibility,
            diagonal,
            rows,
            take=lambda rows, i, j: _at(rows, i),
            update=functools.partial(update, tile),
            put=lambda rows, entry, i, j: _put(rows, entry, i),
        )

    shape = operands.query.shape[:-1]
    rows = _Rows(
        largest=jnp.full(shape, MASKED),
        normaliser=jnp.zeros(shape),
        weighted=jnp.zeros(shape) if grid.with_entropy else None,
        output=jnp.zeros((*shape, operands.value.shape[-1])),
    )
    rows = _sweep(grid, visibility, visit_diagonal, rows)

    seen = rows.largest > MASKED / 2
    normaliser = jnp.where(seen, rows.normaliser, 1.0)
    output = jnp.where(seen, 1 / normaliser, 0.0)[..., None] * rows.output
    logsumexp = jnp.where(seen, rows.largest + jnp.log(normaliser), -jnp.inf)
    if rows.weighted is None:
        entropy = jnp.zeros(shape)
    else:
        entropy = jnp.where(seen, jnp.log(normaliser) - rows.weighted / normaliser, 0.0)
    return output.astype(operands.value.dtype), entropy, logsumexp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(grid: _Grid, operands: _Operands, visibility: Visibility):
    return _forward(grid, operands, visibility)


def _attend_forward(grid: _Grid, operands: _Operands, visibility: Visibility):
    results = _forward(grid, operands, visibility)
    return results, (operands, visibility, results)


def _attend_backward(grid: _Grid, residuals, cotangents):
    operands, visibility, (output, entropy, logsumexp) = residuals
    d_output, d_entropy, d_logsumexp = cotangents
    seen = jnp.isfinite(logsumexp)
    logsumexp = jnp.where(seen, logsumexp, -MASKED)  # so that e^(s - logsumexp) is 0 in rows that see nothing
    # The part of ds/p that is one number per row: -(output·d_output) + d_logsumexp - d_entropy·(entropy - logsumexp).
    row_term = d_logsumexp - (output.astype(jnp.float32) * d_output.astype(jnp.float32)).sum(-1)
    if grid.with_entropy:
        row_term -= d_entropy * (entropy - logsumexp)
    row_term = jnp.where(seen, row_term, 0.0)

    def update(tile, i, j, visible, gradients):
        d_query, d_key, d_value, d_tile, d_logit, d_value_term = gradients
        pair = _Pair(grid, operands, visibility, i, j)
        d_out, row, lse = _at((d_output, row_term, logsumexp), i)
        logits = pair.logits(tile, visible)
        weights = jnp.exp(logits - lse[..., None])
        d_weights = pair.einsum("bkgqh,bksh->bkgqs", d_out, pair.value)
        if operands.value_term is not None:
            _, pull = jax.vjp(pair.value_added, operands.value_term, weights, pair.scaled, pair.key)
            added, d_weights_added, d_scaled, d_key_added = pull(d_out.astype(jnp.float32))
            d_value_term = _add(d_value_term, added)
            d_weights += d_weights_added
            d_query, d_key = d_query + d_scaled, d_key + d_key_added
        d_logits = d_weights + row[..., None]
        if grid.with_entropy:
            d_logits -= _at(d_entropy, i)[..., None] * logits
        d_logits *= weights

        low = d_logits.astype(pair.key.dtype)
        d_query += pair.einsum("bkgqs,bksh->bkgqh", low, pair.key)
        d_key += pair.einsum("bkgqs,bkgqh->bksh", low, pair.scaled.astype(low.dtype))
        d_value += pair.einsum("bkgqs,bkgqh->bksh", weights.astype(d_out.dtype), d_out)
        if d_tile is not None:
            d_tile += d_logits.sum(0)
        if operands.logit is not None:
            added, pull = jax.vjp(pair.added, operands.logit, pair.scaled, pair.key)
            logit_added, d_scaled, d_key_added = pull(_sum_to(d_logits, added.shape))
            d_logit = _add(d_logit, logit_added)
            d_query, d_key = d_query + d_scaled, d_key + d_key_added
        return d_query, d_key, d_value, d_tile, d_logit, d_value_term

    def visit_diagonal(diagonal, masked, gradients):
        tile = _tile(grid, operands, visibility, diagonal, masked)
        d_query, d_key, d_value, d_values, d_logit, d_value_term = gradients
        d_tile = None if d_values is None else jnp.zeros((*operands.key.shape[2:3], grid.groups, grid.size, grid.size))
        d_query, d_key, d_value, d_tile, d_logit, d_value_term = _along(
            grid,
            visibility,
            diagonal,
            (d_query, d_key, d_value, d_tile, d_logit, d_value_term),
            take=lambda g, i, j: (_at(g[0], i), _at(g[1], j), _at(g[2], j), *g[3:]),
            update=functools.partial(update, tile),
            put=lambda g, e, i, j: (_put(g[0], e[0], i), _put(g[1], e[1], j), _put(g[2], e[2], j), *e[3:]),
        )
        if d_values is not None:
            start = (diagonal + grid.key_blocks - 1) * grid.size
            sums = _unshear(d_tile.reshape(-1, grid.size, grid.size))
            here = lax.dynamic_slice_in_dim(d_values, start, sums.shape[1], axis=1)
            d_values = lax.dynamic_update_slice_in_dim(d_values, here + sums, start, axis=1)
        return d_query, d_key, d_value, d_values, d_logit, d_value_term

    zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape))
    gradients = zeros(
        (
            operands.query,
            operands.key,
            operands.value,
            operands.distance_values,
            operands.logit,
            operands.value_term,
        )
    )
    d_scaled, d_key, d_value, d_values, d_logit, d_value_term = _sweep(grid, visibility, visit_diagonal, gradients)
    d_factor = (d_scaled * operands.query.astype(jnp.float32)).sum(-1)
    gradients = _Operands(
        query=d_scaled * operands.factor[..., None],
        factor=_sum_to(d_factor, operands.factor.shape),
        key=d_key,
        value=d_value,
        distance_values=d_values,
        logit=d_logit,
        value_term=d_value_term,
    )
    return jax.tree.map(lambda g, x: g.astype(x.dtype), gradients, operands), None


_attend.defvjp(_attend_forward, _attend_backward)


def _add(x: Any, y: Any) -> Any:
    return jax.tree.map(jnp.add, x, y)


def _sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """Sum over the axes along which an array of a shape was broadcast to x."""
    axes = tuple(axis for axis, (wide, narrow) in enumerate(zip(x.shape, shape, strict=True)) if wide != narrow)
    return x.sum(axes, keepdims=True)
