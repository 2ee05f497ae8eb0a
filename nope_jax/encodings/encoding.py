"""The encoding interface: five places in a decoder where an encoding can act.

    once:      embeddings -> [input] -> x
    per layer: q, k -> [query/key] -> [logit scale] · q·k/√H + [logit] -> softmax -> weights · v + [value] -> output

The logit place takes one of three kinds of term; attention kernels need to know nothing else. A `DistanceLogit` depends
only on the distance between query and key, so a vector of length T represents a [T, S] matrix. A `BlockLogit` is any
function of a block's positions, queries and keys. A `ScanLogit` also carries state from block to block. All are
evaluated block by block, so the full bias is never materialized.

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, H head dim, D model width;
q and k the queries and keys of one block.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from nope_jax.encodings import former_names
from nope_jax.encodings.checks import as_array

Params = dict[str, Any]
"""The parameters of an encoding: arrays by name."""


MASKED = -1e30
"""Logit of a masked key: far below any other, but finite to avoid inf - inf."""


@dataclasses.dataclass(frozen=True)
class ModelDims:
    """The dimensions of the model that an encoding is created for."""

    num_heads: int
    head_dim: int
    model_dim: int
    train_length: int | None = None
    """Training length of the model, if known."""
    num_kv_heads: int | None = None
    """None: the same as num_heads."""
    vocab_size: int | None = None


class TokenInputs(NamedTuple):
    """Inputs of the input place other than the embeddings."""

    ids: Int[Array, "B T"]
    positions: Int[Array, "#B T"]
    segments: Int[Array, "#B T"] | None
    """Tokens in different segments do not attend to each other."""
    length: int
    """Upper bound of the positions (exclusive): the number of table rows to compute."""


class AttentionSpan(NamedTuple):
    """The window and chunk size of a layer: which of the keys left by causality and segments its queries see."""

    window: int | None = None
    chunk_size: int | None = None


class Tile(NamedTuple):
    """One block of queries and keys, as passed to the function of a term. Key heads are repeated to N."""

    query: Float[Array, "B N q H"]
    """Queries after the query/key place, times `factor`: a logit linear in them is scaled as q·k is."""
    factor: Float[Array, "#B N q"]
    """logit_scale/√H, for logits that are not linear in the query."""
    key: Float[Array, "B N k H"]
    query_positions: Int[Array, "#B q"]
    key_positions: Int[Array, "#B k"]
    query_features: Any
    """`query_features` of the logit for the block's queries."""
    key_features: Any
    distances: Int[Array, "q+k-1"] | None = None
    """For consecutive positions: the distances in the block, ascending from the first query and last key. Else None."""
    by_distance: Any = None
    """`by_distance` of the logit at `distances`, leading axis q+k-1. None unless positions are consecutive."""

    @property
    def distance(self) -> Int[Array, "#B q k"]:
        """Query position minus key position: the past is positive."""
        return self.query_positions[:, :, None] - self.key_positions[:, None, :]


@jax.custom_jvp
def _at_least_masked(added: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.maximum(added, MASKED)


@_at_least_masked.defjvp
def _at_least_masked_jvp(primals, tangents):
    # A masked key has a weight and so a gradient of 0. To ask which keys are masked would take the term once more.
    return _at_least_masked(*primals), *tangents


def _finite(function: Callable, added: Any) -> Array:
    """Convert what a term's function returned to finite float32; -inf, which masks a key, becomes MASKED."""
    return _at_least_masked(as_array(f"the value of {_name(function)}", added).astype(jnp.float32))


def _shaped(function: Callable, added: Array, wanted: tuple[int, ...]) -> Array:
    """Refuse what does not broadcast to the shape, axis by axis."""
    if added.ndim not in (0, len(wanted)) or any(n not in (1, m) for n, m in zip(added.shape, wanted, strict=False)):
        raise ValueError(
            f"the value of {_name(function)} must have shape {list(wanted)}, or 1 in place of an axis, "
            f"not {list(added.shape)}"
        )
    return added


def _name(function: Any) -> str:
    while hasattr(function, "function"):  # what is around a method, or around what is called only for the past
        function = function.function
    return getattr(function, "__name__", repr(function))


@dataclasses.dataclass(frozen=True)
class _Method:
    """A method that compares equal for equal owners (Python's methods compare by identity), so jit can cache on it."""

    function: Callable
    owner: Any

    def __call__(self, *args):
        return self.function(self.owner, *args)


class _Term:
    """A function and its arrays: a pytree whose function is static.

    jit compiles once per function, so define the function once (in a module, or as a method of a frozen dataclass) and
    pass its numbers as `parameters`. The exception is a `DistanceLogit` outside jit with consecutive positions: it may
    use a new lambda on every call.

    `heads` gives, for each array in the order of `jax.tree.leaves(term)`, the axis of its query heads, or None for an
    array shared by all heads. When heads are sharded over devices, each device passes the function its shard of the
    queries, keys and arrays; if `heads` is None, every device computes all heads.
    """

    function: Callable

    def __post_init__(self):
        for name in ("function", "by_distance", "by_pair"):
            method = getattr(self, name, None)
            if inspect.ismethod(method):
                object.__setattr__(self, name, _Method(method.__func__, method.__self__))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DistanceLogit(_Term):
    """A logit that depends only on distance: `function(parameters, distance [...]) -> [N, ...]`, float32.

    The result may be [1, ...] or [...] if all heads share it. -inf masks the keys at a distance. Causal attention never
    asks for negative distances.
    """

    function: Callable = dataclasses.field(metadata={"static": True})
    parameters: Any = None

    def values(self, distance: Int[Array, "*shape"]) -> Float[Array, "#N *shape"]:
        """The logit at each distance."""
        values = _finite(self.function, self.function(self.parameters, distance))
        heads = values.shape[:1] if values.ndim > distance.ndim else ()
        values = _shaped(self.function, values, (*heads, *distance.shape))
        values = jnp.broadcast_to(values, (*heads, *distance.shape))
        return values if heads else values[None]

    def block(self, block: Tile) -> Float[Array, "#B #N q k"]:
        return jnp.moveaxis(self.values(block.distance), 0, 1)


class DistanceVectors(NamedTuple):
    """What a logit factor · (q·query[d] + k·key[d] + constant[d]) consists of at each distance d; None is nothing."""

    query: Float[Array, "d #N H"] | None = None
    key: Float[Array, "d #N H"] | None = None
    constant: Float[Array, "d #N"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockLogit(_Term):
    """Any other logit: `function(parameters, block) -> [B or 1, N or 1, q, k]`, float32, of a `Tile`.

    -inf masks a key, which must be finite. `query_features` and `key_features` are arrays [B, T, ...] and [B, S, ...]
    (or pytrees of them); the function gets the slices for its block. `by_distance` is for work that is too expensive to
    repeat in every block: a function (parameters, distances [d]) -> [d, ...] that is evaluated once for consecutive
    positions and sliced to each block's distances. If the logit then consists of nothing but one vector per distance,
    `by_distance` returns these as `DistanceVectors`, from which kernels compute it.

    `by_pair` is for kernels, which compile few operations. Where a logit depends on nothing but both positions and
    numbers of both tokens, it is the same function once more, `by_pair(parameters, query_position, key_position) ->
    logit`, of one head and entry by entry; where it has features, `by_pair(parameters, query_position, key_position,
    query_features, key_features)`. Its arguments are arrays of any shapes that broadcast. An array among the parameters
    comes as a tuple of its entries, or of tuples of them, without the axis of heads. `heads` has to be given; features
    are floating and [B, T], or [B, T, N] with 2 in `heads`.
    """

    function: Callable = dataclasses.field(metadata={"static": True})
    parameters: Any = None
    query_features: Any = None
    key_features: Any = None
    by_distance: Callable | None = dataclasses.field(default=None, metadata={"static": True})
    by_pair: Callable | None = dataclasses.field(default=None, metadata={"static": True})
    heads: tuple[int | None, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    def block(self, block: Tile) -> Float[Array, "#B #N q k"]:
        added = _finite(self.function, self.function(self.parameters, block))
        return _shaped(self.function, added, (*block.query.shape[:3], block.key.shape[2]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockValue(_Term):
    """A term of the output: `function(parameters, weights [B, N, q, k], block) -> [B, N, q, H]`, linear in weights.

    `by_distance` is for kernels. If the term is Σ weights · vector[d], for consecutive positions, it gives
    the vectors: `by_distance(parameters, distances [d], H) -> [d, N or 1, H]`.
    """

    function: Callable = dataclasses.field(metadata={"static": True})
    parameters: Any = None
    by_distance: Callable | None = dataclasses.field(default=None, metadata={"static": True})
    heads: tuple[int | None, ...] | None = dataclasses.field(default=None, metadata={"static": True})

    def block(self, weights: Float[Array, "B N q k"], block: Tile) -> Float[Array, "B N q H"]:
        return jnp.asarray(self.function(self.parameters, weights, block), jnp.float32)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScanLogit(_Term):
    """A logit that sums over the keys between query and key.

    `function(parameters, block, content, visible, carry) -> (added, carry)` is called on the blocks of a query's keys
    from the last to the first. `content` [B, N, q, k] is the scaled q·k, `visible` [B or 1, N or 1, q, k] the mask, and
    `added` [B, N, q, k] is added to the logits; `carry` [B, N, q] is passed to the next call and starts at 0.
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
        """Return the content logits plus the term, with masked keys set to MASKED, and the carry."""
        content = jnp.where(visible, content, 0.0)
        added, carry = self.function(self.parameters, block, content, visible, carry)
        return jnp.where(visible, content + _finite(self.function, added), MASKED), carry.astype(jnp.float32)


Logit = DistanceLogit | BlockLogit | ScanLogit


def skew(rows: Shaped[Array, "*B q span"], keys: int) -> Shaped[Array, "*B q k"]:
    """Entry (x, y) of a block from rows x in ascending distance, as in `Tile.distances`; without a gather.

    Read as rows that are one entry longer, each row begins one entry later than the one before: at the last key.
    """
    *outer, queries, span = rows.shape
    flat = jnp.pad(rows.reshape(*outer, -1), [(0, 0)] * len(outer) + [(0, queries)])
    return flat.reshape(*outer, queries, span + 1)[..., keys - 1 :: -1]


def unskew(block: Shaped[Array, "*B q k"]) -> Shaped[Array, "*B q q+k-1"]:
    """The transpose of `skew`: each row of a block in ascending distance, 0 where the block has no key.

    The barrier keeps XLA from computing where each entry lies while it reads them.
    """
    *outer, queries, keys = block.shape
    span = queries + keys - 1
    rows = jnp.pad(block[..., ::-1], [(0, 0)] * (len(outer) + 1) + [(0, queries)])
    flat = jax.lax.optimization_barrier(rows).reshape(*outer, -1)[..., : queries * span]
    return flat.reshape(*outer, queries, span)


_Function = TypeVar("_Function", bound=Callable)


def tokenwise(method: _Function) -> _Function:
    """Declare that a place of an encoding treats each token by itself, for decoding with a KV cache.

    For `query_key` and `logit_scale`: what becomes of a token follows from itself, its position, and the smallest and
    largest position in use. For `positions`: a position follows from the given one alone. Keys are then cached after
    the query/key place. A method without this declaration, such as an override in a subclass, gets all tokens of the
    cache in every step: always right, but slower.
    """
    method.tokenwise = True  # type: ignore[attr-defined]
    return method


def _is_tokenwise(encoding: Any, *places: str) -> bool:
    return all(getattr(getattr(type(encoding), place), "tokenwise", False) for place in places)


@dataclasses.dataclass(frozen=True)
class Encoding:
    """Base class of all encodings; acts at none of the five places.

    A subclass is a frozen dataclass of plain settings. It declares its learned parameters in `init_shared` (one set for
    the whole model) and `init_layer` (one set per layer). Every place gets both, merged into one dict `params`.
    """

    def __init_subclass__(cls, **keywords: Any):
        super().__init_subclass__(**keywords)
        former_names.adopt_methods(cls)

    def __getattr__(self, name: str) -> Any:
        return former_names.method(self, name)

    def max_length(self, dims: ModelDims) -> int | None:
        """Number of positions the encoding supports; None if unbounded."""
        return None

    def bind(self, dims: ModelDims) -> "Encoding":
        """Return a copy with the settings that default to the model's (such as the training length) filled in."""
        return self

    @property
    def unwrapped(self) -> "Encoding":
        """The encoding at the input place, which owns the shared parameters; layers with an equal one share them."""
        return self

    @property
    def keys_apart(self) -> bool:
        """Whether a key after the query/key place never changes, so that it can be cached: see `tokenwise`."""
        return _is_tokenwise(self, "query_key", "logit_scale")

    @property
    def depends_on_length(self) -> bool:
        """Whether a token is treated differently in a longer text. In decoding the length is the cache's capacity."""
        return not _is_tokenwise(self, "query_key", "logit_scale", "positions")

    def init_shared(self, key: Array, dims: ModelDims) -> Params:
        """Initialize the parameters shared by all layers and the input place."""
        return {}

    def init_layer(self, key: Array, dims: ModelDims) -> Params:
        """Initialize the parameters of one layer."""
        return {}

    @tokenwise
    def positions(self, positions: Int[Array, "#B T"], length: int, key: Array | None) -> Int[Array, "#B T"]:
        """Map token positions, all below length, to the positions that the other places get.

        A later token has a larger position, as before. `key` is the random key of a training step, or None outside
        training.
        """
        return positions

    def span(self) -> AttentionSpan:
        """Which of the keys left by causality and segments the layer's queries see."""
        return AttentionSpan()

    def input_context(self) -> int:
        """Number of preceding tokens that the input place reads; needed for decoding one token at a time."""
        return 0

    def input(self, params: Params, embeddings: Float[Array, "B T D"], tokens: TokenInputs) -> Float[Array, "B T D"]:
        """Input place: transform the token embeddings, once per model. `params` are the shared ones."""
        return embeddings

    def features(self, params: Params, inputs: Float[Array, "B T D"], previous: Any) -> Any:
        """Compute features [B, T, ...] of the layer's input that the logit place needs besides queries and keys.

        For features that accumulate over tokens, `previous` [B, ...] is the entry of the token before the first one, or
        None at the start.
        """
        return None

    @tokenwise
    def query_key(
        self,
        params: Params,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        query_positions: Int[Array, "#B T"],
        key_positions: Int[Array, "#B S"],
    ) -> tuple[Float[Array, "B T N H2"], Float[Array, "B S K H2"]]:
        """Query/key place: transform queries and keys before their product.

        The head dim may change; the product is then divided by the square root of the new one.
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
        """Logit place: the term added to q·k/√H.

        In decoding, the keys are those of a KV cache. Those of a window or chunk are in no order, except for a
        `ScanLogit`: their positions are what tells them apart.
        """
        return None

    def value(self, params: Params) -> BlockValue | None:
        """Value place: the term added to the weighted sum of values."""
        return None

    @tokenwise
    def logit_scale(
        self, params: Params, query_positions: Int[Array, "#B T"], key_positions: Int[Array, "#B S"]
    ) -> Float[Array, "#B #N T"] | Float[Array, "N"] | float | None:
        """Logit-scale place: the factor that multiplies q·k/√H."""
        return None

    def sink(self, params: Params) -> Float[Array, "N"] | None:
        """The logit, per head, of a key without a value that every query of the layer sees; None: there is none."""
        return None
