"""What a program reads of an array: some tokens of it, with head dims filled up to a power of two.

A matrix is an array [B, length, heads, dim], of which a program reads blocks [size, dim], with dim filled up to a power
of two; a vector is an array [B, heads, length], of which it reads blocks [size].

Shapes as in `pallas`.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

SMALLEST_DIM = 16
"""Of a matrix product on a tensor core."""
DISTANCES = 128
"""Distances in the table are filled up to a multiple of this at both ends: that of the largest block."""


def padded_dim(dim: int) -> int:
    """The head dim that a program computes with."""
    return max(SMALLEST_DIM, pl.next_power_of_2(dim))


def of_dim(padded: int) -> Any:
    """All of a row. (The interpreter has other indices of 32 bits, too, but would take a Python number for 64.)"""
    return pl.ds(jnp.int32(0), padded)


def padded_length(length: int) -> int:
    """The number of distances to one side in the table."""
    return -(-length // DISTANCES) * DISTANCES


def all_masks(masks: list[Any], shape: tuple[int, ...]) -> Any:
    """Where all of some masks, which broadcast to a shape, are true; None for none."""
    masks = [mask for mask in masks if mask is not None]
    return jnp.broadcast_to(functools.reduce(jnp.logical_and, masks), shape) if masks else None


class Span:
    """`size` tokens from `start` on, of `length`."""

    def __init__(self, start: Any, size: int, length: int):
        self.size, self.slice, self.index = size, pl.ds(start, size), start + lax.iota(jnp.int32, size)
        self.within = None if length % size == 0 else self.index < length

    def mask(self, dim: int, padded: int) -> Any:
        """Which entries of a block of a matrix there are; None: all."""
        of_tokens = None if self.within is None else self.within[:, None]
        of_dim = None if dim == padded else (lax.iota(jnp.int32, padded) < dim)[None]
        return all_masks([of_tokens, of_dim], (self.size, padded))

    def _load(self, reference: Any, mask: Any) -> Any:
        return plgpu.load(reference, mask=mask, other=None if mask is None else 0)

    def matrix(self, array: Any, reference: Any, b: Any, n: Any) -> Any:
        """The block of head n, zero past its end."""
        padded = padded_dim(array.shape[-1])
        return self._load(reference.at[b, self.slice, n, of_dim(padded)], self.mask(array.shape[-1], padded))

    def vector(self, reference: Any, b: Any, n: Any) -> Any:
        """The block of head n, zero past its end."""
        return self._load(reference.at[b, n, self.slice], self.within)

    def tokens(self, reference: Any, b: Any) -> Any:
        """The block of an array [#B, length]."""
        return self._load(reference.at[jnp.minimum(b, reference.shape[0] - 1), self.slice], self.within)
