"""The report of `train.py --compile_for`: memory and time of a run on a machine, or settings that would fit."""

import math
import operator
from collections.abc import Iterable, Iterator
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from nope_jax.compile.estimate import Estimate, estimate_run, find_machine
from nope_jax.compile.machine import KERNEL_EFFICIENCY, Computing, Traffic
from nope_jax.compile.memory import GIB, DoesNotFitError, Memory, gib
from nope_jax.config import Config, override
from nope_jax.sharding import make_mesh


def report(config: Config, name: str) -> str:
    """Return a report of the memory and time of a run on a machine.

    Raises:
        DoesNotFitError: the run does not fit; the message is one line and states by how much, and settings that fit, as
            verified by compiling them.
        ValueError: as for `estimate_run`.
    """
    try:
        return describe(config, name, estimate_run(config, name))
    except DoesNotFitError as error:
        raise DoesNotFitError(f"{error}; {_what_fits(config, name, error)}") from error


def describe(config: Config, name: str, estimate: Estimate) -> str:
    """Format an estimate as text."""
    e, machine = estimate, find_machine(name)
    tokens = config.data.batch_size * config.data.context_length
    axes = " x ".join(f"{axis} {size}" for axis, size in e.mesh.items())
    between = [t for t in e.traffic if t.between_slices]
    slices = across = ""
    if machine.num_slices > 1:
        slices = f" in {machine.num_slices} {machine.slices}"
        seconds = sum(t.seconds for t in between)
        sent = f"{_sent(between) or 'nothing'}: {seconds:.3g} s over the {machine.network}"
        across = f"  {f'across {machine.slices}':13} {sent}\n"

    def memory(m: Memory) -> str:
        parts = [f"{name} {gib(size)}" for name, size in m._asdict().items() if size]
        return f"{gib(m.total)} of {machine.memory / GIB:.0f} GiB: {', '.join(parts)}"

    best, worst = e.seconds
    low, high = e.mfu
    return f"""\
{name}: {e.chips} chips{slices}, mesh {axes}; it fits.
Memory of each chip
  training      {memory(e.training)}
  validation    {memory(e.validation)}
                temporaries are activations, gradients and all else that lives within a step
A training step of {tokens:,} tokens
  model FLOPs   {e.flops:.3g} (6 per weight and token, and attention; nothing that is computed again)
  sent          {_sent(t for t in e.traffic if not t.between_slices) or "nothing"}, by each chip
{across}  computing     {e.computing.total:.3g} s, from {machine.computed_from}: {_parts(e.computing)}
  communicating {e.communicating:.3g} s, from what is sent and the published bandwidth
  time          {best:.3g} s if all communication hides behind computation, {worst:.3g} s if none does
  utilisation   {low:.0%} to {high:.0%} of the published peak, where the model FLOPs take {e.flops / e.peak:.3g} s
  throughput    {tokens / worst:,.0f} to {tokens / best:,.0f} tokens per second
Nothing was run: times are estimates. Where a kernel serves attention, its products are assumed to reach
{KERNEL_EFFICIENCY:.0%} of the peak."""


def _parts(computing: Computing) -> str:
    parts = {"matrix products": computing.products, "attention's kernels": computing.kernels, "other": computing.other}
    return ", ".join(f"{name} {seconds:.3g}" for name, seconds in parts.items() if seconds)


def _sent(traffic: Iterable[Traffic]) -> str:
    return ", ".join(f"{t.kind} {t.sent / 1e9:.3g} GB ({t.times:,} along {' x '.join(t.axes)})" for t in traffic)


def _what_fits(config: Config, name: str, error: DoesNotFitError) -> str:
    """Compile alternative settings, cheapest first, until one fits; return that one, or all those tried."""
    tried = []
    machine = find_machine(name)
    for settings in _remedies(config, make_mesh(config.mesh, machine.devices()), machine.num_slices, error):
        options = " ".join(f"--{name} {value}" for name, value in settings.items())
        try:
            estimate_run(override(config, settings), name)
            return f"it fits with {options}"
        except DoesNotFitError:
            tried.append(options)
        except ValueError:  # the model does not divide over that mesh
            continue
    return f"nor does it fit with {', with '.join(tried)}" if tried else "there was nothing to try that takes less"


def _remedies(
    config: Config, mesh: Mesh | AbstractMesh, num_slices: int, error: DoesNotFitError
) -> Iterator[dict[str, Any]]:
    """Yield settings that need less memory, cheapest first; each kind adds to the previous ones.

    Fewer rows per microbatch cost little. Sharding all parameters costs communication, remat a third more computation,
    and sharding heads communication in every layer.
    """
    model, sizes = config.model, mesh.shape
    num_shards = sizes["data"] * sizes["fsdp"]
    kinds: list[dict[str, Any]] = [{}]
    if sizes["data"] > num_slices or config.mesh.rules != "fsdp":  # the parameters are not gathered between slices
        kinds.append({"mesh.data": num_slices, "mesh.fsdp": num_shards // num_slices, "mesh.rules": "fsdp"})
    if model.remat in ("none", "dots"):
        kinds.append({"model.remat": "full"})
    shared = math.gcd(
        model.num_heads,
        model.num_kv_heads or model.num_heads,
        model.mlp_size,
        model.num_tokens,
        num_shards // num_slices,
    )
    if sizes["tensor"] == 1 < shared:
        kinds.append({"mesh.data": num_slices, "mesh.fsdp": num_shards // num_slices // shared, "mesh.tensor": shared})

    settings: dict[str, Any] = {}
    for kind in kinds:
        settings = settings | kind
        rows = config.data.batch_size * settings.get("mesh.tensor", 1) // num_shards
        for accumulation in _accumulations(rows, config.optimizer.accumulation, error, alone=not kind):
            changed = settings | {"optimizer.accumulation": accumulation}
            yield {name: value for name, value in changed.items() if operator.attrgetter(name)(config) != value}


def _accumulations(rows: int, now: int, error: DoesNotFitError, *, alone: bool) -> list[int]:
    """Numbers of microbatches to try: the fewest that should fit if memory is proportional to their rows, and `rows`.

    Args:
        rows: Rows of a step on each chip.
        now: The number of microbatches that did not fit.
        error: The error with that number.
        alone: Nothing else changes, so parameters and optimizer take the same memory as before.
    """
    least, kept = now, error.kept if alone else 0
    if alone and error.needed is not None and error.kept >= error.available:
        return []
    if error.needed is not None:
        shrink = (error.needed - error.kept) / (error.available - kept)
        least = min((n for n in range(now, rows) if rows % n == 0 and n >= shrink * now), default=rows)
    return sorted({least, rows} - {now} if alone else {least, rows})
