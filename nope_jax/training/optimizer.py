"""Optimizers by name, and which parameters get weight decay."""

from collections.abc import Callable

import jax
import optax
from flax import nnx

from nope_jax.config import OptimizerConfig
from nope_jax.training.schedules import learning_rate_schedule


def decays(params: nnx.State) -> nnx.State:
    """True for the matrices that read or write the residual stream, False for norms and an encoding's own parameters.

    These are the matrices with the logical axis "embed" and another one besides "layers", which only stacks.
    """

    def decay(variable: nnx.Variable) -> nnx.Variable:
        names = set(variable.get_metadata("axes", None) or ()) - {"layers", None}
        return jax.tree.map(lambda _: "embed" in names and len(names) > 1, variable)

    return jax.tree.map(decay, params, is_leaf=lambda node: isinstance(node, nnx.Variable))


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=config.b1, b2=config.b2)


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the matrices of the layers; Adam, also with Nesterov momentum, for the rest.

    Muon's updates are scaled to the size of Adam's, so one learning rate serves both (Liu et al. 2025, arXiv
    2502.16982).
    """
    # The rate -1 gives the direction to subtract, as every entry of OPTIMIZERS does.
    return optax.contrib.muon(
        -1.0,
        adam_b1=config.b1,
        adam_b2=config.b2,
        muon_weight_dimension_numbers=layer_matrices,
        consistent_rms=0.2,
    )


def layer_matrices(params: nnx.State) -> nnx.State:
    """For the weights of layers, which of their axes are the rows and columns of a matrix; None for all others.

    A matrix is what one layer multiplies the residual stream by or adds to it: the heads of an attention kernel
    [D, N, H] are its columns side by side, and layers stacked on a leading axis have one matrix each.
    """

    def matrix(variable: nnx.Variable) -> optax.contrib.MuonDimensionNumbers | None:
        names = variable.get_metadata("axes", None) or ()
        if "layers" not in names or "embed" not in names:
            return None
        embed = (names.index("embed"),)
        others = tuple(axis for axis, name in enumerate(names) if name not in ("layers", "embed"))
        return optax.contrib.MuonDimensionNumbers(*((embed, others) if embed < others else (others, embed)))

    return jax.tree.map(matrix, params, is_leaf=lambda node: isinstance(node, nnx.Variable))


OPTIMIZERS: dict[str, Callable[[OptimizerConfig], optax.GradientTransformation]] = {"adamw": _adam, "muon": _muon}
"""Optimizers by `optimizer.name`: from gradients to the direction of an update, before decay and learning rate."""


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Chain clipping by global norm, the named optimizer over `steps` updates, and decoupled weight decay."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.chain(
            OPTIMIZERS[config.name](config),
            optax.add_decayed_weights(config.weight_decay, mask=decays),
            optax.scale_by_learning_rate(learning_rate_schedule(config, steps)),
        ),
    )
