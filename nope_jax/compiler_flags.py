"""The flags that training gives XLA, by platform: the fewest, each with its reason.

A flag is here if it changes the program that is compiled for a training step, in the way that its reason says; what the
compilers do by themselves is left to them. On TPUs that is everything: with libtpu 0.0.50.1 a step sharded by `fsdp` or
`data` over v5e:2x4 is the same program with and without the flags for asynchronous collective fusion, for asynchronous
all-gathers and for the all-reduce of data parallelism. The same holds of the latency-hiding scheduler of GPUs and
of pipelined reduce-scatters (jax-cuda13-plugin 0.10.2, h100:8, `fsdp`; 2026-11-22).
"""

import importlib.util
import os
from collections.abc import Mapping, MutableMapping
from types import MappingProxyType

_PLUGINS = "jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"

GPU: Mapping[str, str] = MappingProxyType(
    {
        # With mesh.fsdp, the loop over layers gathers the weights of the next layer while it computes this one. On
        # h100:8, 48 operations instead of 18 then come between the start of a gather and its end.
        "xla_gpu_enable_pipelined_all_gather": "true",
    }
)
"""Flags in $XLA_FLAGS, where JAX has a plugin for GPUs."""


def set_flags(environment: MutableMapping[str, str] = os.environ) -> None:
    """Add the flags that the user has not set, before JAX starts its devices: an unknown one would end the process."""
    if not _has_gpu_plugin():
        return
    own = environment.get("XLA_FLAGS", "")
    more = [f"--{name}={value}" for name, value in GPU.items() if name not in own]
    environment["XLA_FLAGS"] = " ".join([own, *more]).strip()


def _has_gpu_plugin() -> bool:
    if importlib.util.find_spec("jax_plugins") is None:
        return False
    return any(importlib.util.find_spec(name) for name in _PLUGINS)
