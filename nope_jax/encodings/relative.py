"""Content-dependent relative positions: Shaw, NEZHA, Transformer-XL, TUPE and DeBERTa.

Their logits multiply queries or keys by one vector per distance. With consecutive positions, a block has only q + k - 1
distances: queries or keys are multiplied by those vectors, or by all rows of a short table from which each distance
picks its product, and the products are skewed into place. Otherwise they are multiplied by every row of the table, and
each pair picks its product by index. No array of vectors per token pair is ever materialized.

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, H head dim, D model width;
q and k the queries and keys of one block, x and y either of them; R rows of a table.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nope_jax.encodings.absolute import rows_at, sinusoidal_positions, table_length
from nope_jax.encodings.bias import T5
from nope_jax.encodings.checks import integer_at_least
from nope_jax.encodings.encoding import (
    BlockLogit,
    BlockValue,
    DistanceVectors,
    Encoding,
    ModelDims,
    Params,
    Tile,
    skew,
    tokenwise,
    unskew,
)

_INIT = 0.02
"""Standard deviation of the initial weights in Transformer-XL, TUPE and DeBERTa."""


def _products(
    vectors: Float[Array, "B N x H"], table: Float[Array, "#N R H"], index: Int[Array, "#B x y"]
) -> Float[Array, "B N x y"]:
    """vectors[x] · table[index[x, y]]."""
    rows = table.shape[1]
    if index.shape[2] * vectors.shape[-1] <= rows:  # gathering rows takes less memory than all products
        return jnp.einsum("bnxh,nbxyh->bnxy", vectors, table[:, index])
    return jnp.take_along_axis(vectors @ table.mT, index[:, None], axis=-1, mode="clip")


def _sums(weights: Float[Array, "B N q k"], index: Int[Array, "#B q k"], rows: int) -> Float[Array, "B N q {rows}"]:
    """Weights summed by the table row of each pair."""
    b, n, q = jnp.ogrid[tuple(slice(size) for size in weights.shape[:3])]
    zeros = jnp.zeros((*weights.shape[:3], rows), weights.dtype)
    return zeros.at[b[..., None], n[..., None], q[..., None], index[:, None]].add(weights)


# --- Shaw and NEZHA


@dataclasses.dataclass(frozen=True)
class Shaw(Encoding):
    """q·(k + R[c])/√H and weights · (v + R'[c]), with c = j - i clipped to ±clip; the heads of a layer share R and R'.

    Shaw et al. 2018, arXiv 1803.02155. Row clip + c of a table is for c; a causal decoder never reads the rows past
    clip, which are for keys after the query.
    """

    clip: int = 16
    """Distances from here on share one row."""

    def __post_init__(self):
        integer_at_least(1, clip=self.clip)

    def init_layer(self, key, dims: ModelDims) -> Params:
        init, shape = jax.nn.initializers.glorot_uniform(), (2 * self.clip + 1, dims.head_dim)
        return {name: init(k, shape) for name, k in zip(("keys", "values"), jax.random.split(key), strict=True)}

    def logit(self, params: Params, query, key, query_features=None, key_features=None):
        return BlockLogit(self._logit, params["keys"], by_distance=self._key_vectors, heads=(None,))

    def value(self, params: Params):
        return BlockValue(self._value, params["values"], by_distance=self._vectors, heads=(None,))

    def _vectors(self, table: Float[Array, "R H"], distances: Int[Array, "d"], _: int) -> Float[Array, "d 1 H"]:
        return table.astype(jnp.float32)[self._rows(distances)][:, None]

    def _key_vectors(self, table: Float[Array, "R H"], distances: Int[Array, "d"]) -> DistanceVectors:
        return DistanceVectors(query=self._vectors(table, distances, table.shape[1]))

    def _rows(self, distance: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        return self.clip - jnp.clip(distance, -self.clip, self.clip)

    def _logit(self, table: Float[Array, "R H"], block: Tile) -> Float[Array, "B N q k"]:
        table = table.astype(jnp.float32)
        if block.distances is None:
            return _products(block.query, table[None], self._rows(block.distance))
        products = jnp.take(block.query @ table.T, self._rows(block.distances), axis=-1, mode="clip")
        return skew(products, block.key.shape[2])

    def _value(self, table: Float[Array, "R H"], weights, block: Tile) -> Float[Array, "B N q H"]:
        table = table.astype(jnp.float32)
        if block.distances is None:
            return _sums(weights, self._rows(block.distance), len(table)) @ table
        # Sums by products with ones have a faster gradient than by a scatter. Few rows are multiplied last, many first.
        rows = jax.nn.one_hot(self._rows(block.distances), len(table), dtype=jnp.float32)
        return jnp.einsum("bnqd,dr,rh->bnqh", unskew(weights), rows, table)


@dataclasses.dataclass(frozen=True)
class NEZHA(Shaw):
    """Shaw's attention with sinusoids of j - i as both tables; nothing is learned.

    Wei et al. 2019, arXiv 1909.00204; its models clip at 64. The sinusoids are of j - i, as in the paper; the released
    code uses the row, clip + j - i, instead.
    """

    clip: int = 64

    def init_layer(self, key, dims: ModelDims) -> Params:
        if dims.head_dim % 2:
            raise ValueError(f"head_dim must be even for NEZHA's sinusoids, not {dims.head_dim}")
        return {}

    def logit(self, params: Params, query, key, query_features=None, key_features=None):
        return BlockLogit(self._logit, self._table(query.shape[-1]), by_distance=self._key_vectors, heads=(None,))

    def value(self, params: Params):
        return BlockValue(self._sinusoid_value, by_distance=self._sinusoids, heads=())

    def _table(self, head_dim: int) -> Float[Array, "R H"]:
        return sinusoidal_positions(jnp.arange(-self.clip, self.clip + 1), head_dim)

    def _sinusoids(self, _, distances: Int[Array, "d"], head_dim: int) -> Float[Array, "d 1 H"]:
        return self._vectors(self._table(head_dim), distances, head_dim)

    def _sinusoid_value(self, _, weights, block: Tile):
        return self._value(self._table(block.key.shape[-1]), weights, block)


# --- Transformer-XL


@dataclasses.dataclass(frozen=True)
class TransformerXL(Encoding):
    """((q+u)·k + (q+v)·W r)/√H, with r the D-wide sinusoids of the distance; u, v and W are learned per layer.

    Dai et al. 2019, arXiv 1901.02860, and XLNet (Yang et al. 2019, arXiv 1906.08237). Values are unchanged. A logit
    scale multiplies the whole expression.
    """

    def init_layer(self, key, dims: ModelDims) -> Params:
        heads, width = (dims.num_heads, dims.head_dim), dims.model_dim
        if width % 2:
            raise ValueError(f"model_dim must be even for Transformer-XL's sinusoids, not {width}")
        shapes = {"content_bias": heads, "position_bias": heads, "position_kernel": (width, *heads)}
        keys = jax.random.split(key, len(shapes))
        return {name: _INIT * jax.random.normal(k, shapes[name]) for name, k in zip(shapes, keys, strict=True)}

    @tokenwise
    def query_key(self, params: Params, query, key, query_positions, key_positions):
        return (query + params["content_bias"].astype(jnp.float32)).astype(query.dtype), key

    def logit(self, params: Params, query, key, query_features=None, key_features=None):
        # The query already includes u, and q + v = (q + u) + (v - u).
        bias, content, kernel = (
            params[name].astype(jnp.float32) for name in ("position_bias", "content_bias", "position_kernel")
        )
        parameters = bias - content, kernel
        return BlockLogit(_transformer_xl_logit, parameters, by_distance=_transformer_xl_vectors, heads=(0, 1))


def _transformer_xl_vectors(parameters, distances: Int[Array, "d"]) -> DistanceVectors:
    """W r of each distance, and what the bias adds."""
    bias, kernel = parameters
    rows = jnp.einsum("df,fnh->dnh", sinusoidal_positions(distances, len(kernel), layout="halves"), kernel)
    return DistanceVectors(query=rows, constant=(rows * bias).sum(-1))


def _transformer_xl_logit(parameters, block: Tile) -> Float[Array, "B N q k"]:
    bias, kernel = parameters
    query = block.query + block.factor[..., None] * bias[:, None]
    if block.by_distance is not None:
        return skew(query @ jnp.moveaxis(block.by_distance.query, 0, -1), block.key.shape[2])
    # The sinusoids of i - j are sums of products of those of i and of j.
    width = len(kernel)
    of_query, of_key = (
        sinusoidal_positions(positions, width, layout="halves")
        for positions in (block.query_positions, block.key_positions)
    )
    sin, cos = jnp.split(of_query[:, None], 2, axis=-1)
    for_sin, for_cos = jnp.split(jnp.einsum("bnqh,fnh->bnqf", query, kernel), 2, axis=-1)
    turned = jnp.concatenate([for_cos * sin - for_sin * cos, for_sin * sin + for_cos * cos], axis=-1)
    return turned @ of_key[:, None].mT


# --- TUPE


@dataclasses.dataclass(frozen=True)
class TUPE(Encoding):
    """q·k/√(2H) + (p_i U)·(p_j V)/√(2H) + bias[bucket(distance), h]: content and position terms without cross terms.

    Ke et al. 2021, arXiv 2006.15595: TUPE-R, or TUPE-A with relative=False. All layers share p, U, V and the bias; p is
    a learned table, normalized as in the paper's code. The position part is concatenated to queries and keys, so a
    logit scale multiplies it too, but not the relative bias. The paper's separate treatment of an encoder's [CLS] token
    does not apply to a causal decoder.
    """

    relative: bool = True
    """Whether T5's bias is added."""
    length: int | None = None
    """Rows of the table. None: the model's training length, or 1,024 if that is unknown."""
    num_buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = False
    """Whether half of the buckets are for the future, as in the paper's encoder."""

    def __post_init__(self):
        integer_at_least(1, length=self.length)
        if self.relative:
            self._bias()  # validates the bucket settings

    def _bias(self) -> T5:
        return T5(self.num_buckets, self.max_distance, self.bidirectional)

    def max_length(self, dims: ModelDims) -> int:
        return table_length(self.length, dims)

    def init_shared(self, key, dims: ModelDims) -> Params:
        width, head_dim, kv_heads = dims.model_dim, dims.head_dim, dims.num_kv_heads or dims.num_heads
        shapes = {
            "positions": (self.max_length(dims), width),
            "query_kernel": (width, dims.num_heads, head_dim),
            "key_kernel": (width, kv_heads, head_dim),
        }
        *keys, last = jax.random.split(key, len(shapes) + 1)
        params = {name: _INIT * jax.random.normal(k, shapes[name]) for name, k in zip(shapes, keys, strict=True)}
        params |= {"scale": jnp.ones(width), "shift": jnp.zeros(width)}
        return params | ({"bias": self._bias().init_shared(last, dims)["table"]} if self.relative else {})

    @tokenwise
    def query_key(self, params: Params, query, key, query_positions, key_positions):
        def joined(x, kernel, positions):
            # Set NaN for missing positions after the projection, so that its gradient comes from the others only.
            rows = rows_at(params["positions"], positions)
            exists = ~jnp.isnan(rows[..., :1])
            rows = _layer_norm(jnp.where(exists, rows, 0.0), params["scale"], params["shift"])
            projected = jnp.einsum("btd,dnh->btnh", rows, kernel.astype(jnp.float32)).astype(x.dtype)
            projected = jnp.where(exists[..., None], projected, jnp.nan)
            return jnp.concatenate([x, jnp.broadcast_to(projected, (*x.shape[:3], kernel.shape[2]))], axis=-1)

        return (
            joined(query, params["query_kernel"], query_positions),
            joined(key, params["key_kernel"], key_positions),
        )

    def logit(self, params: Params, query, key, query_features=None, key_features=None):
        return self._bias().logit({"table": params["bias"]}, query, key) if self.relative else None


def _layer_norm(x: Float[Array, "*B D"], scale: Float[Array, "D"], shift: Float[Array, "D"]) -> Float[Array, "*B D"]:
    x = x.astype(jnp.float32)
    x -= x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * scale + shift


# --- DeBERTa


def deberta_bucket(
    distance: Int[Array, "*shape"], *, num_buckets: int = 256, max_distance: int = 512
) -> Int[Array, "*shape"]:
    """Signed bucket of each distance: exact up to num_buckets/2, then logarithmic up to max_distance, then shared.

    He et al. 2021, arXiv 2006.03654, as in the second version of its code.

    Args:
        distance: Query position minus key position; the bucket has its sign.
        num_buckets: The bucket of the farthest distances; must be even.
        max_distance: The distance at which the last bucket starts.

    Raises:
        ValueError: num_buckets or max_distance leave no room for exact and logarithmic buckets.
    """
    _check_buckets("num_buckets", num_buckets, max_distance)
    exact = num_buckets // 2
    # In float64, so that boundaries are the same on every device.
    log = np.log(np.arange(exact, max_distance) / exact) / np.log((max_distance - 1) / exact)
    far = exact + np.ceil(log * (exact - 1) - 1e-9)
    buckets = np.concatenate([np.arange(exact), far, [num_buckets]]).astype(np.int32)
    return jnp.sign(distance) * jnp.array(buckets)[jnp.minimum(jnp.abs(distance), max_distance)]


def _check_buckets(name: str, num_buckets: int, max_distance: int) -> None:
    if num_buckets < 4 or num_buckets % 2:
        raise ValueError(f"{name} must be an even number of at least 4, not {num_buckets}")
    if max_distance <= num_buckets // 2 + 1:
        raise ValueError(
            f"max_distance must be above {num_buckets // 2 + 1} for {num_buckets} buckets, not {max_distance}"
        )


@dataclasses.dataclass(frozen=True)
class DeBERTa(Encoding):
    """(q_i·k_j + q_i·K[δ(i,j)] + k_j·Q[δ(j,i)])/√(3H): content to content, content to position, position to content.

    He et al. 2021, arXiv 2006.03654. δ(i,j) is i - j + max_distance, clipped to 0..2·max_distance - 1; K and Q are the
    layer's projections of one table shared by all layers. A logit scale multiplies the whole expression.
    """

    max_distance: int = 512
    """Distances from here on share one row."""
    buckets: int | None = None
    """Rows on either side, logarithmic as in the second version (256 there); None: one per distance."""
    absolute: bool = False
    """The enhanced mask decoder: add absolute positions to the queries. For the last layers only, as in
    `("deberta",) * 10 + (DeBERTa(absolute=True),) * 2`. Each such layer has its own table, as wide as its queries; the
    paper instead projects one table with the layer's query weights, which an encoding has no access to."""
    length: int | None = None
    """Rows of the absolute table. None: the model's training length, or 1,024 if that is unknown."""
    released: bool = False
    """Use Q[δ(i,j)] instead of Q[δ(j,i)], as the released code does; its checkpoints need this."""

    def __post_init__(self):
        integer_at_least(1, length=self.length, max_distance=self.max_distance)
        if self.buckets is not None:
            _check_buckets("buckets", self.buckets, self.max_distance)

    @property
    def unwrapped(self) -> Encoding:
        # Layers with absolute positions share the relative table with those without.
        return dataclasses.replace(self, absolute=False, length=None)

    @property
    def _span(self) -> int:
        return self.buckets or self.max_distance

    def max_length(self, dims: ModelDims) -> int | None:
        return table_length(self.length, dims) if self.absolute else None

    def init_shared(self, key, dims: ModelDims) -> Params:
        return {"relative": _INIT * jax.random.normal(key, (2 * self._span, dims.model_dim))}

    def init_layer(self, key, dims: ModelDims) -> Params:
        width, heads, head_dim = dims.model_dim, dims.num_heads, dims.head_dim
        kv_heads = dims.num_kv_heads or heads
        shapes = {"key_kernel": (width, kv_heads, head_dim), "query_kernel": (width, heads, head_dim)}
        length = self.max_length(dims)
        if length is not None:
            shapes["absolute"] = (length, heads, head_dim)
        keys = jax.random.split(key, len(shapes))
        return {name: _INIT * jax.random.normal(k, shapes[name]) for name, k in zip(shapes, keys, strict=True)}

    @tokenwise
    def query_key(self, params: Params, query, key, query_positions, key_positions):
        if not self.absolute:
            return query, key
        table = params["absolute"].astype(jnp.float32)
        rows = rows_at(table.reshape(len(table), -1), query_positions).reshape(*query_positions.shape, *table.shape[1:])
        return (query + rows).astype(query.dtype), key

    @tokenwise
    def logit_scale(self, params: Params, query_positions, key_positions):
        return 3**-0.5

    def logit(self, params: Params, query, key, query_features=None, key_features=None):
        relative, key_kernel, query_kernel = (
            params[name].astype(jnp.float32) for name in ("relative", "key_kernel", "query_kernel")
        )
        keys, queries = (jnp.einsum("rd,dnh->nrh", relative, kernel) for kernel in (key_kernel, query_kernel))
        keys = jnp.repeat(keys, query.shape[2] // len(keys), axis=0)
        return BlockLogit(self._logit, (keys, queries), by_distance=self._by_distance, heads=(0, 0))

    def _rows(self, distance: Int[Array, "*shape"]) -> tuple[Int[Array, "*shape"], Int[Array, "*shape"]]:
        """Row indices of K and of Q."""
        if self.buckets is not None:
            distance = deberta_bucket(distance, num_buckets=self.buckets, max_distance=self.max_distance)
        keys, queries = (
            jnp.clip(d + self._span, 0, 2 * self._span - 1)
            for d in (distance, distance if self.released else -distance)
        )
        return keys, queries

    def _by_distance(self, tables, distances: Int[Array, "d"]) -> DistanceVectors:
        keys, queries = (
            jnp.moveaxis(table, 0, 1)[rows] for table, rows in zip(tables, self._rows(distances), strict=True)
        )
        return DistanceVectors(query=keys, key=queries)

    def _logit(self, tables, block: Tile) -> Float[Array, "B N q k"]:
        key, (num_queries, num_keys) = block.key.astype(jnp.float32), (block.query.shape[2], block.key.shape[2])
        if block.by_distance is not None:
            keys, queries, _ = block.by_distance
            to_keys = skew(block.query @ jnp.moveaxis(keys, 0, -1), num_keys)
            # From the keys' side, distances ascend in the other direction.
            to_queries = skew(key @ jnp.moveaxis(queries[::-1], 0, -1), num_queries)
        else:
            (keys, queries), (key_rows, query_rows) = tables, self._rows(block.distance)
            to_keys = _products(block.query, keys, key_rows)
            to_queries = _products(key, queries, query_rows.mT)
        return to_keys + block.factor[..., None] * to_queries.mT
