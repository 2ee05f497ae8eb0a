"""Attention as Pallas kernels for NVIDIA GPUs, compiled by Triton.

A program of a kernel has one block of queries (or of keys) and loops over the blocks of keys (or of queries) that meet
it, with its sums in registers. It reads queries, keys and values where they lie, [B, T, N, H]: nothing is transposed,
and nothing is filled up, since loads and stores are masked at the ends of sequences and of head dims, which Triton
wants to be powers of two.

A term by distance is a vector per head, which a block reads by the distances of its pairs. Its gradient is a kernel of
its own: a program adds up the gradients of the logits of all blocks with the same i - j, whose pairs lie at the same
distances, and what it has summed is then summed along its diagonals. So every sum has a fixed order, and the same
inputs give the same bits, which atomic additions would not. Where nobody asks for this gradient (ALiBi's slopes are
constants), XLA drops the kernel. A term of pairs is computed for each, from parameters and features in memory. The
gradient of the parameters is a kernel of its own, too, with one sum per program; that of the features comes with those
of queries and of keys.

A term of one vector per distance is a product of queries or keys with the vectors of a block's distances, sheared
through memory. The programs of its kernels have a slot each, so they are few and loop over what would be more programs.

A hidden key that is not finite would make a product NaN, even with a weight of 0. Leaving such keys out of every
product would cost registers, and time where all is finite. So a program notes whether its sums are finite; a second
launch of the kernel, whose programs end at once otherwise, computes those again that are not, with care.

    spans.py      what a program reads of an array
    vectors.py    what of terms of one vector per distance is a GPU's
    tiles.py      what a program reads and writes, and its loops
    attention.py  the kernels of the forward and the backward pass
    decoding.py   the kernel for a few queries against many keys
    sizes.py      the sizes of blocks

Shapes as in `pallas`.
"""
