"""Ring attention: a sequence sharded over several devices, with keys and values passed around a ring.

Each of n devices holds a shard of 1/n of the queries and keys, and the keys travel around the ring (Liu et al. 2023,
arXiv 2310.01889): in n steps every device sees all keys, holding two shards at a time. The result of each step is
merged with those of the previous steps (`softmax_state.Rows`). In the backward pass, keys and values travel around the
ring once more together with their gradients; the gradient of one step needs only the row's final logsumexp, entropy and
output. Memory in both passes is therefore that of 1/n of the sequence.

With causal attention, queries see few keys at the start of a sequence and many at its end. To balance the load, the
sequence is split into 2n half-shards, and device d works on half-shards d and 2n-1-d ("zigzag"). It then computes two
of the four pairs of half-shards in each step; pairs in which no query sees a key are skipped. A `ScanLogit`, whose sums
run from the last key to the first, uses contiguous shards instead, so that keys arrive in the order of the sums, and a
carry is passed from step to step.

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, H head dim; n devices in the ring,
P parts of a device's shard of the sequence (two halves, or one), C the length of a part.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from nope_jax.attention.backends import Results
from nope_jax.attention.blocks import at, put, summed, zero_sums
from nope_jax.attention.mask_spec import MaskSpec
from nope_jax.attention.mesh import LENGTH
from nope_jax.attention.softmax_state import Rows, named
from nope_jax.encodings import BlockValue, DistanceLogit, ScanLogit
from nope_jax.encodings.encoding import Logit
from nope_jax.jax_settings import with_implicit_promotion


class _Queries(NamedTuple):
    query: Shaped[Array, "*P B C N H"]
    factor: Float[Array, "*P #B C #N"]
    features: Any


class _Keys(NamedTuple):
    key: Shaped[Array, "*P B C K H"]
    value: Shaped[Array, "*P B C K H"]
    features: Any


class _Terms(NamedTuple):
    """The logit, without its features, and the value term."""

    logit: Logit | None
    value_term: BlockValue | None


class _Tokens(NamedTuple):
    """Positions and segments of queries or keys, which determine visibility."""

    positions: Int[Array, "*P #B C"] | None
    segments: Int[Array, "*P #B C"] | None


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static arguments of a call."""

    attend: Callable[..., Results]
    mask_spec: MaskSpec
    """The static fields of the call's MaskSpec."""
    precision: Any
    with_entropy: bool
    softcap: float | None
    halves: bool
    """Shards are split into zigzag halves and positions are contiguous, so the order of halves gives visibility."""


def ring_attention(
    attend: Callable[..., Results],
    query: Shaped[Array, "B T N H"],
    factor: Float[Array, "#B #N T"],
    key: Shaped[Array, "B T K H"],
    value: Shaped[Array, "B T K H2"],
    logit: Logit | None,
    value_term: BlockValue | None,
    mask_spec: MaskSpec,
    precision: jax.lax.PrecisionLike,
    with_entropy: bool,
    softcap: float | None,
) -> Results:
    """Run `attend` on a sequence whose shards are on the devices in order."""
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
    plan = _Plan(attend, rule, precision, with_entropy, softcap, halves=balanced and mask_spec.contiguous)
    if balanced:
        queries, keys, tokens = jax.tree.map(_to_zigzag, (queries, keys, tokens))
    rows = (_scanning_ring if hands_on else _ring)(plan, queries, keys, _Terms(logit, value_term), *tokens)
    if balanced:
        rows = jax.tree.map(_from_zigzag, rows)
    return rows.output, jnp.swapaxes(rows.entropy, 1, 2), jnp.swapaxes(rows.logsumexp, 1, 2)


def _zigzag() -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(source, target) devices of the first and of the second half of each shard: half h goes to device min(h, 2n-1-h).

    Each is a permutation, since one of a device's two halves has an even number.
    """
    n = lax.axis_size(LENGTH)
    first, second = ([(r, min(half, 2 * n - 1 - half)) for r, half in enumerate(range(x, 2 * n, 2))] for x in (0, 1))
    return first, second


def _to_zigzag(x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B T ..."]:
    """Exchange halves 2d and 2d+1 for halves d and 2n-1-d."""
    received = [lax.ppermute(half, LENGTH, to) for half, to in zip(jnp.split(x, 2, axis=1), _zigzag(), strict=True)]
    return _ordered(*received)


def _from_zigzag(x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B T ..."]:
    """The inverse of `_to_zigzag`."""
    halves = jnp.split(_ordered(*jnp.split(x, 2, axis=1)), 2, axis=1)
    back = [[(target, source) for source, target in to] for to in _zigzag()]
    return jnp.concatenate([lax.ppermute(half, LENGTH, to) for half, to in zip(halves, back, strict=True)], axis=1)


def _ordered(even: Array, odd: Array) -> Array:
    """Concatenate two halves of a shard, the even one first on devices with an even number."""
    swapped = lax.axis_index(LENGTH) % 2 == 1
    return jnp.concatenate([jnp.where(swapped, odd, even), jnp.where(swapped, even, odd)], axis=1)


def _in_parts(plan: _Plan, x: Any) -> Any:
    """Split shards [B, T, ...] into parts [P, B, C, ...]."""
    count = 2 if plan.halves else 1
    return jax.tree.map(lambda leaf: jnp.stack(jnp.split(leaf, count, axis=1)), x)


def _joined(x: Any) -> Any:
    """The inverse of `_in_parts`."""
    return jax.tree.map(lambda leaf: jnp.concatenate(list(leaf), axis=1), x)


def _add_at(x: Any, entry: Any, part) -> Any:
    return put(x, summed(at(x, part), entry), part)


def _pass_on(x: Any, by: int = 1) -> Any:
    """Send to the next device of the ring."""
    n = lax.axis_size(LENGTH)
    return jax.tree.map(lambda leaf: lax.ppermute(leaf, LENGTH, [(d, (d + by) % n) for d in range(n)]), x)


def _sweep(plan: _Plan, keys: tuple[_Keys, _Tokens], update, state, sums, *, reverse: bool = False):
    """Fold update(i, j, rule, keys, state, sums) over all pairs of query part i and key part j.

    The keys travel around the ring: a device's own first, then those of the devices before it, or in reverse order.
    `sums` travel with their keys and return to the device that owns them.
    """
    n, device = lax.axis_size(LENGTH), lax.axis_index(LENGTH)
    size, run_on = keys[0].key.shape[2], keys[1].positions is None

    def start(source, part):
        """Position of the first token of a part of the shard owned by device `source`."""
        return size * (jnp.where(part == 0, source, 2 * n - 1 - source) if plan.halves else source)

    def visit(i, j, keys, source, folded):
        if not run_on:
            return update(i, j, plan.mask_spec, keys, *folded)
        mine, theirs = start(device, i), start(source, j)
        rule = dataclasses.replace(plan.mask_spec, start=theirs, query_offset=mine - theirs)
        seen = _reaches(rule, mine, theirs, size)
        if plan.halves:  # the diagonal is done: all visible keys of another half are in the past
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
        next_keys = _pass_on(keys)  # independent of the computation below, so the two can overlap
        source = (device - t) % n
        if plan.halves:
            before = source < device

            def pair(p, folded):
                # The later half of the queries sees the earlier half of every shard, and there is one more pair.
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
    """Whether, by position, any query of the part starting at `mine` sees a key of the part starting at `theirs`."""
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
    """Results of one part of the queries over one part of the keys, and any extra results of `attend` given `more`."""
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
    output, *of_rows = plan.attend(*arguments, plan.with_entropy, plan.softcap, **more)
    entropy, logsumexp, *rest = (jnp.swapaxes(x, 1, 2) for x in of_rows)
    return Rows(output, entropy, logsumexp), *rest


@with_implicit_promotion
def _forward(plan: _Plan, queries: _Queries, keys: _Keys, terms: _Terms, query_tokens: _Tokens, key_tokens: _Tokens):
    dtype, empty = keys.value.dtype, Rows.over_no_keys(queries.query.shape[:3], keys.value.shape[-1])
    queries, keys, query_tokens, key_tokens, empty = _in_parts(plan, (queries, keys, query_tokens, key_tokens, empty))

    def update(i, j, rule, keys, rows, sums):
        (queries_i, tokens_i), (keys_j, tokens_j) = at((queries, query_tokens), i), at(keys, j)
        (part,) = _attend_pair(plan, rule, queries_i, keys_j, terms, tokens_i, tokens_j)
        return put(rows, at(rows, i).merged(part, plan.with_entropy), i), sums

    rows, _ = _sweep(plan, (keys, key_tokens), update, empty, None)
    rows = _joined(rows)
    return rows._replace(output=rows.output.astype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(plan: _Plan, queries: _Queries, keys: _Keys, terms: _Terms, query_tokens: _Tokens, key_tokens: _Tokens):
    """Results of the local queries over the keys of all devices."""
    return _forward(plan, queries, keys, terms, query_tokens, key_tokens)


def _ring_forward(plan: _Plan, *operands):
    rows = named(_forward(plan, *operands))
    return rows, (operands, rows)


@with_implicit_promotion
def _ring_backward(plan: _Plan, residuals, d_rows: Rows):
    operands, rows = residuals
    terms: _Terms = operands[2]
    queries, keys, query_tokens, key_tokens = _in_parts(plan, (*operands[:2], *operands[3:]))
    rows, d_rows = _in_parts(plan, (rows, d_rows))

    def update(i, j, rule, keys, sums, d_keys):
        d_queries, d_terms = sums
        (queries_i, tokens_i, rows_i, d_rows_i) = at((queries, query_tokens, rows, d_rows), i)
        keys_j, tokens_j = at(keys, j)
        final_rows = rows_i.output, jnp.swapaxes(rows_i.entropy, 1, 2), jnp.swapaxes(rows_i.logsumexp, 1, 2)

        def part(queries, keys, terms):
            return _attend_pair(plan, rule, queries, keys, terms, tokens_i, tokens_j, final_rows=final_rows)[0]

        _, pull = jax.vjp(part, queries_i, keys_j, terms)
        of_queries, of_keys, of_terms = pull(d_rows_i)
        d_queries = _add_at(d_queries, of_queries, i)
        return (d_queries, summed(d_terms, of_terms)), _add_at(d_keys, of_keys, j)

    nothing = zero_sums((queries, terms, keys))
    (d_queries, d_terms), d_keys = _sweep(plan, (keys, key_tokens), update, nothing[:2], nothing[2])
    gradients = _joined(d_queries), _joined(d_keys), d_terms
    return *jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), gradients, operands[:3]), None, None


_ring.defvjp(_ring_forward, _ring_backward)


# --- A ring with a carry from step to step


@with_implicit_promotion
def _scan_forward(
    plan: _Plan, queries: _Queries, keys: _Keys, terms: _Terms, query_tokens: _Tokens, key_tokens: _Tokens
):
    """Results, and the carry into each step and out of the last, [n + 1, B, C, N]."""
    dtype, rows = keys.value.dtype, Rows.over_no_keys(queries.query.shape[:3], keys.value.shape[-1])
    handed = jnp.zeros((lax.axis_size(LENGTH) + 1, *rows.logsumexp.shape), jnp.float32)

    def update(i, j, rule, keys, state, sums):
        (rows, handed), (keys, key_tokens) = state, at(keys, 0)
        step = rule.query_offset // keys.key.shape[1]
        carry = jnp.swapaxes(at(handed, step), 1, 2)
        part, carry = _attend_pair(plan, rule, queries, keys, terms, query_tokens, key_tokens, carry=carry)
        return (rows.merged(part, plan.with_entropy), put(handed, carry, step + 1)), sums

    (rows, handed), _ = _sweep(plan, _in_parts(plan, (keys, key_tokens)), update, (rows, handed), None)
    return rows._replace(output=rows.output.astype(dtype)), handed


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scanning_ring(plan: _Plan, *operands):
    """`_ring` for a `ScanLogit`."""
    return _scan_forward(plan, *operands)[0]


def _scanning_ring_forward(plan: _Plan, *operands):
    rows, handed = named(_scan_forward(plan, *operands))
    return rows, (operands, rows, handed)


@with_implicit_promotion
def _scanning_ring_backward(plan: _Plan, residuals, d_rows: Rows):
    (queries, keys, terms, query_tokens, key_tokens), rows, handed = residuals

    def update(i, j, rule, keys, sums, d_keys):
        (d_queries, d_terms, d_carry), (keys, key_tokens) = sums, at(keys, 0)

        def part(queries, keys, terms, carry):
            return _attend_pair(plan, rule, queries, keys, terms, query_tokens, key_tokens, carry=carry)

        carry = jnp.swapaxes(at(handed, rule.query_offset // keys.key.shape[1]), 1, 2)
        (found, _), pull = jax.vjp(part, queries, keys, terms, carry)
        of_queries, of_keys, of_terms, d_carry = pull((rows.gradient_of(found, d_rows), d_carry))
        d_queries, d_terms = summed((d_queries, d_terms), (of_queries, of_terms))
        return (d_queries, d_terms, jnp.swapaxes(d_carry, 1, 2)), _add_at(d_keys, of_keys, 0)

    keys = _in_parts(plan, (keys, key_tokens))
    nothing = zero_sums((queries, terms, handed[0])), zero_sums(keys[0])
    (d_queries, d_terms, _), d_keys = _sweep(plan, keys, update, *nothing, reverse=True)
    operands, gradients = residuals[0][:3], (d_queries, _joined(d_keys), d_terms)
    return *jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), gradients, operands), None, None


_scanning_ring.defvjp(_scanning_ring_forward, _scanning_ring_backward)
