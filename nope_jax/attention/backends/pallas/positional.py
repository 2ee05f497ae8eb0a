"""A logit that is a function of both positions, within a kernel.

Its parameters are numbers, of which a kernel has a list for each head: it reads them wherever they are, and the
function gets them back in the structure in which the encoding gave them.

Shapes as in `pallas`; P numbers.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from nope_jax.encodings import BlockLogit
from nope_jax.encodings.encoding import MASKED

MAX_PARAMETERS = 256
"""Of one head. A kernel has operations for each of them."""


@dataclasses.dataclass(frozen=True)
class Positional:
    """What is static in such a logit."""

    function: Callable
    structure: Any
    """Of the parameters as a pytree."""
    shapes: tuple[tuple[int, ...], ...]
    """Of each parameter, for one head."""

    @classmethod
    def of(cls, logit: Any) -> "Positional | None":
        """That of a logit; None if it is not one."""
        if not isinstance(logit, BlockLogit) or logit.by_positions is None or logit.heads is None:
            return None
        leaves, structure = jax.tree.flatten(logit.parameters)
        shapes = (
            x.shape if axis is None else np.delete(x.shape, axis) for x, axis in zip(leaves, logit.heads, strict=True)
        )
        return cls(logit.by_positions, structure, tuple(tuple(map(int, shape)) for shape in shapes))

    @property
    def size(self) -> int:
        """P."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def filled_size(self) -> int:
        """P, filled up to a power of two of at least 8."""
        return max(8, 1 << (self.size - 1).bit_length())

    def numbers(self, logit: Any, num_heads: int) -> Float[Array, "N filled"]:
        """All parameters of each head, and zeros up to `filled_size`."""
        found = []
        for x, axis in zip(jax.tree.leaves(logit.parameters), logit.heads, strict=True):
            by_head = x[None] if axis is None else jnp.moveaxis(x, axis, 0)
            by_head = by_head.astype(jnp.float32).reshape(len(by_head), -1)
            found.append(jnp.broadcast_to(by_head, (num_heads, by_head.shape[1])))
        missing = self.filled_size - self.size
        return jnp.concatenate([*found, jnp.zeros((num_heads, missing), jnp.float32)], axis=1)

    def operations(self, *, gradient: bool = False) -> int:
        """About how many operations a pair takes for the logit, or for its gradient, for estimates of cost."""
        number, position = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
        pair = [number] * self.size, position, position
        program = jax.make_jaxpr(self.gradient)(*pair, number) if gradient else jax.make_jaxpr(self)(*pair)
        return _count(program.jaxpr)

    def __call__(self, numbers: Sequence[Any], query_position: Any, key_position: Any) -> Float[Array, "..."]:
        """The logit of pairs, float32, from numbers that broadcast to them."""
        return self._with_gradient(numbers, query_position, key_position)[0]

    def gradient(self, numbers: Sequence[Any], query_position: Any, key_position: Any, d_logit: Any) -> tuple[Any, ...]:
        """The gradients of the numbers, in their shapes."""
        return self._with_gradient(numbers, query_position, key_position)[1](d_logit)

    def _with_gradient(self, numbers: Sequence[Any], query_position: Any, key_position: Any) -> tuple[Any, Any]:
        """The logit and its pullback. Where only the logit is wanted too: compilers of kernels know no custom rules,
        which are replaced by what they say in differentiation."""
        pairs = jnp.broadcast_shapes(query_position.shape, key_position.shape)

        def logit(*numbers):
            leaves, rest = [], list(numbers)
            for shape in self.shapes:
                leaf, rest = rest[: math.prod(shape)], rest[math.prod(shape) :]
                leaves.append(_nested(leaf, shape))
            parameters = jax.tree.unflatten(self.structure, leaves)
            found = jnp.asarray(self.function(parameters, query_position, key_position), jnp.float32)
            return jnp.broadcast_to(jnp.maximum(found, MASKED), pairs)

        return jax.vjp(logit, *numbers)


def _count(program: Any) -> int:
    return sum(_count(one.params["jaxpr"].jaxpr) if "jaxpr" in one.params else 1 for one in program.eqns)


def _nested(entries: list[Any], shape: tuple[int, ...]) -> Any:
    """Tuples of tuples instead of axes."""
    if not shape:
        return entries[0]
    step = len(entries) // shape[0] if shape[0] else 0
    return tuple(_nested(entries[k * step : (k + 1) * step], shape[1:]) for k in range(shape[0]))
