"""Encodings that change one thing about another."""

import dataclasses
from typing import Any

from nope_jax.encodings.encoding import Encoding, Params, Reach, Sizes, Tokens
from nope_jax.encodings.nope import NoPE

_NOPE = NoPE()


@dataclasses.dataclass(frozen=True)
class Wrapper(Encoding):
    """Base of wrappers: does at every place what the encoding within does. A subclass overrides what it changes.

    Its own parameters, if any, are those of a layer, under names that the encoding within does not use.
    """

    encoding: Encoding = _NOPE

    def __post_init__(self):
        if not isinstance(self.encoding, Encoding):
            raise ValueError(f"encoding must be an Encoding, such as RoPE(), not {self.encoding!r}")

    def with_sizes(self, sizes: Sizes) -> Encoding:
        return dataclasses.replace(self, encoding=self.encoding.with_sizes(sizes))

    @property
    def core(self) -> Encoding:
        return self.encoding.core

    def max_length(self, sizes: Sizes) -> int | None:
        return self.encoding.max_length(sizes)

    def init_shared(self, key, sizes: Sizes) -> Params:
        return self.encoding.init_shared(key, sizes)

    def init_layer(self, key, sizes: Sizes) -> Params:
        return self.encoding.init_layer(key, sizes)

    def positions(self, positions, length: int, key):
        return self.encoding.positions(positions, length, key)

    def reach(self) -> Reach:
        return self.encoding.reach()

    def lookback(self) -> int:
        return self.encoding.lookback()

    def input(self, params: Params, embeddings, tokens: Tokens):
        return self.encoding.input(params, embeddings, tokens)

    def features(self, params: Params, inputs, previous: Any) -> Any:
        return self.encoding.features(params, inputs, previous)

    def query_key(self, params: Params, query, key, query_positions, key_positions):
        return self.encoding.query_key(params, query, key, query_positions, key_positions)

    def logit(self, params: Params, query, key, query_features=None, key_features=None):
        return self.encoding.logit(params, query, key, query_features, key_features)

    def value(self, params: Params):
        return self.encoding.value(params)

    def temperature(self, params: Params, query_positions, key_positions):
        return self.encoding.temperature(params, query_positions, key_positions)
