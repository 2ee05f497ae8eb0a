"""What the benchmarks share: contestants that run in turn, the peak of a matrix product beside them, and the JSON file.

All contestants of a group run in turn, round after round, in one process, so what slows the machine down affects all of
them. A ratio is that of two times in the same round. The first contestant of every group is a matrix product as large
as keeps the device busy: its FLOP/s are what the others are compared with, on the device as it was then.

A benchmark writes one file, BENCHMARK-DEVICE.json:

    benchmark, command, date, device, devices, versions, load    how it was made; load is that of the machine before
    groups: [{title, rounds, rows: [{name, what, seconds, ratio, cpu_ratio, flops, of_matmul, temporaries}]}]

`seconds`, `ratio` (to the row named in `of`) and `of_matmul` (FLOP/s as a part of those of the matrix product) are
[lower quartile, median, upper quartile] over rounds. `cpu_ratio` is the ratio of the time that all cores spent on it,
which other work on the machine hardly changes; on an accelerator it is null. `flops` are the useful ones of a call,
`temporaries` the bytes that the compiled program takes besides what it is given and returns. What is not known is null.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: its threads would keep the cores from JAX's

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.pages import date, hardware
from nope_jax.cli import keep_freed_memory
from nope_jax.evaluation.common.files import replace_file

RESULTS = Path(__file__).with_name("results")
MATMUL = "matrix product"
HEADER = "", "", "ms", "ratio", "ratio of CPU time", "of matmul", "MiB"
SAMPLE = 0.02
"""Seconds that a sample takes at least on an accelerator: shorter calls are repeated, so that launching them hides."""


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One thing to be timed."""

    name: str
    call: Callable[[], Any]
    """Starts it and returns what `wait` waits for."""
    wait: Callable[[Any], Any] = jax.block_until_ready
    what: str = ""
    """Which of several things that are compared among themselves, such as forward."""
    flops: float | None = None
    """Useful floating-point operations of a call."""
    temporaries: int | None = None
    """Bytes."""


def compiled(name: str, function: Callable, *inputs: Any, **about: Any) -> Contestant:
    """A function of JAX arrays, compiled."""
    program = jax.jit(function).lower(*inputs).compile()
    memory = program.memory_analysis()
    temporaries = None if memory is None else memory.temp_size_in_bytes
    return Contestant(name, lambda: program(*inputs), temporaries=temporaries, **about)


def matmul(dtype: str) -> Contestant:
    """The matrix product that keeps a device of this kind busy."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    return compiled(MATMUL, lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32), x, flops=2.0 * size**3)


def torch() -> Any:
    """The module torch, or None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    return torch


def torch_device() -> str:
    """Where torch computes: on the GPU if JAX does."""
    return "cuda" if jax.default_backend() == "gpu" and torch().cuda.is_available() else "cpu"


def torch_wait(_: Any) -> None:
    if torch_device() == "cuda":
        torch().cuda.synchronize()


def group(title: str, contestants: Iterable[Contestant], of: str, rounds: int, dtype: str) -> dict[str, Any]:
    """Time contestants in turn, and return a group of the file; ratios are to those named `of`."""
    contestants = [matmul(dtype), *contestants]
    repeats = [_repeats(contestant) for contestant in contestants]
    taken = [[_time(c, n) for c, n in zip(contestants, repeats, strict=True)] for _ in range(rounds)]
    times, cpu_times = np.array(taken).T  # [contestants, rounds] each
    peak = contestants[0].flops / times[0]
    base, cpu_base = (
        {c.what: own for c, own in zip(contestants, each, strict=True) if c.name == of} for each in (times, cpu_times)
    )
    on_cpu = jax.default_backend() == "cpu"

    def compared(contestant: Contestant) -> bool:
        return contestant.what in base and contestant.name != MATMUL

    rows = [
        {
            "name": c.name,
            "what": c.what,
            "seconds": _quartiles(own),
            "ratio": _quartiles(own / base[c.what]) if compared(c) else None,
            "cpu_ratio": _quartiles(cpu / cpu_base[c.what]) if compared(c) and on_cpu else None,
            "of": of,
            "flops": c.flops,
            "of_matmul": None if c.flops is None else _quartiles(c.flops / own / peak),
            "temporaries": c.temporaries,
        }
        for c, own, cpu in zip(contestants, times, cpu_times, strict=True)
    ]
    found = {"title": title, "rounds": rounds, "rows": rows}
    _print(found)
    return found


def _repeats(contestant: Contestant) -> int:
    """Run it twice, to compile and to see how long it takes; return how often a sample repeats it."""
    _time(contestant, 1)
    taken, _ = _time(contestant, 1)
    return 1 if jax.default_backend() == "cpu" else max(1, round(SAMPLE / taken))


def _time(contestant: Contestant, repeats: int) -> tuple[float, float]:
    """Seconds of a call by the clock, and of all cores."""
    start, cpu_start = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        result = contestant.call()
    contestant.wait(result)
    return (time.perf_counter() - start) / repeats, (time.process_time() - cpu_start) / repeats


def _quartiles(values: np.ndarray) -> list[float]:
    return [float(f"{x:.4g}") for x in np.quantile(values, [0.25, 0.5, 0.75])]


def _print(found: dict[str, Any]) -> None:
    table = Table(title=found["title"])
    for column in HEADER:
        table.add_column(column, justify="left" if not column else "right")
    for row in found["rows"]:
        table.add_row(*cells(row))
    Console().print(table)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the file as text, by the columns of HEADER."""

    def spread(values: Sequence[float] | None, form: str) -> str:
        if values is None:
            return ""
        low, middle, high = (format(value, form) for value in values)
        return middle if low == high else f"{middle} ({low} to {high})"

    milliseconds = 1e3 * row["seconds"][1]
    return (
        row["name"],
        row["what"],
        f"{milliseconds:.3g}" if milliseconds < 100 else f"{milliseconds:,.0f}",
        spread(row["ratio"], ".2f"),
        spread(row["cpu_ratio"], ".2f"),
        spread(row["of_matmul"], ".0%"),
        "" if row["temporaries"] is None else f"{row['temporaries'] / 2**20:,.0f}",
    )


def parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark, which from here on keeps freed memory, as the commands do."""
    keep_freed_memory()
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    return made


def save(benchmark: str, groups: Iterable[dict[str, Any]], out: Path) -> Path:
    """Run a benchmark, whose groups are measured as they are asked for, and write the file; return its path."""
    device = jax.devices()[0]
    loads = [round(os.getloadavg()[0], 1)]
    about = {
        "benchmark": benchmark,
        "command": " ".join(["python", "-m", f"benchmarks.{benchmark}", *sys.argv[1:]]),
        "date": date(),
        "device": hardware().rpartition(", ")[0],
        "platform": device.platform,
        "versions": versions(),
    }
    found = []
    for one in groups:
        found.append(one)
        loads.append(round(os.getloadavg()[0], 1))
    about["load"] = [min(loads), max(loads)]
    about["finished"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    name = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    path = out / f"{benchmark}-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(about | {"groups": found}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    return path


def versions() -> dict[str, str]:
    """The versions of what takes part, as far as it is installed."""
    packages = "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin", "torch", "tokamax", "transformers"
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
