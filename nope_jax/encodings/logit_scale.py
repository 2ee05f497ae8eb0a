"""Logit scale: wrappers that multiply the content logit q·k/√H of the encoding within by a factor.

With more keys to choose from, a softmax spreads over more of them; a factor that grows with their number keeps it
sharp. The factor acts on the content logit alone, not on what the logit place adds, and beside the logit scale of the
encoding within.

Shapes: B batch, T query length, S key length, N query heads.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from nope_jax.encodings.checks import at_least, integer_at_least, positive
from nope_jax.encodings.encoding import AttentionSpan, Encoding, ModelDims, Params
from nope_jax.encodings.wrapper import Wrapper


def keys_seen(positions: Int[Array, "*shape"], span: AttentionSpan | None = None) -> Int[Array, "*shape"]:
    """How many keys causal queries see that stand at these positions, all those before them being there.

    Args:
        positions: Of the queries.
        reach: Of the layer; None for all keys.
    """
    span = span or AttentionSpan()
    number = positions + 1 if span.chunk_size is None else positions % span.chunk_size + 1
    # A query before position 0 (padding) sees none, and no logarithm should know.
    return jnp.clip(number, 1, span.window)


def logit_scale_product(first: Any, second: Any) -> Any:
    """Product of two logit scales, each None (which is 1), a number, [N] or [B or 1, N or 1, T]."""
    if first is None or second is None:
        return second if first is None else first
    first, second = jnp.asarray(first, jnp.float32), jnp.asarray(second, jnp.float32)
    if max(first.ndim, second.ndim) == 3:
        first, second = (x[:, None] if x.ndim == 1 else x for x in (first, second))
    return first * second


@dataclasses.dataclass(frozen=True)
class LogN(Wrapper):
    """max(1, log_L n) · q·k/√H, with n the keys that a query sees and L the training length: 1 within L.

    It keeps the entropy of attention from growing with length. It multiplies the logit; it does not divide it. Su 2021,
    https://kexue.fm/archives/8823. n is counted as `keys_seen` does: for a causal query, from its position, within the
    window or chunk of the encoding inside.

    Raises:
        ValueError: length is below 2, or it is None and the model's training length is not known either.
    """

    length: int | None = None
    """L. None: the model's training length."""

    def __post_init__(self):
        super().__post_init__()
        integer_at_least(2, length=self.length)

    def bind(self, dims: ModelDims) -> Encoding:
        length = dims.train_length if self.length is None else self.length
        return dataclasses.replace(self, encoding=self.encoding.bind(dims), length=length)

    def logit_scale(self, params: Params, query_positions, key_positions):
        if self.length is None:
            raise ValueError("length must be given where no model's training length is known, such as LogN(length=512)")
        seen = keys_seen(query_positions, self.span()).astype(jnp.float32)
        factor = jnp.maximum(jnp.log(seen) / math.log(self.length), 1.0)[:, None]
        return logit_scale_product(factor, self.encoding.logit_scale(params, query_positions, key_positions))


@dataclasses.dataclass(frozen=True)
class UniformScale(Wrapper):
    """λ · q·k/√H, one λ for all layers, heads and positions (Wang et al. 2024, arXiv 2404.12224).

    For a model trained at L and used at s·L they find λ of about 1.2, 1.5 and 1.8 at s = 2, 4 and 8, and fit
    1 + 0.397·ln s; DroPE uses 1 + 0.412·ln s. It is for NoPE: RoPE, which breaks otherwise, it does not help.

    Raises:
        ValueError: factor is not positive.
    """

    factor: float = 1.2

    def __post_init__(self):
        super().__post_init__()
        positive(factor=self.factor)

    def logit_scale(self, params: Params, query_positions, key_positions):
        return logit_scale_product(self.factor, self.encoding.logit_scale(params, query_positions, key_positions))


@dataclasses.dataclass(frozen=True)
class HeadScale(Wrapper):
    """λ_h · q·k/√H with a learned λ for each layer and head (Wang et al. 2024, arXiv 2404.12224).

    They learn nothing else, on a trained NoPE model at the longer length, from the best uniform scale on, and keep
    every λ at 1 or above ("focus constraint"); that is left to training, here a λ can take any value.

    Raises:
        ValueError: start is not positive.
    """

    start: float = 1.0
    """Where every λ begins."""

    def __post_init__(self):
        super().__post_init__()
        positive(start=self.start)

    def init_layer(self, key, dims: ModelDims) -> Params:
        scales = jnp.full(dims.num_heads, self.start, jnp.float32)
        return _joined(self.encoding.init_layer(key, dims), "head_scale", scales)

    def logit_scale(self, params: Params, query_positions, key_positions):
        inner = self.encoding.logit_scale(params, query_positions, key_positions)
        return logit_scale_product(params["head_scale"], inner)


@dataclasses.dataclass(frozen=True)
class SSMax(Wrapper):
    """s_h · ln n · q·k/√H: scalable softmax, with n the keys that a query sees and s learned for each layer and head.

    The same as n^(s·q·k/√H) in place of e^(q·k/√H) (Nakanishi 2025, arXiv 2501.19399). The first query, which sees
    itself alone, has the factor 0. n is counted as in `LogN`.

    Raises:
        ValueError: start is not positive.
    """

    start: float = 0.168
    """Where every s begins. The default makes s·ln n equal to 1 on average over the lengths up to 1,024."""

    def __post_init__(self):
        super().__post_init__()
        positive(start=self.start)

    def init_layer(self, key, dims: ModelDims) -> Params:
        scales = jnp.full(dims.num_heads, self.start, jnp.float32)
        return _joined(self.encoding.init_layer(key, dims), "ssmax", scales)

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

    def logit_scale(self, params: Params, query_positions, key_positions):
        step = (jnp.maximum(query_positions + 1, 0) // self.floor_scale).astype(jnp.float32)
        factor = (1 + self.scale * jnp.log1p(step))[:, None]
        return logit_scale_product(factor, self.encoding.logit_scale(params, query_positions, key_positions))


@dataclasses.dataclass(frozen=True)
class SwanScale(Wrapper):
    """log_a(a + position) · q·k/√H, as on SWAN-GPT's NoPE layers at inference (Puvvada et al. 2025, arXiv 2504.08719).

    It is 1 at the first token and grows from there on, within the training length too; training goes without. The
    paper fits a to the factors that are best for each stretch of a text, and finds about 362 for a model trained at
    1,024 tokens.

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

    def logit_scale(self, params: Params, query_positions, key_positions):
        # log_a(a + n) = 1 + log_a(1 + n/a), which is exactly 1 at n = 0.
        positions = jnp.maximum(query_positions, 0).astype(jnp.float32)
        factor = 1 + jnp.log1p(positions / self.offset) / math.log(self.offset)
        return logit_scale_product(factor[:, None], self.encoding.logit_scale(params, query_positions, key_positions))


def _joined(params: Params, name: str, value: Any) -> Params:
    if name in params:
        raise ValueError(f"encoding must not have a {name} of its own: one wrapper of a kind is enough")
    return {**params, name: value}
