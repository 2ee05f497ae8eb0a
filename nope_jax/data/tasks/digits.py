"""Numbers as the tasks write them: digit by digit."""

import functools

DIGITS = "0 1 2 3 4 5 6 7 8 9"


@functools.lru_cache(2**15)
def spaced(number: int) -> str:
    """Write a number with spaces between its digits, and after a minus sign: - 1 2."""
    return f"- {spaced(-number)}" if number < 0 else " ".join(str(number))
