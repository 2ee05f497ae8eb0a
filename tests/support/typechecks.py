"""What holds calls of nope_jax to their signatures in tests, by jaxtyping's import hook (see pyproject.toml)."""

import functools
import inspect
import typing

import beartype
import jaxtyping
import numpy as np

check = beartype.beartype(
    conf=beartype.BeartypeConf(
        is_pep484_tower=True,  # an int is a float
        hint_overrides=beartype.FrozenDict({int: int | np.integer}),
    )
)


def _names_arrays(function) -> bool:
    """Whether a signature has shapes, which must agree with one another; one that cannot be read might."""
    try:
        hints = [*typing.get_type_hints(function).values()]
    except NameError:
        return True
    while hints:
        hint = hints.pop()
        if type(hint).__module__.startswith("jaxtyping"):
            return True
        hints += [part for part in typing.get_args(hint) if not isinstance(part, (str, int))]
        hints += [inner for part in typing.get_args(hint) if isinstance(part, list) for inner in part]
    return False


def _held_to_signature(function=None, *, typechecker):
    """As jaxtyping.jaxtyped, but prepared when it is first called, and without its records of shapes where are none.

    They cost a call more than most functions do, and to prepare what no test calls costs each process seconds.
    """
    if function is None:
        return functools.partial(_held_to_signature, typechecker=typechecker)
    if not inspect.isfunction(function):
        return _jaxtyped(function, typechecker=typechecker)
    if not function.__annotations__:
        return function
    checked = None

    @functools.wraps(function)
    def call(*arguments, **keywords):
        nonlocal checked
        if jaxtyping.config.jaxtyping_disable:
            return function(*arguments, **keywords)
        if checked is None:
            checked = _jaxtyped(function, typechecker=typechecker) if _names_arrays(function) else typechecker(function)
        return checked(*arguments, **keywords)

    return call


_jaxtyped, jaxtyping.jaxtyped = jaxtyping.jaxtyped, _held_to_signature
