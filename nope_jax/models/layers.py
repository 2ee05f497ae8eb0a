"""The layers of a decoder. Flax modules hold the parameters; the computations are plain functions.

Shapes: B batch, T length, N query heads, K key/value heads, H head dim, D model width, F feed-forward.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from nope_jax.attention import AttentionStats, attention_weights, encoded_attention
from nope_jax.config import ModelConfig
from nope_jax.encodings import Encoding, ModelDims, Params
from nope_jax.sharding import gathered, num_shards, with_logical_constraint

RESIDUAL = "batch", "length", None
"""Logical axes of the residual stream: the width is not sharded."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def project(
    x: Shaped[Array, "B T *inputs"], weights: Float[Array, "..."], axes: tuple[str, ...]
) -> Shaped[Array, "B T *outputs"]:
    """Multiply x by weights [*inputs, *outputs] with the given logical axes, in the dtype of x.

    The custom gradient saves the weights as they are, whereas autodiff would save a copy that is cast and gathered from
    all devices. It also avoids the transpose of the cotangent in memory that autodiff would make on a CPU.
    """
    outputs = weights.shape[x.ndim - 2 :]
    return (_rows(x) @ _matrix(x, weights, axes)).reshape(*x.shape[:2], *outputs)


def _project_forward(x, weights, axes):
    return project(x, weights, axes), (x, weights)


def _project_backward(axes, residuals, d_out):
    x, weights = residuals
    d_x = _rows(d_out) @ _matrix(x, weights, axes).T
    rows, columns = [axis for axis in axes if axis != "head"]
    if columns == "embed" and num_shards("embed") > 1:
        # On a TPU, a sum over devices that each keep a shard is one operation, but only along a matrix's first axis.
        d_matrix = with_logical_constraint(jnp.einsum("btf,btd->fd", _rows(d_out), _rows(x)), (columns, rows)).T
    else:
        d_matrix = with_logical_constraint(jnp.einsum("btd,btf->df", _rows(x), _rows(d_out)), (rows, columns))
    d_weights = with_logical_constraint(d_matrix.reshape(weights.shape), axes)
    return d_x.reshape(x.shape), d_weights.astype(weights.dtype)


def _rows(x: Shaped[Array, "B T *features"]) -> Shaped[Array, "B T F"]:
    return x.reshape(*x.shape[:2], -1)


def _matrix(x, weights, axes) -> Shaped[Array, "D F"]:
    """The weights as a matrix, with the features of x in one axis and the outputs in the other."""
    return gathered(weights.astype(x.dtype), axes).reshape(math.prod(x.shape[2:]), -1)


project.defvjp(_project_forward, _project_backward)


def rms_norm(x: Shaped[Array, "*B D"], scale: Float[Array, "D"]) -> Shaped[Array, "*B D"]:
    """Divide x by its root mean square and scale it, in float32 (Zhang and Sennrich 2019, arXiv 1910.07467)."""
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
    return (wide * scale).astype(x.dtype)


def kernel(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], inputs: int, gain: float = 1.0) -> nnx.Param:
    """Create a weight matrix with its logical axes; `inputs` is the number of terms that each output sums."""
    init = jax.nn.initializers.truncated_normal(gain * inputs**-0.5)
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)


def encoding_params(params: Params) -> nnx.Dict:
    """Parameters of an encoding. They name no axes, so they are replicated over the mesh and not decayed."""
    return nnx.Dict({name: nnx.Param(value) for name, value in params.items()})


class Attention(nnx.Module):
    """Grouped-query attention with an encoding."""

    def __init__(self, config: ModelConfig, encoding: Encoding, dims: ModelDims, *, rngs: nnx.Rngs):
        d, n, h = config.model_dim, dims.num_heads, dims.head_dim
        k = config.num_kv_heads or n
        self.encoding = encoding
        self.implementation = config.attention
        self.query = kernel(rngs, (d, n, h), ("embed", "heads", "head"), inputs=d)
        self.key = kernel(rngs, (d, k, h), ("embed", "kv_heads", "head"), inputs=d)
        self.value = kernel(rngs, (d, k, h), ("embed", "kv_heads", "head"), inputs=d)
        residual = (2 * config.num_layers) ** -0.5  # for the number of outputs added to the residual stream (GPT-2)
        self.out = kernel(rngs, (n, h, d), ("heads", "head", "embed"), inputs=n * h, gain=residual)
        self.position = encoding_params(encoding.init_layer(rngs.params(), dims))

    def __call__(
        self,
        x: Shaped[Array, "B T D"],
        shared: Params,
        *,
        kv_cache: "KVCache | None" = None,
        start: Int[Array, ""] | int = 0,
        return_stats: bool = False,
        **common: Any,
    ) -> tuple[Shaped[Array, "B T D"], AttentionStats | None, "KVCache | None"]:
        """Apply attention; return the output, the statistics and the KV cache with these tokens written into it.

        Args:
            x: The layer's input.
            shared: The encoding's shared parameters.
            kv_cache: The layer's cache, when decoding.
            start: Index in the cache at which to write these tokens.
            return_stats: Whether to compute statistics.
            **common: As `dot_product_attention`.
        """
        params = self.encoding_params(shared)
        features = self.encoding.features(params, x, None if kv_cache is None else kv_cache.before(start))
        now = KVCache(_to_heads(x, self.key, "kv_heads"), _to_heads(x, self.value, "kv_heads"), features)
        seen = now if kv_cache is None else kv_cache.write(now, start)
        out = encoded_attention(
            self.encoding,
            params,
            _to_heads(x, self.query, "heads"),
            seen.key,
            seen.value,
            query_features=features,
            key_features=seen.features,
            implementation=self.implementation,
            return_stats=return_stats,
            **common,
        )
        out, stats = out if return_stats else (out, None)
        out = project(out, self.out[...], ("heads", "head", "embed"))
        return out, stats, None if kv_cache is None else seen

    def weights(self, x: Shaped[Array, "B T D"], shared: Params, **common: Any) -> Float[Array, "B N T T"]:
        """Compute the full attention weights; every row sums to 1. Args as `__call__`."""
        params = self.encoding_params(shared)
        features = self.encoding.features(params, x, None)
        query, key = _to_heads(x, self.query, "heads"), _to_heads(x, self.key, "kv_heads")
        return attention_weights(
            self.encoding,
            params,
            query,
            key,
            query_features=features,
            key_features=features,
            precision="highest",
            **common,
        )

    def encoding_params(self, shared: Params) -> Params:
        """The shared and layer parameters of the encoding, merged."""
        return {**shared, **{name: param[...] for name, param in self.position.items()}}

    def empty_kv_cache(self, shared: Params, batch_size: int, length: int, dtype: Any) -> "KVCache":
        """An empty cache for the keys and values of `length` tokens."""
        (d, k, h), room = self.key.shape, (batch_size, length)
        features = jax.eval_shape(
            lambda x: self.encoding.features(self.encoding_params(shared), x, None), jnp.zeros((*room, d), dtype)
        )
        heads = jnp.zeros((*room, k, h), dtype)
        return KVCache(heads, heads, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), features))


class KVCache(NamedTuple):
    """The keys and values of the tokens so far, with capacity for more.

    Keys are stored as projected: every step applies the query/key place to all of them, as a single pass does.
    """

    key: Shaped[Array, "B S K H"]
    value: Shaped[Array, "B S K H"]
    features: Any
    """The encoding's features of the tokens, [B, S, ...]."""

    def write(self, now: "KVCache", start: Int[Array, ""] | int) -> "KVCache":
        """Return the cache with the entries from `start` on replaced by `now`."""
        return jax.tree.map(lambda old, new: lax.dynamic_update_slice_in_dim(old, new, start, axis=1), self, now)

    def before(self, start: Int[Array, ""] | int) -> Any:
        """The features of the token before `start`; zeros if there is none."""
        index = jnp.maximum(start - 1, 0)
        entry = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, axis=1, keepdims=False), self.features)
        return jax.tree.map(lambda x: jnp.where(start > 0, x, 0), entry)


def _to_heads(x: Shaped[Array, "B T D"], weights: nnx.Param, axis: str) -> Shaped[Array, "B T N H"]:
    return with_logical_constraint(project(x, weights[...], ("embed", axis, "head")), ("batch", "length", axis, "head"))


class MLP(nnx.Module):
    """Feed-forward: SwiGLU (Shazeer 2020, arXiv 2002.05202) or GELU."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, gated = config.model_dim, config.mlp == "gated"
        f = config.mlp_size
        self.gate = kernel(rngs, (d, f), ("embed", "mlp"), inputs=d) if gated else None
        self.up = kernel(rngs, (d, f), ("embed", "mlp"), inputs=d)
        self.down = kernel(rngs, (f, d), ("mlp", "embed"), inputs=f, gain=(2 * config.num_layers) ** -0.5)

    def __call__(self, x: Shaped[Array, "B T D"]) -> Shaped[Array, "B T D"]:
        hidden = self._hidden(x, self.up)
        # Nonlinearities in float32: on a CPU, their gradients in bfloat16 are several times slower, and less accurate.
        if self.gate is None:
            hidden = jax.nn.gelu(hidden.astype(jnp.float32)).astype(x.dtype)
        else:
            gate = self._hidden(x, self.gate)
            hidden = jax.nn.silu(gate.astype(jnp.float32)).astype(x.dtype) * hidden
        return project(hidden, self.down[...], ("mlp", "embed"))

    def _hidden(self, x: Shaped[Array, "B T D"], weights: nnx.Param) -> Shaped[Array, "B T F"]:
        return with_logical_constraint(project(x, weights[...], ("embed", "mlp")), ("batch", "length", "mlp"))


class Block(nnx.Module):
    """One pre-norm layer: x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: ModelConfig, encoding: Encoding, dims: ModelDims, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.Param(jnp.ones(config.model_dim))
        self.attention = Attention(config, encoding, dims, rngs=rngs)
        self.mlp_norm = nnx.Param(jnp.ones(config.model_dim))
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self, x: Shaped[Array, "B T D"], shared: Params, **common: Any
    ) -> tuple[Shaped[Array, "B T D"], AttentionStats | None, KVCache | None]:
        """Args and Returns as `Attention`."""
        attended, stats, kv_cache = self.attention(rms_norm(x, self.attention_norm[...]), shared, **common)
        x = with_logical_constraint(x + attended, RESIDUAL)
        return with_logical_constraint(x + self.mlp(rms_norm(x, self.mlp_norm[...])), RESIDUAL), stats, kv_cache
