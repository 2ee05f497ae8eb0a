"""Sharding: the device mesh, and the table that maps an array's logical axes to mesh axes.

The model names the axes of its parameters and activations ("embed", "heads", "length", ...) without knowing the mesh;
only this module translates them. Parameters are created sharded and stay so (`state_shardings`). Activations are
constrained where it matters (`with_logical_constraint`), and parameters are gathered while a layer uses them
(`gathered`), which leaves the compiler nothing to guess.
"""

import difflib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from nope_jax.explicit_axes import call_with_auto_axes, explicit_mesh

if TYPE_CHECKING:
    from nope_jax.config import Config, MeshConfig, ModelConfig

AXES = ("data", "fsdp", "tensor", "sequence")

HOST_MEMORY = "pinned_host"
"""The kind of the host's memory that devices read and write by themselves."""

Rules = Mapping[str, str | tuple[str, ...] | None]

RULES: Rules = MappingProxyType(
    {
        "batch": ("data", "fsdp"),
        "length": "sequence",
        "vocab": "tensor",
        # Devices that share rows or sequences also share parameters; the width of activations is not sharded.
        "embed": ("fsdp", "sequence"),
        "heads": "tensor",
        "kv_heads": "tensor",
        "head": None,
        "mlp": "tensor",
        "layers": None,
    }
)
"""The mesh axes that shard each logical axis: of activations, gradients and optimizer moments always, and of parameters
under `mesh.rules fsdp`."""

PARAMETER_RULES: Mapping[str, Rules] = MappingProxyType(
    {"fsdp": RULES, "zero1": MappingProxyType({**RULES, "embed": None})}
)
"""The rules for parameters, by `mesh.rules`."""


def make_mesh(config: "MeshConfig", devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Create the mesh over `devices` (None: all) with the axes data, fsdp, tensor and sequence.

    One axis may be -1, to use the devices left by the others; data is 1 if another axis is -1. Over several slices
    (devices with fast links among them: a TPU slice, or the GPUs of a host), the first axes go over the slower network
    between slices: data, as far as its size allows, then fsdp, and so on.

    Raises:
        ValueError: the product of the axes is not the number of devices, or the axes do not divide over the slices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [getattr(config, axis) for axis in AXES]
    if shape.count(-1) > 1 and shape[0] == -1:
        shape[0] = 1
    if shape.count(-1) == 1:
        others = -math.prod(shape)
        shape[shape.index(-1)] = len(devices) // max(1, others)
    if min(shape) < 1 or math.prod(shape) != len(devices):
        asked = " x ".join(f"{axis} {getattr(config, axis)}" for axis in AXES)
        raise ValueError(f"mesh {asked} does not fit {len(devices)} device(s): the product must be their number")
    types = (AxisType.Auto,) * len(AXES)
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if num_slices > 1:
        between = _between_slices(shape, num_slices)
        within = [size // slices for size, slices in zip(shape, between, strict=True)]
        placed = mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
        return Mesh(placed, AXES, axis_types=types)
    try:
        return jax.make_mesh(tuple(shape), AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # an axis takes a part of one dimension of the slice
        placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(placed, AXES, axis_types=types)


def _between_slices(shape: Sequence[int], num_slices: int) -> list[int]:
    """Split a number of slices over the axes of a mesh, the first as far as they go."""
    between: list[int] = []
    for size in shape:
        between.append(math.gcd(size, num_slices // math.prod(between)))
    if math.prod(between) != num_slices:
        axes = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, shape, strict=True))
        raise ValueError(f"mesh {axes} does not divide over {num_slices} slices")
    return between


def partition_spec(names: Sequence[str | None], rules: Rules = RULES) -> PartitionSpec:
    """Return the mesh axes of an array with these logical axes; None is not sharded.

    Raises:
        ValueError: a name is not in the rules, or two of them claim the same mesh axis.
    """
    taken: dict[str, str | None] = {}
    spec = []
    for name in names:
        if name is not None and name not in rules:
            near = difflib.get_close_matches(name, rules, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown logical axis {name!r} (known: {', '.join(rules)}){hint}")
        axes = rules[name] if name is not None else None
        for axis in _several(axes):
            if axis in taken:
                raise ValueError(
                    f"logical axes {taken[axis]!r} and {name!r} of one array both map to mesh axis {axis!r}"
                )
            taken[axis] = name
        spec.append(axes)
    return PartitionSpec(*spec)


def _several(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()


# Activations


def with_logical_constraint(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """Constrain `x` to the sharding of its logical axes on the mesh in context; None is not sharded.

    Does nothing without a mesh, on a mesh with axes other than AXES (which belongs to other code), and for axes that
    are not Auto or do not divide `x`.

    Raises:
        ValueError: as `partition_spec`.
    """
    sizes = _auto_sizes()
    return jax.lax.with_sharding_constraint(x, _fitting(names, x.shape, sizes)) if sizes else x


def num_shards(name: str, size: int = 0) -> int:
    """Number of shards of a logical axis on the mesh in context; 1 if it does not divide the size."""
    devices = math.prod(_auto_sizes().get(axis, 1) for axis in _several(RULES[name]))
    return devices if size % devices == 0 else 1


def num_row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Number of shards of a batch's rows on a mesh."""
    return math.prod(mesh.shape[axis] for axis in _several(RULES["batch"]))


def _auto_sizes() -> dict[str, int]:
    mesh = jax.sharding.get_abstract_mesh()
    known = set(mesh.axis_names) <= set(AXES)
    return {axis: size for axis, size in mesh.shape.items() if axis in mesh.auto_axes and size > 1 and known}


def _fitting(names: Sequence[str | None], shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
    """The spec of these names, without axes that are not in `sizes` or do not divide the array."""
    spec: list[tuple[str, ...] | None] = []
    for size, axes in zip(shape, partition_spec(names), strict=True):
        axes = tuple(axis for axis in _several(axes) if axis in sizes)
        spec.append(axes if axes and size % math.prod(sizes[axis] for axis in axes) == 0 else None)
    return PartitionSpec(*spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gathered(parameter: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
    """Gather a parameter along the model's width, to compute with it.

    Its gradient is sharded as the parameter is: each device keeps the sum of its own shard.
    """
    return with_logical_constraint(parameter, [None if name == "embed" else name for name in names])


gathered.defvjp(
    lambda parameter, names: (gathered(parameter, names), None),
    lambda names, _, gradient: (with_logical_constraint(gradient, names),),
)

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_RESULTS = {2: ("batch", "length"), 3: ("batch", "length", None), 4: ("layers", "batch", "heads", "length")}
"""Logical axes of results by rank: per position, with features, and statistics."""


def auto_axes(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Make a function work on meshes with Explicit axes (the default of `jax.make_mesh`) by using Auto axes inside.

    Inputs may have any sharding. Results [B, T], [B, T, D] and [L, B, N, T] are sharded over rows, positions and heads;
    others are replicated.
    """

    @functools.wraps(function)
    def wrapped(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        context = jax.sharding.get_abstract_mesh()
        mesh = context if context.explicit_axes else explicit_mesh(*jax.tree.leaves((args, kwargs)))
        if mesh is None:
            return function(*args, **kwargs)
        sizes = {axis: mesh.shape[axis] for axis in mesh.explicit_axes}

        def spec(x: jax.Array) -> PartitionSpec:
            return _fitting(_RESULTS.get(x.ndim, (None,) * x.ndim), x.shape, sizes)

        return call_with_auto_axes(mesh, function, args, kwargs, spec, move=jax.Array | np.ndarray)

    return wrapped


# The state and its batches


def check_fits(config: "Config", mesh: Mesh | AbstractMesh) -> None:
    """Check that a model and a batch divide evenly over a mesh, and that its devices have the memory asked for.

    Raises:
        ValueError: names the mesh axes and the field that they must divide, or the field and the memory.
    """
    check_model_fits(config.model, mesh)
    if config.model.remat == "offload" and isinstance(mesh, Mesh):
        device = mesh.devices.flat[0]
        if HOST_MEMORY not in {memory.kind for memory in device.addressable_memories()}:
            raise ValueError(
                f"model.remat offload needs devices with memory of the kind {HOST_MEMORY}, which {device.device_kind} "
                "has not; full keeps least on the device"
            )
    data = config.data
    _check_divides(mesh, "length", "data.context_length", data.context_length)
    _check_divides(
        mesh, "batch", "data.batch_size", data.batch_size, {"optimizer.accumulation": config.optimizer.accumulation}
    )


def check_model_fits(model: "ModelConfig", mesh: Mesh | AbstractMesh) -> None:
    """Check that a model divides evenly over a mesh.

    Raises:
        ValueError: names the mesh axes and the field that they must divide.
    """
    fields = {
        "num_heads": (model.num_heads, "heads"),
        "num_kv_heads": (model.num_kv_heads or model.num_heads, "kv_heads"),
        "mlp_dim": (model.mlp_size, "mlp"),
        "vocab_size": (model.num_tokens, "vocab"),
        "model_dim": (model.model_dim, "embed"),
    }
    for field, (size, name) in fields.items():
        _check_divides(mesh, name, f"model.{field}", size)


def _check_divides(
    mesh: Mesh | AbstractMesh, name: str, field: str, size: int, others: Mapping[str, int] = MappingProxyType({})
) -> None:
    """Check that the shards of a logical axis, times `others`, divide the size of a field."""
    num_shards = {f"mesh.{axis}": mesh.shape[axis] for axis in _several(RULES[name])} | dict(others)
    if size % math.prod(num_shards.values()):
        split = " x ".join(f"{way} {n}" for way, n in num_shards.items() if n > 1)
        raise ValueError(f"{split} must divide {field} {size}")


def _sharding(
    mesh: Mesh | AbstractMesh, names: Sequence[str | None], shape: Sequence[int], what: str, rules: Rules
) -> NamedSharding:
    if len(names) != len(shape):
        raise ValueError(f"{what} has {len(shape)} axes but {len(names)} names: {tuple(names)}")
    sharding = NamedSharding(mesh, partition_spec(names, rules))
    for name, size, axes in zip(names, shape, sharding.spec, strict=True):
        if size % math.prod(mesh.shape[axis] for axis in _several(axes)):
            split = " x ".join(f"mesh.{axis} {mesh.shape[axis]}" for axis in _several(axes))
            raise ValueError(f"{what}: its {name} axis of {size} does not divide over {split}")
    return sharding


def state_shardings(state: Any, mesh: Mesh | AbstractMesh, rules: Rules = RULES) -> Any:
    """Return the sharding of every array in a tree: by logical axes for an `nnx.Variable`, otherwise replicated.

    Args:
        state: Parameters or optimizer state, abstract or concrete. A variable names its axes in its metadata `axes`.
        mesh: The mesh.
        rules: The rules; for parameters, one of PARAMETER_RULES.

    Returns:
        The same tree with a `NamedSharding` in place of each array.
    """

    def shardings(path: tuple, node: Any) -> Any:
        names = node.get_metadata("axes", None) if isinstance(node, nnx.Variable) else None
        if not names:
            return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), node)
        what = jax.tree_util.keystr(path, simple=True, separator=".")
        return jax.tree.map(lambda array: _sharding(mesh, names, array.shape, what, rules), node)

    return jax.tree_util.tree_map_with_path(shardings, state, is_leaf=lambda node: isinstance(node, nnx.Variable))


def abstract_on_mesh(abstract: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Add the shardings of `state_shardings` to `abstract`, a tree of `jax.ShapeDtypeStruct`."""
    return jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding),
        abstract,
        state_shardings(abstract, mesh, rules),
    )


def process_share(mesh: Mesh) -> tuple[int, int]:
    """Return which of how many equal shares of a batch's rows this process reads.

    Processes that differ only along mesh axes other than those of the batch hold the same rows and read the same share.

    Raises:
        ValueError: the rows of two processes overlap without being the same.
    """
    rows = NamedSharding(mesh, partition_spec(["batch"]))
    held: dict[int, set[int]] = {}
    for device, (index,) in rows.devices_indices_map((mesh.size,)).items():
        process = device.process_index  # type: ignore[attr-defined]
        held.setdefault(process, set()).update(range(*index.indices(mesh.size)))
    shares = sorted({tuple(sorted(share)) for share in held.values()})
    if len(shares) * len(shares[0]) != mesh.size or len(set().union(*shares)) != mesh.size:
        raise ValueError(
            f"mesh.data {mesh.shape['data']} x mesh.fsdp {mesh.shape['fsdp']} does not divide over the devices of "
            f"{len(held)} processes: let each have a whole number of them, or let it divide the processes"
        )
    return shares.index(tuple(sorted(held[jax.process_index()]))), len(shares)


def place_batch(batch: Any, mesh: Mesh) -> Any:
    """Turn this process's share of a batch, a tree of arrays [B, T], into global arrays sharded over the mesh.

    Raises:
        ValueError: the rows or the positions do not divide over their mesh axes.
    """
    _, shares = process_share(mesh)

    def place(array: Any) -> jax.Array:
        shape = (array.shape[0] * shares, *array.shape[1:])
        sharding = _sharding(mesh, ("batch", "length"), shape, "the batch", RULES)
        return jax.make_array_from_process_local_data(sharding, array, shape)

    return jax.tree.map(place, batch)


def place_copy(batch: Any, mesh: Mesh) -> Any:
    """Turn a tree of arrays [B, T], which every process has whole, into global arrays sharded over the mesh.

    An axis whose size does not divide over its devices is replicated.
    """

    def place(array: Any) -> jax.Array:
        sharding = NamedSharding(mesh, _fitting(("batch", "length"), array.shape, mesh.shape))
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, batch)


def to_host(array: jax.Array | np.ndarray) -> np.ndarray:
    """Return an array as NumPy's. All processes that hold a part of it must call this, and all get the whole."""
    if isinstance(array, np.ndarray) or array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
