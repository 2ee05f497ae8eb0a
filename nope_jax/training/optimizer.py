"""Optimizers by name, and which parameters get weight decay.

To add an optimizer, write its function here and its settings in `config/choices.py`.
"""

import functools
from collections.abc import Callable

import jax
import optax
from flax import nnx

from nope_jax.config import OptimizerConfig
from nope_jax.training.adafactor import is_variable, matrix_axes, scale_by_adafactor
from nope_jax.training.schedules import learning_rate_schedule


def _adamw(*, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015), with decoupled weight decay like all others (Loshchilov & Hutter 2019)."""
    return optax.scale_by_adam(b1=b1, b2=b2, eps=eps)


def _lion(*, b1: float, b2: float) -> optax.GradientTransformation:
    """Lion (Chen et al. 2023, arXiv 2302.06675): the sign of a momentum, so half of Adam's state."""
    return optax.scale_by_lion(b1=b1, b2=b2)


def _adafactor(*, b1: float, decay_rate: float, eps: float) -> optax.GradientTransformation:
    """Adafactor; with `b1` also a momentum of the updates, which takes the memory of the parameters."""
    factored = scale_by_adafactor(decay_rate=decay_rate, eps=eps)
    return optax.chain(factored, optax.ema(b1, debias=False)) if b1 else factored


def _muon(*, momentum: float, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the matrices of the layers; Adam, also with Nesterov momentum, for the rest.

    Muon's updates are scaled to the size of Adam's, so one learning rate serves both (Liu et al. 2025, arXiv
    2502.16982).
    """
    # The rate -1 gives the direction to subtract, as every entry of OPTIMIZERS does.
    return optax.contrib.muon(
        -1.0,
        beta=momentum,
        eps=eps,
        adam_b1=b1,
        adam_b2=b2,
        muon_weight_dimension_numbers=layer_matrices,
        consistent_rms=0.2,
    )


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": _adamw,
    "lion": _lion,
    "adafactor": _adafactor,
    "muon": _muon,
}
"""Optimizers by `optimizer.name`: from gradients to the direction of an update, before decay and learning rate.

Each takes its settings by name."""


def layer_matrices(params: nnx.State) -> nnx.State:
    """For the matrices of layers, which axes are their rows and columns, one matrix per layer; None for all others."""

    def axes(variable: nnx.Variable) -> optax.contrib.MuonDimensionNumbers | None:
        found = matrix_axes(variable)
        if found is None or "layers" not in variable.get_metadata("axes"):
            return None
        return optax.contrib.MuonDimensionNumbers(*found)

    return jax.tree.map(axes, params, is_leaf=is_variable)


def matrices(params: nnx.State, *, embedding: bool = True) -> nnx.State:
    """True for the matrices that read or write the residual stream, False for norms, biases and an encoding's own.

    Args:
        params: Parameters of a decoder.
        embedding: Whether the token embedding, tied to the head or not, is one of them.
    """

    def mark(path: tuple, variable: nnx.Variable) -> nnx.Variable:
        is_embedding = jax.tree_util.keystr(path, simple=True) == "embedding"
        marked = matrix_axes(variable) is not None and (embedding or not is_embedding)
        return jax.tree.map(lambda _: marked, variable)

    return jax.tree_util.tree_map_with_path(mark, params, is_leaf=is_variable)


DECAYED: dict[str, Callable[[nnx.State], nnx.State]] = {
    "matrices": matrices,
    "no_embedding": functools.partial(matrices, embedding=False),
    "all": lambda params: jax.tree.map(lambda _: True, params),
}
"""Which parameters get weight decay, by `optimizer.decay`."""


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Chain clipping by global norm, the named optimizer over `steps` updates, and decoupled weight decay."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.chain(
            OPTIMIZERS[config.name](**config.settings("name")),
            optax.add_decayed_weights(config.weight_decay, mask=DECAYED[config.decay]),
            optax.scale_by_learning_rate(learning_rate_schedule(config, steps)),
        ),
    )
