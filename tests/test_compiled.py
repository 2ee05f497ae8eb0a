"""Compiled programs are kept between processes, and a broken one is compiled and written again."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from nope_jax import compiled

ROOT = Path(__file__).parents[1]
SCRIPT = """
import jax, os, pathlib, sys
from nope_jax.cli import run

def command():
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    events = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    program = jax.jit(lambda x: x + 1)

    def reads():
        jax.clear_caches()
        del events[:]
        program(1.0)
        return "/jax/compilation_cache/cache_hits" in events

    print(reads(), reads())
    (entry,) = pathlib.Path(os.environ["XDG_CACHE_HOME"]).glob("nope_jax/*/jit__lambda*-cache")
    entry.write_bytes(entry.read_bytes()[:100])
    print(reads(), reads())

sys.exit(run(command))
"""


def test_what_was_compiled_is_read_and_what_is_broken_is_written_again(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("False True\nFalse True\n", "")


@pytest.mark.parametrize(
    ("variables", "before", "after"),
    [
        ({}, None, "{home}/.cache/nope_jax/{cpu}"),
        ({"XDG_CACHE_HOME": "{home}/kept"}, None, "{home}/kept/nope_jax/{cpu}"),
        ({"XDG_CACHE_HOME": "{home}/file"}, None, None),  # cannot be made
        ({"JAX_COMPILATION_CACHE_DIR": ""}, None, None),
        ({}, "/somewhere", "/somewhere"),
    ],
)
def test_the_folder(tmp_path, monkeypatch, variables, before, after):
    (tmp_path / "file").write_text("")
    names = {"home": str(tmp_path), "cpu": compiled._cpu()}
    for name in ("XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "{home}", **variables}.items():
        monkeypatch.setenv(name, value.format(**names))
    config = types.SimpleNamespace(jax_compilation_cache_dir=before)
    config.update = lambda name, value: setattr(config, name, value)
    monkeypatch.setattr(compiled, "jax", types.SimpleNamespace(config=config))
    compiled.keep_compiled()
    assert config.jax_compilation_cache_dir == (after and after.format(**names))
