"""The base class of encodings that modify another encoding."""

import dataclasses
from typing import Any

from nope_jax.encodings.encoding import AttentionSpan, Encoding, ModelDims, Params, TokenInputs, tokenwise
from nope_jax.encodings.nope import NoPE

_NOPE = NoPE()


@dataclasses.dataclass(frozen=True)
class Wrapper(Encoding):
    """Base class of wrappers: forwards every place to the inner encoding. A subclass overrides what it changes.

    Its own parameters, if any, are per layer, under names that the inner encoding does not use.
    """

    encoding: Encoding = _NOPE

    def __post_init__(self):
        if not isinstance(self.encoding, Encoding):
            raise ValueError(f"encoding must be an Encoding, such as RoPE(), not {self.encoding!r}")

    def bind(self, dims: ModelDims) -> Encoding:
        return dataclasses.replace(self, encoding=self.encoding.bind(dims))

    @property
    def unwrapped(self) -> Encoding:
        return self.encoding.unwrapped

    @property
    def keys_apart(self) -> bool:
        return super().keys_apart and self.encoding.keys_apart

    @property
    def depends_on_length(self) -> bool:
        return super().depends_on_length or self.encoding.depends_on_length

    def max_length(self, dims: ModelDims) -> int | None:
        return self.encoding.max_length(dims)

    def init_shared(self, key, dims: ModelDims) -> Params:
        return self.encoding.init_shared(key, dims)

    def init_layer(self, key, dims: ModelDims) -> Params:
        return self.encoding.init_layer(key, dims)

    @tokenwise
    def positions(self, positions, length: int, key):
        return self.encoding.positions(positions, length, key)

    def span(self) -> AttentionSpan:
        return self.encoding.span()

    def input_context(self) -> int:
        return self.encoding.input_context()

    def input(self, params: Params, embeddings, tokens: TokenInputs):
        return self.encoding.input(params, embeddings, tokens)

    def features(self, params: Params, inputs, previous: Any) -> Any:
        return self.encoding.features(params, inputs, previous)

    @tokenwise
    def query_key(self, params: Params, query, key, query_positions, key_positions):
        return self.encoding.query_key(params, query, key, query_positions, key_positions)

    def logit(self, params: Params, query, key, query_features=None, key_features=None):
        return self.encoding.logit(params, query, key, query_features, key_features)

    def value(self, params: Params):
        return self.encoding.value(params)

    @tokenwise
    def logit_scale(self, params: Params, query_positions, key_positions):
        return self.encoding.logit_scale(params, query_positions, key_positions)

    def sink(self, params: Params):
        return self.encoding.sink(params)

    def _with_layer_params(self, key, dims: ModelDims, **own: Any) -> Params:
        """The layer parameters of the inner encoding, and this wrapper's own by name."""
        inner = self.encoding.init_layer(key, dims)
        for name in own.keys() & inner:
            raise ValueError(f"encoding must not have a {name} of its own: apply this wrapper only once")
        return {**inner, **own}
