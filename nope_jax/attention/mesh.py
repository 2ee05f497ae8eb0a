"""Queries about the device mesh in context (`jax.set_mesh`), and the axis names that attention uses."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import PartitionSpec

from nope_jax.explicit_axes import call_with_auto_axes, explicit_mesh

BATCH, LENGTH, HEADS = ("data", "fsdp"), "sequence", "tensor"
"""Mesh axes over which batch rows, positions and heads are sharded."""


def axis_sizes() -> dict[str, int]:
    """Return the Auto axes of the mesh in context that have several devices.

    The result is empty within a `shard_map`, where arrays are local, and for a mesh with other axis names, whose
    sharding is left to the caller.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {axis: size for axis, size in mesh.shape.items() if size > 1}
    if mesh.manual_axes or not set(sizes) <= {*BATCH, LENGTH, HEADS}:
        return {}
    return {axis: size for axis, size in sizes.items() if axis in mesh.auto_axes}


def ring_size() -> int:
    """Number of devices over which a sequence is sharded, in the mesh in context."""
    return axis_sizes().get(LENGTH, 1)


def platform() -> str:
    """The platform that is compiled for, cpu, gpu or tpu: that of the mesh in context, or of JAX's default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device or getattr(jax.config, "jax_default_device", None)
    name = getattr(device, "platform", device) or jax.default_backend()
    return name if name in ("cpu", "tpu") else "gpu"


def compute_capability() -> str | None:
    """That of the GPU in use, such as "9.0"; None if there is none, or only its description."""
    return getattr(jax.local_devices()[0], "compute_capability", None) if jax.default_backend() == "gpu" else None


def unused_axes() -> tuple[str, ...]:
    """The Auto axes with several devices, in the mesh in context, over which attention is not sharded here."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in mesh.auto_axes if mesh.shape[axis] > 1 and axis not in axis_sizes())


_Function = TypeVar("_Function", bound=Callable)


def with_auto_axes(function: _Function, *, heads_first: bool = False) -> _Function:
    """Make an attention function support arrays on a mesh with Explicit axes, which are Auto within it.

    Inputs may have any sharding. Results [B, T, N, H] and [B, N, T] are sharded like the query.

    Args:
        function: Attention function with a parameter `query` [B, T, N, H].
        heads_first: Whether results with four axes are [B, N, T, S].
    """
    place = list(inspect.signature(function).parameters).index("query")

    @functools.wraps(function)
    def wrapped(*args: Any, **keywords: Any) -> Any:
        query = args[place] if place < len(args) else keywords.get("query")
        mesh = explicit_mesh(query)
        if mesh is None:
            return function(*args, **keywords)

        def spec(x: jax.Array) -> PartitionSpec:
            batch, length, heads, _ = jax.typeof(query).sharding.spec
            if x.ndim == 4 and not heads_first:
                return PartitionSpec(batch, length, heads, None)
            return PartitionSpec(batch, heads, length, *[None] * (x.ndim - 3))

        return call_with_auto_axes(mesh, function, args, keywords, spec)

    return wrapped  # type: ignore[return-value]
