"""Trained models, wherever one is asked for: the workdir of a run, or a published model, `hf:...` or `gguf:...`."""

import abc
import dataclasses
import json
import os
import time
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from nope_jax import config as configs
from nope_jax.checkpoint import load_model
from nope_jax.config import Config, Step
from nope_jax.data.tokenizers import tokenizer_digest
from nope_jax.interop import Dtype, PublishedModel, published
from nope_jax.models import Decoder, abstract_decoder
from nope_jax.paths import check_reachable, is_published, location
from nope_jax.retention import find_step


class Trained(abc.ABC):
    """A trained model, of which only the config has been read."""

    config: Config
    """Of a published model: its shape, its tokenizer, and the length it was published for as `model.train_length`."""

    @abc.abstractmethod
    def find_step(self) -> int:
        """Step of the checkpoint that `load` would read now; 0 for a published model.

        Raises:
            ValueError: there is no such checkpoint.
        """

    @abc.abstractmethod
    def load(self, mesh: Mesh | None = None, dtype: Dtype | None = None) -> tuple[Decoder, int]:
        """Load the decoder, and return it with the step that was read.

        Args:
            mesh: Devices to shard the parameters over; None puts them all on the first device of this process.
            dtype: Of parameters and computation. None: float32 parameters, and the computation of the config.

        Raises:
            ValueError: it cannot be read.
        """

    @abc.abstractmethod
    def identity(self, step: int) -> str:
        """Identifies the weights of a step. If they are gone, an identity that never matches again."""

    @abc.abstractmethod
    def tokenizer_digest(self) -> str | None:
        """Digest of the tokenizer that it was trained with; None if that is unknown."""


def find_trained(spec: str | os.PathLike[str], step: Step = "newest", *, trust_code: bool = False) -> Trained:
    """Find a trained model and read its config.

    Args:
        spec: A workdir, or hf:NAME_OR_FOLDER or gguf:FILE (`nope_jax.interop.published`).
        step: The checkpoint of a run, as for `load_model`.
        trust_code: As `nope_jax.config.load`.

    Raises:
        ValueError: there is none, or it is not supported; or a step of a published model.
    """
    if not is_published(spec):
        return _Run(spec, step, trust_code)
    if step != "newest":
        raise ValueError(f"step {step} is a checkpoint of a run, but {os.fspath(spec)} is a published model")
    return _Published(published(os.fspath(spec)))


class _Run(Trained):
    """The workdir of a run."""

    def __init__(self, workdir: str | os.PathLike[str], step: Step, trust_code: bool):
        self._workdir, self._step = location(workdir), step
        check_reachable(self._workdir)
        self.config = configs.load(workdir, trust_code=trust_code)

    def find_step(self) -> int:
        return find_step(self._workdir, self._step)

    def load(self, mesh: Mesh | None = None, dtype: Dtype | None = None) -> tuple[Decoder, int]:
        _, model, step = load_model(self._workdir, mesh, step=self._step)
        return (model if dtype is None else _cast(model, dtype)), step

    def identity(self, step: int) -> str:
        folder = self._workdir / "checkpoints" / str(step)
        try:
            # A folder of a bucket has no time; that of the save is in this file.
            in_bucket = folder / "_CHECKPOINT_METADATA"
            saved = folder.stat().st_mtime_ns if isinstance(folder, Path) else in_bucket.read_text()
        except FileNotFoundError:
            saved = time.time_ns()
        return f"{step} {saved}"

    def tokenizer_digest(self) -> str | None:
        data = self._workdir / "data.json"  # written by train.py; absent from the workdirs of earlier versions
        return json.loads(data.read_text()).get("tokenizer") if data.exists() else None


class _Published(Trained):
    """A published model."""

    def __init__(self, model: PublishedModel):
        self._model, self.config = model, model.config

    def find_step(self) -> int:
        return 0

    def load(self, mesh: Mesh | None = None, dtype: Dtype | None = None) -> tuple[Decoder, int]:
        return self._model.load(mesh, dtype or "float32"), 0

    def identity(self, step: int) -> str:
        return self._model.identity

    def tokenizer_digest(self) -> str | None:
        return None if self._model.tokenizer is None else tokenizer_digest(self.config.data.tokenizer)


def _cast(model: Decoder, dtype: Dtype) -> Decoder:
    """The model with parameters and computation in another dtype."""
    config = dataclasses.replace(model.config, dtype=dtype)
    graphdef = nnx.graphdef(abstract_decoder(config))
    return nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(dtype), nnx.state(model)))
