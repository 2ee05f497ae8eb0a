"""Placement of evaluation batches: windows spread over the devices, or one long window over all of them."""

import math
from collections.abc import Sequence

import jax
from flax import nnx
from jax.sharding import Mesh

from nope_jax.config import MeshConfig, ModelConfig
from nope_jax.models import Decoder
from nope_jax.sharding import make_mesh, state_shardings


def evaluation_mesh(
    config: ModelConfig, windows: int, length: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh for a batch of windows. It uses as many devices as possible; the data axis is preferred to the tensor
    axis, and the tensor axis to the sequence axis.

    Args:
        config: the model config, whose dimensions the mesh must divide.
        windows: rows of a batch.
        length: positions per window.
        devices: None: all devices.
    """
    devices = jax.devices() if devices is None else devices
    state = nnx.state(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    divisors = [n for n in range(1, len(devices) + 1) if len(devices) % n == 0]
    shapes = [
        (data, tensor, sequence)
        for data in divisors
        for tensor in divisors
        for sequence in divisors
        if windows % data == 0 and length % sequence == 0 and data * tensor * sequence <= len(devices)
    ]
    for data, tensor, sequence in sorted(shapes, key=lambda shape: (math.prod(shape), shape), reverse=True):
        shape = MeshConfig(data=data, tensor=tensor, sequence=sequence)
        mesh = make_mesh(shape, devices[: data * tensor * sequence])
        try:
            state_shardings(state, mesh)
        except ValueError:  # the mesh does not divide the model
            continue
        return mesh
    raise AssertionError("one device can read anything")


def on_mesh(model: Decoder, mesh: Mesh) -> Decoder:
    """Returns the model with its parameters sharded over a mesh."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.device_put(state, state_shardings(state, mesh)))


def over_devices(batch_size: int) -> tuple[Mesh, int]:
    """A mesh of all devices for the rows of a batch, and the batch size rounded up to a multiple of its data axis."""
    mesh = make_mesh(MeshConfig())
    return mesh, -(-batch_size // mesh.shape["data"]) * mesh.shape["data"]
