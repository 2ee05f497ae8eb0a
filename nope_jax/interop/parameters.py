"""Between a family's table and the parameters of a decoder, one published tensor at a time.

The layers at one place in the encodings' period are stacked: layer i is row i // period of `blocks/<i % period>`.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jax.typing import ArrayLike

from nope_jax.config import ModelConfig
from nope_jax.encodings import resolve
from nope_jax.interop.rotary import head_dim
from nope_jax.interop.weights import Weight
from nope_jax.models import Decoder, abstract_decoder
from nope_jax.models.layers import row_of
from nope_jax.sharding import abstract_on_mesh, to_host

Path = tuple[Any, ...]


class Slice(NamedTuple):
    """A parameter of the decoder, or the row of one layer in it."""

    path: Path
    row: int | None


class Published(NamedTuple):
    """One published tensor and what it holds."""

    name: str
    weight: Weight
    shape: tuple[int, ...]
    slices: tuple[Slice, ...]
    """One for each place of the weight."""


def abstract_parameters(config: ModelConfig) -> tuple[Any, dict[Path, Any]]:
    """The structure of a decoder, and its parameters by path as variables of `jax.ShapeDtypeStruct`."""
    structure, state = nnx.split(abstract_decoder(config))
    return structure, dict(nnx.to_flat_state(state))


def sizes(config: ModelConfig) -> dict[str, int]:
    """The size of each axis by its letter."""
    return {
        "D": config.model_dim,
        "N": config.num_heads,
        "K": config.num_kv_heads or config.num_heads,
        "H": head_dim(config),
        "F": config.mlp_size,
        "V": config.num_tokens,
    }


def published_tensors(config: ModelConfig, weights: tuple[Weight, ...]) -> list[Published]:
    """The published tensors of a model by its family's table: those of which the decoder has the parameters.

    Raises:
        ValueError: the table has no line for a parameter, so the family cannot hold this model.
    """
    _, parameters = abstract_parameters(config)
    period, found = len(resolve(config.encoding)), []
    held: set[Path] = set()
    for weight in weights:
        if any(getattr(config, field) not in values for field, values in weight.only):
            continue
        for layer in range(config.num_layers) if weight.per_layer else [None]:
            slices = tuple(_slice(place, layer, period) for place in weight.places)
            paths = [part.path for part in slices]
            if not all(path in parameters for path in paths):
                continue
            held.update(paths)
            shapes = [parameters[path].shape[0 if layer is None else 1 :] for path in paths]
            shape = weight.shape(sizes(config), shapes)
            found.append(Published(weight.name.format(layer), weight, shape, slices))
    if absent := sorted("/".join(map(str, path)) for path in parameters.keys() - held):
        raise ValueError(f"has no tensor for {', '.join(absent[:4])}")
    return found


def _slice(place: str, layer: int | None, period: int) -> Slice:
    names = tuple(int(name) if name.isdigit() else name for name in place.split("/"))
    return Slice(names, None) if layer is None else Slice(("blocks", layer % period, *names), layer // period)


def fill(
    config: ModelConfig,
    tensors: list[Published],
    read: Callable[[str], np.ndarray],
    mesh: Mesh | None,
) -> Decoder:
    """A decoder with published weights, read one at a time straight onto the devices.

    Stacked parameters are filled layer by layer in place, so that neither host nor devices ever hold the model twice.

    Args:
        config: The decoder's; parameters get its dtype, but those of encodings stay in float32.
        tensors: As `published_tensors`.
        read: Returns a published tensor by its name.
        mesh: Devices to shard the parameters over; None puts them all on the first device of this process.
    """
    structure, parameters = abstract_parameters(config)
    shardings = _shardings(parameters, mesh)
    axes, filled = sizes(config), {}
    for tensor in tensors:
        views = tensor.weight.unpack(read(tensor.name), axes)
        for (path, row), view in zip(tensor.slices, views, strict=True):
            dtype = jnp.float32 if _of_encoding(path) else jnp.dtype(config.dtype)
            sharding = shardings[path]
            if row is None:
                filled[path] = _place(view, dtype, sharding)
                continue
            if path not in filled:
                filled[path] = _compiled_zeros(parameters[path].shape, dtype, sharding)()
            filled[path] = _set_row(filled[path], _place(view, dtype, _of_row(sharding)), np.int32(row))
        jax.block_until_ready([filled[path] for path, _ in tensor.slices])  # bounds what is under way
        del views
    state = {path: variable.replace(filled[path]) for path, variable in parameters.items()}
    return nnx.merge(structure, nnx.from_flat_state(state))


def published_values(
    model: Decoder, tensors: list[Published], factors: Mapping[Slice, np.ndarray]
) -> Iterator[np.ndarray]:
    """The published tensors of a decoder, one at a time on the host; `factors` multiply a parameter's last axes."""
    parameters, axes = dict(nnx.to_flat_state(nnx.state(model))), sizes(model.config)
    for tensor in tensors:
        values = []
        for part in tensor.slices:
            array = parameters[part.path][...]
            value = to_host(array if part.row is None else row_of(array, np.int32(part.row)))
            values.append((value * factors[part]).astype(value.dtype) if part in factors else value)
        yield tensor.weight.pack(values, axes)


def _of_encoding(path: Path) -> bool:
    return path[0] == "positions" or "position" in path


def _shardings(parameters: dict[Path, Any], mesh: Mesh | None) -> dict[Path, Sharding]:
    if mesh is None:
        return dict.fromkeys(parameters, SingleDeviceSharding(jax.local_devices()[0]))
    placed = abstract_on_mesh(nnx.from_flat_state(parameters), mesh)
    return {path: variable.sharding for path, variable in nnx.to_flat_state(placed)}


def _of_row(sharding: Sharding) -> Sharding:
    """The sharding of one layer of a stacked parameter."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def _place(view: np.ndarray, dtype: Any, sharding: Sharding) -> jax.Array:
    """An array on the devices, of which each gets its own part, converted."""
    return jax.make_array_from_callback(
        view.shape, sharding, lambda index: np.asarray(view[index]).astype(dtype, order="C")
    )


@functools.lru_cache(maxsize=256)
def _compiled_zeros(shape: tuple[int, ...], dtype: Any, sharding: Sharding) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.partial(jax.jit, donate_argnums=0)
def _set_row(stack: jax.Array, row: jax.Array, index: ArrayLike) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, row, index, 0)
