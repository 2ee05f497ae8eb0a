"""Attention as Pallas kernels for TPUs.

A block of logits is [keys, queries]. What belongs to a row of attention (factor, largest logit, normaliser, entropy) is
thus a vector along the lanes, sums over keys run down the sublanes, and statistics need no transpose.

A term by distance is a vector per head. A block meets 2·size - 1 of its entries, within two neighbouring pieces of the
vector, which a rotation by one more lane per sublane turns into the term of the block; its gradient is rotated back
and summed. A term of one vector per distance is a product of queries or keys with the vectors of a block's distances,
rotated likewise. A term of pairs is computed in strips.

Blocks in which no query sees a key are neither fetched nor computed.

    inputs.py     the arrays of a call, heads first and cut into blocks; one block within a kernel
    terms.py      the logit of a block, and its gradient
    vectors.py    what of terms of one vector per distance is a TPU's
    shear.py      from distances to pairs and back
    walk.py       runs a function over all blocks that meet: one kernel
    attention.py  the kernels of the forward and the backward pass
    decoding.py   the kernel for a few queries against many keys

Shapes as in `pallas`, with q = k.
"""
