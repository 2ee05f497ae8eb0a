"""The commands of the Makefiles, with a Python that only says what it was asked for."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKEFILES = [ROOT / "Makefile", ROOT / "benchmarks" / "study" / "Makefile"]

STUB = """#!/bin/sh
echo "asked for $*"
case "$*" in *"$BROKEN"*) echo "it broke" >&2; exit 2;; esac
echo "all done"
"""


@pytest.fixture
def make(tmp_path):
    """`make` in an environment whose Python is a stub that fails where its arguments have `broken` in them."""
    stub = tmp_path / "venv" / "bin" / "python"
    stub.parent.mkdir(parents=True)
    stub.write_text(STUB)
    stub.chmod(0o755)
    (stub.parent / ".installed").touch()

    def run(*arguments, broken="nothing at all"):
        return subprocess.run(
            ["make", *arguments, f"PYTHON={sys.executable}", f"VENV={tmp_path / 'venv'}", f"RUNS={tmp_path / 'runs'}"],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if name != "MAKEFLAGS"} | {"BROKEN": broken},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.mark.parametrize("path", MAKEFILES, ids=["Makefile", "study"])
def test_the_makefiles_need_no_make_newer_than_that_of_macos(path):
    """GNU make 3.81; what came later is silently something else there, or an error."""
    later = (
        r"--output-sync|--trace|\.ONESHELL|\.EXTRA_PREREQS|\$\((file|guile|let|intcmp) |!=|::=|&:|^(private|undefine) "
    )
    assert re.findall(later, path.read_text(), re.MULTILINE) == []


def test_the_demo_keeps_the_output_of_its_trainings_apart(make, tmp_path):
    done = make("demo")
    assert done.returncode == 0, done.stderr
    for name in ("nope", "rope", "alibi", "t5", "learned"):
        assert f"\n{name}: all done\n" in done.stdout
        log = (tmp_path / "runs" / f"{name}.log").read_text()
        assert re.fullmatch(f"asked for train.py .*--model.encoding {name}\nall done\n", log)
    assert "asked for eval.py --workdirs" in done.stdout


def test_a_training_that_fails_shows_why_and_ends_the_demo(make):
    failed = make("demo", broken="--model.encoding t5")
    assert failed.returncode != 0
    assert "it broke\nt5: failed\n" in failed.stdout
    assert "eval.py" not in failed.stdout


def test_a_training_that_fails_ends_the_study(make):
    failed = make("study", broken="--model.encoding t5")
    assert failed.returncode != 0
    assert "it broke\nt5: failed\n" in failed.stdout
