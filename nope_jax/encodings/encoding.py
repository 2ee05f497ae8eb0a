"""What an encoding is: five places of a decoder where position can enter, each of which it may leave alone.

    once:      embeddings -> [input] -> x
    per layer: q, k -> [query/key] -> [logit scale] · q·k/√H + [logit] -> softmax -> weights · v + [value] -> output

The logit place comes in three kinds, which are all that an attention kernel has to know. A `DistanceLogit` is a
function of the distance between query and key alone, so that a vector of length T stands for a [T, S] matrix. A
`BlockLogit` is any function of a block's positions, queries and keys. A `ScanLogit` is one that also hands something on
from block to block. All are evaluated block by block: no full bias ever exists.

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, H head dim, D model width;
q and k the queries and keys of one block.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from nope_jax.encodings import former_names

Params = dict[str, Any]
"""The parameters of an encoding: arrays by name."""


MASKED = -1e30
"""Logit of a key that is not seen: far below any other, yet finite, so that no inf - inf arises."""


@dataclasses.dataclass(frozen=True)
class ModelDims:
    """The sizes of the model an encoding is created for."""

    num_heads: int
    head_dim: int
    model_dim: int
    train_length: int | None = None
    """The length the model is trained at, where it is known."""
    num_kv_heads: int | None = None
    """None: as many as num_heads."""
    vocab_size: int | None = None


class TokenInputs(NamedTuple):
    """What the input place knows of the tokens beside their embeddings."""

    ids: Int[Array, "B T"]
    positions: Int[Array, "#B T"]
    segments: Int[Array, "#B T"] | None
    """Tokens of different segments do not see each other."""
    length: int
    """Positions are below it: how much of a table has to be computed."""


class AttentionSpan(NamedTuple):
    """Which of the keys that are visible anyway a layer's queries see: `window` and `chunk_size` of attention."""

    window: int | None = None
    chunk_size: int | None = None


class Tile(NamedTuple):
    """What the function of a term sees of one block of queries and keys; key heads are repeated to N."""

    query: Float[Array, "B N q H"]
    """After the query/key place, times `factor`: a logit linear in it is scaled as q·k is."""
    factor: Float[Array, "#B N q"]
    """logit_scale/√H, for logits that are not linear in the query."""
    key: Float[Array, "B N k H"]
    query_positions: Int[Array, "#B q"]
    key_positions: Int[Array, "#B k"]
    query_features: Any
    """`query_features` of the logit, cut to the block's queries."""
    key_features: Any
    distances: Int[Array, "q+k-1"] | None = None
    """Where positions run on: the distances that occur, ascending, from the first query and last key on. Else None."""
    by_distance: Any = None
    """`by_distance` of the logit at `distances`, a leading axis of q+k-1; None where positions do not run on."""

    @property
    def distance(self) -> Int[Array, "#B q k"]:
        """Query position minus key position: the past is positive."""
        return self.query_positions[:, :, None] - self.key_positions[:, None, :]


def _finite(added: Any) -> Array:
    """What a term adds to the logits, float32; -inf hides a key as a mask does."""
    return jnp.maximum(jnp.asarray(added, jnp.float32), MASKED)


@dataclasses.dataclass(frozen=True)
class _Method:
    """A method that equals the same method of an equal object (Python's do not), so that jit caches on it."""

    function: Callable
    owner: Any

    def __call__(self, *args):
        return self.function(self.owner, *args)


class _Term:
    """A function and the arrays it needs: a pytree whose function is static.

    jit compiles once for each function, so define it once (in a module, or as a method of a frozen dataclass) and give
    it its numbers as `parameters`. Only a `DistanceLogit` outside of jit, where positions run on, may have a new lambda
    in every call.

    Which axis of each array counts the query heads is said in `heads`, in the order of `jax.tree.leaves(term)`, None
    for an array that serves all of them. Where devices share the heads among them, each gives the function its own
    share of queries, keys and arrays; where `heads` is None, each has to compute all.
    """

    function: Callable

    def __post_init__(self):
        for name in ("function", "by_distance"):
            method = getattr(self, name, None)
            if inspect.ismethod(method):
                object.__setattr__(self, name, _Method(method.__func__, method.__self__))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DistanceLogit(_Term):
    """A logit that depends on distance alone: `function(parameters, distance [...]) -> [N, ...]`, float32.

    One for all heads is [1, ...] or [...]. -inf hides the keys at a distance. With causal attention distances below 0
    are never asked for.
    """

    function: Callable = dataclasses.field(metadata={"static": True})
    parameters: Any = None

    def values(self, distance: Int[Array, "*shape"]) -> Float[Array, "#N *shape"]:
        """What it adds at each distance."""
        values = _finite(self.function(self.parameters, distance))
        return values if values.ndim > distance.ndim else jnp.broadcast_to(values, distance.shape)[None]

    def block(self, block: Tile) -> Float[Array, "#B #N q k"]:
        return jnp.moveaxis(self.values(block.distance), 0, 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockLogit(_Term):
    """Any other logit: `function(parameters, block) -> [B or 1, N or 1, q, k]`, float32, of a `Tile`.

    -inf hides a key.
    `query_features` and `key_features` are arrays [B, T, ...] and [B, S, ...] (or pytrees of them), which reach the
    function cut to its block. `by_distance` is for what costs more per distance than one would pay in every block: a
    function (parameters, distances [d]) -> [d, ...], evaluated once where positions run on, and cut to each block's
    distances.
    """

    function: Callable = dataclasses.field(metadata={"static": True})
    parameters: Any = None
    query_features: Any = None
    key_features: Any = None
    by_distance: Callable | None = dataclasses.field(default=None, metadata={"static": True})
    heads: tuple[int | None, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    def block(self, block: Tile) -> Float[Array, "#B #N q k"]:
        return _finite(self.function(self.parameters, block))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockValue(_Term):
    """Added to the output: `function(parameters, weights [B, N, q, k], block) -> [B, N, q, H]`, linear in weights."""

    function: Callable = dataclasses.field(metadata={"static": True})
    parameters: Any = None
    heads: tuple[int | None, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    def block(self, weights: Float[Array, "B N q k"], block: Tile) -> Float[Array, "B N q H"]:
        return self.function(self.parameters, weights, block)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScanLogit(_Term):
    """A logit that sums over the keys between query and key.

    `function(parameters, block, content, visible, carry) -> (added, carry)` visits the blocks of a query's keys from
    the last to the first. `content` [B, N, q, k] is the scaled q·k, `visible` [B or 1, N or 1, q, k] what the queries
    see, `added` [B, N, q, k] goes to the logits; `carry` [B, N, q] is handed on, and is 0 before the last key.
    """

    function: Callable = dataclasses.field(metadata={"static": True})
    parameters: Any = None
    query_features: Any = None
    key_features: Any = None
    heads: tuple[int | None, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    def block(
        self,
        block: Tile,
        content: Float[Array, "B N q k"],
        visible: Bool[Array, "#B #N q k"],
        carry: Float[Array, "B N q"],
    ) -> tuple[Float[Array, "B N q k"], Float[Array, "B N q"]]:
        """The content logits with what it adds to them, and what it hands on; of keys that are not seen, MASKED."""
        content = jnp.where(visible, content, 0.0)
        added, carry = self.function(self.parameters, block, content, visible, carry)
        return jnp.where(visible, content + _finite(added), MASKED), carry.astype(jnp.float32)


Logit = DistanceLogit | BlockLogit | ScanLogit


def skew(rows: Shaped[Array, "*B q span"], keys: int) -> Shaped[Array, "*B q k"]:
    """Entry (x, y) of a block from rows x by ascending distance, as in `Tile.distances`; no gather."""
    queries, span = rows.shape[-2:]
    rows = jnp.pad(rows[..., ::-1], [(0, 0)] * (rows.ndim - 1) + [(0, 1)])
    flat = rows.reshape(*rows.shape[:-2], -1)[..., queries - 1 : queries - 1 + queries * span]
    return flat.reshape(*rows.shape[:-2], queries, span)[..., :keys]


def unskew(block: Shaped[Array, "*B q k"]) -> Shaped[Array, "*B q q+k-1"]:
    """The transpose of `skew`: each row of a block by ascending distance, 0 where the block has no such key."""
    queries, keys = block.shape[-2:]
    span, outer = queries + keys - 1, [(0, 0)] * (block.ndim - 2)
    flat = jnp.pad(block, [*outer, (0, 0), (0, queries - 1)]).reshape(*block.shape[:-2], -1)
    rows = jnp.pad(flat, [*outer, (queries - 1, 1)]).reshape(*block.shape[:-2], queries, span + 1)
    return rows[..., -2::-1]


@dataclasses.dataclass(frozen=True)
class Encoding:
    """Base of all encodings: does nothing at any of the five places.

    A subclass is a frozen dataclass of plain settings; what it learns it declares in `init_shared` (one set for the
    whole model) and `init_layer` (one set per layer). Every place receives the two merged in one dict `params`.
    """

    def __init_subclass__(cls, **keywords: Any):
        super().__init_subclass__(**keywords)
        former_names.adopt_methods(cls)

    def max_length(self, dims: ModelDims) -> int | None:
        """Number of positions the encoding can take; None when nothing bounds it."""
        return None

    def bind(self, dims: ModelDims) -> "Encoding":
        """Itself, with those settings that are left to the model (a training length) taken from it."""
        return self

    @property
    def unwrapped(self) -> "Encoding":
        """What acts at the input place and holds the shared parameters: layers with the same one share it."""
        return self

    def init_shared(self, key: Array, dims: ModelDims) -> Params:
        """Parameters that all layers (and the input place) share."""
        return {}

    def init_layer(self, key: Array, dims: ModelDims) -> Params:
        """Parameters of one layer."""
        return {}

    def positions(self, positions: Int[Array, "#B T"], length: int, key: Array | None) -> Int[Array, "#B T"]:
        """The positions that the other places are told, given those of the tokens, all below length.

        They keep the tokens' order. The key is that of a training step; None outside of training.
        """
        return positions

    def span(self) -> AttentionSpan:
        """Which keys the layer's queries see, of those that causality and segments leave."""
        return AttentionSpan()

    def input_context(self) -> int:
        """How many tokens before a token its input place reads, for decoding token by token."""
        return 0

    def input(self, params: Params, embeddings: Float[Array, "B T D"], tokens: TokenInputs) -> Float[Array, "B T D"]:
        """Input place: acts on the token embeddings, once. Its params are the shared ones."""
        return embeddings

    def features(self, params: Params, inputs: Float[Array, "B T D"], previous: Any) -> Any:
        """Numbers per token [B, T, ...] that the logit place needs beside queries and keys, from the layer's input.

        Where they run on from token to token, `previous` is the entry [B, ...] of the token before the first; None
        where there is none.
        """
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

    def logit_scale(
        self, params: Params, query_positions: Int[Array, "#B T"], key_positions: Int[Array, "#B S"]
    ) -> Float[Array, "#B #N T"] | Float[Array, "N"] | float | None:
        """Logit-scale place: the factor of q·k/√H."""
        return None
