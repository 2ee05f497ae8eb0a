"""Attention as Pallas kernels: output, entropy and logsumexp in one pass over blocks, differentiable.

The recurrences are those of `streaming.py`. A kernel visits only the blocks in which some query sees a key, and masks
only those in which something is hidden. Of a term by distance it reads one number, or one vector, per distance.

    call.py        a call: its static arguments, and which blocks meet
    block.py       one block of queries and keys within a kernel: logits, weights, and their gradients
    pairwise.py    a logit of pairs within a kernel
    vectors.py     terms of one vector per distance within a kernel
    gradient.py    what the backward pass has in common: residuals, and the terms that are one number per row
    decoding.py    what the kernels for a few queries against many keys have in common
    served.py      which calls the kernels serve
    tpu/           the kernels for TPUs
    gpu/           the kernels for NVIDIA GPUs

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, H and H2 the head dims of keys and
values; q and k the sizes of blocks of queries and keys.
"""

import functools
from typing import Any

from nope_jax.attention.backends.pallas import served
from nope_jax.attention.backends.pallas.served import is_decoding

__all__ = ["gpu_attention", "is_decoding", "supports_gpu", "supports_tpu", "tpu_attention"]

supports_tpu = functools.partial(served.supports, "tpu")
supports_gpu = functools.partial(served.supports, "gpu")

# Pallas takes long to import, and only who uses it should wait.


def tpu_attention(*call: Any, **keywords: Any) -> tuple[Any, Any, Any]:
    """The `attend` of the kernels for TPUs."""
    from nope_jax.attention.backends.pallas.tpu.attention import pallas_tpu_attention

    return pallas_tpu_attention(*call, **keywords)


def gpu_attention(*call: Any, **keywords: Any) -> tuple[Any, Any, Any]:
    """The `attend` of the kernels for GPUs."""
    from nope_jax.attention.backends.pallas.gpu.attention import pallas_gpu_attention

    return pallas_gpu_attention(*call, **keywords)
