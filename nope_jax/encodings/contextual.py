"""Content-dependent positions: CoPE counts the keys that a query selects; the forget gate decays past tokens.

Shapes: B batch, T query length, S key length, N query heads, H head dim, D model width, P CoPE's embedded positions;
q and k the queries and keys of one block.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float

from nope_jax.encodings.checks import integer_at_least
from nope_jax.encodings.encoding import MASKED, BlockLogit, Encoding, ModelDims, Params, ScanLogit, Tile
from nope_jax.jax_settings import with_implicit_promotion


@dataclasses.dataclass(frozen=True)
class CoPE(Encoding):
    """q·k/√H + q·e[p], with p the gated count of the keys from j to i.

    Golovneva et al. 2024, arXiv 2405.18719. p_ij = Σ_{l=j..i} σ(q_i·k_l/√H), clipped to P - 1; q·e is interpolated
    between integers. The gate is the sigmoid of the scaled content logit, and q·e is not divided by √H: the paper's
    equations omit every √H, but its listing is as here. A logit scale multiplies the queries, hence content, gates and
    q·e alike.

    The sum runs over the keys that the query sees, in the order given: windows, segments and masks exclude keys, and
    without a causal mask the sum continues to the last key.
    """

    num_positions: int = 64
    """P, the number of embeddings per layer, for counts 0 to P - 1; heads share them."""
    scaled: bool = False
    """Whether q·e is also divided by √H, the default of the authors' released code."""

    def __post_init__(self):
        integer_at_least(1, num_positions=self.num_positions)

    def init_layer(self, key, dims: ModelDims) -> Params:
        return {"embeddings": jnp.zeros((self.num_positions, dims.head_dim))}

    def logit(self, params: Params, query, key, query_features=None, key_features=None):
        embeddings = params["embeddings"]
        return ScanLogit(self._count, embeddings, heads=(0 if embeddings.ndim == 3 else None,))

    def _count(
        self,
        embeddings: Float[Array, "P H"] | Float[Array, "N P H"],
        block: Tile,
        content: Float[Array, "B N q k"],
        visible: Bool[Array, "#B #N q k"],
        carry: Float[Array, "B N q"],
    ) -> tuple[Float[Array, "B N q k"], Float[Array, "B N q"]]:
        gates = jnp.where(visible, jax.nn.sigmoid(content), 0.0)
        count = _sums_to_the_end(gates) + carry[..., None]
        position = jnp.minimum(count, embeddings.shape[-2] - 1)
        below = lax.stop_gradient(jnp.floor(position))

        heads = "nph" if embeddings.ndim == 3 else "ph"
        at = jnp.einsum(f"bnqh,{heads}->bnqp", block.query, embeddings.astype(jnp.float32))
        if not self.scaled:
            at *= math.sqrt(block.query.shape[-1])
        step = jnp.diff(at, axis=-1, append=at[..., -1:])
        # One lookup in a combined table is faster than one along each axis.
        table = jnp.stack([at, step], axis=-1).reshape(-1, 2)
        first = jnp.arange(0, table.shape[0], at.shape[-1]).reshape(*at.shape[:-1], 1)
        found = table.at[first + below.astype(jnp.int32)].get(mode="clip")
        return found[..., 0] + (position - below) * found[..., 1], count[..., 0]


_PIECE = 16
"""Entries that `_sums_to_the_end` sums in one product."""


def _sums_to_the_end(x: Float[Array, "*B k"]) -> Float[Array, "*B k"]:
    """The sum of each entry and all after it, as products with ones: of the entries of a piece, and of later pieces."""
    *outer, length = x.shape
    pieces = jnp.pad(x, [(0, 0)] * len(outer) + [(0, -length % _PIECE)]).reshape(*outer, -1, _PIECE)
    matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    within = matmul(pieces, jnp.tri(_PIECE))
    after = matmul(within[..., 0], jnp.tri(within.shape[-2], k=-1))
    return (within + after[..., None]).reshape(*outer, -1)[..., :length]


class RunningSum(NamedTuple):
    """A running sum over tokens, stored as two floats so that differences stay accurate over long ranges.

    After thousands of tokens a single float32 sum is accurate to only 1e-3, and so is the difference of two.
    """

    high: Float[Array, "B T N"]
    """The sum, rounded."""
    low: Float[Array, "B T N"]
    """The rounding error."""


@jax.custom_jvp
def running_sum(x: Float[Array, "B T N"], start: RunningSum) -> RunningSum:
    """Cumulative sums of x over tokens, added to a start [B, N] (double-float arithmetic, Dekker 1971)."""
    x = x.astype(jnp.float32)
    sums = lax.associative_scan(_add, RunningSum(x, jnp.zeros_like(x)), axis=1)
    return _add(RunningSum(*(part[:, None] for part in start)), sums)


@running_sum.defjvp
@with_implicit_promotion
def _running_sum_jvp(primals, tangents):
    # Rounding has no derivative: the tangent is that of the plain sum.
    x, start = tangents
    out = running_sum(*primals)
    moved = jnp.cumsum(x.astype(jnp.float32), axis=1) + (start.high + start.low)[:, None]
    return out, RunningSum(jnp.broadcast_to(moved, out.high.shape), jnp.zeros_like(out.low))


def _add(a: RunningSum, b: RunningSum) -> RunningSum:
    total = a.high + b.high
    moved = total - a.high
    low = (a.high - (total - moved)) + (b.high - moved) + (a.low + b.low)
    high = total + low
    return RunningSum(high, low - (high - total))


@dataclasses.dataclass(frozen=True)
class Forgetting(Encoding):
    """q·k/√H + Σ_{j<l≤i} log σ(w·x_l + b): a forget gate per head, from the layer's input x (Lin et al. 2025).

    arXiv 2503.02130, "FoX". w is initialized with standard deviation 0.02 and b to 0, as in the authors' code. The sum
    runs over tokens in array order, whatever their positions. The paper is causal; without the mask, later keys decay
    by the gates in between, as earlier ones do.
    """

    def init_layer(self, key, dims: ModelDims) -> Params:
        return {
            "weights": 0.02 * jax.random.normal(key, (dims.model_dim, dims.num_heads)),
            "bias": jnp.zeros(dims.num_heads),
        }

    def features(self, params: Params, inputs, previous: Any) -> RunningSum:
        """The running sums of log σ(w·x + b), float32."""
        gate = jnp.einsum("btd,dn->btn", inputs.astype(jnp.float32), params["weights"]) + params["bias"]
        return forget_sums(jax.nn.log_sigmoid(gate), previous)

    def logit(self, params: Params, query, key, query_features=None, key_features=None):
        if query_features is None or key_features is None:
            raise ValueError("query_features and key_features must be given: the outputs of Forgetting.features")
        return BlockLogit(
            _forgotten, None, query_features, key_features, by_pair=_forgotten_by_pair, heads=(2, 2, 2, 2)
        )


def forget_sums(log_forget: Float[ArrayLike, "B T N"], previous: RunningSum | None = None) -> RunningSum:
    """`Forgetting.features` for given log gates; `previous` [B, N] is the sum at the preceding token."""
    log_forget = jnp.maximum(jnp.asarray(log_forget), MASKED)  # a sum with -inf would tell no later tokens apart
    if previous is None:
        zeros = jnp.zeros((log_forget.shape[0], log_forget.shape[2]), jnp.float32)
        previous = RunningSum(zeros, zeros)
    return running_sum(log_forget, RunningSum(*previous))


def _forgotten(_, block: Tile) -> Float[Array, "B N q k"]:
    query = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2)[..., :, None], block.query_features)
    key = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2)[..., None, :], block.key_features)
    return _forgotten_by_pair(None, block.query_positions, block.key_positions, query, key)


def _forgotten_by_pair(_, query_position, key_position, query: RunningSum, key: RunningSum) -> Float[Array, "..."]:
    high, low = (i - j for i, j in zip(query, key, strict=True))
    faded = high + low
    return jnp.where(faded <= 0, faded, -faded)
