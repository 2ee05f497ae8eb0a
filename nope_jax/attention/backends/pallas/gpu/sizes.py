"""The sizes of blocks."""

from typing import NamedTuple


class Blocks(NamedTuple):
    """How a kernel is cut into programs."""

    queries: int
    keys: int
    warps: int
    stages: int
    """Blocks of its loop that a program loads ahead."""


class Sizes(NamedTuple):
    """Of every kernel."""

    forward: Blocks
    query_gradient: Blocks
    key_gradients: Blocks
    table_gradient: Blocks
    """Also of the gradient of the parameters of a logit of pairs."""
    decoding: Blocks
    """Of the queries, which are rows of all heads of a group, at most so many."""

    def square(self) -> "Sizes":
        """For terms of one vector per distance: as many queries as keys. Nothing is loaded ahead, since a program would
        have to know which loads may go before which stores."""
        sides = (min(blocks.queries, blocks.keys) for blocks in self)
        return Sizes(*(Blocks(side, side, blocks.warps, 1) for side, blocks in zip(sides, self, strict=True)))


_SIZES = {
    64: Sizes(
        Blocks(128, 64, 8, 3), Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2), Blocks(64, 64, 4, 3)
    ),
    128: Sizes(
        Blocks(128, 64, 8, 2), Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2), Blocks(64, 64, 8, 2), Blocks(64, 64, 4, 3)
    ),
    512: Sizes(
        Blocks(64, 32, 8, 2), Blocks(32, 32, 4, 2), Blocks(32, 32, 8, 2), Blocks(32, 32, 4, 2), Blocks(32, 32, 4, 2)
    ),
    1024: Sizes(
        Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 1), Blocks(32, 32, 4, 1), Blocks(16, 32, 4, 1)
    ),
}
"""By the head dim, filled up to a power of two; float32, which takes twice the memory and more registers, counts four
times. Found with the compilers for sm80, sm90 and sm100: powers of two that fit the shared memory of an A100 (163 KiB)
and spill few registers, if any. No GPU was at hand, so none is tuned."""


def sizes_for(head_dim: int, itemsize: int) -> Sizes:
    """The sizes of blocks for a head dim filled up to a power of two, and bytes per number."""
    return next(sizes for size, sizes in _SIZES.items() if head_dim * itemsize**2 // 4 <= size)
