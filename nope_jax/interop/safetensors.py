"""Files of tensors in the safetensors format: 8 bytes for the length of a JSON header, the header, the tensors.

Read and written here tensor by tensor, with nothing mapped into memory: the package of that name maps whole files, and
writes from a dict that holds all tensors at once. See https://github.com/huggingface/safetensors.
"""

import dataclasses
import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
"""Dtypes of weights; other ones are those of quantised models and of buffers."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in its file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""

    def read(self) -> np.ndarray:
        """Read the tensor; its dtype must be one of DTYPES."""
        dtype, count = DTYPES[self.dtype], math.prod(self.shape)
        return np.fromfile(self.file, dtype, count, offset=self.offset).reshape(self.shape)


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, without reading any.

    Raises:
        ValueError: the file is truncated or is not safetensors.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise ValueError(f"{file} is truncated or not safetensors: its header of {length} bytes is not there")
        try:
            header = json.loads(opened.read(length))
            header.pop("__metadata__", None)
            tensors = {
                name: (entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"]) for name, entry in header.items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is not safetensors: its header cannot be read") from error
    found = {}
    for name, (dtype, shape, begin, end) in tensors.items():
        if 8 + length + end > size:
            raise ValueError(f"{file} is truncated: it has {size} bytes, and {name} ends at {8 + length + end}")
        if dtype in DTYPES and end - begin != DTYPES[dtype].itemsize * math.prod(shape):
            raise ValueError(f"{file}: {name} has {end - begin} bytes, which is not {dtype} {list(shape)}")
        found[name] = Tensor(file, dtype, shape, 8 + length + begin)
    return found


def write_file(
    file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, tensors: Iterable[np.ndarray]
) -> None:
    """Write a file of tensors, given in the order of their names and shapes, holding one at a time."""
    name_of = {own: name for name, own in DTYPES.items()}[np.dtype(dtype)]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": name_of, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        for shape, tensor in zip(shapes.values(), tensors, strict=True):
            assert tensor.shape == shape
            opened.write(np.ascontiguousarray(tensor, dtype).reshape(-1).view(np.uint8).data)
