"""Meshes with Explicit axes, which is what `jax.make_mesh` makes: within this package's functions they are Auto."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec


def explicit_mesh(*arrays: Any) -> AbstractMesh | None:
    """The mesh with Explicit axes that one of these lies on; None where there is none."""
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
    """function(*args, **keywords) with a mesh in context whose Explicit axes are Auto.

    Args:
        mesh: The mesh.
        function: What to call.
        args: Pytrees; the arrays among their leaves come in from wherever they are, whole.
        keywords: The same.
        spec: How each array of the results is to go out.
        move: The types of leaves that are such arrays.
    """

    def whole(x: Any) -> Any:
        return jax.sharding.reshard(x, PartitionSpec(*[None] * x.ndim)) if isinstance(x, move) else x

    with jax.sharding.use_abstract_mesh(mesh.update_axis_types(dict.fromkeys(mesh.explicit_axes, AxisType.Auto))):
        args, keywords = jax.tree.map(whole, (tuple(args), dict(keywords)))
        results = function(*args, **keywords)
    return jax.tree.map(lambda x: jax.sharding.reshard(x, NamedSharding(mesh, spec(x))), results)
