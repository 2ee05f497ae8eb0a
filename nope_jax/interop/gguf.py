"""Models in GGUF, llama.cpp's format, dequantised tensor by tensor by the `gguf` package."""

import functools
import hashlib
import math
from typing import Any

import numpy as np

from nope_jax.config import Config
from nope_jax.data.gguf import read_header
from nope_jax.data.gguf_tokenizer import adds_bos
from nope_jax.interop.families import GGUF_FAMILIES
from nope_jax.interop.families.family import GGUF
from nope_jax.interop.published import PublishedModel, default_config
from nope_jax.interop.settings import Settings
from nope_jax.interop.weights import Weight

_IGNORED = {"rope_freqs.weight"}  # read as a setting


class GGUFModel(PublishedModel):
    """A model in a GGUF file.

    Raises:
        ValueError: there is no such file, or it is not of a supported architecture.
    """

    def __init__(self, name: str):
        self._header = read_header(name)
        self.path = self._header.path
        kind = self._header.metadata.get("general.architecture")
        if not isinstance(kind, str) or kind not in GGUF_FAMILIES:
            raise ValueError(f"{name}: architecture {kind!r} is not supported, only {', '.join(GGUF_FAMILIES)}")
        if (parts := self._header.metadata.get("split.count", 0)) > 1:
            raise ValueError(f"{name} is one of {parts} parts: join them with llama-gguf-split --merge")
        self.family = GGUF_FAMILIES[kind]

    @property
    def _gguf(self) -> GGUF:
        assert self.family.gguf is not None
        return self.family.gguf

    @functools.cached_property
    def config(self) -> Config:
        start = f"{self._gguf.architecture}."
        own = {key.removeprefix(start): value for key, value in self._header.metadata.items() if key.startswith(start)}
        metadata = Settings(own, str(self.path))
        settings = Settings(self._gguf.settings(metadata, self._header), str(self.path))
        metadata.refuse_rest(frozenset())
        model = self.family.read(settings)
        return default_config(model, str(self.path), adds_bos(self._header))

    @functools.cached_property
    def identity(self) -> str:
        status = self.path.stat()
        shapes = {name: (info.shape, info.type) for name, info in self._header.tensors.items()}
        own = {key: value for key, value in self._header.metadata.items() if not key.startswith("tokenizer.")}
        return hashlib.sha256(repr((own, shapes, status.st_size, status.st_mtime_ns)).encode()).hexdigest()

    @property
    def _weights(self) -> tuple[Weight, ...]:
        return self._gguf.weights

    @property
    def _has_tokenizer(self) -> bool:
        return "tokenizer.ggml.model" in self._header.metadata

    def _tensors(self) -> dict[str, tuple[int, ...]]:
        package = _package(str(self.path))
        for name, info in self._header.tensors.items():
            kind = _kind(package, info.type)
            if kind not in _supported(package):
                raise ValueError(
                    f"{self.path}: {name} is quantised as {kind.name if kind else info.type}, which is not supported, "
                    f"only {', '.join(sorted(each.name for each in _supported(package)))}"
                )
            end = info.offset + self._bytes(name)
            if end > self._header.size:
                raise ValueError(
                    f"{self.path} is truncated: it has {self._header.size} bytes, and {name} ends at {end}"
                )
        return {name: info.shape for name, info in self._header.tensors.items() if name not in _IGNORED}

    def _bytes(self, name: str) -> int:
        info, package = self._header.tensors[name], _package(str(self.path))
        block, size = package.GGML_QUANT_SIZES[_kind(package, info.type)]
        return math.prod(info.shape) // block * size

    def _read(self, name: str) -> np.ndarray:
        info, package = self._header.tensors[name], _package(str(self.path))
        raw = np.fromfile(self.path, np.uint8, self._bytes(name), offset=info.offset)
        kind, shape = _kind(package, info.type), info.shape
        if kind == package.GGMLQuantizationType.F32:
            return raw.view(np.float32).reshape(shape)
        if kind == package.GGMLQuantizationType.F16:
            return raw.view(np.float16).reshape(shape)
        rows = raw.reshape(*shape[:-1], -1)
        return package.quants.dequantize(rows, kind).reshape(shape)


def _package(name: str) -> Any:
    try:
        import gguf
    except ModuleNotFoundError:
        raise ValueError(
            f"{name}: GGUF needs a package that is not installed: pip install 'nope_jax[interop]'"
        ) from None
    return gguf


def _kind(package: Any, number: int) -> Any:
    try:
        return package.GGMLQuantizationType(number)
    except ValueError:
        return None


@functools.cache
def _supported(package: Any) -> frozenset[Any]:
    """The quantisations that the package can undo."""
    kinds = package.GGMLQuantizationType
    return frozenset({kinds.F32, kinds.F16, kinds.BF16, *package.quants._type_traits})
