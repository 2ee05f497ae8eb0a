"""Attention functions as the `attention_fn` of Flax layers, with Flax's semantics.

Flax layers call `attention_fn(query, key, value, **keywords)`. `nnx.MultiHeadAttention` passes all of its keywords,
`nn.MultiHeadDotProductAttention` only those named in the function's signature. Both always pass `broadcast_dropout`,
which direct callers have no reason to pass because dropout is not supported; this keyword therefore identifies a call
from a layer. In such a call, arguments have the defaults and the meaning of Flax's own attention:

- `is_causal`: False. Linen never passes it; its layers are causal only through their mask.
- `query_positions`: start at 0, like those of the keys, since Flax's causal mask is aligned at the start. A single
  query with a mask is at the last key that the mask lets it see: with `decode=True`, its position in the cache.
- `mask`: nonzero numbers are True, including floating-point ones, because `make_causal_mask` returns float32.

One thing differs: the output of a query whose mask hides all keys is 0. In Flax it is the mean of all values.

Shapes: B batch, T query length, S key length, N query heads.
"""

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from nope_jax.encodings.checks import known_values

FLAX_KEYWORDS = (
    "broadcast_dropout",
    "dropout_rng",
    "dropout_rate",
    "deterministic",
    "dtype",
    "force_fp32_for_softmax",
    "module",
    "promote_dtype",
)
"""Keywords that Flax layers pass in addition to those of an attention function."""

_Function = TypeVar("_Function", bound=Callable)


def for_flax_layers(function: _Function, common: Callable | None = None) -> _Function:
    """Adapt an attention function to Flax layers. Its signature names every keyword, as linen requires.

    Args:
        function: Function of query, key, value and keywords.
        common: The function whose keywords `function` accepts as `**common`; None if it has no `**common`.
    """
    signature = inspect.signature(function)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    if common is not None:
        shared = inspect.signature(common).parameters.values()
        names = {"query", "key", "value", "logit", "value_term", *(p.name for p in parameters)}
        parameters += [p for p in shared if p.name not in names]
    else:
        parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in FLAX_KEYWORDS]
    known = {p.name for p in parameters}

    @functools.wraps(function)
    def wrapped(*args: Any, **keywords: Any) -> Any:
        for name in keywords:
            if name == "temperature":
                raise TypeError("temperature: the factor of q·k/√H is logit_scale; above 1, it sharpens attention")
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise TypeError(f"unknown keyword {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        flax = {name: keywords.pop(name) for name in FLAX_KEYWORDS if name in keywords}
        if not flax:
            return function(*args, **keywords)
        _refuse(**flax)
        call = signature.bind(*args, **keywords)
        if flax.get("dtype") is not None:
            for name in ("query", "key", "value"):
                call.arguments[name] = call.arguments[name].astype(flax["dtype"])
        if "broadcast_dropout" not in flax:
            return function(*call.args, **call.kwargs)
        lengths = (call.arguments[name].shape[-3] for name in ("query", "key"))
        return function(*call.args, **_as_in_flax(*lengths, **call.kwargs))

    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return wrapped  # type: ignore[return-value]


def _refuse(dropout_rate: float = 0.0, deterministic: bool = False, module: Any = None, **_: Any) -> None:
    """Refuse options of Flax layers that are not supported."""
    if dropout_rate and not deterministic:
        raise ValueError("dropout_rate must be 0, or deterministic True: attention dropout is not supported")
    if module is not None:
        raise ValueError("sow_weights must be False: attention weights are not kept (module must be None)")


def _as_in_flax(query_length: int, key_length: int, **keywords: Any) -> dict[str, Any]:
    """Translate the keywords of a layer's call into those of the equivalent direct call."""
    keywords = {"is_causal": False, **keywords}
    mask = keywords.get("mask")
    if mask is not None:
        known_values("booleans, or zeros and ones", lambda x: (x == 0) | (x == 1), mask=mask)
        mask = keywords["mask"] = jnp.asarray(mask).astype(bool)
    run_on = keywords.get("query_positions") is None and keywords.get("key_positions") is None
    if run_on and query_length != key_length:
        keywords["query_positions"] = jnp.arange(query_length, dtype=jnp.int32)
        if query_length == 1 and mask is not None:
            keywords["query_positions"] = _last_seen(mask, key_length)
    return keywords


def _last_seen(mask: Bool[Array, "*#B #N 1 #S"], key_length: int) -> Int[Array, "#B 1"]:
    """Index of the last key that a mask lets the single query of each batch row see."""
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    return jnp.where(mask, jnp.arange(key_length, dtype=jnp.int32), 0).max((1, 3))
