"""What goes on inside a decoder, layer by layer: the residual stream and the attention weights.

Shapes: B batch, T length, N query heads, D model width.
"""

import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from nope_jax import config as configs
from nope_jax.config import Config
from nope_jax.evaluation.run import encoding_name, newest_step, run_names
from nope_jax.models import Decoder
from nope_jax.models.layers import rms_norm


class Inside(NamedTuple):
    """A decoder between two layers."""

    layer: int
    """How many layers have been passed: 0 is what enters the first."""
    stream: Shaped[Array, "B T D"]
    """The residual stream, before any norm."""
    weights: Float[Array, "B N T T"] | None
    """The attention weights of the layer just passed, where they were asked for: query by key, rows sum to 1."""


def walk(model: Decoder, tokens: Int[Array | np.ndarray, "B T"], *, weights: bool = False) -> Iterator[Inside]:
    """Runs a decoder one layer at a time, so that no more than one layer's inside exists at once.

    Args:
        model: the decoder.
        tokens: token ids, at positions 0..T-1.
        weights: whether to write out the attention weights, [B, N, T, T] of every layer.

    Raises:
        ValueError: tokens outside the vocabulary, or more than the encoding has positions.
    """
    model.check_tokens(tokens)
    x, arguments = _embed(*nnx.split(model), tokens)
    yield Inside(0, x, None)
    for index in range(model.config.num_layers):
        structure, state = nnx.split(model.layer(index))
        x, written = _pass_layer(structure, weights, state, x, arguments[index % len(arguments)])
        yield Inside(index + 1, x, written)


@functools.partial(jax.jit, static_argnums=0)
def _embed(structure: nnx.GraphDef, state: nnx.State, tokens: Int[Array, "B T"]) -> tuple:
    return nnx.merge(structure, state).embed(tokens)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pass_layer(
    structure: nnx.GraphDef, weights: bool, state: nnx.State, x: Shaped[Array, "B T D"], arguments
) -> tuple:
    block, (shared, keywords) = nnx.merge(structure, state), arguments
    written = None
    if weights:
        written = block.attention.weights(rms_norm(x, block.attention_norm[...]), shared, **keywords)
    return block(x, shared, **keywords)[0], written


class Subject(NamedTuple):
    """A run to look into."""

    workdir: Path
    name: str
    encoding: str
    config: Config
    train_length: int
    max_length: int | None
    """Positions that its encoding can take; None: any number."""

    def takes(self, length: int) -> bool:
        return self.max_length is None or length <= self.max_length


def find_subjects(workdirs: Sequence[Path], overrides: Mapping[str, Any]) -> list[Subject]:
    """The runs of workdirs, with other values for some data.* and eval.* fields; loads nothing large.

    Raises:
        ValueError: a workdir that holds no run, or no checkpoint yet; a tokenizer that is not the run's; or runs that
            would read documents of different sources, or in another order.
    """
    subjects = []
    for workdir, name in zip(workdirs, run_names(workdirs), strict=True):
        config = configs.override(configs.load(workdir), overrides)
        newest_step(workdir, config)
        train_length = config.model.train_length
        assert train_length is not None  # Config fills it in
        limit = _max_length(config)
        subjects.append(Subject(workdir, name, encoding_name(config.model.encoding), config, train_length, limit))
    for field in ("data.source", "eval.seed"):
        values = {subject.name: operator.attrgetter(field)(subject.config) for subject in subjects}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{name}: {value}" for name, value in values.items())
            raise ValueError(f"{field} differs between the runs ({listed}); give --{field} for all of them")
    return subjects


def _max_length(config: Config) -> int | None:
    return nnx.eval_shape(lambda: Decoder(config.model, rngs=nnx.Rngs(0))).max_length
