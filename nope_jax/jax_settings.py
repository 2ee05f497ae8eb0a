"""Decorators for code that is traced by JAX's default rules, whatever its caller has set.

Rules of differentiation need them too: JAX traces these when it likes, outside of the function that they belong to.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax

_Function = TypeVar("_Function", bound=Callable)


def with_implicit_promotion(function: _Function) -> _Function:
    """For `jax_numpy_dtype_promotion="strict"` and `jax_numpy_rank_promotion="raise"`."""

    @functools.wraps(function)
    def traced(*arguments: Any, **keywords: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return function(*arguments, **keywords)

    return traced  # type: ignore[return-value]


def in_32_bits(function: _Function) -> _Function:
    """For `jax_enable_x64=True`, with which indices in a kernel would be of both sizes."""

    @functools.wraps(function)
    def traced(*arguments: Any, **keywords: Any) -> Any:
        with jax.enable_x64(False):
            return function(*arguments, **keywords)

    return traced  # type: ignore[return-value]
