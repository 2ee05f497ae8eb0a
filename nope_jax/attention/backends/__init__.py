"""The backends of attention: a table with one row for each value of `implementation`.

To add a backend, add a file or folder to this one and a row to the table. The file defines a function
`attend(query, factor, key, value, logit, value_term, mask_spec, precision, with_entropy, softcap)`, whose arguments
have been validated:

- `query` [B, T, N, H], `key` [B, S, K, H], `value` [B, S, K, H2]: floating-point arrays, possibly of different dtypes;
  K divides N, and neither T nor S is 0. In decoding, key and value may be a `CachedLayer`; `whole` makes it an array
  (`nope_jax.attention.blocks`).
- `factor` [B or 1, N or 1, T]: float32, the factor logit_scale/√H of q·k.
- `logit`: None, or a `DistanceLogit`, `BlockLogit` or `ScanLogit` (`nope_jax.encodings`), to be evaluated block by
  block. Where it adds -inf, the weight of the key is 0, provided that key and value are finite.
- `value_term`: None, or a `BlockValue` to add to the output.
- `mask_spec`: which keys each query sees (`nope_jax.attention.mask_spec`).
- `precision`: precision of the products, as in `jax.lax.dot`.
- `with_entropy`: if False, the entropy is not used and may have any value.
- `softcap`: None, or the cap of factor · q·k (`nope_jax.attention.softcap`), to which `logit` is then added.

It returns the output [B, T, N, H2] in value's dtype, and entropy [B, N, T] in nats and logsumexp [B, N, T], both
float32. It is traced under jit and, with several devices, under `shard_map`, where it gets the local rows and heads. A
query that sees no key gives 0, 0 and -inf. Non-finite inputs must affect only the queries that see them; the products
of `nope_jax.attention.nonfinite` ensure this. Results must be differentiable and agree with `reference.py`, the
definition.

`supports` takes the same arguments, concrete or traced, before any sharding. It returns None if the backend can serve
the call, and otherwise the reason, such as "head dim must be a multiple of 128, not 64".

A backend with `in_parts` supports sequences sharded over several devices, where `attend` sees the keys in parts
(`nope_jax.attention.ring`). It then also takes `final_rows=`, the results over all keys, which it returns unchanged;
the backward pass computes only the gradient contribution of the given keys. For a `ScanLogit` it takes `carry=`, the
carry from later keys, and returns its own carry as a fourth result.

A backend without `statistics` is passed over where entropy or logsumexp are needed, and may return any.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from jaxtyping import Array, Float, Shaped

from nope_jax.attention.backends import cudnn, pallas, splash
from nope_jax.attention.backends.reference import reference_attention
from nope_jax.attention.backends.streaming import streaming_attention
from nope_jax.attention.blocks import BLOCK_SIZE, CachedLayer, few_queries
from nope_jax.attention.mesh import platform, ring_size

log = logging.getLogger(__name__)

Results = tuple[Shaped[Array, "B T N H2"], Float[Array, "B N T"], Float[Array, "B N T"]]
"""Output, entropy and logsumexp."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """A row of the backend table."""

    attend: Callable[..., Any]
    supports: Callable[..., str | None] = lambda *call: None
    """Returns the reason why a call cannot be served, or None if it can. By default, every call can be served."""
    in_parts: bool = False
    is_kernel: bool = False
    """Whether XLA cannot partition it: with several devices, it is always traced under `shard_map`."""
    statistics: bool = True
    """Whether it computes entropy and logsumexp; if not, calls that need them are left to others."""


BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {
        "reference": Backend(reference_attention),
        "streaming": Backend(streaming_attention, in_parts=True),
        "pallas_tpu": Backend(pallas.tpu_attention, pallas.supports_tpu, in_parts=True, is_kernel=True),
        "splash": Backend(splash.splash_attention, splash.supports, is_kernel=True, statistics=False),
        "cudnn": Backend(cudnn.cudnn_attention, cudnn.supports, is_kernel=True, statistics=False),
        "pallas_gpu": Backend(pallas.gpu_attention, pallas.supports_gpu, in_parts=True, is_kernel=True),
    }
)
"""The backend of every implementation name."""


KERNEL_LENGTH = 128
"""Queries and keys from which on a kernel is chosen by default: fewer do not fill one of its blocks."""


KERNELS = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}
"""The one that is chosen by default, by platform."""


def default_order(query_length: int, key_length: int, *, cached: bool = False) -> tuple[str, ...]:
    """Default names: the platform's kernel, for a block at least, or for decoding if there is one; then streaming.

    Instead of streaming, reference if all weights of a head fit in one block on one device and there is no cache.

    Args:
        cached: Whether keys and values are those of a `CachedLayer`. The TPU's kernel for decoding would copy others.
    """
    few = few_queries(query_length, key_length)
    small = query_length * key_length <= BLOCK_SIZE**2 and not few and ring_size() == 1
    decoding = pallas.is_decoding(query_length, key_length) and (cached or platform() == "gpu")
    long = key_length >= KERNEL_LENGTH and (decoding if few else query_length >= KERNEL_LENGTH)
    kernel = (KERNELS[platform()],) if long and platform() in KERNELS else ()
    return (*kernel, "reference" if small else "streaming")


def choose(implementation: str | Sequence[str] | None, *call: Any, statistics: bool = True) -> Backend:
    """Return the first named backend that can serve a call; a debug message names it and says why not those before it.

    Args:
        implementation: One name or several, tried in order; None for `default_order`.
        *call: The arguments of `attend`.
        statistics: Whether entropy or logsumexp are needed.

    Raises:
        ValueError: A name is unknown, or none of the named backends can serve the call; the message gives the reasons.
    """
    if implementation is None:
        query, _, key = call[:3]
        implementation = default_order(query.shape[1], key.shape[1], cached=isinstance(key, CachedLayer))
    names = tuple(implementation) if isinstance(implementation, list | tuple) else (implementation,)
    if not names or not all(isinstance(name, str) and name in BACKENDS for name in names):
        known = ", ".join(f'"{name}"' for name in BACKENDS)
        raise ValueError(f"implementation must be one of {known}, a sequence of these or None, not {implementation!r}")
    reasons: list[str] = []
    for name in names:
        reason = BACKENDS[name].supports(*call)
        if statistics and not BACKENDS[name].statistics:
            reason = "it computes neither entropy nor logsumexp, as return_stats and sinks need"
        if reason is None:
            query, key = call[0], call[2]
            log.debug("%s", "; ".join([f'"{name}" for queries {query.shape} and keys {key.shape}', *reasons]))
            return BACKENDS[name]
        reasons.append(f'"{name}" cannot serve this call: {reason}')
    raise ValueError(f"implementation {'; '.join(reasons)}")
