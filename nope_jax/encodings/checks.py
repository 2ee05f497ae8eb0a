"""What the settings of encodings are held to: each refusal names the setting and its bound."""

import math
import numbers


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


def _is_number(number: object) -> bool:
    return isinstance(number, numbers.Real) and not isinstance(number, bool) and math.isfinite(number)
