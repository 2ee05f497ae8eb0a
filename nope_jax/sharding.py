"""Where arrays live: the device mesh, and the one table from an array's logical axes to the axes of the mesh.

The model names the axes of its parameters ("embed", "heads", ...) and knows no mesh; this module alone translates.
"""

import difflib
import math
from collections.abc import Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

if TYPE_CHECKING:
    from nope_jax.config import MeshConfig

AXES = ("data", "fsdp", "tensor", "sequence")

RULES = MappingProxyType(
    {
        "batch": ("data", "fsdp"),
        "length": "sequence",
        "vocab": "tensor",
        "embed": "fsdp",
        "heads": "tensor",
        "kv_heads": "tensor",
        "head": None,
        "mlp": "tensor",
        "layers": None,
    }
)


def make_mesh(config: "MeshConfig", devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (all there are, when None) with the axes data, fsdp, tensor and sequence.

    Raises:
        ValueError: the product of the axes, of which one may be -1 for what the others leave, is not that number.
    """
    devices = jax.devices() if devices is None else devices
    shape = [getattr(config, axis) for axis in AXES]
    if shape.count(-1) == 1:
        others = -math.prod(shape)
        shape[shape.index(-1)] = len(devices) // max(1, others)
    if min(shape) < 1 or math.prod(shape) != len(devices):
        asked = " x ".join(f"{axis} {getattr(config, axis)}" for axis in AXES)
        raise ValueError(f"mesh {asked} does not fit {len(devices)} device(s): the product must be their number")
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def partition_spec(names: Sequence[str | None]) -> PartitionSpec:
    """The mesh axes of an array whose axes have these logical names, None being replicated.

    Raises:
        ValueError: a name is not in RULES, or two of them claim the same mesh axis.
    """
    taken: dict[str, str | None] = {}
    spec = []
    for name in names:
        if name is not None and name not in RULES:
            near = difflib.get_close_matches(name, RULES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown logical axis {name!r} (known: {', '.join(RULES)}){hint}")
        axes = RULES[name] if name is not None else None
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            if axis in taken:
                raise ValueError(
                    f"logical axes {taken[axis]!r} and {name!r} of one array both map to mesh axis {axis!r}"
                )
            taken[axis] = name
        spec.append(axes)
    return PartitionSpec(*spec)


def _sharding(mesh: Mesh, names: Sequence[str | None], shape: Sequence[int], what: str) -> NamedSharding:
    if len(names) != len(shape):
        raise ValueError(f"{what} has {len(shape)} axes but {len(names)} names: {tuple(names)}")
    sharding = NamedSharding(mesh, partition_spec(names))
    for name, size, axes in zip(names, shape, sharding.spec, strict=True):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        ways = math.prod(mesh.shape[axis] for axis in axes)
        if size % ways:
            split = " x ".join(f"mesh.{axis} {mesh.shape[axis]}" for axis in axes)
            raise ValueError(f"{what}: its {name} axis of {size} does not divide over {split}")
    return sharding


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """The sharding of every array in a tree: an `nnx.Variable` by its logical names, anything else replicated.

    Args:
        state: parameters or optimizer state, abstract or concrete. A variable names its axes in its metadata `axes`.

    Returns:
        The same tree with a `NamedSharding` in place of each array.
    """

    def shardings(path: tuple, node: Any) -> Any:
        names = node.get_metadata("axes", None) if isinstance(node, nnx.Variable) else None
        if not names:
            return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), node)
        what = jax.tree_util.keystr(path, simple=True, separator=".")
        return jax.tree.map(lambda array: _sharding(mesh, names, array.shape, what), node)

    return jax.tree_util.tree_map_with_path(shardings, state, is_leaf=lambda node: isinstance(node, nnx.Variable))


def abstract_on_mesh(abstract: Any, mesh: Mesh) -> Any:
    """`abstract` (a tree of `jax.ShapeDtypeStruct`) with the sharding of each array on `mesh`."""
    return jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
        abstract,
        state_shardings(abstract, mesh),
    )


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's rows of a batch, a tree of arrays [B, T], as global arrays spread over the mesh.

    Raises:
        ValueError: the rows or the positions do not divide over their mesh axes.
    """

    def place(array: Any) -> jax.Array:
        shape = (array.shape[0] * jax.process_count(), *array.shape[1:])
        sharding = _sharding(mesh, ("batch", "length"), shape, "the batch")
        return jax.make_array_from_process_local_data(sharding, array, shape)

    return jax.tree.map(place, batch)
