"""The training state, created sharded on the mesh: no device ever holds more than its shard."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from nope_jax.config import Config
from nope_jax.models import Decoder, abstract_decoder
from nope_jax.sharding import PARAMETER_RULES, abstract_on_mesh


class Skips(NamedTuple):
    """State of `train.on_bad_step skip`; unused otherwise."""

    total: jax.Array
    """Number of skipped steps, int32."""
    in_a_row: jax.Array
    """Number of steps skipped since the last good one, int32."""
    averaged: jax.Array
    """Number of steps averaged in `grad_norm`, int32."""
    grad_norm: jax.Array
    """Running average of the global gradient norm over good steps, float32."""


def no_skips() -> Skips:
    """The state before the first step."""
    return Skips(jnp.int32(0), jnp.int32(0), jnp.int32(0), jnp.float32(0))


class TrainState(NamedTuple):
    """The contents of a checkpoint. The number of updates is the optimizer's own count."""

    params: nnx.State
    opt_state: optax.OptState
    skips: Skips
    ema: nnx.State | None = None
    """The moving average of the parameters (`train.ema`), sharded as they are; None: there is none."""

    @property
    def weights(self) -> nnx.State:
        """What is validated, and evaluated later: the average if there is one, else the parameters."""
        return self.params if self.ema is None else self.ema

    def trees(self) -> dict[str, Any]:
        """The parts that a checkpoint has, by name."""
        return {name: part for name, part in self._asdict().items() if part is not None}


def new_state(config: Config, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """Return the state of a run before its first step."""
    params = nnx.state(Decoder(config.model, rngs=nnx.Rngs(key)))
    average = None if config.train.ema is None else jax.tree.map(jnp.copy, params)  # its own memory, to be donated
    return TrainState(params, optimizer.init(params), no_skips(), average)


def abstract_state(
    config: Config, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[nnx.GraphDef[Decoder], TrainState]:
    """Return the structure of the model, and the shape, dtype and sharding of every array of its state.

    Raises:
        ValueError: an axis of a parameter does not divide evenly over the mesh.
    """
    graphdef = nnx.graphdef(abstract_decoder(config.model))
    abstract = jax.eval_shape(lambda: new_state(config, optimizer, jax.random.key(0)))
    params = abstract_on_mesh(abstract.params, mesh, PARAMETER_RULES[config.mesh.rules])
    average = None if abstract.ema is None else params
    return graphdef, abstract_on_mesh(abstract, mesh)._replace(params=params, ema=average)


def init_state(config: Config, optimizer: optax.GradientTransformation, abstract: TrainState) -> TrainState:
    """Initialize the state from `config.train.seed`, directly in the shardings of `abstract`."""
    shardings = jax.tree.map(lambda array: array.sharding, abstract)
    # This runs once. On a CPU the lower level compiles in a fifth of the time and gives the same bits.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    init = jax.jit(lambda key: new_state(config, optimizer, key), out_shardings=shardings, compiler_options=options)
    return init(jax.random.key(config.train.seed))
