"""What attention asks about the mesh of devices in context (`jax.set_mesh`), and the names it knows axes by."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import PartitionSpec

from nope_jax.explicit_axes import call_with_auto_axes, explicit_mesh

BATCH, LENGTH, HEADS = ("data", "fsdp"), "sequence", "tensor"
"""Axes of the mesh that rows of the batch, positions and heads are spread over."""


def axis_sizes() -> dict[str, int]:
    """Auto axes of the mesh in context that have several devices; none within a `shard_map`, where arrays are local,
    and none of a mesh with axes of other names, whose owner has plans of their own.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {axis: size for axis, size in mesh.shape.items() if size > 1}
    if mesh.manual_axes or not set(sizes) <= {*BATCH, LENGTH, HEADS}:
        return {}
    return {axis: size for axis, size in sizes.items() if axis in mesh.auto_axes}


def ring_size() -> int:
    """Devices that share a sequence, in the mesh in context."""
    return axis_sizes().get(LENGTH, 1)


_Function = TypeVar("_Function", bound=Callable)


def with_auto_axes(function: _Function, *, heads_first: bool = False) -> _Function:
    """An attention function, for arrays on a mesh with Explicit axes too: within it they are Auto.

    Arrays come in from wherever they are, and results [B, T, N, H] and [B, N, T] go out split as the query was.

    Args:
        function: Has a parameter `query` [B, T, N, H].
        heads_first: Results with four axes are [B, N, T, S].
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
