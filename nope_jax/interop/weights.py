"""The language of a family's table: one line for each published tensor, with its axes and its place in the decoder.

    Weight("model.layers.{}.self_attn.q_proj.weight", "(N H) D", "attention/query")
    Weight("transformer.h.{}.attn.c_attn.weight", "D (* H)", "attention/query", "attention/key", "attention/value")

Axes are named as everywhere: D model width, N query heads, K key/value heads, H head dim, F feed-forward, V vocabulary.
Those in parentheses are one axis of the published tensor, the first the slowest. `=` keeps the shape of the place.
`*` is the axis along which the tensors of several places lie one after the other: above, N query heads, then K key
heads, then K value heads; in "(K * H) D" each of the K groups has its N/K query heads, a key head and a value head.
`h c` in place of H are its pairs of dimensions for interleaved rotary embeddings, which become the two halves.

    Weight("decoder.block.{}.layer.2.DenseReluDense.wi_1.weight", "F D", "mlp/up", mlp="gated")

is the name in those models alone whose config has `mlp` gated: other fields of ModelConfig may stand there too.
"""

import copy
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

PLACES: Mapping[str, str] = {
    "embedding": "V D",
    "embedding_norm": "D",
    "embedding_norm_bias": "D",
    "norm": "D",
    "norm_bias": "D",
    "head": "D V",
    "head_bias": "V",
    "attention_norm": "D",
    "attention_norm_bias": "D",
    "attention_post_norm": "D",
    "attention_post_norm_bias": "D",
    "mlp_norm": "D",
    "mlp_norm_bias": "D",
    "mlp_post_norm": "D",
    "mlp_post_norm_bias": "D",
    "attention/query": "D N H",
    "attention/key": "D K H",
    "attention/value": "D K H",
    "attention/out": "N H D",
    "attention/query_bias": "N H",
    "attention/key_bias": "K H",
    "attention/value_bias": "K H",
    "attention/out_bias": "D",
    "mlp/gate": "D F",
    "mlp/up": "D F",
    "mlp/down": "F D",
    "mlp/gate_bias": "F",
    "mlp/up_bias": "F",
    "mlp/down_bias": "D",
}
"""The axes of the decoder's parameters, of one layer where they are stacked. Others are taken as they are (`=`)."""


@dataclasses.dataclass(frozen=True, init=False)
class Weight:
    """One published tensor, or one for each layer if its name has a {}, and the parameters of the decoder it holds."""

    name: str
    axes: str
    places: tuple[str, ...]
    only: tuple[tuple[str, tuple[str, ...]], ...]
    """Fields of ModelConfig, and the values that a model may have there for its tensor to go by this name."""

    plus: float
    """What the published tensor has been increased by; see `increased`."""

    def __init__(self, name: str, axes: str, *places: str, **only: str | tuple[str, ...]):
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "places", places)
        values = ((field, (value,) if isinstance(value, str) else value) for field, value in only.items())
        object.__setattr__(self, "only", tuple(values))
        object.__setattr__(self, "plus", 0.0)

    def increased(self, plus: float) -> "Weight":
        """The same line for a tensor that has been published increased by a number."""
        line = copy.copy(self)
        object.__setattr__(line, "plus", plus)
        return line

    @property
    def per_layer(self) -> bool:
        return "{}" in self.name

    def shape(self, sizes: Mapping[str, int], shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """The published shape, given the sizes of the axes and the shapes of its places."""
        if self.axes == "=":
            return tuple(shapes[0])
        known = self._sizes(sizes)
        known["*"] = sum(self._star(place, sizes) for place in self.places)
        return tuple(math.prod(known[letter] for letter in axis) for axis in self._published)

    def unpack(self, tensor: np.ndarray, sizes: Mapping[str, int]) -> list[np.ndarray]:
        """The parameter at each place, as views of the published tensor where NumPy can."""
        if self.plus:
            tensor = tensor - np.asarray(self.plus, tensor.dtype)
        if self.axes == "=":
            return [tensor]
        known = self._sizes(sizes)
        counts = [self._star(place, sizes) for place in self.places]
        letters = [letter for axis in self._published for letter in axis]
        known["*"] = sum(counts)
        tensor = tensor.reshape([known[letter] for letter in letters])
        parts = np.split(tensor, np.cumsum(counts)[:-1], letters.index("*")) if "*" in letters else [tensor]
        return [
            part.transpose([letters.index(letter) for axis in ours for letter in axis]).reshape(
                [math.prod(count if letter == "*" else known[letter] for letter in axis) for axis in ours]
            )
            for part, count, ours in zip(parts, counts, map(self._ours, self.places), strict=True)
        ]

    def pack(self, parameters: Sequence[np.ndarray], sizes: Mapping[str, int]) -> np.ndarray:
        """The published tensor, given the parameter at each place."""
        if self.plus:
            parameters = [parameter + np.asarray(self.plus, parameter.dtype) for parameter in parameters]
        if self.axes == "=":
            return parameters[0]
        known = self._sizes(sizes)
        letters = [letter for axis in self._published for letter in axis]
        parts = []
        for parameter, place in zip(parameters, self.places, strict=True):
            known["*"] = self._star(place, sizes)
            ours = [letter for axis in self._ours(place) for letter in axis]
            parts.append(
                parameter.reshape([known[letter] for letter in ours]).transpose([ours.index(x) for x in letters])
            )
        whole = np.concatenate(parts, letters.index("*")) if len(parts) > 1 else parts[0]
        known["*"] = sum(self._star(place, sizes) for place in self.places)
        return whole.reshape([math.prod(known[letter] for letter in axis) for axis in self._published])

    @property
    def _published(self) -> list[str]:
        return [axis.replace(" ", "") for axis in re.findall(r"(?<=\()[^)]*(?=\))|[^\s()]", self.axes)]

    @staticmethod
    def _sizes(sizes: Mapping[str, int]) -> dict[str, int]:
        return {**sizes, "c": 2, "h": sizes["H"] // 2}

    def _missing(self, place: str) -> str | None:
        """The axis of a place that `*` stands for, alone or within each of the K groups."""
        known = self.axes.replace("h c", "H")
        return next((axis for axis in PLACES[place].split() if axis not in known), None)

    def _star(self, place: str, sizes: Mapping[str, int]) -> int:
        """The length of `*` for a place."""
        axis = self._missing(place)
        if axis is None:
            return 1
        return sizes[axis] // (sizes["K"] if "K" in self.axes else 1)

    def _ours(self, place: str) -> list[str]:
        """The axes of a place, in the letters of the published tensor."""
        missing = self._missing(place)
        ours = []
        for axis in PLACES[place].split():
            if axis == "H" and "h" in self.axes:
                ours.append("ch")
            elif "*" in self.axes and axis == (missing or "K"):
                ours.append("K*" if "K" in self.axes else "*")
            else:
                ours.append(axis)
        return ours


def linear(name: str, axes: str, *places: str, **only: str | tuple[str, ...]) -> tuple[Weight, Weight]:
    """The weight and the bias of one layer of torch, whose outputs are the first axis."""
    outputs = re.match(r"\([^)]*\)|\S+", axes)
    assert outputs is not None
    biases = (f"{place}_bias" for place in places)
    return Weight(f"{name}.weight", axes, *places, **only), Weight(f"{name}.bias", outputs[0], *biases, **only)
