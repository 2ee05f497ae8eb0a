"""Estimates of memory and time of a run on a TPU slice, from programs compiled for that slice on any machine.

Memory is what the compiler allocates: a program that compiles fits. Nothing is executed, so times are estimates of
computation and communication (`nope_jax.compile.tpu`). How much of the two overlaps is unknown: a step takes between
the larger of the two and their sum.
"""

from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from nope_jax.compile.collectives import collectives
from nope_jax.compile.memory import Memory, compiled, kept_memory, memory_of
from nope_jax.compile.tpu import chip_of_slice, communicating, computing, slice_devices
from nope_jax.config import Config
from nope_jax.data import Batch
from nope_jax.data.batches import masks_loss
from nope_jax.sharding import check_fits, make_mesh, partition_spec
from nope_jax.training.flops import model_flops_per_token
from nope_jax.training.optimizer import make_optimizer
from nope_jax.training.state import abstract_state
from nope_jax.training.step import jit_train_step, jit_validation


class Estimate(NamedTuple):
    """The estimate of a run on a slice; bytes and seconds are per chip and training step."""

    chips: int
    mesh: dict[str, int]
    training: Memory
    validation: Memory
    flops: float
    """Model FLOPs of a step on all chips, without recomputation."""
    peak: float
    """Peak bfloat16 FLOP/s of all chips."""
    computing: float
    communicating: float
    sent: dict[str, int]
    """Bytes sent by each kind of collective."""

    @property
    def seconds(self) -> tuple[float, float]:
        """Seconds per step if communication fully overlaps with computation, and if it does not overlap at all."""
        return max(self.computing, self.communicating), self.computing + self.communicating

    @property
    def mfu(self) -> tuple[float, float]:
        """Model FLOPs utilization (MFU) without overlap of communication, and with full overlap."""
        best, worst = self.seconds
        return self.flops / self.peak / worst, self.flops / self.peak / best


def estimate_run(config: Config, slice_name: str) -> Estimate:
    """Compile the training step and the validation loss of a run for a slice, and estimate their memory and time.

    Raises:
        DoesNotFitError: a program needs more memory than a chip has; the message is one line and states how much.
        ValueError: the slice or the compiler does not exist, or the config cannot be sharded over the chips.
    """
    devices = slice_devices(slice_name)
    mesh = make_mesh(config.mesh, devices)
    check_fits(config, mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    with jax.set_mesh(mesh):
        graphdef, abstract = abstract_state(config, optimizer, mesh)
        batch = _abstract_batch(config, mesh)
        kept = kept_memory(abstract)
        step = jit_train_step(
            graphdef,
            optimizer,
            abstract,
            config.optimizer.accumulation,
            skip_bad=config.train.on_bad_step == "skip",
            spike_factor=config.train.spike_factor,
        )
        loss = jit_validation(graphdef, config.optimizer.accumulation)
        program = compiled("the training step", step.lower(abstract, batch), kept, slice_name)
        training = memory_of(program, kept)
        kept = kept._replace(optimizer=0)
        lowered = loss.lower(abstract.params, batch)
        validation = memory_of(compiled("the validation loss", lowered, kept, slice_name), kept)

    text = program.as_text()
    assert text is not None
    found = collectives(text)  # in loops of unknown trip count, they count once; attention has none
    sent: Counter[str] = Counter()
    for collective in found:
        sent[collective.kind] += collective.sent * (collective.times or 1)
    return Estimate(
        chips=len(devices),
        mesh=dict(mesh.shape),
        training=training,
        validation=validation,
        flops=model_flops_per_token(config) * config.data.batch_size * config.data.context_length,
        peak=chip_of_slice(slice_name).flops * len(devices),
        computing=computing(text, slice_name, -(-config.data.context_length // mesh.shape["sequence"])),
        communicating=communicating(found, mesh, slice_name),
        sent=dict(sent),
    )


def _abstract_batch(config: Config, mesh: Mesh) -> Batch:
    shape = config.data.batch_size, config.data.context_length
    sharding = NamedSharding(mesh, partition_spec(("batch", "length")))
    rows: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    batch = Batch(rows, rows, rows, rows) if config.data.document_mask else Batch(rows, rows)
    mask: Any = jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=sharding) if masks_loss(config.data) else None
    return batch._replace(loss_mask=mask)
