"""Position biases of the attention logit: ALiBi, T5, KERPLE, FIRE.

Shapes: N query heads, B batch, T query length, S key length; q and k the queries and keys of one block, W the width of
FIRE's hidden layer.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Integer

from nope_jax.encodings.checks import as_array, at_least, integer_at_least, positive
from nope_jax.encodings.encoding import BlockLogit, DistanceLogit, Encoding, ModelDims, Params, Tile, skew, tokenwise
from nope_jax.jax_settings import with_implicit_promotion


def alibi_slopes(num_heads: int) -> Float[Array, "{num_heads}"]:
    """ALiBi slopes, float32: 2^(-8h/N) for h = 1..N if N is a power of two.

    For other N: the slopes for the next lower power of two, then every second slope for the next higher one
    (Press et al. 2022, arXiv 2108.12409, and its code).

    Raises:
        ValueError: num_heads is not a positive integer.
    """
    integer_at_least(1, num_heads=num_heads)
    below = 2 ** int(math.log2(num_heads))
    slopes = [2 ** (-8 * h / below) for h in range(1, below + 1)]
    slopes += [2 ** (-4 * h / below) for h in range(1, 2 * (num_heads - below), 2)]
    return jnp.array(slopes, jnp.float32)


@dataclasses.dataclass(frozen=True)
class ALiBi(Encoding):
    """q·k/√H - slope_h · distance (Press et al. 2022, arXiv 2108.12409).

    The bias is added after the division by √H, not inside it, with one slope per head. Using slope_h · key position
    instead gives the same softmax, because the two differ by a constant per row. Without a causal mask the bias is
    symmetric in distance.
    """

    learned: bool = False
    """Whether each layer learns its slopes, which start at `slopes`; in the paper they are fixed."""
    slopes: Sequence[float] | None = None
    """One per query head, such as those of MPT and Falcon. None: `alibi_slopes`."""

    def __post_init__(self):
        if self.slopes is None:
            return
        object.__setattr__(self, "slopes", tuple(self.slopes))  # also accepts a list
        for slope in self.slopes:
            at_least(0, slopes=slope)

    def init_layer(self, key, dims: ModelDims) -> Params:
        return {"slopes": self._slopes(dims.num_heads)} if self.learned else {}

    def logit(self, params: Params, query, key, query_features=None, key_features=None):
        return DistanceLogit(_alibi, params["slopes"] if "slopes" in params else self._slopes(query.shape[2]))

    def bind(self, dims: ModelDims) -> Encoding:
        self._slopes(dims.num_heads)  # refuses another number of heads
        return self

    def _slopes(self, num_heads: int) -> Float[Array, "{num_heads}"]:
        if self.slopes is None:
            return alibi_slopes(num_heads)
        if len(self.slopes) != num_heads:
            raise ValueError(f"slopes must be {num_heads} numbers, one per query head, not {len(self.slopes)}")
        return jnp.array(self.slopes, jnp.float32)


def _alibi(slopes: Float[Array, "N"], distance: Int[Array, "*shape"]) -> Float[Array, "N *shape"]:
    return -slopes.astype(jnp.float32).reshape(-1, *[1] * distance.ndim) * jnp.abs(distance)


def t5_bucket(
    relative_position: Integer[ArrayLike, "*shape"],
    *,
    bidirectional: bool,
    num_buckets: int = 32,
    max_distance: int = 128,
) -> Integer[Array, "*shape"]:
    """Map relative positions to buckets: exact at short distances, then logarithmic (Raffel et al. 2020).

    Args:
        relative_position: Key position minus query position: the past is negative.
        bidirectional: Whether half of the buckets are for the future. A decoder does not need them: with the default 32
            it has 16 exact buckets for the past; the often-shown table with 8 exact buckets is the bidirectional one.
        num_buckets: Total number of buckets.
        max_distance: Distance at which the logarithmic buckets end; all longer distances share the last bucket.

    Raises:
        ValueError: num_buckets or max_distance leave no room for exact and logarithmic buckets.
    """
    _check_buckets(bidirectional, num_buckets, max_distance)
    relative_position = as_array("relative_position", relative_position)
    future = jnp.zeros_like(relative_position)
    distance = jnp.maximum(-relative_position, 0)
    if bidirectional:
        num_buckets //= 2
        future = jnp.where(relative_position > 0, num_buckets, 0)
        distance = jnp.abs(relative_position)
    return future + jnp.array(_past_buckets(num_buckets, max_distance))[jnp.minimum(distance, max_distance)]


def _past_buckets(num_buckets: int, max_distance: int) -> np.ndarray:
    """Buckets of the distances 0..max_distance, in float64 so that boundaries are the same on every device."""
    exact = num_buckets // 2
    distance = np.arange(1, max_distance + 1)
    log = np.log(distance / exact) / np.log(max_distance / exact) * (num_buckets - exact)
    bucket = np.where(distance < exact, distance, exact + np.floor(log + 1e-9))
    return np.concatenate([[0], np.minimum(bucket, num_buckets - 1)]).astype(np.int32)


def _check_buckets(bidirectional: bool, num_buckets: int, max_distance: int) -> None:
    integer_at_least(2, num_buckets=num_buckets, max_distance=max_distance)
    least = 4 if bidirectional else 2
    if num_buckets < least or num_buckets % least:
        raise ValueError(f"num_buckets must be a positive multiple of {least}, not {num_buckets}")
    if max_distance <= num_buckets // least:
        raise ValueError(f"max_distance must be above {num_buckets // least} (the exact buckets), not {max_distance}")


@dataclasses.dataclass(frozen=True)
class T5(Encoding):
    """q·k/√H + table[bucket(distance), h], one table for all layers (Raffel et al. 2020, arXiv 1910.10683).

    With bidirectional attention, the bias distinguishes past from future.
    """

    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = False
    scaled: bool = True
    """Whether q·k is divided by √H. T5 itself does not divide, and initializes its query weights smaller by √H."""

    def __post_init__(self):
        _check_buckets(self.bidirectional, self.num_buckets, self.max_distance)

    def init_shared(self, key, dims: ModelDims) -> Params:
        return {"table": 0.02 * jax.random.normal(key, (self.num_buckets, dims.num_heads))}

    @tokenwise
    def query_key(self, params: Params, query, key, query_positions, key_positions):
        if self.scaled:
            return query, key
        return (query.astype(jnp.float32) * math.sqrt(query.shape[-1])).astype(query.dtype), key

    def logit(self, params: Params, query, key, query_features=None, key_features=None):
        return DistanceLogit(self._bias, params["table"])

    def _bias(self, table: Float[Array, "buckets N"], distance: Int[Array, "*shape"]) -> Float[Array, "N *shape"]:
        bucket = t5_bucket(
            -distance,
            bidirectional=self.bidirectional,
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
        )
        return jnp.moveaxis(table.astype(jnp.float32)[bucket], -1, 0)


_KERPLE_LEAST = 0.01
"""Lower bound of r1 and r2 in the authors' code."""


@dataclasses.dataclass(frozen=True)
class KERPLE(Encoding):
    """q·k/√H - r1·log(1 + r2·|i - j|), or - r1·|i - j|^r2, with r1 and r2 learned per head and layer.

    Chi et al. 2022, arXiv 2205.09921. To keep both positive and the power at most 2, the parameters are log r1, and log
    r2 or the logit of r2/2. They are initialized as in the authors' code: uniform in (0, 2) and (0, 1) for r1 and r2 of
    "log", in (0, 1) and (0, 2) for those of "power", at least 0.01.
    """

    variant: Literal["log", "power"] = "log"

    def __post_init__(self):
        if self.variant not in ("log", "power"):
            raise ValueError(f'variant must be "log" or "power", not {self.variant!r}')

    def init_layer(self, key, dims: ModelDims) -> Params:
        draws = jax.random.uniform(key, (2, dims.num_heads))
        if self.variant == "log":
            r1, r2 = jnp.maximum(jnp.array([[2.0], [1.0]]) * draws, _KERPLE_LEAST)
            return {"log_r1": jnp.log(r1), "log_r2": jnp.log(r2)}
        r1, half_r2 = jnp.clip(draws, jnp.array([[_KERPLE_LEAST], [_KERPLE_LEAST / 2]]), 0.999)
        return {"log_r1": jnp.log(r1), "logit_r2": jax.scipy.special.logit(half_r2)}

    def logit(self, params: Params, query, key, query_features=None, key_features=None):
        if self.variant == "log":
            return self.bias(jnp.exp(params["log_r1"]), jnp.exp(params["log_r2"]))
        return self.bias(jnp.exp(params["log_r1"]), 2 * jax.nn.sigmoid(params["logit_r2"]))

    def bias(self, r1: Float[Array, "N"], r2: Float[Array, "N"]) -> DistanceLogit:
        """The logit for given r1 and r2."""
        return DistanceLogit(_kerple_log if self.variant == "log" else _kerple_power, (r1, r2))


def _kerple_log(parameters, distance: Int[Array, "*shape"]) -> Float[Array, "N *shape"]:
    r1, r2 = (x.astype(jnp.float32).reshape(-1, *[1] * distance.ndim) for x in parameters)
    return -r1 * jnp.log1p(r2 * jnp.abs(distance))


def _kerple_power(parameters, distance: Int[Array, "*shape"]) -> Float[Array, "N *shape"]:
    r1, r2 = (x.astype(jnp.float32).reshape(-1, *[1] * distance.ndim) for x in parameters)
    distance = jnp.abs(distance).astype(jnp.float32)
    # 0^r2 is 0 for every r2 > 0, but the power rule would compute its derivative as 0·log 0.
    return jnp.where(distance > 0, -r1 * jnp.exp(r2 * jnp.log(jnp.maximum(distance, 1.0))), 0.0)


@dataclasses.dataclass(frozen=True)
class FIRE(Encoding):
    """q·k/√H + MLP(log(c·|i - j| + 1) / log(c·max(i, L) + 1)), with the MLP, c and L learned per layer.

    Li et al. 2024, arXiv 2310.04418. The MLP has one input, one hidden layer of ReLU and one output per head. c and L
    are parametrized by their logarithms to keep them positive. From position L on, a query sees its whole past as
    distances 0 to 1, whatever its length; the bias therefore depends on absolute position, not only on distance. The
    paper is causal. Without the mask, distances in both directions count alike, still relative to the query's position,
    so keys far after the query get values above 1.
    """

    width: int = 32
    c: float = 0.1
    """Initial value of c."""
    threshold: float = 512.0
    """Initial value of L, in positions."""

    def __post_init__(self):
        integer_at_least(1, width=self.width)
        positive(c=self.c, threshold=self.threshold)

    def init_layer(self, key, dims: ModelDims) -> Params:
        keys = jax.random.split(key, 4)

        def uniform(key, shape, inputs):  # PyTorch's default for linear layers, which the paper's code uses
            return jax.random.uniform(key, shape, minval=-(inputs**-0.5), maxval=inputs**-0.5)

        return {
            "hidden_weights": uniform(keys[0], (self.width,), 1),
            "hidden_bias": uniform(keys[1], (self.width,), 1),
            "weights": uniform(keys[2], (self.width, dims.num_heads), self.width),
            "bias": uniform(keys[3], (dims.num_heads,), self.width),
            "log_c": jnp.log(jnp.float32(self.c)),
            "log_threshold": jnp.log(jnp.float32(self.threshold)),
        }

    def logit(self, params: Params, query, key, query_features=None, key_features=None):
        mlp = {name: params[name] for name in ("hidden_weights", "hidden_bias", "weights", "bias")}
        return self.bias(**mlp, c=jnp.exp(params["log_c"]), threshold=jnp.exp(params["log_threshold"]))

    def bias(
        self,
        hidden_weights: Float[Array, "W"],
        hidden_bias: Float[Array, "W"],
        weights: Float[Array, "W N"],
        bias: Float[Array, "N"],
        c: Float[Array, ""],
        threshold: Float[Array, ""],
    ) -> BlockLogit:
        """The logit for given parameters: ReLU(x·hidden_weights + hidden_bias) · weights + bias."""
        parameters = hidden_weights, hidden_bias, weights, bias, c, threshold
        heads = None, None, 1, 0, None, None
        return BlockLogit(_fire, parameters, by_pair=_fire_by_pair, heads=heads)


def _fire(parameters, block: Tile) -> Float[Array, "#B N q k"]:
    *mlp, c, threshold = (x.astype(jnp.float32) for x in parameters)
    if block.distances is None:
        log_distance = jnp.log1p(c * jnp.abs(block.distance))
    else:
        rows = jnp.log1p(c * jnp.abs(block.distances))
        rows = jnp.broadcast_to(rows, (block.query_positions.shape[1], *rows.shape))
        log_distance = skew(rows, block.key_positions.shape[1])[None]
    x = log_distance / _log_longest(block.query_positions, c, threshold)[..., None]

    # An MLP of one number is linear between the edges where a unit turns on or off. The piece that contains x is found
    # once for all heads, and each head looks up its slope and offset instead of summing its units for every x.
    edges, slopes, offsets = _pieces(*mlp)
    x = jax.lax.optimization_barrier(x)  # or XLA would compute it for every edge, and the piece for every head
    piece = jax.lax.optimization_barrier((x[..., None] > edges).sum(-1))
    return jnp.moveaxis(_on_line(jnp.stack([slopes, offsets]), x, piece), 0, 1)


_WITHIN: Any = {"mode": "promise_in_bounds", "wrap_negative_indices": False}
"""For `.get`: no index needs a check."""


@jax.custom_jvp
def _on_line(lines: Float[Array, "2 pieces N"], x: Float[Array, "*shape"], piece: Int[Array, "*shape"]):
    """What the line of a piece is at each x, [N, *shape]."""
    _, pieces, heads = lines.shape
    # Looked up in one vector: XLA takes twice as long with an axis of heads beside that of pieces.
    first = jnp.arange(heads, dtype=piece.dtype) * pieces
    place = first.reshape(-1, *[1] * piece.ndim) + piece
    slopes, offsets = (of_heads.reshape(-1).at[place].get(**_WITHIN) for of_heads in lines.mT)
    return slopes * x + offsets


@_on_line.defjvp
@with_implicit_promotion
def _on_line_jvp(primals, tangents):
    # The gradient is the transpose of this. It adds all numbers of a line at once, and those of neighbours, mostly of
    # one line, to several copies of it in turn: an addition waits for the one before in the same place. The heads are
    # taken one by one because XLA, in jaxlib 0.10, takes ten times as long for the sum of their product with d_x.
    (lines, x, piece), (d_lines, d_x, _) = primals, tangents
    copies = 4
    d_copies = jnp.repeat(jnp.moveaxis(d_lines, 1, 0), copies, axis=0)
    copy = piece * copies + jnp.arange(piece.shape[-1]) % copies
    d_slopes, d_offsets = jnp.moveaxis(d_copies.at[copy].get(**_WITHIN), (-2, -1), (0, 1))
    through_x = jnp.stack([slopes.at[piece].get(**_WITHIN) * d_x for slopes in lines[0].T])
    return _on_line(lines, x, piece), d_slopes * x + d_offsets + through_x


def _log_longest(query_position: Int[Array, "*shape"], c, threshold) -> Float[Array, "..."]:
    """The logarithm of the distance that counts as 1."""
    position = query_position.astype(jnp.float32)
    return jnp.log1p(c * jnp.where(position > threshold, position, threshold))


def _fire_by_pair(parameters, query_position: Int[Array, "..."], key_position: Int[Array, "..."]):
    """The MLP unit by unit: kernels cannot look up the piece of each x."""
    hidden_weights, hidden_bias, weights, bias, c, threshold = parameters
    log_distance = jnp.log1p(c * jnp.abs(query_position - key_position))
    x = log_distance / _log_longest(query_position, c, threshold)
    return _sum_of_units(x, tuple(zip(hidden_weights, hidden_bias, weights, strict=True))) + bias


@with_implicit_promotion
def _units(x, units):
    return sum(_unit(x, *unit) for unit in units)


_sum_of_units = jax.custom_vjp(_units)
"""Σ weight · ReLU(x · hidden_weight + hidden_bias); the gradient keeps x alone, and computes the units again."""


def _unit(x, hidden_weight, hidden_bias, weight):
    hidden = x * hidden_weight + hidden_bias
    return jnp.where(hidden > 0, weight * hidden, 0.0)


@with_implicit_promotion
def _sum_of_units_gradient(kept, d_sum):
    x, units = kept
    d_x, *d_units = zip(*(jax.vjp(_unit, x, *unit)[1](d_sum) for unit in units), strict=True)
    return sum(d_x), tuple(zip(*d_units, strict=True))


_sum_of_units.defvjp(lambda x, units: (_units(x, units), (x, units)), _sum_of_units_gradient)


def _pieces(
    hidden_weights: Float[Array, "W"],
    hidden_bias: Float[Array, "W"],
    weights: Float[Array, "W N"],
    bias: Float[Array, "N"],
) -> tuple[Float[Array, "W"], Float[Array, "W+1 N"], Float[Array, "W+1 N"]]:
    """Piecewise linear form of an MLP of one number: ascending edges, and the slope and offset of each piece."""
    width = hidden_weights.shape[0]
    constant = hidden_weights == 0  # constant units have no edge
    edges = jnp.where(constant, jnp.inf, -hidden_bias / jnp.where(constant, 1.0, hidden_weights))
    order = jnp.argsort(edges)
    passed = jnp.arange(width + 1)[:, None] > jnp.argsort(order)
    on = jnp.where(constant, hidden_bias > 0, passed == (hidden_weights > 0)).astype(jnp.float32)
    slopes, offsets = (
        jnp.matmul(on * x, weights, precision=jax.lax.Precision.HIGHEST) for x in (hidden_weights, hidden_bias)
    )
    return jax.lax.stop_gradient(edges)[order], slopes, offsets + bias
