"""The layers of a decoder. Flax modules hold the parameters; the computations are plain functions.

Shapes: B batch, T length, N query heads, K key/value heads, H head dim, D model width, F feed-forward.
"""

import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, ArrayLike, Float, Shaped

from nope_jax.attention import AttentionStats, attention_weights, encoded_attention
from nope_jax.attention.mesh import platform
from nope_jax.config import ModelConfig
from nope_jax.encodings import Encoding, ModelDims, Params
from nope_jax.models.kv_cache import KVCache, LayerCache
from nope_jax.models.remat import PRODUCT
from nope_jax.sharding import gathered, num_shards, with_logical_constraint

RESIDUAL = "batch", "length", None
"""Logical axes of the residual stream: the width is not sharded."""


def project(
    x: Shaped[Array, "B T *inputs"], weights: Float[Array, "..."], axes: tuple[str, ...]
) -> Shaped[Array, "B T *outputs"]:
    """Multiply x by weights [*inputs, *outputs] with the given logical axes, in the dtype of x."""
    return checkpoint_name(_project(x, weights, axes), PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _project(x, weights, axes):
    """`project`; its custom gradient saves the weights as they are.

    Autodiff would save a copy that is cast and gathered from all devices. The custom gradient also avoids the transpose
    of the cotangent in memory that autodiff would make on a CPU.
    """
    outputs = weights.shape[x.ndim - 2 :]
    product = jnp.matmul(_rows(x), _matrix(x, weights, axes), preferred_element_type=_sums_dtype(x))
    return product.astype(x.dtype).reshape(*x.shape[:2], *outputs)


def _project_forward(x, weights, axes):
    return _project(x, weights, axes), (x, weights)


def _project_backward(axes, residuals, d_out):
    x, weights = residuals
    sums = {"preferred_element_type": _sums_dtype(x)}
    d_x = jnp.matmul(_rows(d_out), _matrix(x, weights, axes).T, **sums).astype(x.dtype)
    rows, columns = [axis for axis in axes if axis != "head"]
    if columns == "embed" and num_shards("embed") > 1:
        # On a TPU, a sum over devices that each keep a shard is one operation, but only along a matrix's first axis.
        d_matrix = with_logical_constraint(jnp.einsum("btf,btd->fd", _rows(d_out), _rows(x), **sums), (columns, rows)).T
    else:
        d_matrix = with_logical_constraint(jnp.einsum("btd,btf->df", _rows(x), _rows(d_out), **sums), (rows, columns))
    d_weights = with_logical_constraint(d_matrix.reshape(weights.shape), axes)
    return d_x.reshape(x.shape), d_weights.astype(weights.dtype)


def _sums_dtype(x: Shaped[Array, "B T *features"]) -> Any:
    """The dtype of a product before it is rounded to that of x.

    On a CPU float32: bfloat16 is multiplied by its own instructions only if the result is wider. Elsewhere that of x,
    since devices that each have a part of a sum exchange it in this dtype.
    """
    return jnp.float32 if platform() == "cpu" else x.dtype


def _rows(x: Shaped[Array, "B T *features"]) -> Shaped[Array, "B T F"]:
    return x.reshape(*x.shape[:2], -1)


def _matrix(x, weights, axes) -> Shaped[Array, "D F"]:
    """The weights as a matrix, with the features of x in one axis and the outputs in the other."""
    return gathered(weights.astype(x.dtype), axes).reshape(math.prod(x.shape[2:]), -1)


_project.defvjp(_project_forward, _project_backward)


def norm(
    x: Shaped[Array, "*B D"],
    scale: Float[Array, "D"],
    bias: Float[Array, "D"] | None = None,
    *,
    kind: str = "rms",
    eps: float = 1e-6,
) -> Shaped[Array, "*B D"]:
    """Divide x by its root mean square and scale it, in float32; `kind` and `eps` as in `ModelConfig`.

    RMSNorm: Zhang and Sennrich 2019, arXiv 1910.07467; LayerNorm, which first subtracts the mean: Ba et al. 2016, arXiv
    1607.06450.
    """
    wide = x.astype(jnp.float32)
    if kind == "layer":
        wide -= jnp.mean(wide, axis=-1, keepdims=True)
    wide *= jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    wide *= 1 + scale if kind == "rms_plus_one" else scale
    return (wide if bias is None else wide + bias).astype(x.dtype)


def norm_scale(config: ModelConfig, size: int) -> nnx.Param:
    """Create the scale of a norm; norms have no axes, so they are replicated over the mesh and not decayed."""
    return nnx.Param(jnp.zeros(size) if config.norm == "rms_plus_one" else jnp.ones(size))


def add_norm(module: nnx.Module, name: str, config: ModelConfig) -> None:
    """Give a module a norm of the residual stream: the parameters `name` and, if norms have biases, `name_bias`."""
    setattr(module, name, norm_scale(config, config.model_dim))
    setattr(module, f"{name}_bias", nnx.Param(jnp.zeros(config.model_dim)) if "norm" in config.biases else None)


def apply_norm(module: nnx.Module, name: str, config: ModelConfig, x: Shaped[Array, "*B D"]) -> Shaped[Array, "*B D"]:
    """Apply the norm of this name; a module without it leaves x as it is."""
    scale, bias = getattr(module, name, None), getattr(module, f"{name}_bias", None)
    if scale is None:
        return x
    return norm(x, scale[...], None if bias is None else bias[...], kind=config.norm, eps=config.norm_eps)


def bias(config: ModelConfig, part: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param | None:
    """Create the bias of a projection, with the logical axes of its outputs; None if that part of the model has none.

    The width of the residual stream is not sharded, so a bias that is added to it has no axes.
    """
    return nnx.Param(jnp.zeros(shape), axes=axes) if part in config.biases else None


def add_bias(x: Shaped[Array, "B T *outputs"], bias: nnx.Param | None) -> Shaped[Array, "B T *outputs"]:
    """Add a bias, if there is one, in float32: its gradient is then summed in float32 too."""
    return x if bias is None else (x.astype(jnp.float32) + bias[...]).astype(x.dtype)


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
        self.config = config
        self.encoding = encoding
        self.implementation = config.attention
        self.query = kernel(rngs, (d, n, h), ("embed", "heads", "head"), inputs=d)
        self.key = kernel(rngs, (d, k, h), ("embed", "kv_heads", "head"), inputs=d)
        self.value = kernel(rngs, (d, k, h), ("embed", "kv_heads", "head"), inputs=d)
        residual = (2 * config.num_layers) ** -0.5  # for the number of outputs added to the residual stream (GPT-2)
        self.out = kernel(rngs, (n, h, d), ("heads", "head", "embed"), inputs=n * h, gain=residual)
        self.query_bias = bias(config, "qkv", (n, h), ("heads", "head"))
        self.key_bias = bias(config, "qkv", (k, h), ("kv_heads", "head"))
        self.value_bias = bias(config, "qkv", (k, h), ("kv_heads", "head"))
        self.out_bias = bias(config, "out", (d,), (None,))
        self.query_norm = norm_scale(config, h if config.qk_norm == "head" else n * h) if config.qk_norm else None
        self.key_norm = norm_scale(config, h if config.qk_norm == "head" else k * h) if config.qk_norm else None
        self.position = encoding_params(encoding.init_layer(rngs.params(), dims))

    def __call__(
        self,
        x: Shaped[Array, "B T D"],
        shared: Params,
        *,
        kv_cache: LayerCache | None = None,
        return_stats: bool = False,
        **common: Any,
    ) -> tuple[Shaped[Array, "B T D"], AttentionStats | None, KVCache | None]:
        """Apply attention; return the output, the statistics and the KV cache with these tokens written into it.

        Args:
            x: The layer's input.
            shared: The encoding's shared parameters.
            kv_cache: The layer's cache, when decoding.
            return_stats: Whether to compute statistics.
            **common: As `dot_product_attention`.
        """
        params = self.encoding_params(shared)
        features = self.encoding.features(params, x, None if kv_cache is None else kv_cache.before())
        query, key = self._queries(x), self._keys(x)
        value = _to_heads(x, self.value, self.value_bias, "kv_heads")
        common |= {"implementation": self.implementation, "return_stats": return_stats, **self._common()}
        cache = None
        if kv_cache is None:
            features_of = {"query_features": features, "key_features": features}
            out = encoded_attention(self.encoding, params, query, key, value, **features_of, **common)
        else:
            out, cache = kv_cache.attend(self.encoding, params, query, key, value, features, **common)
        out, stats = out if return_stats else (out, None)
        out = add_bias(project(out, self.out[...], ("heads", "head", "embed")), self.out_bias)
        return out, stats, cache

    def weights(self, x: Shaped[Array, "B T D"], shared: Params, **common: Any) -> Float[Array, "B N T T"]:
        """Compute the full attention weights; see `attention_weights`. Args as `__call__`."""
        params = self.encoding_params(shared)
        features = self.encoding.features(params, x, None)
        return attention_weights(
            self.encoding,
            params,
            self._queries(x),
            self._keys(x),
            query_features=features,
            key_features=features,
            precision="highest",
            **self._common(),
            **common,
        )

    def _common(self) -> dict[str, Any]:
        """Keywords of attention that the config sets."""
        return {"qk_scale": self.config.attention_scale, "softcap": self.config.attention_softcap}

    def _queries(self, x: Shaped[Array, "B T D"]) -> Shaped[Array, "B T N H"]:
        return self._normed(_to_heads(x, self.query, self.query_bias, "heads"), self.query_norm)

    def _keys(self, x: Shaped[Array, "B T D"]) -> Shaped[Array, "B T K H"]:
        return self._normed(_to_heads(x, self.key, self.key_bias, "kv_heads"), self.key_norm)

    def _normed(self, x: Shaped[Array, "B T N H"], scale: nnx.Param | None) -> Shaped[Array, "B T N H"]:
        """QK norm, over as many heads at once as the scale has entries for (Henry et al. 2020, arXiv 2010.04245)."""
        if scale is None:
            return x
        groups = x.reshape(*x.shape[:2], -1, scale.shape[0])
        return norm(groups, scale[...], kind=self.config.norm, eps=self.config.norm_eps).reshape(x.shape)

    def encoding_params(self, shared: Params) -> Params:
        """The shared and layer parameters of the encoding, merged."""
        return {**shared, **{name: param[...] for name, param in self.position.items()}}


def _to_heads(
    x: Shaped[Array, "B T D"], weights: nnx.Param, bias: nnx.Param | None, axis: str
) -> Shaped[Array, "B T N H"]:
    heads = project(x, weights[...], ("embed", axis, "head"))
    return add_bias(with_logical_constraint(heads, ("batch", "length", axis, "head")), bias)


def _relu2(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = MappingProxyType(
    {
        "silu": jax.nn.silu,
        "gelu": functools.partial(jax.nn.gelu, approximate=False),
        "gelu_tanh": jax.nn.gelu,
        "relu": jax.nn.relu,
        "relu2": _relu2,
    }
)
"""Activations by name: GELU of Hendrycks and Gimpel 2016 (arXiv 1606.08415), squared ReLU of So et al. 2021 (arXiv
2109.08668)."""


class MLP(nnx.Module):
    """Feed-forward, gated (Shazeer 2020, arXiv 2002.05202) or plain."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, gated = config.model_dim, config.mlp == "gated"
        f = config.mlp_size
        self.gate = kernel(rngs, (d, f), ("embed", "mlp"), inputs=d) if gated else None
        self.up = kernel(rngs, (d, f), ("embed", "mlp"), inputs=d)
        self.down = kernel(rngs, (f, d), ("mlp", "embed"), inputs=f, gain=(2 * config.num_layers) ** -0.5)
        self.gate_bias = bias(config, "mlp", (f,), ("mlp",)) if gated else None
        self.up_bias = bias(config, "mlp", (f,), ("mlp",))
        self.down_bias = bias(config, "mlp", (d,), (None,))
        self.activation = config.activation or ("silu" if gated else "gelu_tanh")

    def __call__(self, x: Shaped[Array, "B T D"]) -> Shaped[Array, "B T D"]:
        hidden = self._hidden(x, self.up, self.up_bias)
        if self.gate is None:
            hidden = self._activated(hidden)
        else:
            hidden = self._activated(self._hidden(x, self.gate, self.gate_bias)) * hidden
        return add_bias(project(hidden, self.down[...], ("mlp", "embed")), self.down_bias)

    def _hidden(self, x: Shaped[Array, "B T D"], weights: nnx.Param, bias: nnx.Param | None) -> Shaped[Array, "B T F"]:
        hidden = project(x, weights[...], ("embed", "mlp"))
        return add_bias(with_logical_constraint(hidden, ("batch", "length", "mlp")), bias)

    def _activated(self, x: Shaped[Array, "B T F"]) -> Shaped[Array, "B T F"]:
        # In float32: on a CPU, gradients of these functions in bfloat16 are several times slower, and less accurate.
        return ACTIVATIONS[self.activation](x.astype(jnp.float32)).astype(x.dtype)


class Block(nnx.Module):
    """One layer: attention and MLP, the norms around them, and how they are added to the residual stream."""

    def __init__(self, config: ModelConfig, encoding: Encoding, dims: ModelDims, *, rngs: nnx.Rngs):
        self.config = config
        before, after = config.norm_place != "post", config.norm_place != "pre"
        if before:
            add_norm(self, "attention_norm", config)
        self.attention = Attention(config, encoding, dims, rngs=rngs)
        if after:
            add_norm(self, "attention_post_norm", config)
        if before and config.block != "parallel_shared_norm":
            add_norm(self, "mlp_norm", config)
        self.mlp = MLP(config, rngs=rngs)
        if after:
            add_norm(self, "mlp_post_norm", config)

    def __call__(
        self, x: Shaped[Array, "B T D"], shared: Params, **common: Any
    ) -> tuple[Shaped[Array, "B T D"], AttentionStats | None, KVCache | None]:
        """x + attention(norm(x)), then x + MLP(norm(x)); in a parallel block, both are added to the layer's input.

        Args and Returns as `Attention`.
        """
        read = self._normed("attention_norm", x)
        attended, stats, kv_cache = self.attention(read, shared, **common)
        layer_input, x = x, self._added(x, attended, "attention_post_norm")
        if self.config.block != "parallel_shared_norm":
            read = self._normed("mlp_norm", x if self.config.block == "sequential" else layer_input)
        return self._added(x, self.mlp(read), "mlp_post_norm"), stats, kv_cache

    def weights(self, x: Shaped[Array, "B T D"], shared: Params, **common: Any) -> Float[Array, "B N T T"]:
        """The full attention weights of the layer; args as `__call__`, Returns as `Attention.weights`."""
        return self.attention.weights(self._normed("attention_norm", x), shared, **common)

    def _normed(self, name: str, x: Shaped[Array, "B T D"]) -> Shaped[Array, "B T D"]:
        return apply_norm(self, name, self.config, x)

    def _added(self, x: Shaped[Array, "B T D"], part: Shaped[Array, "B T D"], norm: str) -> Shaped[Array, "B T D"]:
        """x + residual_scale · norm(part)."""
        part = self._normed(norm, part)
        if self.config.residual_scale != 1:
            part *= self.config.residual_scale
        return with_logical_constraint(x + part, RESIDUAL)


@jax.jit
def row_of(stacks: Any, index: ArrayLike) -> Any:
    """The entry at an index of the first axis of every array, by one program; indexing takes two for each shape."""
    return jax.tree.map(lambda stack: jax.lax.dynamic_index_in_dim(stack, index, keepdims=False), stacks)
