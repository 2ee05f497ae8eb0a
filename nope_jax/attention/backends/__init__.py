"""The backends of attention: the table that `implementation` names the rows of.

A backend is one file of this folder, and adding one is adding its file and its row. The file has a function
`attend(query, factor, key, value, logit, value_term, mask_spec, precision, with_entropy)` of arguments that have been
checked:

- `query` [B, T, N, H], `key` [B, S, K, H], `value` [B, S, K, H2]: floating point, each of its own dtype, K divides N,
  and neither T nor S is 0.
- `factor` [B or 1, N or 1, T]: float32, logit_scale/√H, of q·k.
- `logit`: None, or a `DistanceLogit`, `BlockLogit` or `ScanLogit` (`nope_jax.encodings`), to be evaluated block by
  block. -inf in what it adds hides a key.
- `value_term`: None, or a `BlockValue`, which adds to the output.
- `mask_spec`: which key each query sees (`nope_jax.attention.mask_spec`).
- `precision`: of products, as in `jax.lax.dot`.
- `with_entropy`: False where nobody reads the entropy, which may then be anything.

It returns output [B, T, N, H2] in value's dtype, entropy [B, N, T] in nats and logsumexp [B, N, T], both float32, and
is traced: under jit, and under `shard_map` where there are several devices, with each one's rows and heads. A row that
sees no key gives 0, 0 and -inf. What is not finite reaches no row that does not see it, as the products of
`nope_jax.attention.nonfinite` see to. Results are differentiable, and agree with `reference.py`, which is the
definition.

Whether it can serve a call its row says by `supports`, of the same arguments, concrete or traced, before any sharding:
None, or why not, as in "head dim must be a multiple of 128, not 64".

With `in_parts` a sequence may be shared by several devices, which see its keys part after part
(`nope_jax.attention.ring`). Then `attend` also takes `final_rows=`, the results of the rows over all their keys, to be
returned as they are: the gradient is what these keys contribute to theirs. For a `ScanLogit` it takes `carry=`, what
later keys handed on, and what these hand on is a fourth result.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from jaxtyping import Array, Float, Shaped

from nope_jax.attention.backends.reference import reference_attention
from nope_jax.attention.backends.streaming import streaming_attention
from nope_jax.attention.blocks import BLOCK_SIZE
from nope_jax.attention.mesh import ring_size

Results = tuple[Shaped[Array, "B T N H2"], Float[Array, "B N T"], Float[Array, "B N T"]]
"""Output, entropy and logsumexp."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """A row of the table."""

    attend: Callable[..., Any]
    supports: Callable[..., str | None] = lambda *call: None
    """Why a call cannot be served, None where it can. The default serves every call."""
    in_parts: bool = False


BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {
        "reference": Backend(reference_attention),
        "streaming": Backend(streaming_attention, in_parts=True),
    }
)
"""Every implementation that a name stands for."""


def default_order(query_length: int, key_length: int) -> tuple[str, ...]:
    """The names that None stands for: streaming, unless all weights of a head fit one block of one device."""
    return ("reference",) if query_length * key_length <= BLOCK_SIZE**2 and ring_size() == 1 else ("streaming",)


def choose(implementation: str | Sequence[str] | None, *call: Any) -> Backend:
    """The first backend of those named that can serve a call.

    Args:
        implementation: A name or several, in the order in which they are tried; None for `default_order`.
        *call: What `attend` will be called with.

    Raises:
        ValueError: A name that is none, or no backend named can serve the call, with each one's reason.
    """
    if implementation is None:
        implementation = default_order(call[0].shape[1], call[2].shape[1])
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    if not names or not all(isinstance(name, str) and name in BACKENDS for name in names):
        known = ", ".join(f'"{name}"' for name in BACKENDS)
        raise ValueError(f"implementation must be one of {known}, a sequence of these or None, not {implementation!r}")
    reasons = []
    for name in names:
        reason = BACKENDS[name].supports(*call)
        if reason is None:
            return BACKENDS[name]
        reasons.append(f'"{name}" cannot serve this call: {reason}')
    raise ValueError(f"implementation {'; '.join(reasons)}")
