"""The words that RULER's needles and lists are made of: those of the package wonderwords."""

import functools


@functools.cache
def wonderwords(kind: str) -> list[str]:
    """The words of a list of wonderwords: "noun", "adjective" or "verb".

    Raises:
        ValueError: the package is not installed.
    """
    try:
        from wonderwords import random_word
    except ModuleNotFoundError:
        raise ValueError("RULER's words need pip install wonderwords==3.0.1 (or 'nope_jax[ruler]')") from None
    return random_word._get_words_from_text_file(f"{kind}list.txt")
