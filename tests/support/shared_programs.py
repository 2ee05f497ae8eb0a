"""Many runs of one config in one process, compiled once: for tests of what happens around the steps."""

import functools

import jax
import pytest

from nope_jax.training import loop
from nope_jax.training.state import new_state

INITS = {}


def share_programs(patch: pytest.MonkeyPatch) -> None:
    """Gives runs that ask for the same step or validation the same jitted function, which JAX compiles only once.

    Runs of one shape have one abstract state, and one program that makes the first state of each, in all modules.
    """
    steps, abstracts = {}, {}
    jit_train_step, abstract_state = loop.jit_train_step, loop.abstract_state

    def shared_step(graphdef, optimizer, abstract, *arguments, **keywords):
        shardings = tuple(array.sharding for array in jax.tree.leaves(abstract))
        key = graphdef, optimizer, shardings, arguments, tuple(sorted(keywords.items()))
        if key not in steps:
            steps[key] = jit_train_step(graphdef, optimizer, abstract, *arguments, **keywords)
        return steps[key]

    def shared_abstract_state(config, optimizer, mesh):
        key = config.model, config.train.ema, config.mesh, optimizer, mesh
        if key not in abstracts:
            abstracts[key] = abstract_state(config, optimizer, mesh)
        return abstracts[key]

    def shared_init_state(config, optimizer, abstract):
        key = config.model, config.train.ema, config.mesh, config.optimizer
        if key not in INITS:
            shardings = jax.tree.map(lambda array: array.sharding, abstract)
            INITS[key] = jax.jit(functools.partial(new_state, config, optimizer), out_shardings=shardings)
        return INITS[key](jax.random.key(config.train.seed))

    patch.setattr(loop, "make_optimizer", functools.cache(loop.make_optimizer))
    patch.setattr(loop, "jit_train_step", shared_step)
    patch.setattr(loop, "jit_validation", functools.cache(loop.jit_validation))
    patch.setattr(loop, "abstract_state", shared_abstract_state)
    patch.setattr(loop, "init_state", shared_init_state)
