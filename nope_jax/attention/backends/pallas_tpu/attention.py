"""The kernels of the forward and the backward pass.

Shapes as in `pallas_tpu`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Shaped

from nope_jax.attention.backends.pallas_tpu.block import Block, unsheared
from nope_jax.attention.backends.pallas_tpu.call import Call, Operands, Tokens, tokens_of
from nope_jax.attention.backends.pallas_tpu.served import kernel_precision
from nope_jax.attention.backends.pallas_tpu.walk import Output, along_keys, along_queries, of_keys, of_queries, run
from nope_jax.attention.mask_spec import MaskSpec
from nope_jax.attention.mesh import platform
from nope_jax.attention.nonfinite import finite
from nope_jax.attention.softmax_state import SoftmaxState
from nope_jax.encodings import BlockValue, DistanceLogit
from nope_jax.encodings.encoding import MASKED, Logit

LANES = 128
BLOCK_SIZE = 512
"""Queries and keys per block, fewer for short sequences. From the compiler's memory limits: not yet tuned on a TPU."""


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
    call = Call(
        size=block_size,
        query_length=query_length,
        key_length=key_length,
        groups=num_heads // kv_heads,
        rule=MaskSpec(None, None, None, None, None, mask_spec.is_causal, mask_spec.window, mask_spec.chunk_size),
        contiguous=mask_spec.contiguous,
        with_entropy=with_entropy,
        precision=kernel_precision(precision),
        softcap=softcap,
        interpret=platform() == "cpu",
    )
    offset = jnp.asarray(key_length - query_length + mask_spec.query_offset_or_0, jnp.int32).reshape(1)
    table = None
    if isinstance(logit, DistanceLogit):
        distances = offset + jnp.arange(-call.key_blocks * block_size, call.query_blocks * block_size, dtype=jnp.int32)
        table = logit.values(distances)[:, None]
    factor = jnp.broadcast_to(factor, (batch, num_heads, query_length))
    operands = Operands(
        query=call.padded(query.swapaxes(1, 2), 2, call.query_blocks),
        factor=call.padded(factor[:, :, None], 3, call.query_blocks),
        key=call.padded(key.swapaxes(1, 2), 2, call.key_blocks),
        value=call.padded(value.swapaxes(1, 2), 2, call.key_blocks),
        table=table,
    )
    tokens = tokens_of(call, mask_spec, offset)
    if final_rows is None:
        out, entropy, logsumexp = _attend(call, operands, tokens)
    else:
        out, entropy, logsumexp = final_rows
        final_rows = (
            call.padded(out.swapaxes(1, 2), 2, call.query_blocks),
            call.padded(entropy[:, :, None], 3, call.query_blocks),
            call.padded(logsumexp[:, :, None], 3, call.query_blocks, -jnp.inf),  # padding sees no key
        )
        out, entropy, logsumexp = _attend_part(call, operands, tokens, final_rows)
    out = out.swapaxes(1, 2)[:, :query_length]
    return out, entropy[:, :, 0, :query_length], logsumexp[:, :, 0, :query_length]


def _forward(call: Call, operands: Operands, tokens: Tokens) -> tuple[Array, Array, Array]:
    (batch, heads, length, dim), value_dim, size = operands.query.shape, operands.value.shape[-1], call.size

    def begin(indices, results, sums):
        sums[0][...] = jnp.full((1, size), MASKED / 2, jnp.float32)

    def visit(block: Block, results, sums):
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
        kept, added = decay * output[...], block.product(block.value, weights, (0, 0))
        output[...] = kept + added
        if block.visible is not None:

            @pl.when(jnp.logical_not(jnp.isfinite(added).all()))
            def _():  # as `weighted_sum`: values that are not finite reach the queries that see them, and no others
                strange = 1 - jnp.isfinite(block.value.astype(jnp.float32)).astype(jnp.float32)
                reached = block.product(strange, (weights != 0).astype(jnp.float32), (0, 0)) > 0
                parted = block.product(block.finite(block.value), weights, (0, 0))
                output[...] = kept + jnp.where(reached, added, parted)

    def end(results, sums):
        largest, normaliser, weighted, output = (reference[...] for reference in sums)
        state = SoftmaxState(largest, normaliser, weighted if call.with_entropy else None)
        normaliser, entropy, logsumexp = state.end()
        results[0][0, 0] = (output / normaliser).T.astype(results[0].dtype)
        results[1][0, 0], results[2][0, 0] = entropy, logsumexp

    of_rows = of_queries(call, (batch, heads, 1, length), jnp.float32)
    output, entropy, logsumexp = run(
        "attention_forward",
        call,
        along_keys(call, batch, heads),
        operands,
        tokens,
        (),
        (of_queries(call, (batch, heads, length, value_dim), operands.value.dtype), of_rows, of_rows),
        ((1, size), (1, size), (1, size), (value_dim, size)),
        begin=begin,
        visit=visit,
        end=end,
        products=dim + value_dim,
    )
    return output, entropy, logsumexp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: Call, operands: Operands, tokens: Tokens):
    return _forward(call, operands, tokens)


def _attend_forward(call: Call, operands: Operands, tokens: Tokens):
    results = _forward(call, operands, tokens)
    return results, (operands, tokens, results)


def _attend_backward(call: Call, residuals, cotangents):
    operands, tokens, (output, entropy, logsumexp) = residuals
    d_output, d_entropy, d_logsumexp = cotangents

    seen = logsumexp != -jnp.inf
    # As in `streaming.py`: the part of ds/p that is one number per row.
    row_term = d_logsumexp - (output.astype(jnp.float32) * d_output.astype(jnp.float32)).sum(-1)[:, :, None]
    if call.with_entropy:
        row_term -= d_entropy * (entropy - logsumexp)
    # With a logsumexp of -MASKED, the weights of a row that sees no key are e^(s + MASKED) = 0.
    rows = d_output, jnp.where(seen, row_term, 0.0), jnp.where(seen, logsumexp, -MASKED), d_entropy

    d_scaled, d_table = _query_gradient(call, operands, tokens, rows)
    d_key, d_value = _key_gradients(call, operands, tokens, rows)
    gradients = Operands(
        query=(d_scaled * operands.factor.swapaxes(2, 3)).astype(operands.query.dtype),
        factor=(d_scaled * finite(operands.query)).sum(-1)[:, :, None],
        key=d_key,
        value=d_value,
        table=d_table,
    )
    return gradients, None


def _logit_gradients(block: Block) -> tuple[Array, Array, Array]:
    """Weights of a block, and the gradients of its logits and of its scaled q·k, all [k, q]."""
    d_output, row_term, logsumexp, d_entropy = block.rows
    logits, slope = block.logits()
    weights = block.hidden_is_zero(jnp.exp(logits - logsumexp))
    d_logits = block.product(block.finite(block.value), d_output, (1, 1)) + row_term
    if block.call.with_entropy:
        d_logits -= d_entropy * logits
    d_logits = block.hidden_is_zero(d_logits * weights)
    return weights, d_logits, d_logits if slope is None else block.hidden_is_zero(d_logits * slope)


def _query_gradient(
    call: Call, operands: Operands, tokens: Tokens, rows: tuple[Array, ...]
) -> tuple[Float[Array, "B N T H"], Float[Array, "#N 1 distances"] | None]:
    """Gradients of the queries times their factor, and of the table."""
    (batch, heads, _, dim), value_dim = operands.query.shape, operands.value.shape[-1]
    table, product_dtype = operands.table, jnp.promote_types(operands.query.dtype, operands.key.dtype)

    def begin(indices, results, sums):
        if table is not None:

            @pl.when((indices[1] == 0) & (indices[2] == 0))
            def _():
                results[1][...] = jnp.zeros(results[1].shape, jnp.float32)

    def visit(block: Block, results, sums):
        _, d_logits, d_product = _logit_gradients(block)
        sums[0][...] += block.product(block.finite(block.key), d_product.astype(product_dtype), (0, 0))
        if table is not None:
            start = pl.multiple_of((block.i - block.j + call.key_blocks - 1) * call.size, call.size)
            results[1][0, :, pl.ds(start, 2 * call.size)] += unsheared(d_logits)

    def end(results, sums):
        results[0][0, 0] = sums[0][...].T

    outputs = [of_queries(call, operands.query.shape, jnp.float32)]
    if table is not None:  # all distances of a head at once, which stay in memory for all batch rows
        span = table.shape[-1]
        outputs.append(Output((heads, 1, span), jnp.float32, (1, 1, span), lambda b, n, i, j: (n, 0, 0)))
    d_scaled, *d_table = run(
        "attention_query_gradient",
        call,
        along_keys(call, batch, heads, heads_first=table is not None),
        operands,
        tokens,
        rows,
        tuple(outputs),
        ((dim, call.size),),
        begin=begin,
        visit=visit,
        end=end,
        products=2 * dim + value_dim,
    )
    if table is None:
        return d_scaled, None
    return d_scaled, d_table[0].sum(0, keepdims=True) if len(table) == 1 else d_table[0]


def _key_gradients(
    call: Call, operands: Operands, tokens: Tokens, rows: tuple[Array, ...]
) -> tuple[Shaped[Array, "B K S H"], Shaped[Array, "B K S H2"]]:
    """Gradients of keys and values."""
    (batch, kv_heads, _, dim), value_dim = operands.key.shape, operands.value.shape[-1]
    product_dtype = jnp.promote_types(operands.query.dtype, operands.key.dtype)

    def visit(block: Block, results, sums):
        weights, _, d_product = _logit_gradients(block)
        d_output = block.rows[0]
        d_product = (d_product * block.factor).astype(product_dtype)
        sums[0][...] += block.product(d_product, block.finite(block.query), (1, 0))
        sums[1][...] += block.product(weights.astype(d_output.dtype), d_output, (1, 0))

    def end(results, sums):
        for result, total in zip(results, sums, strict=True):
            result[0, 0] = total[...].astype(result.dtype)

    d_key, d_value = run(
        "attention_key_gradients",
        call,
        along_queries(call, batch, kv_heads),
        operands,
        tokens,
        rows,
        tuple(of_keys(call, x.shape, x.dtype) for x in (operands.key, operands.value)),
        ((call.size, dim), (call.size, value_dim)),
        visit=visit,
        end=end,
        products=2 * dim + 2 * value_dim,
    )
    return d_key, d_value


_attend.defvjp(_attend_forward, _attend_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_part(call: Call, operands: Operands, tokens: Tokens, final_rows):
    """Return the given results over all keys; the backward pass computes the gradient contribution of these keys."""
    return final_rows


_attend_part.defvjp(
    lambda call, operands, tokens, final_rows: (final_rows, (operands, tokens, final_rows)),
    lambda call, residuals, cotangents: (*_attend_backward(call, residuals, cotangents), None),
)
