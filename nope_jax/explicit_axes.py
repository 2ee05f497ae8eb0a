"""Support for meshes with Explicit axes, as made by `jax.make_mesh`: functions of this package run with them Auto."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec


def explicit_mesh(*arrays: Any) -> AbstractMesh | None:
    """Return the mesh with Explicit axes on which one of the arrays is placed, or None."""
    meshes = (jax.typeof(x).sharding.mesh for x in arrays if isinstance(x, jax.Array))
    return next((mesh for mesh in meshes if mesh.explicit_axes), None)


def call_with_auto_axes(
    mesh: AbstractMesh,
    function: Callable[..., Any],
    args: Sequence[Any],
    keywords: Mapping[str, Any],
    spec: Callable[[jax.Array], PartitionSpec],
    *,
    move: Any = jax.Array,
) -> Any:
    """Call function(*args, **keywords) with the mesh in context and its Explicit axes made Auto.

    Args:
        mesh: The mesh.
        function: The function to call.
        args: Positional arguments, as pytrees; their array leaves are replicated over the mesh first.
        keywords: Keyword arguments, likewise.
        spec: Returns the PartitionSpec of each array in the results.
        move: The types of leaves that count as arrays.
    """

    def whole(x: Any) -> Any:
        return jax.sharding.reshard(x, PartitionSpec(*[None] * x.ndim)) if isinstance(x, move) else x

    with jax.sharding.use_abstract_mesh(mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, AxisType.Auto))):
        args, keywords = jax.tree.map(whole, (tuple(args), dict(keywords)))
        results = function(*args, **keywords)
    return jax.tree.map(lambda x: jax.sharding.reshard(x, NamedSharding(mesh, spec(x))), results)
