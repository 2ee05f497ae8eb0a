"""Attention over several devices: what can be seen without them. ring_on_eight_devices.py has the rest."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from nope_jax.attention import alibi_attention


@pytest.mark.parametrize(
    ("length", "axes", "goes_round"),
    [
        (16, ("data", "sequence"), True),
        (13, ("data", "sequence"), False),  # which the devices do not divide
        (16, ("model", "sequence"), False),  # a mesh of somebody else's
    ],
)
def test_what_goes_round_a_ring(length, axes, goes_round):
    array = jax.ShapeDtypeStruct((2, length, 2, 8), jnp.float32)
    mesh = AbstractMesh((2, 4), axes, axis_types=(AxisType.Auto,) * 2)
    with jax.sharding.use_abstract_mesh(mesh):
        program = str(jax.make_jaxpr(alibi_attention)(array, array, array))
    assert ("ppermute" in program) == goes_round
