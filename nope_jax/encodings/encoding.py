"""What an encoding is: five places of a decoder where position can enter, each of which it may leave alone.

    once:      embeddings -> [input] -> x
    per layer: q, k -> [query/key] -> [temperature] · q·k/√H + [logit] -> softmax -> weights · v + [value] -> output

The logit place comes in two kinds, which are all that an attention kernel has to know. A `DistanceLogit` is a function
of the distance between query and key alone, so that a vector of length T stands for a [T, S] matrix. A `BlockLogit` is
any function of a block's positions, queries and keys. Both are evaluated block by block: no full bias ever exists.

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, H head dim, D model width;
q and k the queries and keys of one block.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

Params = dict[str, Any]
"""The parameters of an encoding: arrays by name."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of the model an encoding is created for."""

    num_heads: int
    head_dim: int
    model_dim: int
    train_length: int | None = None
    """The length the model is trained at, where it is known."""


class Block(NamedTuple):
    """What a `BlockLogit` or `BlockValue` sees of one block of queries and keys; key heads are repeated to N."""

    query: Float[Array, "B N q H"]
    """After the query/key place, times `factor`: a logit linear in it is scaled as q·k is."""
    factor: Float[Array, "#B N q"]
    """temperature/√H, for logits that are not linear in the query."""
    key: Float[Array, "B N k H"]
    query_positions: Int[Array, "#B q"]
    key_positions: Int[Array, "#B k"]
    query_features: Any
    """`query_features` of the logit, cut to the block's queries."""
    key_features: Any

    @property
    def distance(self) -> Int[Array, "#B q k"]:
        """Query position minus key position: the past is positive."""
        return self.query_positions[:, :, None] - self.key_positions[:, None, :]


@dataclasses.dataclass(frozen=True)
class _Method:
    """A method that equals the same method of an equal object (Python's do not), so that jit caches on it."""

    function: Callable
    owner: Any

    def __call__(self, *args):
        return self.function(self.owner, *args)


class _Term:
    """A function and the arrays it needs: a pytree whose function is static."""

    function: Callable

    def __post_init__(self):
        if inspect.ismethod(self.function):
            object.__setattr__(self, "function", _Method(self.function.__func__, self.function.__self__))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DistanceLogit(_Term):
    """A logit that depends on distance alone: `function(parameters, distance [...]) -> [N, ...]`, float32.

    With causal attention distances below 0 are never asked for.
    """

    function: Callable = dataclasses.field(metadata={"static": True})
    parameters: Any = None

    def block(self, block: Block) -> Float[Array, "#B N q k"]:
        return jax.numpy.moveaxis(self.function(self.parameters, block.distance), 0, 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockLogit(_Term):
    """Any other logit: `function(parameters, block) -> [B or 1, N or 1, q, k]`, float32, of a `Block`.

    `query_features` and `key_features` are arrays [B, T, ...] and [B, S, ...] (or pytrees of them), which reach the
    function cut to its block.
    """

    function: Callable = dataclasses.field(metadata={"static": True})
    parameters: Any = None
    query_features: Any = None
    key_features: Any = None

    def block(self, block: Block) -> Float[Array, "#B #N q k"]:
        return self.function(self.parameters, block)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockValue(_Term):
    """Added to the output: `function(parameters, weights [B, N, q, k], block) -> [B, N, q, H]`, linear in weights."""

    function: Callable = dataclasses.field(metadata={"static": True})
    parameters: Any = None

    def block(self, weights: Float[Array, "B N q k"], block: Block) -> Float[Array, "B N q H"]:
        return self.function(self.parameters, weights, block)


Logit = DistanceLogit | BlockLogit


@dataclasses.dataclass(frozen=True)
class Encoding:
    """Base of all encodings: does nothing at any of the five places.

    A subclass is a frozen dataclass of plain settings; what it learns it declares in `init_shared` (one set for the
    whole model) and `init_layer` (one set per layer). Every place receives the two merged in one dict `params`.
    """

    def max_length(self, sizes: Sizes) -> int | None:
        """Number of positions the encoding can take; None when nothing bounds it."""
        return None

    def init_shared(self, key: Array, sizes: Sizes) -> Params:
        """Parameters that all layers (and the input place) share."""
        return {}

    def init_layer(self, key: Array, sizes: Sizes) -> Params:
        """Parameters of one layer."""
        return {}

    def input(
        self, params: Params, embeddings: Float[Array, "B T D"], positions: Int[Array, "#B T"]
    ) -> Float[Array, "B T D"]:
        """Input place: acts on the token embeddings, once."""
        return embeddings

    def features(self, params: Params, inputs: Float[Array, "B T D"]) -> Any:
        """Numbers per token [B, T, ...] that the logit place needs beside queries and keys, from the layer's input."""
        return None

    def query_key(
        self,
        params: Params,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        query_positions: Int[Array, "#B T"],
        key_positions: Int[Array, "#B S"],
    ) -> tuple[Float[Array, "B T N H2"], Float[Array, "B S K H2"]]:
        """Query/key place: transforms queries and keys before their product.

        It may change their head dim; the product is then divided by the root of the new one.
        """
        return query, key

    def logit(
        self,
        params: Params,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        query_features: Any = None,
        key_features: Any = None,
    ) -> Logit | None:
        """Logit place: what is added to q·k/√H."""
        return None

    def value(self, params: Params) -> BlockValue | None:
        """Value place: what is added to the weighted sum of values."""
        return None

    def temperature(
        self, params: Params, query_positions: Int[Array, "#B T"], key_positions: Int[Array, "#B S"]
    ) -> Float[Array, "#B #N T"] | Float[Array, "N"] | float | None:
        """Temperature place: the factor of q·k/√H."""
        return None
