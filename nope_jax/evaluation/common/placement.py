"""Which devices read what: a batch of windows over the devices there are, or one long window over all of them."""

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
    """A mesh for reading so many windows at once: over as many devices as can be, rather windows apart than heads, and
    rather heads than the positions of a window.

    Args:
        config: of the model, whose sizes the devices must divide.
        windows: rows of a batch.
        length: positions of each.
        devices: all there are, when None.
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
        except ValueError:  # they do not divide the model
            continue
        return mesh
    raise AssertionError("one device can read anything")


def on_mesh(model: Decoder, mesh: Mesh) -> Decoder:
    """The model with its parameters spread over a mesh."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.device_put(state, state_shardings(state, mesh)))


def over_devices(batch_size: int) -> tuple[Mesh, int]:
    """A mesh of all devices for the rows of a batch, and its size, rounded up to what divides over them."""
    mesh = make_mesh(MeshConfig())
    return mesh, -(-batch_size // mesh.shape["data"]) * mesh.shape["data"]
