"""The tuning methods: the encoding that each of them gives to a run.

Factors of the attention logits follow Wang et al. 2024 (arXiv 2404.12224): one for all heads (`UniformScale`), or one
per layer and head (`HeadScale`, `SSMax`). The other methods scale RoPE.

Shapes: L layers, N query heads.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float

from nope_jax.config import Config, EncodingSpec, ModelConfig
from nope_jax.encodings import (
    DynamicNTKScaling,
    Encoding,
    HeadScale,
    LinearScaling,
    LogN,
    NTKScaling,
    RoPE,
    RotaryScaling,
    SSMax,
    UniformScale,
    Wrapper,
    YaRNScaling,
    resolve,
)
from nope_jax.errors import is_refusal
from nope_jax.evaluation.common.runs import encoding_name
from nope_jax.evaluation.registry import EVALUATIONS
from nope_jax.models import Decoder, abstract_decoder, transfer_weights
from nope_jax.sharding import state_shardings

LEARNED = {"head": "head_scale", "ssmax": "ssmax"}
"""The methods that learn a factor per layer and head, and the name of the layer parameter that holds the factors."""


def refuse_method(config: ModelConfig, method: str) -> None:
    """Traces the tuned model without computing it, and rejects the method if the encoding rejects the model."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    try:
        graphdef, state = nnx.split(abstract_decoder(config))
        jax.eval_shape(lambda state, tokens: nnx.merge(graphdef, state).hidden(tokens)[0], state, tokens)
    except ValueError as error:
        if not is_refusal(error):
            raise
        raise ValueError(f"--method {method}: {error}") from error


def new_encoding(config: Config, method: str, lengths: Sequence[int], factor: float = 1.0) -> EncodingSpec:
    """The encoding of the tuned run, with as many layers per period as before.

    Args:
        config: config of the run.
        method: the tuning method.
        lengths: target lengths, ascending.
        factor: factor of `UniformScale`.

    Raises:
        ValueError: there is no RoPE to scale, the target does not exceed the training length, or a layer already has
            this wrapper.
    """
    encodings, train_length = resolve(config.model.encoding), config.model.train_length
    assert train_length is not None  # Config fills it in
    if method in ("log-n", "ssmax") and train_length < 2:
        raise ValueError(f"--method {method} needs a run whose model.train_length is at least 2, not {train_length}")
    wrappers: dict[str, tuple[type[Wrapper], dict[str, Any]]] = {
        "uniform": (UniformScale, {"factor": factor}),
        "head": (HeadScale, {}),
        "log-n": (LogN, {"length": train_length}),
        "ssmax": (SSMax, {"start": 1 / math.log(max(2, train_length))}),
    }
    if method in wrappers:
        wrapper, settings = wrappers[method]
        for encoding in encodings:
            if any(isinstance(inner, wrapper) for inner in _nested(encoding)):
                raise ValueError(
                    f"--method {method}: the run has {wrapper.__name__} already, which cannot wrap itself; tune "
                    "the run that it came from"
                )
        changed: tuple[Encoding, ...] = tuple(wrapper(encoding, **settings) for encoding in encodings)
    else:
        if lengths[-1] <= train_length:
            raise ValueError(
                f"--method {method} stretches RoPE to the longest of --lengths, which must be above the training "
                f"length {train_length}, not {lengths[-1]}"
            )
        scaling = _scaling(method, lengths[-1] / train_length, train_length)
        changed = tuple(_scaled(encoding, scaling, method) for encoding in encodings)
        if changed == encodings:
            raise ValueError(
                f"--method {method} scales RoPE, but no layer of the run has it: its encoding is "
                f"{encoding_name(config.model.encoding)}"
            )
    return changed if len(changed) > 1 else changed[0]


def _nested(encoding: Encoding) -> Iterator[Encoding]:
    """Yields an encoding and the encodings nested in it, outermost first."""
    yield encoding
    if isinstance(encoding, Wrapper):
        yield from _nested(encoding.encoding)


def _scaling(method: str, factor: float, train_length: int) -> RotaryScaling:
    match method:
        case "linear":
            return LinearScaling(factor)
        case "ntk":
            return NTKScaling(factor)
        case "dynamic":
            return DynamicNTKScaling(1.0, original_length=train_length)  # grows as n/L, whatever the longest length
        case "yarn":
            return YaRNScaling(factor, original_length=train_length)
    raise ValueError(f"--method {method} is none of {', '.join(EVALUATIONS['tune'].methods)}")


def _scaled(encoding: Encoding, scaling: RotaryScaling, method: str) -> Encoding:
    """The encoding with its RoPE scaled, at any nesting depth; unchanged if it has none."""
    if isinstance(encoding, RoPE):
        if encoding.scaling is not None:
            raise ValueError(
                f"--method {method}: the RoPE of the run has {type(encoding.scaling).__name__} already; tune the run "
                "that it came from"
            )
        return dataclasses.replace(encoding, scaling=scaling)
    if isinstance(encoding, Wrapper):
        return dataclasses.replace(encoding, encoding=_scaled(encoding.encoding, scaling, method))
    return encoding


def with_encoding(
    config: ModelConfig,
    encoding: EncodingSpec,
    source: Decoder,
    mesh: Mesh,
    factors: Mapping[str, Float[np.ndarray, "L N"]],
) -> Decoder:
    """The source with another encoding and the same weights; `factors` are the learned factors by parameter name."""
    model = abstract_decoder(dataclasses.replace(config, encoding=encoding))
    transfer_weights(model, source)
    for slot, block in enumerate(model.blocks):
        position = block.attention.position
        for name, values in factors.items():
            rows = np.asarray(values, np.float32)[slot :: len(model.blocks)]
            position[name] = position[name].replace(jnp.asarray(rows))
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(jax.device_put, state, state_shardings(state, mesh)))
