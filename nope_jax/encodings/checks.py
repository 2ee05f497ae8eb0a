"""Checks of encoding settings and of arrays; each error names the argument and what it should be."""

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def at_least(least: int, **settings: float | None) -> None:
    """Check that settings are finite numbers of at least `least`. None is accepted.

    Raises:
        ValueError: names the setting and its bound.
    """
    for name, number in settings.items():
        if number is not None and not (_is_number(number) and number >= least):
            raise ValueError(f"{name} must be at least {least}, not {number!r}")


def integer_at_least(least: int, **settings: int | None) -> None:
    """Check that settings are integers of at least `least`. None is accepted.

    Raises:
        ValueError: names the setting and its bound.
    """
    for name, number in settings.items():
        if number is None:
            continue
        if not isinstance(number, numbers.Integral) or isinstance(number, bool):
            raise ValueError(f"{name} must be an integer of at least {least}, not {number!r}")
        if number < least:
            raise ValueError(f"{name} must be at least {least}, not {number}")


def positive(**settings: float | None) -> None:
    """Check that settings are finite numbers above 0. None is accepted.

    Raises:
        ValueError: names the setting and its bound.
    """
    for name, number in settings.items():
        if number is not None and not (_is_number(number) and number > 0):
            raise ValueError(f"{name} must be positive, not {number!r}")


def boolean(**settings: bool) -> None:
    """Check that settings are True or False.

    Raises:
        ValueError: names the setting.
    """
    for name, setting in settings.items():
        if not isinstance(setting, bool | np.bool_):
            raise ValueError(f"{name} must be True or False, not {setting!r}")


def finite(**settings: float) -> None:
    """Check that settings are finite numbers.

    Raises:
        ValueError: names the setting.
    """
    for name, number in settings.items():
        if not _is_number(number):
            raise ValueError(f"{name} must be a finite number, not {number!r}")


def known_values(what: str, holds: Callable[[np.ndarray], np.ndarray], **arrays: Any) -> None:
    """Check that `holds` is true of every entry; skipped for arrays traced under jit or held by other hosts.

    Raises:
        ValueError: names the array, what its entries should be, and the first that is not.
    """
    for name, x in arrays.items():
        if isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True):
            continue
        x = np.asarray(x)
        if not np.all(holds(x)):
            raise ValueError(f"{name} must be {what}, not {x[~holds(x)].flat[0]}")


def as_array(name: str, x: Any) -> jax.Array:
    """Convert to an array.

    Raises:
        ValueError: `x` is no array of numbers, or JAX, which has 32 bits by default, would change them; the message
            names it.
    """
    try:
        with np.errstate(over="ignore"):  # of what is refused below
            array = jnp.asarray(x)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be an array of numbers, not {x!r}") from None
    except OverflowError:
        raise ValueError(f"{name} must fit {jax.dtypes.canonicalize_dtype(int)}, not {x!r}") from None
    if isinstance(x, np.ndarray | np.generic | float) and np.asarray(x).dtype.itemsize > array.dtype.itemsize:
        most = (jnp.iinfo if jnp.issubdtype(array.dtype, jnp.integer) else jnp.finfo)(array.dtype).max
        fits = f"at most {most}, which fits {array.dtype}"
        known_values(fits, lambda x: ~np.isfinite(x) | (np.abs(x) <= most), **{name: x})
    return array


def _is_number(number: object) -> bool:
    return isinstance(number, numbers.Real) and not isinstance(number, bool) and math.isfinite(number)
