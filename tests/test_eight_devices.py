"""Tests that need eight devices of one CPU, in a process of their own: JAX counts its devices once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "tests/support").glob("*_on_eight_devices.py"))


def run_those(which: str) -> None:
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-m", "pytest", *map(str, FILES), "-p", "no:cacheprovider", "-m", which]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]


def test_eight_devices():
    run_those("not slow")


@pytest.mark.slow
def test_eight_devices_with_everything():
    run_those("slow")
