"""Attention as Pallas kernels for TPUs: output, entropy and logsumexp in one pass over blocks, differentiable.

The recurrences are those of `streaming.py`. What differs follows from the chip: a block of logits is [keys, queries].
What belongs to a row of attention (factor, largest logit, normaliser, entropy) is thus a vector along the lanes, sums
over keys run down the sublanes, and statistics need no transpose.

A term by distance is a vector per head. A block meets 2·size - 1 of its entries, within two neighbouring pieces of the
vector, which a rotation by one more lane per sublane turns into the term of the block; its gradient is rotated back
and summed.

Blocks in which no query sees a key are neither fetched nor computed; masks are computed only where something is hidden.

    call.py       a call: its static arguments, its arrays cut into blocks, and which blocks meet
    block.py      one block of queries and keys within a kernel: visibility, logits, the shear
    walk.py       runs a function over all blocks that meet: one kernel
    attention.py  the kernels of the forward and the backward pass
    served.py     which calls they serve

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, H and H2 the head dims;
q = k the size of blocks of queries and keys.
"""

from typing import Any

from nope_jax.attention.backends.pallas_tpu.served import supports

__all__ = ["attend", "supports"]


def attend(*call: Any, **keywords: Any) -> tuple[Any, Any, Any]:
    """The `attend` of the backend."""
    # Pallas takes long to import, and only who uses it should wait.
    from nope_jax.attention.backends.pallas_tpu.attention import pallas_tpu_attention

    return pallas_tpu_attention(*call, **keywords)
