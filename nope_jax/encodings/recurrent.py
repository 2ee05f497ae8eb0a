"""Recurrent positions at the input: each position is computed from the one before, by a learned cell or ODE.

They continue past the training length. Every call computes all positions below `tokens.length` sequentially, and uses
length · D memory, for the gradient too.

Shapes: B batch, T length, D model width, W hidden width.
"""

import abc
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nope_jax.encodings.absolute import rows_at
from nope_jax.encodings.checks import integer_at_least, positive
from nope_jax.encodings.encoding import Encoding, ModelDims, Params, TokenInputs

# At thousands of steps, a GPU's default of ten bits per step would accumulate error.
_matmul = functools.partial(jnp.matmul, precision="highest")


@dataclasses.dataclass(frozen=True)
class _Recurrence(Encoding, abc.ABC):
    """Base class: x + p_k, where p_0 is the parameter `start` and the subclass's `step` computes each next one."""

    @abc.abstractmethod
    def step(self, params: Params, row: Float[Array, "D"], k: Int[Array, ""]) -> Float[Array, "D"]:
        """p_{k+1} from p_k."""

    def input(self, params: Params, embeddings, tokens: TokenInputs):
        cell = {name: param.astype(jnp.float32) for name, param in params.items()}

        def next_row(row, k):
            return self.step(cell, row, k), row

        table = jax.lax.scan(next_row, cell["start"], jnp.arange(tokens.length))[1]
        return embeddings + rows_at(table, tokens.positions).astype(embeddings.dtype)


@dataclasses.dataclass(frozen=True)
class Recursive(_Recurrence):
    """x + p_k with p_{k+1} = tanh(W·p_k + b) and p_0 learned: a recurrent network over positions, without input.

    W is initialized to an orthogonal matrix, a rotation in D dimensions, so the initial positions are sums of sinusoids
    of random frequencies. The idea is from Liu et al. 2020 (arXiv 2003.09229), who compare FLOATER with it.
    """

    def init_shared(self, key, dims: ModelDims) -> Params:
        start, kernel = jax.random.split(key)
        return {
            "start": 0.02 * jax.random.normal(start, (dims.model_dim,)),
            "kernel": jax.random.orthogonal(kernel, dims.model_dim),
            "bias": jnp.zeros(dims.model_dim),
        }

    def step(self, params, row, k):
        return jnp.tanh(_matmul(row, params["kernel"]) + params["bias"])


@dataclasses.dataclass(frozen=True)
class FLOATER(_Recurrence):
    """x + p(t_k) with dp/dt = h(t, p), t_k = k·step_size, h a learned MLP (Liu et al. 2020, arXiv 2003.09229).

    p(0) is learned too. The equation is solved by the classical fourth-order Runge-Kutta method, in `substeps` equal
    steps per position. The paper uses one flow per block, in addition to sinusoids at the input; here one flow acts at
    the input only. h uses tanh where the authors' code uses ReLU: tanh is smooth, as the order of the method requires,
    and bounded, so p grows at most linearly in t.
    """

    step_size: float = 0.01
    """Time between consecutive positions; the default is from the authors' code."""
    substeps: int = 1
    """The authors' code uses 5; at this step size, 1 differs from it only by float32 rounding."""
    width: int | None = None
    """Hidden width of h; None for the model width."""

    def __post_init__(self):
        positive(step_size=self.step_size)
        integer_at_least(1, substeps=self.substeps, width=self.width)

    def init_shared(self, key, dims: ModelDims) -> Params:
        d, w = dims.model_dim, self.width or dims.model_dim
        # Over the training length, p moves about as far as an embedding is long, whatever that length.
        duration = self.step_size * (dims.train_length or 1024)
        start, inner, bias, outer = jax.random.split(key, 4)
        return {
            "start": 0.02 * jax.random.normal(start, (d,)),
            "inner": (d + 1) ** -0.5 * jax.random.normal(inner, (d + 1, w)),  # the last row multiplies time
            "inner_bias": jax.random.normal(bias, (w,)),
            "outer": w**-0.5 / duration * jax.random.normal(outer, (w, d)),
            "outer_bias": jnp.zeros(d),
        }

    def step(self, params, row, k):
        def slope(time, row):
            inner = _matmul(row, params["inner"][:-1]) + time * params["inner"][-1] + params["inner_bias"]
            return _matmul(jnp.tanh(inner), params["outer"]) + params["outer_bias"]

        h = self.step_size / self.substeps
        for i in range(self.substeps):
            time = (k * self.substeps + i) * h
            first = slope(time, row)
            second = slope(time + h / 2, row + h / 2 * first)
            third = slope(time + h / 2, row + h / 2 * second)
            fourth = slope(time + h, row + h * third)
            row = row + h / 6 * (first + 2 * second + 2 * third + fourth)
        return row
