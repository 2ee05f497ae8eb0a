"""Attention over a mesh of devices: rows of the batch and heads side by side, a long sequence in a ring.

Under a mesh in context (`jax.set_mesh`) every device computes the attention of its rows and heads, and nothing is
exchanged. Where the mesh has a `sequence` axis of n devices, each holds 1/n of the queries and of the keys, and the
keys go round (Liu et al. 2023, arXiv 2310.01889): in n steps every device sees all of them, while it holds two shares
at a time. What it sees of a row in one step has a logsumexp, an entropy and an output of its own, which merge with
those of the steps before: p = e^(lse_part - lse), output Σ p·output_part, entropy Σ p·(entropy_part + lse - lse_part).
Backward, keys and values go round once more, together with their gradients; a part's gradient needs only the row's
final logsumexp, entropy and output. So memory is that of 1/n of the sequence in both directions.

Causal queries see few keys at the start of a sequence and many at its end. For all devices to have as much to do, the
sequence is cut into 2n halves of a share, and device d works on halves d and 2n-1-d ("zigzag"). Then step by step it
has two pairs of halves to compute, of four: pairs in which no query sees a key are never computed. A `ScanLogit`, whose
sums run from the last key to the first, goes round in the order of the sequence itself, which is the order of the sums,
and hands on from step to step.

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, H head dim; n devices in the ring,
P parts that a device's share of the sequence is cut into (two halves, or one), C their length.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from nope_jax.attention.mask_spec import MaskSpec
from nope_jax.encodings import BlockValue, DistanceLogit, ScanLogit
from nope_jax.encodings.encoding import Logit

BATCH, LENGTH, HEADS = ("data", "fsdp"), "sequence", "tensor"
"""Axes of the mesh that rows of the batch, positions and heads are spread over."""

Results = tuple[Shaped[Array, "B T N H2"], Float[Array, "B N T"], Float[Array, "B N T"]]
"""Output, entropy and logsumexp."""


_Function = TypeVar("_Function", bound=Callable)


def with_explicit_axes(function: _Function) -> _Function:
    """An attention function, for arrays on a mesh with Explicit axes too (what `jax.make_mesh` makes).

    Within it the axes are Auto. Arrays come in from wherever they are, and results go out split as the query was.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapped(*args: Any, **keywords: Any) -> Any:
        query = signature.bind_partial(*args, **keywords).arguments.get("query")
        mesh = jax.typeof(query).sharding.mesh if isinstance(query, jax.Array) else None
        if mesh is None or not mesh.explicit_axes:
            return function(*args, **keywords)
        batch, length, heads, _ = jax.typeof(query).sharding.spec
        split = {4: PartitionSpec(batch, length, heads, None), 3: PartitionSpec(batch, heads, length)}
        with jax.sharding.use_abstract_mesh(mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, AxisType.Auto))):
            args, keywords = jax.tree.map(
                lambda x: jax.sharding.reshard(x, PartitionSpec(*[None] * x.ndim)) if isinstance(x, jax.Array) else x,
                (args, keywords),
            )
            results = function(*args, **keywords)
        return jax.tree.map(lambda x: jax.sharding.reshard(x, NamedSharding(mesh, split[x.ndim])), results)

    return wrapped  # type: ignore[return-value]


def ring_size() -> int:
    """Devices that share a sequence, in the mesh in context."""
    return _sizes().get(LENGTH, 1)


def spread_attention(
    attend: Callable[..., Results],
    query: Shaped[Array, "B T N H"],
    factor: Float[Array, "#B #N T"],
    key: Shaped[Array, "B S K H"],
    value: Shaped[Array, "B S K H2"],
    logit: Logit | None,
    value_term: BlockValue | None,
    mask_spec: MaskSpec,
    precision: jax.lax.PrecisionLike,
    *,
    in_parts: bool,
    with_entropy: bool,
) -> Results:
    """`attend` of the other arguments, over the devices of the mesh in context.

    An axis that its devices do not divide is not split, and neither are heads where a term does not say which axes of
    its arrays count them: then every device computes all of it. Queries against a longer cache, a mask, and what cannot
    be done in parts have the whole sequence on every device.

    Args:
        in_parts: Whether `attend` can compute keys in parts, as `streaming_attention` and, for causal attention at
            positions that run on, `scanning_attention`.
        with_entropy: Whether the entropy is asked for.

    """
    dims = _sizes()
    (batch, query_length), (key_length, kv_heads) = query.shape[:2], key.shape[1:3]
    rows = tuple(axis for axis in BATCH if axis in dims)
    rows = rows if batch % math.prod(dims[axis] for axis in rows) == 0 else ()
    heads = HEADS if HEADS in dims and kv_heads % dims[HEADS] == 0 and _says_heads(logit, value_term) else None
    if isinstance(logit, ScanLogit):
        in_parts = in_parts and mask_spec.is_causal and mask_spec.contiguous
    ring = in_parts and LENGTH in dims and query_length == key_length and mask_spec.mask is None
    ring = ring and query_length % dims[LENGTH] == 0
    split = _Split(rows or None, LENGTH if ring else None, heads)
    if not any(split):
        return attend(query, factor, key, value, logit, value_term, mask_spec, precision)

    if not mask_spec.contiguous:
        query_positions, key_positions = mask_spec.positions(query_length, key_length)
        mask_spec = dataclasses.replace(mask_spec, query_positions=query_positions, key_positions=key_positions)

    def local(query, factor, key, value, logit, value_term, mask_spec):
        if heads is not None and isinstance(logit, DistanceLogit):
            logit = DistanceLogit(_OwnHeads(logit.function), logit.parameters)
        if not ring:
            return attend(query, factor, key, value, logit, value_term, mask_spec, precision)
        return _in_a_ring(attend, query, factor, key, value, logit, value_term, mask_spec, precision, with_entropy)

    per_token = split.specs("batch", "length", "heads")
    operands = query, factor, key, value, logit, value_term, mask_spec
    specs = (
        per_token(query),
        split.specs("batch", "heads", "length")(factor),
        per_token(key),
        per_token(value),
        split.of_term(logit),
        split.of_term(value_term),
        dataclasses.replace(
            jax.tree.map(split.specs("batch", "length"), mask_spec),
            mask=jax.tree.map(split.specs("batch", "heads"), mask_spec.mask),
        ),
    )
    of_rows = PartitionSpec(split.batch, split.heads, split.length)
    results = PartitionSpec(split.batch, split.length, split.heads), of_rows, of_rows
    return jax.shard_map(local, in_specs=specs, out_specs=results, check_vma=False)(*operands)


def _sizes() -> dict[str, int]:
    """Auto axes of the mesh in context that have several devices; none within a `shard_map`, where arrays are local,
    and none of a mesh with axes of other names, whose owner has plans of their own.
    """
    mesh = jax.sharding.get_abstract_mesh()
    dims = {axis: size for axis, size in mesh.shape.items() if size > 1}
    if mesh.manual_axes or not set(dims) <= {*BATCH, LENGTH, HEADS}:
        return {}
    return {axis: size for axis, size in dims.items() if axis in mesh.auto_axes}


def _says_heads(*terms: Any) -> bool:
    return all(term is None or isinstance(term, DistanceLogit) or term.heads is not None for term in terms)


class _Split(NamedTuple):
    """The axes of the mesh that a call's rows, positions and heads are split over."""

    batch: tuple[str, ...] | None
    length: str | None
    heads: str | None

    def specs(self, *names: str | None) -> Callable[[Array], PartitionSpec]:
        """From an array to its axes of the mesh, its own axes having these names; one of size 1 serves all."""
        axes = [None if name is None else getattr(self, name) for name in names]
        return lambda x: PartitionSpec(*(axis if size > 1 else None for size, axis in zip(x.shape, axes, strict=False)))

    def of_term(self, term: Any) -> Any:
        """The specs of a term's arrays: features are split as tokens are, and all of them by what they say of heads."""
        leaves, structure = jax.tree.flatten(term)
        features = len(jax.tree.leaves([getattr(term, name, None) for name in ("query_features", "key_features")]))
        heads = getattr(term, "heads", None) if self.heads else None
        specs = []
        for index, leaf in enumerate(leaves):
            names: list[str | None] = [None] * leaf.ndim
            if index >= len(leaves) - features:
                names[:2] = "batch", "length"
            axis = None if heads is None else heads[index]
            if axis is not None:
                names[axis] = "heads"
            specs.append(self.specs(*names)(leaf))
        return jax.tree.unflatten(structure, specs)


@dataclasses.dataclass(frozen=True)
class _OwnHeads:
    """A function of distance, of whose heads a device keeps its own."""

    function: Callable

    def __call__(self, parameters, distance):
        values = DistanceLogit(self.function, parameters).values(distance)
        if len(values) == 1:  # one for all heads
            return values
        own = len(values) // lax.axis_size(HEADS)
        return lax.dynamic_slice_in_dim(values, lax.axis_index(HEADS) * own, own)


# --- Within a device of the ring


class _Queries(NamedTuple):
    query: Shaped[Array, "*P B C N H"]
    factor: Float[Array, "*P #B C #N"]
    features: Any


class _Keys(NamedTuple):
    key: Shaped[Array, "*P B C K H"]
    value: Shaped[Array, "*P B C K H"]
    features: Any


class _Terms(NamedTuple):
    """The logit without its features, and the value term."""

    logit: Logit | None
    value_term: BlockValue | None


class _Tokens(NamedTuple):
    """What visibility knows of queries or keys."""

    positions: Int[Array, "*P #B C"] | None
    segments: Int[Array, "*P #B C"] | None


class _Rows(NamedTuple):
    """The results of rows."""

    output: Shaped[Array, "*P B C N H"]
    entropy: Float[Array, "*P B C N"]
    logsumexp: Float[Array, "*P B C N"]

    @classmethod
    def over_no_keys(cls, queries: _Queries, keys: _Keys) -> "_Rows":
        """The output is float32, as sums over parts are."""
        shape, width = queries.query.shape[:3], keys.value.shape[-1]
        return cls(_zeros((*shape, width)), _zeros(shape), jnp.full(shape, -jnp.inf, jnp.float32))

    def merged(self, part: "_Rows", with_entropy: bool) -> "_Rows":
        """With the results over more keys."""
        logsumexp = jnp.logaddexp(self.logsumexp, part.logsumexp)

        def share(rows: _Rows):
            seen = rows.logsumexp != -jnp.inf
            moved = jnp.where(seen, logsumexp - rows.logsumexp, 0.0)
            return jnp.where(seen, jnp.exp(-moved), 0.0), moved

        (old, old_moved), (new, new_moved) = share(self), share(part)
        entropy = self.entropy
        if with_entropy:
            entropy = old * (self.entropy + old_moved) + new * (part.entropy + new_moved)
        output = old[..., None] * self.output + new[..., None] * part.output.astype(jnp.float32)
        return _Rows(output, entropy, logsumexp)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static side of a call."""

    attend: Callable[..., Results]
    mask_spec: MaskSpec
    """Its static part."""
    precision: Any
    with_entropy: bool
    halves: bool
    """Shares are cut in two, in zigzag order, and positions run on: the halves' order says who sees whom."""


def _in_a_ring(attend, query, factor, key, value, logit, value_term, mask_spec, precision, with_entropy) -> Results:
    """`attend` of a sequence of which every device has its share, in order."""
    tokens = (
        _Tokens(mask_spec.query_positions, mask_spec.query_segments),
        _Tokens(mask_spec.key_positions, mask_spec.key_segments),
    )
    queries = _Queries(query, jnp.swapaxes(factor, 1, 2), getattr(logit, "query_features", None))
    keys = _Keys(key, value, getattr(logit, "key_features", None))
    if not isinstance(logit, DistanceLogit | None):
        logit = dataclasses.replace(logit, query_features=None, key_features=None)
    hands_on = isinstance(logit, ScanLogit)
    balanced = mask_spec.is_causal and query.shape[1] % 2 == 0 and not hands_on
    rule = MaskSpec(None, None, None, None, None, mask_spec.is_causal, mask_spec.window, mask_spec.chunk_size)
    plan = _Plan(attend, rule, precision, with_entropy, halves=balanced and mask_spec.contiguous)
    if balanced:
        queries, keys, tokens = jax.tree.map(_to_zigzag, (queries, keys, tokens))
    rows = (_scanning_ring if hands_on else _ring)(plan, queries, keys, _Terms(logit, value_term), *tokens)
    if balanced:
        rows = jax.tree.map(_from_zigzag, rows)
    return rows.output, jnp.swapaxes(rows.entropy, 1, 2), jnp.swapaxes(rows.logsumexp, 1, 2)


def _zigzag() -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """From which device to which the first and the second half of each share go: to the device of their own number,
    or of as many before the end. Each is a permutation, since one of a device's two halves is an even one.
    """
    n = lax.axis_size(LENGTH)
    first, second = ([(r, min(half, 2 * n - 1 - half)) for r, half in enumerate(range(x, 2 * n, 2))] for x in (0, 1))
    return first, second


def _to_zigzag(x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B T ..."]:
    """Halves d and 2n-1-d for 2d and 2d+1."""
    received = [lax.ppermute(half, LENGTH, to) for half, to in zip(jnp.split(x, 2, axis=1), _zigzag(), strict=True)]
    return _ordered(*received)


def _from_zigzag(x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B T ..."]:
    """The reverse of `_to_zigzag`."""
    halves = jnp.split(_ordered(*jnp.split(x, 2, axis=1)), 2, axis=1)
    back = [[(target, source) for source, target in to] for to in _zigzag()]
    return jnp.concatenate([lax.ppermute(half, LENGTH, to) for half, to in zip(halves, back, strict=True)], axis=1)


def _ordered(even: Array, odd: Array) -> Array:
    """Two halves of a share, the even one first where the device's number is even."""
    swapped = lax.axis_index(LENGTH) % 2 == 1
    return jnp.concatenate([jnp.where(swapped, odd, even), jnp.where(swapped, even, odd)], axis=1)


def _in_parts(plan: _Plan, x: Any) -> Any:
    """Shares [B, T, ...] cut into parts [P, B, C, ...]."""
    count = 2 if plan.halves else 1
    return jax.tree.map(lambda leaf: jnp.stack(jnp.split(leaf, count, axis=1)), x)


def _joined(x: Any) -> Any:
    """The reverse of `_in_parts`."""
    return jax.tree.map(lambda leaf: jnp.concatenate(list(leaf), axis=1), x)


def _at(x: Any, part) -> Any:
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, part, keepdims=False), x)


def _zeros(shape: tuple[int, ...]) -> Array:
    return jnp.zeros(shape, jnp.float32)


def _put(x: Any, entry: Any, part) -> Any:
    return jax.tree.map(lambda leaf, new: lax.dynamic_update_index_in_dim(leaf, new, part, 0), x, entry)


def _add_at(x: Any, entry: Any, part) -> Any:
    return _put(x, _summed(_at(x, part), entry), part)


def _summed(sums: Any, more: Any) -> Any:
    """Float32 sums with more, of whatever dtype it is."""
    return jax.tree.map(lambda x, y: x + y.astype(x.dtype), sums, more)


def _pass_on(x: Any, by: int = 1) -> Any:
    """To the next device of the ring."""
    n = lax.axis_size(LENGTH)
    return jax.tree.map(lambda leaf: lax.ppermute(leaf, LENGTH, [(d, (d + by) % n) for d in range(n)]), x)


def _sweep(plan: _Plan, keys: tuple[_Keys, _Tokens], update, state, sums, *, reverse: bool = False):
    """Fold update(i, j, rule, keys, state, sums) over the pairs of a part i of the queries and j of the keys held.

    The keys go round, a device's own first and then those before it, or in the reverse order; `sums` go with the keys
    that they are of, and come home.
    """
    n, device = lax.axis_size(LENGTH), lax.axis_index(LENGTH)
    size, run_on = keys[0].key.shape[2], keys[1].positions is None

    def start(source, part):
        """Position of the first token of a part of the share that began at a device."""
        return size * (jnp.where(part == 0, source, 2 * n - 1 - source) if plan.halves else source)

    def visit(i, j, keys, source, folded):
        if not run_on:
            return update(i, j, plan.mask_spec, keys, *folded)
        mine, theirs = start(device, i), start(source, j)
        rule = dataclasses.replace(plan.mask_spec, start=theirs, query_offset=mine - theirs)
        seen = _reaches(rule, mine, theirs, size)
        if plan.halves:  # the diagonal is done: all keys of another half that are seen at all are in the past
            rule = dataclasses.replace(rule, is_causal=False)
            seen &= mine != theirs
        return lax.cond(seen, lambda f: update(i, j, rule, keys, *f), lambda f: f, folded)

    if plan.halves:

        def diagonal(i, folded):
            rule = dataclasses.replace(plan.mask_spec, start=start(device, i))
            return update(i, i, rule, keys, *folded)

        state, sums = lax.fori_loop(0, 2, diagonal, (state, sums))

    def step(t, folded):
        keys, *folded = folded
        next_keys = _pass_on(keys)  # which needs nothing of what follows, and can take place meanwhile
        source = (device - t) % n
        if plan.halves:
            before = source < device

            def pair(p, folded):
                # The later half of queries sees the earlier half of every share, and one pair more.
                i = jnp.where((p == 1) & before, 0, 1)
                j = jnp.where((p == 0) | before, 0, 1)
                return visit(i, j, keys, source, folded)

            state, sums = lax.fori_loop(0, 2, pair, tuple(folded))
        else:
            state, sums = visit(0, 0, keys, source, tuple(folded))
        return next_keys, state, _pass_on(sums)

    def step_back(t, folded):
        keys, state, sums = folded
        keys, sums = _pass_on(keys, by=-1), _pass_on(sums, by=-1)
        return keys, *visit(0, 0, keys, (device + 1 + t) % n, (state, sums))

    _, state, sums = lax.fori_loop(0, n, step_back if reverse else step, (keys, state, sums))
    return state, sums


def _reaches(rule: MaskSpec, mine, theirs, size: int):
    """Whether any query of a part that starts at `mine` sees a key of one that starts at `theirs`, by position."""
    seen = jnp.array(True)
    earlier, later = jnp.minimum(mine, theirs), jnp.maximum(mine, theirs)
    if rule.is_causal:
        seen &= theirs <= mine
    if rule.window is not None:
        seen &= later - (earlier + size - 1) < rule.window
    if rule.chunk_size is not None:
        seen &= (earlier + size - 1) // rule.chunk_size >= later // rule.chunk_size
    return seen


def _attend_pair(
    plan: _Plan,
    rule: MaskSpec,
    queries: _Queries,
    keys: _Keys,
    terms: _Terms,
    query_tokens: _Tokens,
    key_tokens: _Tokens,
    **more: Any,
) -> tuple[Any, ...]:
    """The results of a part of the queries over a part of the keys, and what else `attend` returns given `more`."""
    logit = terms.logit
    if logit is not None and not isinstance(logit, DistanceLogit):
        logit = dataclasses.replace(logit, query_features=queries.features, key_features=keys.features)
    mask_spec = dataclasses.replace(
        rule,
        query_positions=query_tokens.positions,
        key_positions=key_tokens.positions,
        query_segments=query_tokens.segments,
        key_segments=key_tokens.segments,
    )
    factor = jnp.swapaxes(queries.factor, 1, 2)
    arguments = queries.query, factor, keys.key, keys.value, logit, terms.value_term, mask_spec, plan.precision
    output, *of_rows = plan.attend(*arguments, **more)
    entropy, logsumexp, *rest = (jnp.swapaxes(x, 1, 2) for x in of_rows)
    return _Rows(output, entropy, logsumexp), *rest


def _forward(plan: _Plan, queries: _Queries, keys: _Keys, terms: _Terms, query_tokens: _Tokens, key_tokens: _Tokens):
    dtype, empty = keys.value.dtype, _Rows.over_no_keys(queries, keys)
    queries, keys, query_tokens, key_tokens, empty = _in_parts(plan, (queries, keys, query_tokens, key_tokens, empty))

    def update(i, j, rule, keys, rows, sums):
        (queries_i, tokens_i), (keys_j, tokens_j) = _at((queries, query_tokens), i), _at(keys, j)
        (part,) = _attend_pair(plan, rule, queries_i, keys_j, terms, tokens_i, tokens_j)
        return _put(rows, _at(rows, i).merged(part, plan.with_entropy), i), sums

    rows, _ = _sweep(plan, (keys, key_tokens), update, empty, None)
    rows = _joined(rows)
    return rows._replace(output=rows.output.astype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(plan: _Plan, queries: _Queries, keys: _Keys, terms: _Terms, query_tokens: _Tokens, key_tokens: _Tokens):
    """The results of a device's queries over the keys of all devices."""
    return _forward(plan, queries, keys, terms, query_tokens, key_tokens)


def _ring_forward(plan: _Plan, *operands):
    rows = _forward(plan, *operands)
    return rows, (operands, rows)


def _ring_backward(plan: _Plan, residuals, d_rows: _Rows):
    operands, rows = residuals
    terms: _Terms = operands[2]
    queries, keys, query_tokens, key_tokens = _in_parts(plan, (*operands[:2], *operands[3:]))
    rows, d_rows = _in_parts(plan, (rows, d_rows))

    def update(i, j, rule, keys, sums, d_keys):
        d_queries, d_terms = sums
        (queries_i, tokens_i, rows_i, d_rows_i) = _at((queries, query_tokens, rows, d_rows), i)
        keys_j, tokens_j = _at(keys, j)
        final_rows = rows_i.output, jnp.swapaxes(rows_i.entropy, 1, 2), jnp.swapaxes(rows_i.logsumexp, 1, 2)

        def part(queries, keys, terms):
            return _attend_pair(plan, rule, queries, keys, terms, tokens_i, tokens_j, final_rows=final_rows)[0]

        _, pull = jax.vjp(part, queries_i, keys_j, terms)
        of_queries, of_keys, of_terms = pull(d_rows_i)
        d_queries = _add_at(d_queries, of_queries, i)
        return (d_queries, _summed(d_terms, of_terms)), _add_at(d_keys, of_keys, j)

    zeros = jax.tree.map(lambda x: _zeros(x.shape), (queries, terms, keys))
    (d_queries, d_terms), d_keys = _sweep(plan, (keys, key_tokens), update, zeros[:2], zeros[2])
    gradients = _joined(d_queries), _joined(d_keys), d_terms
    return *jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), gradients, operands[:3]), None, None


_ring.defvjp(_ring_forward, _ring_backward)


# --- A ring that hands on from step to step


def _scan_forward(
    plan: _Plan, queries: _Queries, keys: _Keys, terms: _Terms, query_tokens: _Tokens, key_tokens: _Tokens
):
    """The results, and what was handed on to each step and by the last, [n + 1, B, C, N]."""
    dtype, rows = keys.value.dtype, _Rows.over_no_keys(queries, keys)
    handed = _zeros((lax.axis_size(LENGTH) + 1, *rows.logsumexp.shape))

    def update(i, j, rule, keys, state, sums):
        (rows, handed), (keys, key_tokens) = state, _at(keys, 0)
        step = rule.query_offset // keys.key.shape[1]
        carry = jnp.swapaxes(_at(handed, step), 1, 2)
        part, carry = _attend_pair(plan, rule, queries, keys, terms, query_tokens, key_tokens, carry=carry)
        return (rows.merged(part, plan.with_entropy), _put(handed, carry, step + 1)), sums

    (rows, handed), _ = _sweep(plan, _in_parts(plan, (keys, key_tokens)), update, (rows, handed), None)
    return rows._replace(output=rows.output.astype(dtype)), handed


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scanning_ring(plan: _Plan, *operands):
    """As `_ring`, for a `ScanLogit`."""
    return _scan_forward(plan, *operands)[0]


def _scanning_ring_forward(plan: _Plan, *operands):
    rows, handed = _scan_forward(plan, *operands)
    return rows, (operands, rows, handed)


def _scanning_ring_backward(plan: _Plan, residuals, d_rows: _Rows):
    (queries, keys, terms, query_tokens, key_tokens), rows, handed = residuals

    def update(i, j, rule, keys, sums, d_keys):
        (d_queries, d_terms, d_carry), (keys, key_tokens) = sums, _at(keys, 0)

        def part(queries, keys, terms, carry):
            return _attend_pair(plan, rule, queries, keys, terms, query_tokens, key_tokens, carry=carry)

        carry = jnp.swapaxes(_at(handed, rule.query_offset // keys.key.shape[1]), 1, 2)
        (found, _), pull = jax.vjp(part, queries, keys, terms, carry)
        of_queries, of_keys, of_terms, d_carry = pull((_of_part(rows, found, d_rows), d_carry))
        d_queries, d_terms = _summed((d_queries, d_terms), (of_queries, of_terms))
        return (d_queries, d_terms, jnp.swapaxes(d_carry, 1, 2)), _add_at(d_keys, of_keys, 0)

    keys = _in_parts(plan, (keys, key_tokens))
    zeros = jax.tree.map(lambda x: _zeros(x.shape), (queries, terms, handed[0]))
    d_keys = jax.tree.map(lambda x: _zeros(x.shape), keys[0])
    (d_queries, d_terms, _), d_keys = _sweep(plan, keys, update, zeros, d_keys, reverse=True)
    operands, gradients = residuals[0][:3], (d_queries, _joined(d_keys), d_terms)
    return *jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), gradients, operands), None, None


_scanning_ring.defvjp(_scanning_ring_forward, _scanning_ring_backward)


def _of_part(rows: _Rows, part: _Rows, d_rows: _Rows) -> _Rows:
    """The gradient by the results over some keys, from that by the results over all: the transpose of `merged`."""
    seen = part.logsumexp != -jnp.inf
    moved = jnp.where(seen, rows.logsumexp - part.logsumexp, 0.0)
    share = jnp.where(seen, jnp.exp(-moved), 0.0)
    outputs = (x.astype(jnp.float32) for x in (d_rows.output, part.output, rows.output))
    d_output, of_part, of_all = outputs
    d_logsumexp = (d_output * (of_part - of_all)).sum(-1) + d_rows.logsumexp
    d_logsumexp += d_rows.entropy * (part.entropy + moved - rows.entropy)
    d_output = (share[..., None] * d_output).astype(part.output.dtype)
    return _Rows(d_output, share * d_rows.entropy, jnp.where(seen, share * d_logsumexp, 0.0))
