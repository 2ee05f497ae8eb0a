"""Tiny runs and documents for the tests of what looks inside a decoder, and eval.py called as from a shell."""

import importlib.util
import shlex
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
from flax import nnx

from nope_jax import ModelConfig
from nope_jax import config as configs
from nope_jax.checkpoint import Checkpointer
from nope_jax.cli import run
from nope_jax.config import Config, DataConfig, EvalConfig
from nope_jax.evaluation.common import evaluation
from tests.support.drawn_model import drawn_model


def write_documents(folder: Path, count: int = 60) -> Path:
    """Text files of 30 to some hundred letters."""
    (folder / "text").mkdir()
    for i in range(count):
        letters = np.random.default_rng(i).integers(97, 123, 30 + 4 * i).astype(np.uint8)
        (folder / "text" / f"{i}.txt").write_bytes(letters.tobytes())
    return folder / "text"


def write_run(folder: Path, name: str, *, seed: int = 0, **model) -> None:
    """A run as train.py leaves it, untrained."""
    config = Config(
        ModelConfig(**({"num_layers": 2, "num_heads": 2, "model_dim": 16, "mlp_dim": 16} | model)),
        DataConfig(source=f"text:{folder}/text", context_length=16),
        eval=EvalConfig(batch_size=4),
    )
    workdir = folder / name
    workdir.mkdir()
    configs.save(config, workdir)
    with Checkpointer(workdir) as checkpointer:
        checkpointer.save(0, {"params": nnx.state(drawn_model(config.model, seed))})


def copy_run(run: Path, workdir: Path, changes: dict | None = None) -> None:
    """A copy of a run, with other values for some fields of its config."""
    shutil.copytree(run, workdir)
    configs.save(configs.override(configs.load(workdir), changes or {}), workdir)


def call_eval(monkeypatch, words: str, pictures: bool = False) -> int:
    """The exit status of `python eval.py` with these words; without pictures, which take long, their files are empty.

    One test of each evaluation draws them.
    """
    path = Path(__file__).parents[2] / "eval.py"
    spec = importlib.util.spec_from_file_location("eval_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["eval.py", *shlex.split(words)])
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # run sets its own
    with monkeypatch.context() as patch:
        if not pictures:
            patch.setattr(evaluation, "save", lambda path, figure: path.touch())
        return run(module.main)
