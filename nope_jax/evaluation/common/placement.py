"""Placement of evaluation batches: rows, heads and positions spread over all devices, and parameters sharded."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh

from nope_jax.config import MeshConfig, ModelConfig
from nope_jax.models import Decoder, abstract_decoder
from nope_jax.sharding import AXES, check_model_fits, make_mesh, num_row_shards, place_copy, state_shardings


class Placement(NamedTuple):
    """A mesh of all devices, and the rows of the batches computed on it."""

    mesh: Mesh
    rows: int
    """Rows per batch: those asked for, rounded up to a multiple of the devices that they are spread over."""

    def put(self, batch: Any) -> Any:
        """Puts a tree of arrays [B, T], which every process has, on the devices."""
        return place_copy(batch, self.mesh)


def place(models: Sequence[ModelConfig], rows: int, length: int = 1, asked: MeshConfig | None = None) -> Placement:
    """Decides where batches of some rows of `length` positions are computed, by models that share a mesh.

    Args:
        models: the models.
        rows: rows of a batch.
        length: positions of a row; 1 for decoding, which no sequence axis can speed up.
        asked: the mesh of the command line; None: `evaluation_mesh`.
    """
    mesh = evaluation_mesh(models, rows, length) if asked is None else make_mesh(asked)
    shards = num_row_shards(mesh)
    return Placement(mesh, -(-rows // shards) * shards)


def evaluation_mesh(
    models: Sequence[ModelConfig], rows: int, length: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of all devices that shards the parameters over all of them, as far as their sizes allow.

    Rows are spread over the fsdp axis; devices for which there are no rows share heads (tensor) and then positions
    (sequence). Parameters are gathered layer by layer where they are used, which costs little beside reading some
    thousand tokens per device with them. The data axis, along which parameters are copied, is the last resort.

    Args:
        models: configs of the models, whose dimensions the mesh must divide.
        rows: rows of a batch.
        length: positions per row.
        devices: None: all devices.
    """
    devices = jax.devices() if devices is None else devices
    states = [nnx.state(abstract_decoder(model)) for model in models]
    divisors = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]

    def cost(shape: tuple[int, ...]) -> tuple[int, ...]:
        data, fsdp, tensor, _ = shape
        computed = -(-rows // (data * fsdp)) * data * fsdp  # with padding
        return computed, data, -fsdp, -tensor

    shapes = (shape for shape in itertools.product(divisors, repeat=len(AXES)) if math.prod(shape) == len(devices))
    for shape in sorted(shapes, key=cost):
        data, fsdp, tensor, sequence = shape
        if length % sequence:
            continue
        try:
            for state in states:
                state_shardings(state, AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES)))
        except ValueError:  # the mesh does not divide the model
            continue
        return make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor, sequence=sequence), devices)
    raise AssertionError("the data axis alone divides any model")


def refuse_mesh(asked: MeshConfig | None, models: Sequence[ModelConfig], lengths: Sequence[int], option: str) -> None:
    """Rejects a mesh of the command line that does not fit the devices, a model or a length.

    Args:
        asked: the mesh; None: it will be chosen to fit.
        models: configs of the models.
        lengths: lengths of the rows.
        option: the option that set the lengths.

    Raises:
        ValueError: names the mesh axis, and the field or option that it must divide.
    """
    if asked is None:
        return
    mesh = make_mesh(asked)
    for model in models:
        check_model_fits(model, mesh)
    for length in lengths:
        if length % mesh.shape["sequence"]:
            raise ValueError(f"mesh.sequence {mesh.shape['sequence']} must divide {option} {length}")


def on_mesh(model: Decoder, mesh: Mesh) -> Decoder:
    """Returns the model with its parameters sharded over a mesh."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.device_put(state, state_shardings(state, mesh)))
