"""What changes from one step to the next, born on the mesh: no device ever holds more than its share."""

from typing import NamedTuple

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from nope_jax.config import Config
from nope_jax.models import Decoder
from nope_jax.sharding import abstract_on_mesh


class TrainState(NamedTuple):
    """Everything a checkpoint holds. The number of steps taken is the optimizer's own count."""

    params: nnx.State
    opt_state: optax.OptState


def _init(config: Config, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    params = nnx.state(Decoder(config.model, rngs=nnx.Rngs(key)))
    return TrainState(params, optimizer.init(params))


def abstract_state(
    config: Config, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[nnx.GraphDef[Decoder], TrainState]:
    """The structure of the model, and the shape, dtype and sharding of every array of its state.

    Raises:
        ValueError: an axis of a parameter does not divide over the mesh.
    """
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Decoder(config.model, rngs=nnx.Rngs(0))))
    abstract = jax.eval_shape(lambda key: _init(config, optimizer, key), jax.random.key(0))
    return graphdef, abstract_on_mesh(abstract, mesh)


def init_state(config: Config, optimizer: optax.GradientTransformation, abstract: TrainState) -> TrainState:
    """The state before the first step, drawn from `config.train.seed` straight into the shardings of `abstract`."""
    shardings = jax.tree.map(lambda array: array.sharding, abstract)
    # It runs once: on a CPU the lower level compiles in a fifth of the time, to the same bits.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    init = jax.jit(lambda key: _init(config, optimizer, key), out_shardings=shardings, compiler_options=options)
    return init(jax.random.key(config.train.seed))
