"""Adafactor (Shazeer & Stern 2018, arXiv 1804.04235) for matrices with several axes, stacked over layers and sharded.

Its second moment of a matrix is two vectors: the mean squares of its rows and of its columns. `optax` factors an array
over its two largest axes, which in a kernel [L, D, N, H] need not be rows and columns, and drops an axis that the mesh
may shard. Here every axis of a matrix belongs to its rows, its columns or neither, and the vectors keep all axes, with
size 1 where they have averaged.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

Axes = tuple[int, ...]


class AdafactorState(NamedTuple):
    """The second moments, by name of parameter."""

    count: jax.Array  # type: ignore[assignment]
    rows: dict[str, nnx.Variable]
    """Of a matrix: the mean square of each row."""
    columns: dict[str, nnx.Variable]
    """Of a matrix: the mean square of each column."""
    squares: dict[str, nnx.Variable]
    """Of all other parameters: the square of each element."""


def matrix_axes(variable: nnx.Variable) -> tuple[Axes, Axes] | None:
    """Return which axes of a weight are the rows and which the columns of a matrix; None if it is no matrix.

    A matrix reads or writes the residual stream: it has the logical axis "embed" and another one besides "layers",
    which only stacks. All other axes belong together: the heads of an attention kernel lie side by side.
    """
    names = variable.get_metadata("axes", None) or ()
    if "embed" not in names:
        return None
    embed = (names.index("embed"),)
    others = tuple(axis for axis, name in enumerate(names) if name not in ("layers", "embed"))
    return (embed, others) if embed < others else (others, embed)


def scale_by_adafactor(*, decay_rate: float, eps: float) -> optax.GradientTransformation:
    """Divide by the root of the factored second moment, and clip each parameter's update to a root mean square of 1.

    Learning rates are absolute, not relative to the size of a parameter (as in Zhai et al. 2022, arXiv 2106.04560):
    those of Adam serve here, and parameters that start at 0 learn as fast as others.

    Args:
        decay_rate: The decay of the moments in step t is 1 - t^-decay_rate.
        eps: Added to squared gradients.
    """

    def init(params: nnx.State) -> AdafactorState:
        state = AdafactorState(jnp.zeros([], jnp.int32), {}, {}, {})
        for name, variable in _by_name(params).items():
            if (axes := matrix_axes(variable)) is None:
                state.squares[name] = jax.tree.map(jnp.zeros_like, variable)
            else:
                state.rows[name], state.columns[name] = (_averaged(variable, over) for over in reversed(axes))
        return state

    def update(updates: nnx.State, state: AdafactorState, params: nnx.State | None = None):
        del params
        count = optax.safe_increment(state.count)
        decay = 1 - count.astype(jnp.float32) ** -decay_rate
        after, scaled = AdafactorState(count, {}, {}, {}), {}
        for name, variable in _by_name(updates).items():
            gradient = variable[...]
            square = gradient**2 + eps
            if (axes := matrix_axes(variable)) is None:
                after.squares[name] = _moved(state.squares[name], square, decay)
                direction, over = gradient * jax.lax.rsqrt(after.squares[name][...]), None
            else:
                over_rows, over_columns = axes
                after.rows[name] = _moved(state.rows[name], square.mean(over_columns, keepdims=True), decay)
                after.columns[name] = _moved(state.columns[name], square.mean(over_rows, keepdims=True), decay)
                rows, columns = after.rows[name][...], after.columns[name][...]
                shares = rows / rows.mean(over_rows, keepdims=True)
                direction = gradient * jax.lax.rsqrt(shares) * jax.lax.rsqrt(columns)
                over = over_rows + over_columns
            size = jnp.sqrt(jnp.mean(direction**2, axis=over, keepdims=True))
            scaled[name] = variable.replace(direction / jnp.maximum(1, size))
        structure = jax.tree.structure(updates, is_leaf=is_variable)
        return jax.tree.unflatten(structure, scaled.values()), after

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def is_variable(node: object) -> bool:
    return isinstance(node, nnx.Variable)


def _by_name(tree: nnx.State) -> dict[str, nnx.Variable]:
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_variable)
    return {jax.tree_util.keystr(path, simple=True, separator="."): variable for path, variable in found}


def _averaged(variable: nnx.Variable, over: Axes) -> nnx.Variable:
    """Zeros for the means of a parameter over some axes, which then are not sharded."""
    names = [None if axis in over else name for axis, name in enumerate(variable.get_metadata("axes"))]
    shape = [1 if axis in over else size for axis, size in enumerate(variable.shape)]
    return nnx.Param(jnp.zeros(shape, variable.dtype), axes=tuple(names))


def _moved(average: nnx.Variable, value: jax.Array, decay: jax.Array) -> nnx.Variable:
    return average.replace(decay * average[...] + (1 - decay) * value)
