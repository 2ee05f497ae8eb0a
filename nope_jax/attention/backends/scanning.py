"""Attention with logits that sum over keys (`ScanLogit`), in memory that grows with T.

For each block of queries, the blocks of keys are visited from last to first, the order of the sums. The state of a row
is that of `softmax_state.py`, its output and the logit's carry. The backward pass recomputes each block from the
logsumexp, as in `streaming.py`, from first to last: the gradient of the carry goes against the sums. The carries with
which the blocks begin are summed up before; only one block of queries at a time keeps its own, [S / block, block]
numbers.

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, H head dim;
n and m the numbers of query and key blocks of q queries and k keys.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Shaped

from nope_jax.attention.blocks import BLOCK_SIZE, CachedLayer, at, cut, mask_at, summed, whole, zero_sums
from nope_jax.attention.mask_spec import MaskSpec
from nope_jax.attention.nonfinite import content_logits, finite, weighted_sum
from nope_jax.attention.softcap import softcapped
from nope_jax.attention.softmax_state import SoftmaxState, named, row_terms
from nope_jax.encodings import BlockValue, ScanLogit, Tile
from nope_jax.jax_settings import with_implicit_promotion


def scanning_attention(
    query: Shaped[Array, "B T N H"],
    factor: Float[Array, "#B #N T"],
    key: Shaped[Array, "B S K H"] | CachedLayer,
    value: Shaped[Array, "B S K H2"] | CachedLayer,
    logit: ScanLogit,
    value_term: BlockValue | None,
    mask_spec: MaskSpec,
    precision: jax.lax.PrecisionLike = None,
    with_entropy: bool = True,
    softcap: float | None = None,
    *,
    block_size: int = BLOCK_SIZE,
    carry: Float[Array, "B N T"] | None = None,
) -> tuple[Array, ...]:
    """The `attend` of a backend with `in_parts`, for a `ScanLogit`; reverse-mode differentiable."""
    key, value = whole(key), whole(value)
    (batch, query_length, num_heads, _), key_length = query.shape, key.shape[1]
    query_size, key_size = min(block_size, query_length), min(block_size, key_length)
    per_query, per_key = (
        functools.partial(jax.tree.map, lambda x, size=size: cut(x, size, 1)) for size in (query_size, key_size)
    )
    mask_spec = mask_spec.in_blocks(query_length, key_length, query_size, key_size)
    start = jnp.zeros((batch, num_heads, query_length), jnp.float32) if carry is None else carry
    operands = _Operands(
        queries=_Queries(
            query=cut(jnp.swapaxes(query, 1, 2), query_size, 2),
            factor=cut(jnp.broadcast_to(factor, (factor.shape[0], num_heads, query_length)), query_size, 2),
            features=per_query(logit.query_features),
        ),
        keys=_Keys(cut(jnp.swapaxes(key, 1, 2), key_size, 2), per_key(logit.key_features)),
        value=cut(jnp.swapaxes(value, 1, 2), key_size, 2),
        logit=dataclasses.replace(logit, query_features=None, key_features=None),
        value_term=value_term,
        carry=cut(start, query_size, 2),
    )
    call = _Call(key_length, precision, with_entropy, softcap)
    output, *of_rows = _attend(call, operands, mask_spec)
    output = output.transpose(1, 0, 3, 2, 4).reshape(batch, -1, num_heads, value.shape[-1])[:, :query_length]
    entropy, logsumexp, handed_on = (
        jnp.moveaxis(x, 0, 2).reshape(batch, num_heads, -1)[..., :query_length] for x in of_rows
    )
    results = output, entropy, logsumexp
    return results if carry is None else (*results, handed_on)


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static arguments."""

    key_length: int
    precision: Any
    with_entropy: bool
    softcap: float | None


class _Queries(NamedTuple):
    query: Shaped[Array, "*n B N q H"]
    factor: Float[Array, "*n #B N q"]
    features: Any


class _Keys(NamedTuple):
    key: Shaped[Array, "*m B K k H"]
    features: Any


class _Operands(NamedTuple):
    """The differentiable arguments, split into blocks."""

    queries: _Queries
    keys: _Keys
    value: Shaped[Array, "m B K k H2"]
    logit: ScanLogit
    """Without its features."""
    value_term: BlockValue | None
    carry: Float[Array, "n B N q"]


class _Pair:
    """Query block i and key block j, with the computations shared by the forward and the backward pass."""

    def __init__(self, call: _Call, mask_spec: MaskSpec, i, j):
        self.call = call
        self.query_positions = at(mask_spec.query_positions, i)
        self.key_positions = at(mask_spec.key_positions, j)
        rule = dataclasses.replace(
            mask_spec,
            query_positions=self.query_positions,
            key_positions=self.key_positions,
            query_segments=at(mask_spec.query_segments, i),
            key_segments=at(mask_spec.key_segments, j),
            mask=None if mask_spec.mask is None else mask_at(mask_spec.mask, i, j),
        )
        query_size, key_size = self.query_positions.shape[-1], self.key_positions.shape[-1]
        index = j * key_size + jnp.arange(key_size, dtype=jnp.int32)
        self.visible: Bool[Array, "#B #N q k"] = rule.matrix(query_size, key_size) & (index < call.key_length)

    def product(self, subscripts: str, *arrays):
        return jnp.einsum(subscripts, *arrays, precision=self.call.precision, preferred_element_type=jnp.float32)

    def tile(self, queries: _Queries, keys: _Keys) -> Tile:
        """The pair for an encoding's function; the queries are scaled."""
        groups = queries.query.shape[1] // keys.key.shape[1]
        return Tile(
            query=finite(queries.query),
            factor=queries.factor,
            key=jnp.repeat(finite(keys.key), groups, axis=1),
            query_positions=self.query_positions,
            key_positions=self.key_positions,
            query_features=queries.features,
            key_features=keys.features,
        )

    def logits(self, queries: _Queries, keys: _Keys, logit: ScanLogit, carry):
        """The logits of the pair, and the carry for the next block of keys."""
        scaled, key = _grouped(queries.query, keys.key.shape[1]), keys.key.astype(jnp.float32)
        content = content_logits("bkqh,bksh->bkqs", scaled, key, self.call.precision)
        content = content.reshape(*carry.shape, -1)
        if self.call.softcap is not None:
            content = softcapped(jnp.where(self.visible, content, 0.0), self.call.softcap)
        return logit.block(self.tile(queries, keys), content, self.visible, carry)

    def value_added(self, term: BlockValue, weights, queries: _Queries, keys: _Keys):
        """What a `BlockValue` adds to the output."""
        return term.block(weights, self.tile(queries, keys))


def _grouped(x: Shaped[Array, "B N q *rest"], kv_heads: int) -> Shaped[Array, "B K _ *rest"]:
    """The queries of all heads that share a key head, as rows of one product."""
    return x.reshape(x.shape[0], kv_heads, -1, *x.shape[3:])


def _scaled(query: Shaped[Array, "B N q H"], factor: Float[Array, "#B N q"]) -> Float[Array, "B N q H"]:
    return query.astype(jnp.float32) * factor[..., None]


def _counted(x: Any) -> tuple[Array, Any]:
    """Blocks, each with its number."""
    return jnp.arange(len(jax.tree.leaves(x)[0]), dtype=jnp.int32), x


@with_implicit_promotion
def _forward(call: _Call, operands: _Operands, mask_spec: MaskSpec):
    # Under a differentiated scan over layers, JAX computes once, and keeps, what follows from constants: visibility.
    # The barrier makes it follow from the operands.
    operands, mask_spec = lax.optimization_barrier((operands, mask_spec))
    value_dim = operands.value.shape[-1]

    def query_block(_, block):
        i, (queries, carry) = block
        queries = queries._replace(query=_scaled(queries.query, queries.factor))

        def key_block(state, block):
            j, (keys, value) = block
            pair = _Pair(call, mask_spec, i, j)

            def visit(state):
                softmax, output, carry = state
                logits, carry = pair.logits(queries, keys, operands.logit, carry)
                softmax, weights, decay = softmax.over_more(logits)
                weights_of_group = _grouped(weights, value.shape[1])
                added = weighted_sum("bkqs,bksh->bkqh", weights_of_group, value, call.precision)
                output = decay[..., None] * output + added.reshape(output.shape)
                if operands.value_term is not None:
                    output += pair.value_added(operands.value_term, weights, queries, keys)
                return softmax, output, carry

            return lax.cond(pair.visible.any(), visit, lambda s: s, state), None

        output = jnp.zeros((*carry.shape, value_dim), jnp.float32)
        state = SoftmaxState.over_no_keys(carry.shape, call.with_entropy), output, carry
        state, _ = lax.scan(key_block, state, _counted((operands.keys, operands.value)), reverse=True)
        softmax, output, handed_on = state
        normaliser, entropy, logsumexp = softmax.end()
        output = (output / normaliser[..., None]).astype(operands.value.dtype)
        return None, (output, entropy, logsumexp, handed_on)

    return lax.scan(query_block, None, _counted((operands.queries, operands.carry)))[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: _Call, operands: _Operands, mask_spec: MaskSpec):
    """Output [n, B, N, q, H2]; entropy, logsumexp and the carry after all keys [n, B, N, q]."""
    return _forward(call, operands, mask_spec)


def _attend_forward(call: _Call, operands: _Operands, mask_spec: MaskSpec):
    results = named(_forward(call, operands, mask_spec))
    return results, (operands, mask_spec, results[:-1])


@with_implicit_promotion
def _attend_backward(call: _Call, residuals, cotangents):
    operands, mask_spec, (output, entropy, logsumexp) = residuals
    d_output, d_entropy, d_logsumexp, d_handed_on = cotangents
    projected = (output.astype(jnp.float32) * d_output.astype(jnp.float32)).sum(-1)
    row_term, logsumexp = row_terms(projected, entropy, logsumexp, d_entropy, d_logsumexp, call.with_entropy)
    kv_heads = operands.value.shape[2]

    def query_block(sums, block):
        i, (unscaled, carry, rows, d_carry) = block
        queries = unscaled._replace(query=_scaled(unscaled.query, unscaled.factor))
        d_output, d_entropy, row_term, logsumexp = rows
        d_output_of_group = _grouped(d_output, kv_heads)

        def hand_on(carry, block):
            j, keys = block
            pair = _Pair(call, mask_spec, i, j)

            def visit(carry):
                return pair.logits(queries, keys, operands.logit, carry)[1]

            return lax.cond(pair.visible.any(), visit, lambda c: c, carry), carry

        # The block of the first keys hands on to none.
        later_keys = jax.tree.map(lambda x: x[1:], _counted(operands.keys))
        first, later = lax.scan(hand_on, carry, later_keys, reverse=True)
        carries = jnp.concatenate([first[None], later])

        def key_block(of_queries, block):
            j, (keys, value, carry, of_keys) = block
            pair = _Pair(call, mask_spec, i, j)

            def visit(sums):
                (d_queries, d_terms, d_carry), (d_keys, d_value) = sums
                (logits, _), pull = jax.vjp(pair.logits, queries, keys, operands.logit, carry)
                weights = jnp.where(pair.visible, jnp.exp(logits - logsumexp[..., None]), 0.0)
                d_weights = pair.product("bkqh,bksh->bkqs", d_output_of_group, finite(value)).reshape(weights.shape)
                d_logit, d_value_term = d_terms
                if operands.value_term is not None:
                    _, pull_added = jax.vjp(pair.value_added, operands.value_term, weights, queries, keys)
                    of_term, of_weights, *rest = pull_added(d_output.astype(jnp.float32))
                    d_value_term, d_weights = summed(d_value_term, of_term), d_weights + of_weights
                    d_queries, d_keys = summed((d_queries, d_keys), tuple(rest))
                d_logits = d_weights + row_term[..., None]
                if call.with_entropy:
                    d_logits -= d_entropy[..., None] * logits
                *rest, d_carry = pull((weights * d_logits, d_carry))
                d_queries, d_keys, d_logit = summed((d_queries, d_keys, d_logit), tuple(rest))
                low = _grouped(weights, kv_heads).astype(d_output.dtype)
                d_value += pair.product("bkqs,bkqh->bksh", low, d_output_of_group)
                return (d_queries, (d_logit, d_value_term), d_carry), (d_keys, d_value)

            return lax.cond(pair.visible.any(), visit, lambda s: s, (of_queries, of_keys))

        d_terms, of_keys = sums
        of_queries = zero_sums(queries), d_terms, d_carry
        blocks = _counted((operands.keys, operands.value, carries, of_keys))
        (d_queries, d_terms, d_carry), of_keys = lax.scan(key_block, of_queries, blocks)
        _, pull_scaled = jax.vjp(_scaled, finite(unscaled.query), unscaled.factor)
        d_query, d_factor = pull_scaled(d_queries.query)
        d_queries = d_queries._replace(query=d_query, factor=d_queries.factor + d_factor)
        return (d_terms, of_keys), (d_queries, d_carry)

    sums = zero_sums(((operands.logit, operands.value_term), (operands.keys, operands.value)))
    rows = d_output, d_entropy, row_term, logsumexp
    blocks = _counted((operands.queries, operands.carry, rows, d_handed_on))
    sums, (d_queries, d_carry) = lax.scan(query_block, sums, blocks)
    (d_logit, d_value_term), (d_keys, d_value) = sums
    gradients = _Operands(d_queries, d_keys, d_value, d_logit, d_value_term, d_carry)
    return jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), gradients, operands), None


_attend.defvjp(_attend_forward, _attend_backward)
