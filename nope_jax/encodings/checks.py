"""What the settings of encodings are held to: each refusal names the setting and its bound."""

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def at_least(least: int, **settings: float | None) -> None:
    """Refuses finite numbers below a bound, and what is no finite number. None is left alone.

    Raises:
        ValueError: which setting it is and what it should be.
    """
    for name, number in settings.items():
        if number is not None and not (_is_number(number) and number >= least):
            raise ValueError(f"{name} must be at least {least}, not {number}")


def integer_at_least(least: int, **settings: int | None) -> None:
    """Refuses integers below a bound, and what is no integer. None is left alone.

    Raises:
        ValueError: which setting it is and what it should be.
    """
    for name, number in settings.items():
        if number is None:
            continue
        if not isinstance(number, numbers.Integral) or isinstance(number, bool):
            raise ValueError(f"{name} must be an integer of at least {least}, not {number!r}")
        if number < least:
            raise ValueError(f"{name} must be at least {least}, not {number}")


def positive(**settings: float | None) -> None:
    """Refuses finite numbers that are not above 0, and what is no finite number. None is left alone.

    Raises:
        ValueError: which setting it is and what it should be.
    """
    for name, number in settings.items():
        if number is not None and not (_is_number(number) and number > 0):
            raise ValueError(f"{name} must be positive, not {number}")


def known_values(what: str, holds: Callable[[np.ndarray], np.ndarray], **arrays: Any) -> None:
    """Refuses arrays with an entry that does not hold, where entries are known: not under jit, nor on other hosts.

    Raises:
        ValueError: which array it is, what its entries should be, and the first that is not.
    """
    for name, x in arrays.items():
        if isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True):
            continue
        x = np.asarray(x)
        if not np.all(holds(x)):
            raise ValueError(f"{name} must be {what}, not {x[~holds(x)].flat[0]}")


def _is_number(number: object) -> bool:
    return isinstance(number, numbers.Real) and not isinstance(number, bool) and math.isfinite(number)
