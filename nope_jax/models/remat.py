"""Rematerialization: which activations of a layer are kept for its backward pass, by `model.remat`.

The activations that cost most to compute again have names (`jax.ad_checkpoint.checkpoint_name`); a policy says what
becomes of them. What has no name is computed again by every policy but none.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax

from nope_jax.attention.softmax_state import RESULTS
from nope_jax.sharding import HOST_MEMORY

LAYER_INPUT = "layer_input"
PRODUCT = "product"
"""A product with weights."""

_POLICIES: Mapping[object, Callable[..., Any] | None] = MappingProxyType(
    {
        "full": None,
        "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT, RESULTS),
        "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[LAYER_INPUT, PRODUCT, RESULTS],
            offload_src="device",
            offload_dst=HOST_MEMORY,
        ),
    }
)


def rematerialized(layer: Callable, policy: object, static_argnums: int | tuple[int, ...] = ()) -> Callable:
    """A layer whose backward pass recomputes what the policy, one of `model.remat`, does not keep."""
    if policy == "none":
        return layer
    return jax.checkpoint(layer, policy=_POLICIES[policy], static_argnums=static_argnums)
