"""Attention over several devices: what can be seen without them, and the tests that need eight of them."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from nope_jax.attention import alibi_attention

ROOT = Path(__file__).parents[2]
FILE = ROOT / "tests/support/ring_on_eight_devices.py"


def on_eight_devices(which: str) -> None:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/support/ring_on_eight_devices.py",
        "-p",
        "no:cacheprovider",
        "-m",
        which,
    ]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]


def test_eight_devices():
    on_eight_devices("not slow")


@pytest.mark.slow
def test_eight_devices_with_everything():
    on_eight_devices("slow")


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
