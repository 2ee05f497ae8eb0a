"""Attention sinks: a logit per head in the denominator of the softmax, so that a head can attend to nothing.

N query heads.
"""

import dataclasses

import jax.numpy as jnp

from nope_jax.encodings.checks import finite
from nope_jax.encodings.encoding import ModelDims, Params
from nope_jax.encodings.wrapper import Wrapper


@dataclasses.dataclass(frozen=True)
class AttentionSink(Wrapper):
    """e^s_j / (e^sink_h + Σ e^s): softmax with one more logit, learned per layer and head, that has no value.

    As in gpt-oss (OpenAI 2025, arXiv 2508.10925); with a sink of 0 this is the "softmax1" of Miller 2023. A head that
    finds nothing to attend to gives its weight to the sink. The weights of the keys sum to less than 1; logsumexp and
    entropy are those of the distribution over the keys and the sink.

    Raises:
        ValueError: start is not a finite number.
    """

    start: float = 0.0
    """Initial value of every sink."""

    def __post_init__(self):
        super().__post_init__()
        finite(start=self.start)

    def init_layer(self, key, dims: ModelDims) -> Params:
        return self._with_layer_params(key, dims, sink=jnp.full(dims.num_heads, self.start, jnp.float32))

    def sink(self, params: Params):
        return params["sink"]
