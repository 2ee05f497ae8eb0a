"""Estimates of memory and time of a run on a TPU slice or GPUs, from programs compiled for them on any machine.

Memory is what the compiler allocates. Nothing is executed, so times are estimates of computation
(`nope_jax.compile.tpu`, `nope_jax.compile.gpu`) and communication (`nope_jax.compile.machine`). How much of the two
overlaps is unknown: a step takes between the larger of the two and their sum.
"""

import difflib
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from nope_jax.compile import gpu, tpu
from nope_jax.compile.collectives import collectives
from nope_jax.compile.machine import Computing, Machine, Traffic
from nope_jax.compile.memory import Memory, compiled, kept_memory
from nope_jax.config import Config
from nope_jax.data import Batch
from nope_jax.data.batches import masks_loss
from nope_jax.data.tokenizers import with_vocab_size
from nope_jax.sharding import check_fits, make_mesh, partition_spec
from nope_jax.training.flops import model_flops_per_token
from nope_jax.training.optimizer import make_optimizer
from nope_jax.training.state import abstract_state
from nope_jax.training.step import jit_train_step, jit_validation, step_settings


class Estimate(NamedTuple):
    """The estimate of a run on a machine; bytes and seconds are per chip and training step."""

    chips: int
    mesh: dict[str, int]
    training: Memory
    validation: Memory
    flops: float
    """Model FLOPs of a step on all chips, without recomputation."""
    peak: float
    """Peak bfloat16 FLOP/s of all chips."""
    computing: Computing
    traffic: tuple[Traffic, ...]

    @property
    def communicating(self) -> float:
        """Seconds of all collectives."""
        return sum(traffic.seconds for traffic in self.traffic)

    @property
    def sent(self) -> dict[str, int]:
        """Bytes sent by each kind of collective."""
        sent: Counter[str] = Counter()
        for traffic in self.traffic:
            sent[traffic.kind] += traffic.sent
        return dict(sent)

    @property
    def seconds(self) -> tuple[float, float]:
        """Seconds per step if communication fully overlaps with computation, and if it does not overlap at all."""
        return max(self.computing.total, self.communicating), self.computing.total + self.communicating

    @property
    def mfu(self) -> tuple[float, float]:
        """Model FLOPs utilization (MFU) without overlap of communication, and with full overlap."""
        best, worst = self.seconds
        return self.flops / self.peak / worst, self.flops / self.peak / best


def find_machine(name: str) -> Machine:
    """Return a machine by its name, such as v5e:16x16, 2xv5e:16x16 (two slices), h100:8 or h100:2x8 (two hosts).

    Raises:
        ValueError: there is no such machine.
    """
    machine = tpu.find_tpus(name) or gpu.find_gpus(name)
    if machine is not None:
        return machine
    kind = name.partition(":")[0].lower()
    known = [*tpu.names(), *gpu.names()]
    same = [one for one in known if one.partition(":")[0] == kind]
    nearest = ", ".join(same or difflib.get_close_matches(name, known, n=6, cutoff=0))
    raise ValueError(f"--compile_for must be a slice of TPUs or GPUs of a host, not {name!r}: such as {nearest}")


def estimate_run(config: Config, name: str) -> Estimate:
    """Compile the training step and the validation loss of a run for a machine, and estimate their memory and time.

    Raises:
        DoesNotFitError: a program needs more memory than a chip has; the message is one line and states how much.
        ValueError: the machine or its compiler does not exist, or the config cannot be sharded over the chips.
    """
    machine = find_machine(name)
    devices = machine.devices()
    config = with_vocab_size(config)
    mesh = make_mesh(config.mesh, devices)
    check_fits(config, mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    with jax.set_mesh(mesh):
        graphdef, abstract = abstract_state(config, optimizer, mesh)
        batch = _abstract_batch(config, mesh)
        kept = kept_memory(abstract)
        step = jit_train_step(graphdef, optimizer, abstract, **step_settings(config))
        loss = jit_validation(graphdef, config.optimizer.accumulation)
        program, training = compiled("the training step", step.lower(abstract, batch, 0), kept, machine)
        kept = kept._replace(optimizer=0)
        lowered = loss.lower(abstract.weights, batch)
        _, validation = compiled("the validation loss", lowered, kept, machine)

    text = program.as_text()
    assert text is not None
    return Estimate(
        chips=len(devices),
        mesh=dict(mesh.shape),
        training=training,
        validation=validation,
        flops=model_flops_per_token(config) * config.data.batch_size * config.data.context_length,
        peak=machine.chip.flops * len(devices),
        computing=machine.computing(text, -(-config.data.context_length // mesh.shape["sequence"])),
        traffic=tuple(machine.traffic(collectives(text), mesh)),
    )


def _abstract_batch(config: Config, mesh: Mesh) -> Batch:
    shape = config.data.batch_size, config.data.context_length
    sharding = NamedSharding(mesh, partition_spec(("batch", "length")))
    rows: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    batch = Batch(rows, rows, rows, rows) if config.data.document_mask else Batch(rows, rows)
    mask: Any = jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=sharding) if masks_loss(config.data) else None
    return batch._replace(loss_mask=mask)
