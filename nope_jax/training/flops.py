"""What a training step costs on paper, and what the chips that it may run on can do: the two sides of `mfu`.

B batch, T length, L layers, N query heads, H head dim.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nope_jax.config import Config
from nope_jax.encodings import keys_seen
from nope_jax.models import Decoder
from nope_jax.training.optimizer import decays


class Chip(NamedTuple):
    """An accelerator as its maker publishes it."""

    flops: float
    """Peak of dense bfloat16 matrix products, FLOP per second."""
    memory: float
    """Bytes of high-bandwidth memory; the runtime keeps a few per cent of it."""
    memory_bandwidth: float
    """Bytes per second."""
    interconnect_bandwidth: float
    """Bytes per second that one chip sends to others of its slice or node, over all its links: one of both ways."""
    device_kinds: tuple[str, ...]
    """What JAX calls it: `jax.Device.device_kind`."""


_GIB = 2**30
CHIPS = {
    "v4": Chip(275e12, 32 * _GIB, 1200e9, 300e9, ("TPU v4",)),
    "v5e": Chip(197e12, 16 * _GIB, 819e9, 200e9, ("TPU v5 lite", "TPU v5e")),
    "v5p": Chip(459e12, 95 * _GIB, 2765e9, 600e9, ("TPU v5", "TPU v5p")),
    "v6e": Chip(918e12, 32 * _GIB, 1600e9, 400e9, ("TPU v6 lite", "TPU v6e")),
    "A100-40GB": Chip(312e12, 40 * _GIB, 1555e9, 300e9, ("NVIDIA A100-SXM4-40GB",)),
    "A100": Chip(312e12, 80 * _GIB, 2039e9, 300e9, ("NVIDIA A100-SXM4-80GB",)),
    "H100": Chip(989e12, 80 * _GIB, 3350e9, 450e9, ("NVIDIA H100 80GB HBM3",)),
    "H200": Chip(989e12, 141 * _GIB, 4800e9, 450e9, ("NVIDIA H200",)),
}
"""By their usual names; GPUs are the SXM boards.

Sources: cloud.google.com/tpu/docs/v4, v5e, v5p and v6e, for v4's links Jouppi et al. 2023 (arXiv 2304.01433, table 4);
NVIDIA's data sheets of the A100, H100 and H200 Tensor Core GPUs, whose peaks with sparsity and whose NVLink bandwidths
of both ways are halved here."""


def chip_of(device: jax.Device) -> Chip | None:
    """What is known of a device; None of one that is not in `CHIPS`, such as a CPU."""
    return next((chip for chip in CHIPS.values() if device.device_kind in chip.device_kinds), None)


def model_flops_per_token(config: Config) -> float:
    """Floating-point operations that one token of training takes: 6·P + 12·Σ N·H·S over the layers.

    P counts the weights of all matrix products, the head among them (tied or not) and the lookup of the embedding not:
    a multiplication and an addition each, once forward and twice backward. S is how many keys a query sees on average,
    (T + 1) / 2 where a layer sees all that came before, fewer in one with a window or chunks; QKᵀ and weights·V take
    2·N·H·S each, and twice that again backward. As Chowdhery et al. 2022 (arXiv 2204.02311, appendix B), but for
    causality, which they do not count. What is computed again (remat, streaming attention) is no part of it, nor what
    an encoding adds, norms, softmax and the optimizer; pairs that `data.document_mask` hides count all the same.
    """
    model = nnx.eval_shape(lambda: Decoder(config.model, rngs=nnx.Rngs(0)))
    params = nnx.state(model)
    sizes = jax.tree.map(lambda array, is_matrix: math.prod(array.shape) if is_matrix else 0, params, decays(params))
    weights = sum(jax.tree.leaves(sizes)) - (0 if config.model.tie_embeddings else model.embedding.size)
    period = len(model.encodings)
    reaches = [model.encodings[layer % period].span() for layer in range(config.model.num_layers)]
    positions = jnp.arange(config.data.context_length)
    keys = sum(float(np.asarray(keys_seen(positions, span)).mean()) for span in reaches)
    heads_width = math.prod(model.blocks[0].attention.query.shape[-2:])
    return 6.0 * weights + 12.0 * heads_width * keys
