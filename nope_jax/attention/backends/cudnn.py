"""cuDNN's fused attention, as `jax.nn.dot_product_attention` calls it: for encodings without a logit term.

It computes the output alone, neither entropy nor a logsumexp that could be differentiated. It scales q·k by one
constant: the factor of a query that differs from 1/√H is multiplied into the query, and rounded to its dtype there.

One part of the contract of a backend it does not keep: a key or value that is not finite may also reach queries that do
not see it.
"""

import functools
import math
from typing import Any

import jax
from jaxtyping import Array

from nope_jax.attention.backends.borrowed import unserved, with_factor, without_statistics
from nope_jax.attention.mesh import platform

_Kind = tuple[tuple[int, ...], Any]
"""Shape and dtype of an array."""


def cudnn_attention(
    query, factor, key, value, logit, value_term, mask_spec, precision=None, with_entropy=False, softcap=None
) -> tuple[Array, Array, Array]:
    """The `attend` of a backend without statistics, for what `supports` allows; entropy and logsumexp are NaN."""
    scale = 1 / math.sqrt(query.shape[-1])
    output = _attend(
        with_factor(query, factor / scale),
        key,
        value,
        scale=scale,
        is_causal=mask_spec.is_causal,
        local_window_size=None if mask_spec.window is None else (mask_spec.window - 1, 0),
    )
    return without_statistics(output)


_attend = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")


def supports(
    query, factor, key, value, logit, value_term, mask_spec, precision, with_entropy, softcap, *_: Any
) -> str | None:
    """Why cuDNN cannot serve a call; None if it can."""
    if platform() != "gpu":
        return f"it needs a GPU, not a {platform().upper()}"
    reason = unserved(key, logit, value_term, mask_spec)
    if reason is not None:
        return reason
    if softcap is not None:
        return "there is a softcap"
    if mask_spec.mask is not None or mask_spec.query_segments is not None or mask_spec.chunk_size is not None:
        return "of mask, segment_ids, window and chunk_size it knows the window alone"
    if mask_spec.is_causal and query.shape[1] != key.shape[1]:
        return f"with is_causal there must be as many queries as keys, not {query.shape[1]} and {key.shape[1]}"
    if mask_spec.window is not None and not mask_spec.is_causal:
        return "a window must be causal"
    return _refused(*((x.shape, x.dtype) for x in (query, key, value)), mask_spec.is_causal)


@functools.cache
def _refused(query: _Kind, key: _Kind, value: _Kind, is_causal: bool) -> str | None:
    """What JAX says against these arrays, such as their dtypes and head dims, or that there is no cuDNN; or None."""
    try:
        jax.eval_shape(
            functools.partial(_attend, is_causal=is_causal), *(jax.ShapeDtypeStruct(*x) for x in (query, key, value))
        )
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return str(error)
    return None
