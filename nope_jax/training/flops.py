"""Model FLOPs of a training step and the peak performance of chips, the two numbers behind `mfu`.

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
from nope_jax.models import abstract_decoder
from nope_jax.training.optimizer import matrices


class Chip(NamedTuple):
    """An accelerator's published specifications."""

    flops: float
    """Peak of dense bfloat16 matrix multiplication, FLOP per second."""
    memory: float
    """Bytes of high-bandwidth memory; the runtime reserves a few per cent of it."""
    memory_bandwidth: float
    """Bytes per second."""
    interconnect_bandwidth: float
    """Bytes per second that one chip sends to others in its slice or node over all its links, in one direction."""
    device_kinds: tuple[str, ...]
    """Names in JAX: `jax.Device.device_kind`."""
    network_bandwidth: float | None = None
    """Bytes per second that one chip sends to other slices or nodes, in one direction; None if not published."""


_GIB = 2**30
CHIPS = {
    "v4": Chip(275e12, 32 * _GIB, 1200e9, 300e9, ("TPU v4",)),
    "v5e": Chip(197e12, 16 * _GIB, 819e9, 200e9, ("TPU v5 lite", "TPU v5e"), 3.125e9),
    "v5p": Chip(459e12, 95 * _GIB, 2765e9, 600e9, ("TPU v5", "TPU v5p"), 6.25e9),
    "v6e": Chip(918e12, 32 * _GIB, 1600e9, 400e9, ("TPU v6 lite", "TPU v6e"), 12.5e9),
    "A100-40GB": Chip(312e12, 40 * _GIB, 1555e9, 300e9, ("NVIDIA A100-SXM4-40GB",), 25e9),
    "A100": Chip(312e12, 80 * _GIB, 2039e9, 300e9, ("NVIDIA A100-SXM4-80GB",), 25e9),
    "H100": Chip(989e12, 80 * _GIB, 3350e9, 450e9, ("NVIDIA H100 80GB HBM3",), 50e9),
    "H200": Chip(989e12, 141 * _GIB, 4800e9, 450e9, ("NVIDIA H200",), 50e9),
    "B200": Chip(2250e12, 180 * _GIB, 8000e9, 900e9, ("NVIDIA B200",), 50e9),
}
"""Chips by their usual names; GPUs are the SXM boards.

Sources: cloud.google.com/tpu/docs/v4, v5e, v5p and v6e, for v4's links Jouppi et al. 2023 (arXiv 2304.01433, table 4);
NVIDIA's data sheets of the A100, H100 and H200 Tensor Core GPUs and of the DGX B200. Their peaks with sparsity and
their bidirectional NVLink bandwidths are halved here. The network of TPUs is the data-center network, of a pod divided
by its chips (v5e, v6e) or of a chip (v5p), from the same pages; of GPUs, an adapter of 200 Gb/s (A100) or 400 Gb/s for
each, as in the DGX of their generation."""


def chip_of(device: jax.Device) -> Chip | None:
    """Return the specifications of a device, or None for one that is not in `CHIPS`, such as a CPU."""
    return next((chip for chip in CHIPS.values() if device.device_kind in chip.device_kinds), None)


def model_flops_per_token(config: Config) -> float:
    """Floating-point operations to train on one token: 6·P + 12·Σ N·H·S over the layers.

    P is the number of weights in matrix multiplications, including the head (tied or not) but not the embedding lookup:
    a multiplication and an addition each, once forward and twice backward. S is the average number of keys a query
    sees: (T + 1) / 2 with full attention, fewer with a window or chunks; QKᵀ and weights·V take 2·N·H·S each, and twice
    that backward. This follows Chowdhery et al. 2022 (arXiv 2204.02311, appendix B), except that they ignore causality.
    Recomputation (remat, streaming attention), the encoding, norms, softmax and the optimizer are not counted; pairs
    masked by `data.document_mask` are.
    """
    model = abstract_decoder(config.model)
    params = nnx.state(model)
    sizes = jax.tree.map(lambda array, is_matrix: math.prod(array.shape) if is_matrix else 0, params, matrices(params))
    weights = sum(jax.tree.leaves(sizes)) - (0 if config.model.tie_embeddings else model.embedding.size)
    period = len(model.encodings)
    reaches = [model.encodings[layer % period].span() for layer in range(config.model.num_layers)]
    positions = jnp.arange(config.data.context_length)
    keys = sum(float(np.asarray(keys_seen(positions, span)).mean()) for span in reaches)
    heads_width = math.prod(model.blocks[0].attention.query.shape[-2:])
    return 6.0 * weights + 12.0 * heads_width * keys
