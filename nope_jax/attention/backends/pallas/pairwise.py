"""A logit of pairs within a kernel: a function of both positions, or of numbers of both tokens.

Its parameters are numbers, of which a kernel has a list for each head, and its features are numbers of each token. The
kernel reads them wherever they are, and the function gets them back in the structure in which the encoding gave them.

Shapes as in `pallas`; P parameters.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nope_jax.encodings import BlockLogit
from nope_jax.encodings.encoding import MASKED

MAX_NUMBERS = 256
"""Parameters of one head, and features of one token. A kernel has operations for each of them."""


class Member(NamedTuple):
    """What the logit knows of a member of each pair: some queries, or some keys."""

    positions: Any
    features: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Pairwise:
    """What is static in such a logit."""

    function: Callable
    structure: Any
    """Of the parameters as a pytree."""
    shapes: tuple[tuple[int, ...], ...]
    """Of each parameter, for one head."""
    features: tuple[Any, Any]
    """The structures of the features of queries and of keys."""

    @classmethod
    def of(cls, logit: Any) -> "Pairwise | None":
        """That of a logit; None if it is not one."""
        if not isinstance(logit, BlockLogit) or logit.by_pair is None or logit.heads is None:
            return None
        leaves, structure = jax.tree.flatten(logit.parameters)
        features = jax.tree.structure(logit.query_features), jax.tree.structure(logit.key_features)
        heads = logit.heads[: len(leaves)]
        shapes = (x.shape if axis is None else np.delete(x.shape, axis) for x, axis in zip(leaves, heads, strict=True))
        return cls(logit.by_pair, structure, tuple(tuple(map(int, shape)) for shape in shapes), features)

    @property
    def size(self) -> int:
        """P."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def filled_size(self) -> int:
        """P, filled up to a power of two of at least 8."""
        return max(8, 1 << (self.size - 1).bit_length())

    def numbers(self, logit: Any, num_heads: int) -> Float[Array, "N filled"] | None:
        """All parameters of each head, and zeros up to `filled_size`; None: there are no parameters."""
        leaves = jax.tree.leaves(logit.parameters)
        if not leaves:
            return None
        found = []
        for x, axis in zip(leaves, logit.heads, strict=False):
            by_head = x[None] if axis is None else jnp.moveaxis(x, axis, 0)
            by_head = by_head.astype(jnp.float32).reshape(len(by_head), -1)
            found.append(jnp.broadcast_to(by_head, (num_heads, by_head.shape[1])))
        missing = self.filled_size - self.size
        return jnp.concatenate([*found, jnp.zeros((num_heads, missing), jnp.float32)], axis=1)

    def operations(self, *, gradient: bool = False) -> int:
        """About how many operations a pair takes for the logit, or for its gradient, for estimates of cost."""
        number, position = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
        members = (Member(position, (number,) * structure.num_leaves) for structure in self.features)
        pair = [number] * self.size, *members
        program = jax.make_jaxpr(self.gradient)(*pair, number) if gradient else jax.make_jaxpr(self)(*pair)
        return _count(program.jaxpr)

    def __call__(self, numbers: Sequence[Any], query: Member, key: Member) -> Float[Array, "..."]:
        """The logit of pairs, float32, from numbers and members that broadcast to them."""
        return self._with_gradient(numbers, query, key)[0]

    def gradient(
        self, numbers: Sequence[Any], query: Member, key: Member, d_logit: Any
    ) -> tuple[Sequence[Any], tuple[Any, ...], tuple[Any, ...]]:
        """The gradients of the numbers, and of the features of queries and keys, in their shapes."""
        return self._with_gradient(numbers, query, key)[1](d_logit)

    def _with_gradient(self, numbers: Sequence[Any], query: Member, key: Member) -> tuple[Any, Any]:
        """The logit and its pullback. Where only the logit is wanted too: compilers of kernels know no custom rules,
        which are replaced by what they say in differentiation."""
        pairs = jnp.broadcast_shapes(*(x.shape for x in jax.tree.leaves((tuple(numbers), query, key))))

        def logit(numbers, *features):
            leaves, rest = [], list(numbers)
            for shape in self.shapes:
                leaf, rest = rest[: math.prod(shape)], rest[math.prod(shape) :]
                leaves.append(_nested(leaf, shape))
            parameters = jax.tree.unflatten(self.structure, leaves)
            trees = [jax.tree.unflatten(*both) for both in zip(self.features, features, strict=True)]
            if not any(features):
                trees = []
            found = jnp.asarray(self.function(parameters, query.positions, key.positions, *trees), jnp.float32)
            return jnp.broadcast_to(jnp.maximum(found, MASKED), pairs)

        return jax.vjp(logit, numbers, query.features, key.features)


def features_of(logit: Any, batch: int, num_heads: int) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """The features of a `Pairwise` as float32 arrays [B, N, T] and [B, N, S]; none of other logits."""
    if Pairwise.of(logit) is None:
        return (), ()
    queries, keys = (tuple(map(_heads_first, jax.tree.leaves(x))) for x in (logit.query_features, logit.key_features))
    sides: Any = [tuple(jnp.broadcast_to(x, (batch, num_heads, x.shape[2])) for x in side) for side in (queries, keys)]
    return sides[0], sides[1]


def _heads_first(x: Array) -> Float[Array, "#B #N tokens"]:
    return (x[..., None] if x.ndim == 2 else x).astype(jnp.float32).swapaxes(1, 2)


def _count(program: Any) -> int:
    return sum(_count(one.params["jaxpr"].jaxpr) if "jaxpr" in one.params else 1 for one in program.eqns)


def _nested(entries: list[Any], shape: tuple[int, ...]) -> Any:
    """Tuples of tuples instead of axes."""
    if not shape:
        return entries[0]
    step = len(entries) // shape[0] if shape[0] else 0
    return tuple(_nested(entries[k * step : (k + 1) * step], shape[1:]) for k in range(shape[0]))
