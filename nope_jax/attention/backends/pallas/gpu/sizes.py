"""The sizes of blocks."""

from typing import NamedTuple


class Blocks(NamedTuple):
    """How a kernel is cut into programs."""

    queries: int
    keys: int
    warps: int
    stages: int
    """Blocks of its loop that a program loads ahead; 1 with vectors, where a load must stay behind a store."""


class Sizes(NamedTuple):
    """Of every kernel."""

    forward: Blocks
    query_gradient: Blocks
    key_gradients: Blocks
    table_gradient: Blocks
    """Also of the gradient of the parameters of a logit of pairs."""
    decoding: Blocks
    """Of the queries, which are rows of all heads of a group, at most so many."""
    with_vectors: Blocks
    """Of all kernels but that for decoding, with terms of one vector per distance: as many queries as keys."""

    @property
    def of_vectors(self) -> "Sizes":
        """With such terms."""
        blocks = self.with_vectors
        return self._replace(forward=blocks, query_gradient=blocks, key_gradients=blocks, table_gradient=blocks)


_SIZES = {
    64: Sizes(
        forward=Blocks(128, 64, 8, 3),
        query_gradient=Blocks(64, 64, 8, 2),
        key_gradients=Blocks(64, 64, 8, 2),
        table_gradient=Blocks(64, 64, 8, 2),
        decoding=Blocks(64, 64, 4, 3),
        with_vectors=Blocks(32, 32, 8, 1),
    ),
    128: Sizes(
        forward=Blocks(128, 64, 8, 2),
        query_gradient=Blocks(64, 64, 8, 2),
        key_gradients=Blocks(64, 64, 8, 2),
        table_gradient=Blocks(64, 64, 8, 2),
        decoding=Blocks(64, 64, 4, 3),
        with_vectors=Blocks(32, 32, 8, 1),
    ),
    512: Sizes(
        forward=Blocks(64, 32, 8, 2),
        query_gradient=Blocks(32, 32, 4, 2),
        key_gradients=Blocks(32, 32, 8, 2),
        table_gradient=Blocks(32, 32, 4, 2),
        decoding=Blocks(32, 32, 4, 2),
        with_vectors=Blocks(16, 16, 4, 1),
    ),
    1024: Sizes(
        forward=Blocks(32, 32, 8, 1),
        query_gradient=Blocks(32, 32, 8, 1),
        key_gradients=Blocks(32, 32, 8, 1),
        table_gradient=Blocks(32, 32, 4, 1),
        decoding=Blocks(16, 32, 4, 1),
        with_vectors=Blocks(16, 16, 4, 1),
    ),
}
"""By the head dim, filled up to a power of two; float32, which takes twice the memory and more registers, counts four
times. Found with the compilers for sm80, sm90 and sm100: powers of two that fit the shared memory of an A100 (163 KiB)
and spill few registers, if any; with vectors, up to about two hundred, and more in float32 with head dims of 256. No
GPU was at hand, so none is tuned."""


def sizes_for(head_dim: int, itemsize: int) -> Sizes:
    """The sizes of blocks for a head dim filled up to a power of two, and bytes per number."""
    return next(sizes for size, sizes in _SIZES.items() if head_dim * itemsize**2 // 4 <= size)
