"""Many runs of one config in one process, compiled once: for tests of what happens around the steps."""

import functools

import jax
import pytest

from nope_jax.training import loop


def share_programs(patch: pytest.MonkeyPatch) -> None:
    """Gives runs that ask for the same step or validation the same jitted function, which JAX compiles only once."""
    steps, jit_train_step = {}, loop.jit_train_step

    def shared(graphdef, optimizer, abstract, *arguments, **keywords):
        shardings = tuple(array.sharding for array in jax.tree.leaves(abstract))
        key = graphdef, optimizer, shardings, arguments, tuple(sorted(keywords.items()))
        if key not in steps:
            steps[key] = jit_train_step(graphdef, optimizer, abstract, *arguments, **keywords)
        return steps[key]

    patch.setattr(loop, "make_optimizer", functools.cache(loop.make_optimizer))
    patch.setattr(loop, "jit_train_step", shared)
    patch.setattr(loop, "jit_validation", functools.cache(loop.jit_validation))
