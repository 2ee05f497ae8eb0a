"""Logit scale: wrappers that multiply the content logit q·k/√H of the inner encoding by a factor.

With more keys, a softmax spreads out; a factor that grows with the number of keys keeps it sharp. The factor multiplies
the content logit only, not the term of the logit place, and combines with the logit scale of the inner encoding.

Shapes: B batch, T query length, S key length, N query heads.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from nope_jax.encodings.checks import at_least, integer_at_least, positive
from nope_jax.encodings.encoding import AttentionSpan, Encoding, ModelDims, Params, tokenwise
from nope_jax.encodings.wrapper import Wrapper


def keys_seen(positions: Int[Array, "*shape"], span: AttentionSpan | None = None) -> Int[Array, "*shape"]:
    """Number of keys that causal queries at these positions see, if all earlier positions have a key.

    Args:
        positions: Positions of the queries.
        span: Attention span of the layer; None for all keys.
    """
    span = span or AttentionSpan()
    number = positions + 1 if span.chunk_size is None else positions % span.chunk_size + 1
    # A query before position 0 (padding) sees no keys; clip it so that the logarithm is defined.
    return jnp.clip(number, 1, span.window)


def logit_scale_product(first: Any, second: Any) -> Any:
    """Product of two logit scales, each None (meaning 1), a number, [N] or [B or 1, N or 1, T]."""
    if first is None or second is None:
        return second if first is None else first
    first, second = jnp.asarray(first, jnp.float32), jnp.asarray(second, jnp.float32)
    if max(first.ndim, second.ndim) == 3:
        first, second = (x[:, None] if x.ndim == 1 else x for x in (first, second))
    return first * second


@dataclasses.dataclass(frozen=True)
class LogN(Wrapper):
    """max(1, log_L n) · q·k/√H, with n the number of keys a query sees and L the training length; 1 within L.

    It keeps the entropy of attention from growing with length. It multiplies the logit; it does not divide it. Su 2021,
    https://kexue.fm/archives/8823. `keys_seen` computes n from the position of a causal query, within the window or
    chunk of the inner encoding.

    Raises:
        ValueError: length is below 2, or it is None and the model's training length is unknown.
    """

    length: int | None = None
    """L. None: the model's training length."""

    def __post_init__(self):
        super().__post_init__()
        integer_at_least(2, length=self.length)

    def bind(self, dims: ModelDims) -> Encoding:
        length = dims.train_length if self.length is None else self.length
        return dataclasses.replace(self, encoding=self.encoding.bind(dims), length=length)

    @tokenwise
    def logit_scale(self, params: Params, query_positions, key_positions):
        if self.length is None:
            raise ValueError("length must be given if the model's training length is unknown, as in LogN(length=512)")
        seen = keys_seen(query_positions, self.span()).astype(jnp.float32)
        factor = jnp.maximum(jnp.log(seen) / math.log(self.length), 1.0)[:, None]
        return logit_scale_product(factor, self.encoding.logit_scale(params, query_positions, key_positions))


@dataclasses.dataclass(frozen=True)
class UniformScale(Wrapper):
    """λ · q·k/√H, one λ for all layers, heads and positions (Wang et al. 2024, arXiv 2404.12224).

    For a model trained at L and used at s·L they find λ of about 1.2, 1.5 and 1.8 at s = 2, 4 and 8, and fit
    1 + 0.397·ln s; DroPE uses 1 + 0.412·ln s. It helps NoPE but not RoPE, which fails for other reasons.

    Raises:
        ValueError: factor is not positive.
    """

    factor: float = 1.2

    def __post_init__(self):
        super().__post_init__()
        positive(factor=self.factor)

    @tokenwise
    def logit_scale(self, params: Params, query_positions, key_positions):
        return logit_scale_product(self.factor, self.encoding.logit_scale(params, query_positions, key_positions))


@dataclasses.dataclass(frozen=True)
class HeadScale(Wrapper):
    """λ_h · q·k/√H with a learned λ per layer and head (Wang et al. 2024, arXiv 2404.12224).

    The authors train only λ, on a trained NoPE model at the longer length, starting from the best uniform scale, and
    keep every λ at 1 or above ("focus constraint"). The constraint is left to training; here λ can take any value.

    Raises:
        ValueError: start is not positive.
    """

    start: float = 1.0
    """Initial value of every λ."""

    def __post_init__(self):
        super().__post_init__()
        positive(start=self.start)

    def init_layer(self, key, dims: ModelDims) -> Params:
        scales = jnp.full(dims.num_heads, self.start, jnp.float32)
        return self._with_layer_params(key, dims, head_scale=scales)

    @tokenwise
    def logit_scale(self, params: Params, query_positions, key_positions):
        inner = self.encoding.logit_scale(params, query_positions, key_positions)
        return logit_scale_product(params["head_scale"], inner)


@dataclasses.dataclass(frozen=True)
class SSMax(Wrapper):
    """s_h · ln n · q·k/√H: scalable softmax, with n the number of keys a query sees and s learned per layer and head.

    Equivalent to n^(s·q·k/√H) in place of e^(q·k/√H) (Nakanishi 2025, arXiv 2501.19399). The first query, which sees
    only itself, has the factor 0. n is computed as in `LogN`.

    Raises:
        ValueError: start is not positive.
    """

    start: float = 0.168
    """Initial value of every s. The default makes s·ln n equal to 1 on average over the lengths up to 1,024."""

    def __post_init__(self):
        super().__post_init__()
        positive(start=self.start)

    def init_layer(self, key, dims: ModelDims) -> Params:
        scales = jnp.full(dims.num_heads, self.start, jnp.float32)
        return self._with_layer_params(key, dims, ssmax=scales)

    @tokenwise
    def logit_scale(self, params: Params, query_positions, key_positions):
        logs = jnp.log(keys_seen(query_positions, self.span()).astype(jnp.float32))
        factor = params["ssmax"].astype(jnp.float32)[:, None] * logs[:, None]
        return logit_scale_product(factor, self.encoding.logit_scale(params, query_positions, key_positions))


@dataclasses.dataclass(frozen=True)
class Llama4Scale(Wrapper):
    """(1 + scale · ln(1 + floor((position + 1) / floor_scale))) · q·k/√H, as on Llama 4's NoPE layers (Meta 2025).

    A staircase: 1 for the first floor_scale - 1 tokens, 1 + scale·ln 2 for the next floor_scale, and so on.

    Raises:
        ValueError: floor_scale is below 1, or scale negative.
    """

    floor_scale: int = 8192
    scale: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        integer_at_least(1, floor_scale=self.floor_scale)
        at_least(0, scale=self.scale)

    @tokenwise
    def logit_scale(self, params: Params, query_positions, key_positions):
        step = (jnp.maximum(query_positions + 1, 0) // self.floor_scale).astype(jnp.float32)
        factor = (1 + self.scale * jnp.log1p(step))[:, None]
        return logit_scale_product(factor, self.encoding.logit_scale(params, query_positions, key_positions))


@dataclasses.dataclass(frozen=True)
class SwanScale(Wrapper):
    """log_a(a + position) · q·k/√H, as on SWAN-GPT's NoPE layers at inference (Puvvada et al. 2025, arXiv 2504.08719).

    The factor is 1 at the first token and grows from there, also within the training length; it is not used in
    training. The paper fits a to the factors that work best for each segment of a text: about 362 for a model trained
    at 1,024 tokens.

    Raises:
        ValueError: offset is not above 1.
    """

    offset: float = 362.0
    """a."""

    def __post_init__(self):
        super().__post_init__()
        positive(offset=self.offset)
        if not self.offset > 1:
            raise ValueError(f"offset must be above 1, not {self.offset}")

    @tokenwise
    def logit_scale(self, params: Params, query_positions, key_positions):
        # log_a(a + n) = 1 + log_a(1 + n/a), which is exactly 1 at n = 0.
        positions = jnp.maximum(query_positions, 0).astype(jnp.float32)
        factor = 1 + jnp.log1p(positions / self.offset) / math.log(self.offset)
        return logit_scale_product(factor[:, None], self.encoding.logit_scale(params, query_positions, key_positions))
