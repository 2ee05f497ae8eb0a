"""The flags that training gives XLA, by platform: the fewest, each with its reason.

A flag is here if it changes the program that is compiled for a training step, in the way that its reason says; what the
compilers do by themselves is left to them. With libtpu 0.0.50.1 a step sharded by `fsdp` or `data` over v5e:2x4 is the
same program with and without the flags for asynchronous collective fusion, for asynchronous all-gathers and for the
all-reduce of data parallelism. The same holds of the latency-hiding scheduler of GPUs and of pipelined reduce-scatters
(jax-cuda13-plugin 0.10.2, h100:8, `fsdp`; 2026-11-22).
"""

import importlib.util
import os
from collections.abc import Mapping, MutableMapping
from types import MappingProxyType

TPU: Mapping[str, str] = MappingProxyType(
    {
        # With mesh.fsdp, the gradient of a weight is summed over the chips, of which each keeps a part. The compiler
        # cuts such a product into as many as there are chips, so as to send one while it computes the next; but these
        # are too thin for the matrix units. Uncut, it expects 3.1 s instead of 4.9 s of a step of configs/nope_1b.py
        # on v6e:4x4 (libtpu 0.0.50.1, 2026-11-22). Only products of more MiB than this are cut.
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    }
)
"""Flags in $LIBTPU_INIT_ARGS, where libtpu is installed."""

GPU: Mapping[str, str] = MappingProxyType(
    {
        # With mesh.fsdp, the loop over layers gathers the weights of the next layer while it computes this one. On
        # h100:8, 48 operations instead of 18 then come between the start of a gather and its end.
        "xla_gpu_enable_pipelined_all_gather": "true",
    }
)
"""Flags in $XLA_FLAGS, where JAX has a plugin for GPUs."""

_FLAGS = (
    ("LIBTPU_INIT_ARGS", TPU, ("libtpu",)),
    ("XLA_FLAGS", GPU, ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")),
)


def set_flags(environment: MutableMapping[str, str] = os.environ) -> None:
    """Add the flags that the user has not set, before JAX starts its devices.

    Only those of platforms whose package is installed: an unknown flag would end the process.
    """
    for variable, flags, packages in _FLAGS:
        own = environment.get(variable, "")
        more = [f"--{name}={value}" for name, value in flags.items() if name not in own]
        if more and any(map(_is_installed, packages)):
            environment[variable] = " ".join([own, *more]).strip()


def _is_installed(package: str) -> bool:
    parent = package.rpartition(".")[0]
    return (not parent or _is_installed(parent)) and importlib.util.find_spec(package) is not None
