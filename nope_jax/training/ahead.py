"""What a run takes on a slice of TPUs that one does not have: its programs, compiled for that slice on any machine.

    print(report(config, "v5e:16x16"))

The TPU compiler (package libtpu, in the extra "tpu") needs no TPU. Memory is what it allocates: a program that it
compiles fits. Nothing runs, so that times are estimates, of two parts:

- computing: the cycles that the compiler expects each operation to take, memory traffic included, as often as loops
  turn, at the chip's clock. Operations that it says nothing of (scalars, some copies) count as none.
- communicating: the bytes of each collective over the bandwidth of the links that its chips have along the dimensions
  of the slice that they span. No latency.

How far one hides behind the other is not known: a step takes between the larger of the two and their sum.
"""

import difflib
import importlib.util
import itertools
import math
import operator
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from nope_jax.collectives import Collective, called_computations, collectives, loop_turns, parse_program
from nope_jax.config import Config, override
from nope_jax.data import Batch
from nope_jax.sharding import check_fits, make_mesh, partition_spec
from nope_jax.training.flops import CHIPS, model_flops_per_token
from nope_jax.training.optimizer import make_optimizer
from nope_jax.training.state import TrainState, abstract_state
from nope_jax.training.step import jit_train_step, jit_validation

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
SLICES = {
    "v4": (*_CUBES, "8x8x12", "8x8x16", "8x16x16"),
    "v5e": _FLAT,
    "v5p": (*_CUBES, "8x8x16", "8x16x16", "16x16x16", "16x16x24"),
    "v6e": _FLAT,
}
"""The slices of each generation, in chips along each dimension (cloud.google.com/tpu/docs, read in 2026)."""

FLOPS_PER_CYCLE = {"v4": 2**18, "v5e": 2**17, "v5p": 2**18, "v6e": 2**19}
"""What a chip's units for bfloat16 products do in a cycle. With the published peak this is its clock: 1.05, 1.50, 1.75
and 1.75 GHz. By the compiler's cycles, a product of two 8192 x 8192 matrices takes 70 % (v6e) to 93 % of it."""

BLOCK = 256
"""Queries and keys in a block of streaming attention."""

UNKNOWN_CYCLES = 2**63 - 1
"""What is written where the compiler has no estimate; or more, -1 as an unsigned number."""

GIB = 2**30


class Memory(NamedTuple):
    """What a program needs of each chip, in bytes."""

    parameters: int
    optimizer: int
    temporaries: int
    """Activations, gradients and whatever else lives within a step."""
    other: int
    """The batch, and the program itself."""

    @property
    def total(self) -> int:
        return sum(self)


class Estimate(NamedTuple):
    """What a run takes on a slice; bytes and seconds are those of one chip and one training step."""

    chips: int
    mesh: dict[str, int]
    training: Memory
    validation: Memory
    flops: float
    """Model FLOPs of a step on all chips: nothing that is computed again counts."""
    peak: float
    """Bfloat16 FLOP per second of all chips."""
    computing: float
    communicating: float
    sent: dict[str, int]
    """Bytes sent, by kind of collective."""

    @property
    def seconds(self) -> tuple[float, float]:
        """Of a step: if all communication hides behind computation, and if none does."""
        return max(self.computing, self.communicating), self.computing + self.communicating

    @property
    def mfu(self) -> tuple[float, float]:
        """Model-FLOPs utilisation: if no communication hides, and if all does."""
        best, worst = self.seconds
        return self.flops / self.peak / worst, self.flops / self.peak / best


class DoesNotFitError(ValueError):
    """A program needs more memory than a chip has.

    Args:
        message: in one line, which program and how much.
        needed: bytes in all; None where the compiler does not say.
        available: bytes that a chip has.
        kept: bytes of parameters and optimizer in what is needed.
    """

    def __init__(self, message: str, needed: float | None = None, available: float = 0, kept: float = 0):
        super().__init__(message)
        self.needed, self.available, self.kept = needed, available, kept


def slice_devices(name: str) -> list[jax.Device]:
    """The chips of a slice, named as v5e:16x16. They can be compiled for, and nothing else.

    Raises:
        ValueError: there is no such slice, or libtpu is not installed.
    """
    generation, _, shape = name.partition(":")
    if shape not in SLICES.get(generation, ()):
        known = {kind: [f"{kind}:{shape}" for shape in shapes] for kind, shapes in SLICES.items()}
        nearest = known.get(generation) or difflib.get_close_matches(
            name, itertools.chain(*known.values()), n=6, cutoff=0
        )
        raise ValueError(f"--compile_for must be a slice of TPUs, not {name!r}: such as {', '.join(nearest)}")
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise ValueError("--compile_for needs the TPU compiler, which is not installed: pip install '.[tpu]'")
    # Without these the compiler looks for TPUs in the network, says so, and keeps others from loading it meanwhile.
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    for variable, value in {**quiet, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")  # what is here is not needed: it may be busy, and takes time to start
    jax.config.update("jax_enable_compilation_cache", False)  # what is compiled for absent chips cannot be read back
    options: dict[str, Any] = {"wrap": (*_wraps(name), False, False)[:3]}
    if shape == "1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)  # older compilers take every host to have four
    if generation in ("v4", "v5p"):
        options["chip_config_name"] = "megacore"  # both cores of a chip are one device
    return topologies.get_topology_desc(name, platform="tpu", **options).devices


def _wraps(name: str) -> tuple[bool, ...]:
    """Whether each dimension of a slice is a ring: of whole cubes all are, of flat slices those of 16 chips."""
    sizes = [int(size) for size in name.partition(":")[2].split("x")]
    if len(sizes) == 3:
        return (all(size % 4 == 0 for size in sizes),) * 3
    return tuple(size == 16 for size in sizes)


def report(config: Config, slice_name: str) -> str:
    """What a run takes on a slice, in words and numbers.

    Raises:
        DoesNotFitError: it does not fit; in one line by how much, and with which settings it does. Those were compiled.
        ValueError: as `compile_ahead`.
    """
    try:
        return describe(config, slice_name, compile_ahead(config, slice_name))
    except DoesNotFitError as error:
        raise DoesNotFitError(f"{error}; {_what_fits(config, slice_name, error)}") from error


def compile_ahead(config: Config, slice_name: str) -> Estimate:
    """Compiles the training step of a run for a slice, and its validation loss, and reads what they take.

    Raises:
        DoesNotFitError: one of them needs more memory than a chip has; in one line how much.
        ValueError: there is no such slice or no compiler, or the config does not divide over its chips.
    """
    devices = slice_devices(slice_name)
    mesh = make_mesh(config.mesh, devices)
    check_fits(config, mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    with jax.set_mesh(mesh):
        graphdef, abstract = abstract_state(config, optimizer, mesh)
        batch = _abstract_batch(config, mesh)
        kept = _kept(abstract)
        step = jit_train_step(
            graphdef,
            optimizer,
            abstract,
            config.optimizer.accumulation,
            skip_bad=config.train.on_bad_step == "skip",
            spike_factor=config.train.spike_factor,
        )
        loss = jit_validation(graphdef, config.optimizer.accumulation)
        program = _compiled("the training step", step.lower(abstract, batch), kept, slice_name)
        training = _memory(program, kept)
        kept = kept._replace(optimizer=0)
        lowered = loss.lower(abstract.params, batch)
        validation = _memory(_compiled("the validation loss", lowered, kept, slice_name), kept)

    text, generation = program.as_text(), slice_name.partition(":")[0]
    assert text is not None
    chip = CHIPS[generation]
    blocks = -(-config.data.context_length // (BLOCK * mesh.shape["sequence"]))
    found = collectives(text)  # those in a loop of unknown turns, of which attention has none, count once
    sent: Counter[str] = Counter()
    for collective in found:
        sent[collective.kind] += collective.sent * (collective.times or 1)
    return Estimate(
        chips=len(devices),
        mesh=dict(mesh.shape),
        training=training,
        validation=validation,
        flops=model_flops_per_token(config) * config.data.batch_size * config.data.context_length,
        peak=chip.flops * len(devices),
        computing=cycles(text, blocks) * FLOPS_PER_CYCLE[generation] / chip.flops,
        communicating=sum(
            collective.sent * (collective.times or 1) / (chip.interconnect_bandwidth * share)
            for collective, share in zip(found, link_shares(found, mesh, slice_name), strict=True)
        ),
        sent=dict(sent),
    )


def _abstract_batch(config: Config, mesh: Mesh) -> Batch:
    shape = config.data.batch_size, config.data.context_length
    sharding = NamedSharding(mesh, partition_spec(("batch", "length")))
    rows: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
    return Batch(rows, rows, rows, rows) if config.data.document_mask else Batch(rows, rows)


def _bytes(tree: Any) -> int:
    """Of a tree of abstract arrays, those that each chip holds."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _memory(program: jax.stages.Compiled, kept: Memory) -> Memory:
    stats = program.memory_analysis()
    assert stats is not None
    given = stats.argument_size_in_bytes
    # Not the size of all temporaries: some take the place of what was given, when that has been read.
    temporaries = stats.peak_memory_in_bytes - given
    return kept._replace(temporaries=temporaries, other=given - kept.total + stats.generated_code_size_in_bytes)


def _kept(abstract: TrainState) -> Memory:
    parameters, state = _bytes(abstract.params), _bytes(abstract)
    return Memory(parameters, state - parameters, 0, 0)


def _compiled(what: str, lowered: jax.stages.Lowered, kept: Memory, slice_name: str) -> jax.stages.Compiled:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise _shortage(f"{what} does not fit a chip of {slice_name}", str(error), kept) from error


def _shortage(what: str, message: str, kept: Memory) -> DoesNotFitError:
    """What the compiler says of the memory that it lacks, in numbers."""
    state = f"parameters {_gib(kept.parameters)} GiB, optimizer {_gib(kept.optimizer)} GiB"
    numbers = re.findall(r"\b(\d+(?:\.\d+)?)([KMGT])i?B?\b", message)[:2]
    if len(numbers) < 2:
        return DoesNotFitError(f"{what}: {message.splitlines()[0]} ({state})")
    needed, available = (float(number) * 1024 ** (1 + "KMGT".index(unit)) for number, unit in numbers)
    needs, has = (f"{number} {unit}iB" for number, unit in numbers)
    rest = "the rest for activations and gradients"
    return DoesNotFitError(
        f"{what}: it needs {needs} of the {has} there are ({state}, {rest})", needed, available, kept.total
    )


# What would fit


def _what_fits(config: Config, slice_name: str, error: DoesNotFitError) -> str:
    """Compiles other settings, those that cost least first, until some fit: which, or that none of those tried does."""
    tried = []
    for settings in _remedies(config, make_mesh(config.mesh, slice_devices(slice_name)), error):
        options = " ".join(f"--{name} {value}" for name, value in settings.items())
        try:
            compile_ahead(override(config, settings), slice_name)
            return f"it fits with {options}"
        except DoesNotFitError:
            tried.append(options)
        except ValueError:  # the model does not divide over that mesh
            continue
    return f"nor does it fit with {', with '.join(tried)}" if tried else "there was nothing to try that takes less"


def _remedies(config: Config, mesh: Mesh | AbstractMesh, error: DoesNotFitError) -> Iterator[dict[str, Any]]:
    """Settings that need less memory, those that cost least first; each kind adds to the ones before.

    Fewer rows at a time cost little; sharing all parameters costs communication, remat a third more computing, and
    sharing heads communication in every layer.
    """
    model, sizes = config.model, mesh.shape
    num_shards = sizes["data"] * sizes["fsdp"]
    kinds: list[dict[str, Any]] = [{}]
    if sizes["data"] > 1 or config.mesh.rules != "fsdp":
        kinds.append({"mesh.data": 1, "mesh.fsdp": num_shards, "mesh.rules": "fsdp"})
    if not model.remat:
        kinds.append({"model.remat": True})
    shared = math.gcd(
        model.num_heads, model.num_kv_heads or model.num_heads, model.mlp_size, model.vocab_size, num_shards
    )
    if sizes["tensor"] == 1 < shared:
        kinds.append({"mesh.data": 1, "mesh.fsdp": num_shards // shared, "mesh.tensor": shared})

    settings: dict[str, Any] = {}
    for kind in kinds:
        settings = settings | kind
        rows = config.data.batch_size * settings.get("mesh.tensor", 1) // num_shards
        for accumulation in _accumulations(rows, config.optimizer.accumulation, error, alone=not kind):
            changed = settings | {"optimizer.accumulation": accumulation}
            yield {name: value for name, value in changed.items() if operator.attrgetter(name)(config) != value}


def _accumulations(rows: int, now: int, error: DoesNotFitError, *, alone: bool) -> list[int]:
    """Microbatches to try: as few as should do if memory goes by the rows in each, and one row of a chip at a time.

    Args:
        rows: those of a step on each chip.
        now: microbatches that did not fit.
        alone: nothing else changes, so that parameters and optimizer take what they took.
    """
    least, kept = now, error.kept if alone else 0
    if alone and error.needed is not None and error.kept >= error.available:
        return []
    if error.needed is not None:
        shrink = (error.needed - error.kept) / (error.available - kept)
        least = min((n for n in range(now, rows) if rows % n == 0 and n >= shrink * now), default=rows)
    return sorted({least, rows} - {now} if alone else {least, rows})


def link_shares(found: Sequence[Collective], mesh: Mesh, slice_name: str) -> list[float]:
    """Which share of its links each chip can send a collective over, at best."""
    wraps, chips = _wraps(slice_name), mesh.devices.reshape(-1)
    permutes = {c.groups: c.mesh_axes(mesh.shape) for c in found if c.kind == "collective-permute"}

    def links(collective: Collective) -> int:
        if collective.kind == "collective-permute":  # to one neighbour, beside one that goes the other way if there is
            return min(2, list(permutes.values()).count(permutes[collective.groups]))
        where = np.array([chips[index].coords for index in max(collective.groups, key=len)])
        # A ring sends both ways; on a line the chips at its ends must receive everything over one link.
        return sum(2 if wraps[axis] else 1 for axis in range(len(wraps)) if len(set(where[:, axis])) > 1)

    return [max(1, links(collective)) / (2 * len(wraps)) for collective in found]


def cycles(text: str, blocks: int) -> float:
    """The cycles that the TPU compiler expects a program to take.

    Args:
        text: the compiled program.
        blocks: blocks of keys in a sequence. The loop over the blocks of a diagonal, within the one over diagonals, is
            the only loop whose turns the text does not tell; they are taken to be those of the average diagonal.
    """
    computations, entry = parse_program(text)

    def within(name: str, around: float) -> float:
        total = 0.0
        for line in computations[name].values():
            expected = re.search(r'"estimated_cycles":"(\d+)"', line)
            total += int(expected[1]) if expected and int(expected[1]) < UNKNOWN_CYCLES else 0
            if " fusion(" in line:
                continue  # what it consists of is in its cycles
            turns = loop_turns(line, computations, name)
            if turns is not None and math.isnan(turns):
                turns = _blocks_of_a_diagonal(around, blocks)
            for callee in called_computations(line):
                total += (turns or 1) * within(callee, turns or around)
        return total

    return within(entry, 1)


def _blocks_of_a_diagonal(diagonals: float, blocks: int) -> float:
    """On average over so many diagonals, how many blocks of each are computed."""
    if diagonals >= blocks:  # all of them are visited, also those above the mask, whose blocks are skipped
        return blocks * (blocks + 1) / 2 / diagonals
    return blocks - (diagonals + 1) / 2  # the first below the main diagonal have one block less each


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size >= GIB / 10 else f"{size / GIB:.2g}"


def describe(config: Config, slice_name: str, estimate: Estimate) -> str:
    """An estimate in words and numbers."""
    e, chip = estimate, CHIPS[slice_name.partition(":")[0]]
    tokens = config.data.batch_size * config.data.context_length
    axes = " x ".join(f"{axis} {size}" for axis, size in e.mesh.items())
    sent = ", ".join(f"{kind} {amount / 1e9:.3g} GB" for kind, amount in e.sent.items()) or "nothing"

    def memory(m: Memory) -> str:
        parts = [f"{name} {_gib(size)}" for name, size in m._asdict().items() if size]
        return f"{_gib(m.total)} of {chip.memory / GIB:.0f} GiB: {', '.join(parts)}"

    best, worst = e.seconds
    low, high = e.mfu
    return f"""\
{slice_name}: {e.chips} chips, mesh {axes}; it fits.
Memory of each chip
  training      {memory(e.training)}
  validation    {memory(e.validation)}
                temporaries are activations, gradients and all else that lives within a step
A training step of {tokens:,} tokens
  model FLOPs   {e.flops:.3g} (6 per weight and token, and attention; nothing that is computed again)
  sent          {sent}, by each chip
  computing     {e.computing:.3g} s, from the cycles that the compiler expects
  communicating {e.communicating:.3g} s, from what is sent and the published bandwidth
  time          {best:.3g} s if all communication hides behind computation, {worst:.3g} s if none does
  utilisation   {low:.0%} to {high:.0%} of the published peak, where the model FLOPs take {e.flops / e.peak:.3g} s
  throughput    {tokens / worst:,.0f} to {tokens / best:,.0f} tokens per second
Nothing was run: times are estimates. Attention is plain JAX, not yet a TPU kernel."""
