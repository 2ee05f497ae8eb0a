"""Positions by recursion, added to the token embeddings: from one to the next by a learned cell, or along a flow.

They go on past the training length. Every call computes all positions below `tokens.length`, one after another, in
memory of length · D, for the gradient as well.

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

# A GPU's default would round to ten bits at every step of thousands.
_matmul = functools.partial(jnp.matmul, precision="highest")


@dataclasses.dataclass(frozen=True)
class _Recurrence(Encoding, abc.ABC):
    """Base: x + p_k, p_0 the parameter `start`, and each next one the subclass's `step` from the one before."""

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
    """x + p_k with p_{k+1} = tanh(W·p_k + b), p_0 learned too: a recurrent network run over positions, without input.

    W starts orthogonal, a rotation of D dimensions, so that the first positions to be trained are sums of sinusoids of
    random frequencies. The idea is that of Liu et al. 2020 (arXiv 2003.09229), who compare their flow with it.
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

    p(0) is learned too. Solved by the classical Runge-Kutta method of fourth order, in `substeps` equal steps from one
    position to the next. In the paper a flow gives every block its own positions, beside sinusoids at the input; here
    one flow acts at the input alone. h is tanh inside where the authors' code has ReLU: it is smooth, which the order
    of the method needs, and bounded, so that p grows no faster than t.
    """

    step_size: float = 0.01
    """Time between positions; that of the authors' code."""
    substeps: int = 1
    """The authors' code takes 5; with so short a step one differs by float32's rounding."""
    width: int | None = None
    """Hidden width of h; None for the model's."""

    def __post_init__(self):
        positive(step_size=self.step_size)
        integer_at_least(1, substeps=self.substeps, width=self.width)

    def init_shared(self, key, dims: ModelDims) -> Params:
        d, w = dims.model_dim, self.width or dims.model_dim
        # Over the training length p travels about as far as embeddings are long, whatever that length.
        duration = self.step_size * (dims.train_length or 1024)
        start, inner, bias, outer = jax.random.split(key, 4)
        return {
            "start": 0.02 * jax.random.normal(start, (d,)),
            "inner": (d + 1) ** -0.5 * jax.random.normal(inner, (d + 1, w)),  # the last row is that of time
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
