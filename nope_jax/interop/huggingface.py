"""Models of Hugging Face: folders with config.json, safetensors and tokenizer.json, and names on the hub.

A name is looked up in the local cache of huggingface_hub, then downloaded. Nothing is unpickled, and no code that comes
with a model is run.
"""

import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from nope_jax.config import Config
from nope_jax.interop.families import FAMILIES, REFUSED
from nope_jax.interop.parameters import published_tensors
from nope_jax.interop.published import PublishedModel, default_config
from nope_jax.interop.safetensors import DTYPES, Tensor, read_header
from nope_jax.interop.settings import Settings
from nope_jax.interop.weights import Weight

_SETTINGS_FILES = ["*.json", "tokenizer.model", "*.jinja"]
_WEIGHT_FILES = ["model*.safetensors"]
_WITHOUT_POSITIONS = "AntNLP/TinyLlama-NoPE-1.1B", "AntNLP/TinyLlama-NoPE-HeadScale8k", "starmpcc/NoPE_1.5B_FW_EDU_15T"
"""Llamas on the hub whose config.json need not say so, because their authors patch transformers' code instead."""

_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?")


class HuggingFaceModel(PublishedModel):
    """A model in a folder, or by its name on the hub.

    Args:
        name: A folder, or NAME or NAME@REVISION of a model on the hub.

    Raises:
        ValueError: there is no such model, or it is not of a supported family.
    """

    def __init__(self, name: str):
        self._name = name
        self.path = find_folder(name)
        file = self.path / "config.json"
        values = _read_json(file)
        if not isinstance(values, dict):
            raise ValueError(f"{file} is not the config.json of a model")
        if name.partition("@")[0] in _WITHOUT_POSITIONS:
            values.setdefault("nope", True)
        self._settings = values
        kind, classes = values.get("model_type"), values.get("architectures") or []
        if not isinstance(kind, str) or kind not in FAMILIES:
            reason = REFUSED.get(str(kind))
            instead = ", only" if reason is None else f": it has {reason}; supported are"
            raise ValueError(f"{file}: model_type {kind!r} is not supported{instead} {', '.join(FAMILIES)}")
        self.family = FAMILIES[kind]
        if classes and not {self.family.architecture, *self.family.former_architectures} & set(classes):
            raise ValueError(
                f"{file}: architectures {', '.join(map(str, classes))} is not supported for {kind}, only "
                f"{self.family.architecture}"
            )
        if quantised := values.get("quantization_config"):
            method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
            raise ValueError(f"{file}: quantization_config {method!r} is not supported, only float weights")

    @functools.cached_property
    def config(self) -> Config:
        settings = Settings(self._settings, str(self.path / "config.json"))
        model = self.family.read(settings)
        settings.refuse_rest()
        if self.family.told_by_tensors is not None:
            model = self.family.told_by_tensors(model, lambda: self._headers)
        return default_config(model, str(self.path), self._adds_bos())

    @functools.cached_property
    def identity(self) -> str:
        content = [json.dumps(self._settings, sort_keys=True)]
        for file in sorted(set(self._files().values())):
            status = file.stat()
            content.append(f"{file.name} {status.st_size} {status.st_mtime_ns}")
        return hashlib.sha256("\n".join(content).encode()).hexdigest()

    @property
    def _weights(self) -> tuple[Weight, ...]:
        return self.family.weights

    @property
    def _has_tokenizer(self) -> bool:
        return (self.path / "tokenizer.json").is_file() or (self.path / "tokenizer.model").is_file()

    def _adds_bos(self) -> bool:
        """Whether the tokenizer starts sequences with its beginning-of-sequence token."""
        if (self.path / "tokenizer.json").is_file():
            try:
                tokenizer = tokenizers.Tokenizer.from_file(str(self.path / "tokenizer.json"))
            except Exception as error:  # the library raises nothing more specific
                raise ValueError(f"{self.path / 'tokenizer.json'} is not a tokenizer.json: {error}") from error
            return len(tokenizer.encode("a").ids) > len(tokenizer.encode("a", add_special_tokens=False).ids)
        settings = self.path / "tokenizer_config.json"
        return settings.is_file() and bool(_read_json(settings).get("add_bos_token", False))

    def _files(self) -> dict[str, Path]:
        """The file of every tensor, or of all that are in one file under the name of that file."""
        self.path = find_folder(self._name, weights=True)
        index, single = self.path / "model.safetensors.index.json", self.path / "model.safetensors"
        if index.is_file():
            names = _read_json(index).get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(f, str) and "/" not in f for f in names.values()):
                raise ValueError(f"{index} has no weight_map from tensors to files beside it")
            for file in sorted(set(names.values())):
                if not (self.path / file).is_file():
                    raise ValueError(f"{index} names {file}, which is not there")
            return {name: self.path / file for name, file in names.items()}
        if single.is_file():
            return {single.name: single}
        pickled = next(iter(sorted(self.path.glob("*.bin")) + sorted(self.path.glob("*.pt"))), None)
        if pickled is not None:
            raise ValueError(
                f"{self.path} has no model.safetensors, only {pickled.name}, and pickles are not read: convert it to "
                "safetensors with transformers' save_pretrained"
            )
        raise ValueError(f"{self.path} has no model.safetensors")

    @functools.cached_property
    def _headers(self) -> dict[str, Tensor]:
        """The tensors of all files by the names of the family's table."""
        expected = {weight.name.format("0") for weight in self._weights}
        found = {}
        for file in sorted(set(self._files().values())):
            for name, tensor in read_header(file).items():
                whole = f"{self.family.prefix}{name}"
                found[whole if re.sub(r"\.\d+\.", ".0.", whole) in expected else name] = tensor
        return found

    @functools.cached_property
    def _found(self) -> dict[str, Tensor]:
        """The tensors of all files but those that hold nothing of this model."""
        needed = {tensor.name for tensor in published_tensors(self.config.model, self._weights)}
        found = {}
        for name, tensor in self._headers.items():
            if name not in needed and any(re.fullmatch(pattern, name) for pattern in self.family.ignored):
                continue
            if tensor.dtype not in DTYPES:
                raise ValueError(
                    f"{tensor.file}: {name} is {tensor.dtype}, which is not supported, only {', '.join(DTYPES)}"
                )
            found[name] = tensor
        return found

    def _tensors(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._found.items()}

    def _read(self, name: str) -> np.ndarray:
        return self._found[name].read()


def find_folder(name: str, *, weights: bool = False) -> Path:
    """The folder of a model: `name` itself, or the hub's, from the local cache or downloaded.

    Args:
        name: A folder, or NAME or NAME@REVISION of a model on the hub.
        weights: Whether the weights must be there, not only settings and tokenizer.

    Raises:
        ValueError: there is no such folder, and no such model can be had from the hub.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not _REPOSITORY.fullmatch(name) or name.startswith("."):
        raise ValueError(f"{name}: there is no such folder, and it is no name on the Hugging Face hub")
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise ValueError(
            f"{name} is no folder; to get it from the Hugging Face hub, pip install 'nope_jax[interop]'"
        ) from None
    repository, _, revision = name.partition("@")
    patterns = _SETTINGS_FILES + _WEIGHT_FILES * weights
    get = functools.partial(huggingface_hub.snapshot_download, repository, revision=revision or None)
    needed = "*.safetensors" if weights else "config.json"
    try:
        try:
            cached = Path(get(local_files_only=True))
        except huggingface_hub.errors.LocalEntryNotFoundError:
            return Path(get(allow_patterns=patterns))
        return cached if any(cached.glob(needed)) else Path(get(allow_patterns=patterns))
    except Exception as error:  # the network, the hub and credentials raise various exceptions
        reason = str(error).strip().partition("\n")[0][:200]
        raise ValueError(
            f"{name} is neither a folder nor in the local cache of the Hugging Face hub, and cannot be downloaded: "
            f"{type(error).__name__}: {reason}"
        ) from error


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file.parent} has no {file.name}") from None
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
