"""JAX's own kernel for TPUs, splash attention: for encodings without a logit term.

It gives the output alone: its logsumexp has no gradient, and it knows no entropy. It does not scale q·k: the factor is
multiplied into the queries, and rounded to their dtype there.

One part of the contract of a backend it does not keep: a value that is not finite may also reach queries that do not
see it, as may a key or value their gradient.
"""

from typing import Any

import jax
from jax import lax

from nope_jax.attention.backends.borrowed import unserved
from nope_jax.attention.backends.pallas.served import DTYPES, kernel_precision
from nope_jax.attention.mesh import platform


def splash_attention(*call: Any) -> tuple[Any, Any, Any]:
    """The `attend` of a backend without statistics, for what `supports` allows; entropy and logsumexp are NaN."""
    from nope_jax.attention.backends.splash.attention import attend  # Pallas takes long to import

    return attend(*call)


def supports(
    query, factor, key, value, logit, value_term, mask_spec, precision, with_entropy, softcap, *_: Any
) -> str | None:
    """Why splash attention cannot serve a call; None if it can."""
    if platform() not in ("tpu", "cpu"):
        return f"it needs a TPU (on a CPU it runs in interpret mode), not a {platform().upper()}"
    reason = unserved(key, logit, value_term, mask_spec)
    if reason is not None:
        return reason
    if mask_spec.mask is not None:
        return "there is a mask; is_causal, window, chunk_size and segment_ids are served"
    if not query.dtype == key.dtype == value.dtype or query.dtype not in DTYPES["tpu"]:
        return f"arrays must all be float32 or all bfloat16, not {query.dtype}, {key.dtype} and {value.dtype}"
    if kernel_precision(precision) != lax.Precision.DEFAULT:
        return "it knows the default precision of products alone"
    if getattr(jax.config, "jax_enable_x64", False):
        return "its indices are of 32 bits, and jax_enable_x64 is on"
    return None
