"""Workdirs as earlier versions of this package left them, each made by its own code out of the history of git.

    python tests/goldens/workdirs/make.py

A run of three steps, and in expected.json the losses of steps 4 and 5, to which the same version has continued it. The
documents are in the folder text beside them, relative to this one.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]

MADE_BY = {
    "first": ("1398f14", "nope"),
    "former-names": ("b7abe5d~1", "llama4_temperature"),
    "format-1": ("22094df", "nope"),
}
"""Workdirs: the commit, and the encoding by its name there."""

MAKE = """
import json, shutil, sys
from pathlib import Path

from nope_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from nope_jax.training import train

workdir, source, encoding = sys.argv[1:]

def run(steps):
    return Config(
        model=ModelConfig(num_layers=2, num_heads=1, model_dim=4, mlp_dim=4, tie_embeddings=True, encoding=encoding),
        data=DataConfig(source=source, context_length=8, batch_size=2),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
        train=TrainConfig(steps=steps, log_every=1, checkpoint_every=3, eval_every=3, eval_batches=1),
    )

train(run(3), workdir)
further = shutil.copytree(workdir, workdir + "-further")
train(run(5), further)
lines = map(json.loads, Path(further, "metrics.jsonl").read_text().splitlines())
losses = {line["step"]: line["loss"] for line in lines if "loss" in line and line["step"] > 3}
Path(workdir, "expected.json").write_text(json.dumps(losses) + "\\n")
"""


def make(name: str, commit: str, encoding: str) -> None:
    """Make a workdir with the code of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        checkout, workdir, text = (Path(folder, part) for part in ("checkout", "run", "text"))
        subprocess.run(["git", "worktree", "add", "--detach", checkout, commit], cwd=ROOT, check=True)
        try:
            shutil.copytree(FOLDER / "text", text)
            environment = os.environ | {"PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
            command = [sys.executable, "-c", MAKE, workdir, "text:text/*.txt", encoding]
            subprocess.run(command, cwd=folder, env=environment, check=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", checkout], cwd=ROOT, check=True)
        (workdir / "lock").unlink(missing_ok=True)
        for marker in workdir.rglob("commit_success.txt"):  # says where it was written, and is read by nobody
            marker.write_text(marker.read_text().replace(f"{workdir}/", ""))
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        shutil.copytree(workdir, FOLDER / name)


if __name__ == "__main__":
    for name, (commit, encoding) in MADE_BY.items():
        make(name, commit, encoding)
