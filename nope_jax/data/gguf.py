"""The header of a GGUF file, llama.cpp's format of one model per file: metadata, and where each tensor lies.

Reads the header alone, and holds nothing of the file in memory after that. See
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import dataclasses
import functools
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in its file."""

    shape: tuple[int, ...]
    """In NumPy's order; GGUF writes it with the fastest axis first."""
    type: int
    """The number of its quantisation or dtype."""
    offset: int
    """Bytes from the start of the file."""


@dataclasses.dataclass(frozen=True)
class GGUFHeader:
    """Metadata by key, and tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    size: int
    """Bytes of the file."""


def read_header(path: str | os.PathLike[str]) -> GGUFHeader:
    """Read the header of a GGUF file.

    Raises:
        ValueError: there is no such file, it is not GGUF of version 2 or 3, or it ends within the header.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"{path}: there is no such GGUF file")
    status = path.stat()
    return _read_header(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _read_header(path: Path, size: int, _changed: int) -> GGUFHeader:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is not a GGUF file")
        try:
            (version,) = _unpack(file, "I")
            if version not in (2, 3):
                raise ValueError(f"{path}: GGUF version {version} is not supported, only 2 and 3")
            num_tensors, num_entries = _unpack(file, "QQ")
            metadata = {}
            for _ in range(num_entries):
                key = _string(file)
                metadata[key] = _value(file, *_unpack(file, "I"))
            tensors = {}
            for _ in range(num_tensors):
                name = _string(file)
                shape = _unpack(file, f"{_unpack(file, 'I')[0]}Q")
                tensors[name] = shape[::-1], *_unpack(file, "IQ")
        except (struct.error, MemoryError, OverflowError, UnicodeDecodeError, KeyError) as error:
            raise ValueError(f"{path} is truncated or damaged: its header cannot be read") from error
        alignment = metadata.get("general.alignment", 32)
        start = -(-file.tell() // alignment) * alignment
    infos = {name: TensorInfo(shape, kind, start + offset) for name, (shape, kind, offset) in tensors.items()}
    return GGUFHeader(path, metadata, infos, size)


def _unpack(file: BinaryIO, format: str) -> tuple:
    return struct.unpack(f"<{format}", file.read(struct.calcsize(f"<{format}")))


def _string(file: BinaryIO) -> str:
    (length,) = _unpack(file, "Q")
    text = file.read(length)
    if len(text) < length:
        raise struct.error
    return text.decode(errors="surrogateescape")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _unpack(file, _SCALARS[kind])[0]
    kind, length = _unpack(file, "IQ")
    if kind in _SCALARS:
        return list(_unpack(file, f"{length}{_SCALARS[kind]}"))
    return [_value(file, kind) for _ in range(length)]
