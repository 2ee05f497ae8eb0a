"""One attention function per encoding, to import into any model: `<name>_attention(query, key, value, ...)`.

Each takes the encoding's own parameters, then every keyword of `dot_product_attention`; returns what that returns; and
can be given as `attention_fn` to Flax's attention modules.

Shapes: B batch, T query length, S key length, N query heads, K key/value heads, H head dim.
"""

import functools
import inspect
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from nope_jax.attention.dot_product import check_arrays, dot_product_attention, per_token
from nope_jax.attention.visibility import positions_or_default
from nope_jax.encodings import T5, ALiBi, Encoding, NoPE, Params, RoPE, RotaryScaling


def encoded_attention(
    encoding: Encoding,
    params: Params,
    query: Shaped[Array, "B T N H"],
    key: Shaped[Array, "B S K H"],
    value: Shaped[Array, "B S K H2"],
    *,
    query_features: Any = None,
    key_features: Any = None,
    temperature: Any = None,
    **common: Any,
) -> Any:
    """`dot_product_attention` with what an encoding does within a layer: all but its input place.

    Args:
        encoding: The encoding, a user's own included.
        params: Its parameters: what its `init_shared` and `init_layer` made, merged.
        query: Queries, before the query/key place.
        key: Keys, likewise.
        value: Values.
        query_features: `encoding.features` of the queries' tokens, where it has any.
        key_features: The same of the keys' tokens.
        temperature: Times the encoding's own temperature.
        **common: As `dot_product_attention`.
    """
    check_arrays(query, key, value)
    batch, query_length, key_length = *query.shape[:2], key.shape[1]
    query_positions, key_positions = positions_or_default(
        per_token("query_positions", common.get("query_positions"), batch, query_length),
        per_token("key_positions", common.get("key_positions"), batch, key_length),
        query_length,
        key_length,
    )
    factor = encoding.temperature(params, query_positions, key_positions)
    if factor is not None:
        temperature = _product(factor, temperature)
    for name, number in encoding.reach()._asdict().items():
        given = [n for n in (number, common.get(name)) if n is not None]
        common[name] = min(given, default=None)
    turned_query, turned_key = encoding.query_key(params, query, key, query_positions, key_positions)
    return dot_product_attention(
        turned_query,
        turned_key,
        value,
        logit=encoding.logit(params, turned_query, turned_key, query_features, key_features),
        value_term=encoding.value(params),
        temperature=temperature,
        **common,
    )


def _product(factor, temperature):
    """Product of two temperatures, each a number, [N] or [B or 1, N or 1, T]."""
    if temperature is None:
        return factor
    factor, temperature = (x[:, None] if x.ndim == 1 else x for x in (jnp.asarray(factor), jnp.asarray(temperature)))
    product = factor * temperature
    return product[..., 0] if product.shape[-1:] == (1,) and product.ndim == 2 else product


def _attention_function(function):
    """Check the arrays first, and spell out **common in the signature, which Flax's modules and readers look at."""

    @functools.wraps(function)
    def checked(query, key, value, **keywords):
        check_arrays(query, key, value)
        return function(query, key, value, **keywords)

    own = inspect.signature(function)
    common = inspect.signature(dot_product_attention).parameters.values()
    shared = [p for p in common if p.name not in ("query", "key", "value", "logit", "value_term")]
    parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    checked.__signature__ = own.replace(parameters=[*parameters, *shared])  # type: ignore[attr-defined]
    return checked


@_attention_function
def nope_attention(query, key, value, **common: Any) -> Any:
    """Attention without positional encoding: softmax(q·k/√H) under the causal mask.

    Args and Returns: `dot_product_attention`.

    References:
        Kazemnejad et al. 2023, arXiv 2305.19466.
    """
    return encoded_attention(NoPE(), {}, query, key, value, **common)


@_attention_function
def rope_attention(
    query,
    key,
    value,
    *,
    base: float = 10_000.0,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    scaling: RotaryScaling | None = None,
    **common: Any,
) -> Any:
    """Attention with rotary position embedding: queries and keys turned by their positions.

    Args:
        query: Queries [B, T, N, H], not turned yet.
        key: Keys [B, S, K, H], not turned yet.
        value: Values [B, S, K, H].
        base: Wavelengths grow from 2π to base·2π.
        rotary_dim: How many leading dimensions turn, an even number up to H; None for all.
        interleaved: Pairs are neighbours (GPT-J, the paper); otherwise halves (Llama, GPT-NeoX).
        scaling: Stretches the frequencies past the training length.
        **common: As `dot_product_attention`, which also says what is returned and raised.

    References:
        Su et al. 2021, arXiv 2104.09864.
    """
    encoding = RoPE(base=base, rotary_dim=rotary_dim, interleaved=interleaved, scaling=scaling)
    return encoded_attention(encoding, {}, query, key, value, **common)


@_attention_function
def alibi_attention(query, key, value, *, slopes: Float[Array, "N"] | None = None, **common: Any) -> Any:
    """Attention with linear biases: softmax(q·k/√H - slope · distance).

    Args:
        query: Queries [B, T, N, H].
        key: Keys [B, S, K, H].
        value: Values [B, S, K, H].
        slopes: One per query head; None for `nope_jax.encodings.alibi_slopes(N)`.
        **common: As `dot_product_attention`, which also says what is returned and raised.

    References:
        Press et al. 2022, arXiv 2108.12409.
    """
    if slopes is not None:
        slopes = jnp.asarray(slopes)
        if slopes.shape != (query.shape[2],):
            raise ValueError(f"slopes must have shape [{query.shape[2]}], one per query head, not {list(slopes.shape)}")
    params = {} if slopes is None else {"slopes": slopes}
    return encoded_attention(ALiBi(), params, query, key, value, **common)


@_attention_function
def t5_attention(
    query,
    key,
    value,
    *,
    table: Float[Array, "num_buckets N"],
    max_distance: int = 128,
    bidirectional: bool = False,
    **common: Any,
) -> Any:
    """Attention with T5's learned bias: softmax(q·k/√H + table[bucket(distance), head]).

    Args:
        query: Queries [B, T, N, H].
        key: Keys [B, S, K, H].
        value: Values [B, S, K, H].
        table: The bias of each bucket and query head; its gradient is exact in both implementations.
        max_distance: The distance from which on all share the last bucket.
        bidirectional: Half of the buckets are for keys after the query, as in an encoder.
        **common: As `dot_product_attention`, which also says what is returned and raised.

    References:
        Raffel et al. 2020, arXiv 1910.10683. T5 itself leaves out 1/√H; temperature=√H gives that form.
    """
    table = jnp.asarray(table)
    if table.ndim != 2 or table.shape[1] != query.shape[2]:
        raise ValueError(f"table must have shape [num_buckets, {query.shape[2]}], not {list(table.shape)}")
    encoding = T5(num_buckets=table.shape[0], max_distance=max_distance, bidirectional=bidirectional)
    return encoded_attention(encoding, {"table": table}, query, key, value, **common)
