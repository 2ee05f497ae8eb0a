"""Time and memory of one causal attention layer on this machine, compared with torch and `jax.nn`.

    python -m benchmarks.attention [--lengths 1024 4096 16384] [--rounds 7]

All implementations run in turn, round after round, in one process, so a slowdown of the machine affects all of them. A
ratio is the median over rounds of the time divided by that of torch SDPA in the same round (of `jax.nn` if torch is not
installed: `pip install torch`). float32, batch 1, 8 heads of dimension 64. "temporaries" is the memory that the
compiled program needs besides inputs and outputs, forward / forward and backward. `jax.nn`, which materializes its
weights, stops at 8,192.
"""

import argparse
import importlib.metadata
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from nope_jax.attention import alibi_attention, nope_attention, rope_attention, t5_attention

HEADS, HEAD_DIM = 8, 64
RATIO_OF = "torch SDPA"


def jax_contestants(arrays: list[np.ndarray]) -> dict[str, tuple[Callable, Callable, list[int]]]:
    """Forward, forward and backward, and MiB of temporaries of both, by name."""
    inputs = [jnp.asarray(x) for x in arrays]
    table = jnp.asarray(np.random.default_rng(1).normal(size=(32, HEADS)), jnp.float32)
    functions: dict[str, tuple[Callable, list]] = {
        "nope": (partial(nope_attention, implementation="streaming"), inputs),
        "nope + entropy": (partial(nope_attention, implementation="streaming", return_stats=True), inputs),
        "rope": (partial(rope_attention, implementation="streaming"), inputs),
        "alibi": (partial(alibi_attention, implementation="streaming"), inputs),
        "t5": (lambda q, k, v, t: t5_attention(q, k, v, table=t, implementation="streaming"), [*inputs, table]),
        "jax.nn (xla)": (partial(jax.nn.dot_product_attention, is_causal=True), inputs),
    }

    if inputs[0].shape[1] > 8192:  # its weights alone would take many GiB
        del functions["jax.nn (xla)"]

    def compiled(function, inputs):
        def total(*inputs):
            return sum(leaf.sum() for leaf in jax.tree.leaves(function(*inputs)))

        gradient = jax.grad(total, argnums=tuple(range(len(inputs))))
        programs = [jax.jit(f).lower(*inputs).compile() for f in (function, gradient)]
        calls = [lambda p=program: jax.block_until_ready(p(*inputs)) for program in programs]
        return *calls, [program.memory_analysis().temp_size_in_bytes >> 20 for program in programs]

    return {name: compiled(*contestant) for name, contestant in functions.items()}


def torch_contestant(arrays: list[np.ndarray]) -> dict[str, tuple[Callable, Callable, None]]:
    try:
        import torch
    except ImportError:
        return {}
    inputs = [torch.tensor(x).transpose(1, 2).contiguous().requires_grad_() for x in arrays]
    attention = partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)

    def forward():
        with torch.no_grad():
            attention(*inputs)

    def both():
        out = attention(*inputs)
        torch.autograd.grad(out, inputs, torch.ones_like(out))

    return {RATIO_OF: (forward, both, None)}


def measure(length: int, rounds: int) -> Table:
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(1, length, HEADS, HEAD_DIM)).astype(np.float32) for _ in range(3)]
    contestants = torch_contestant(arrays) | jax_contestants(arrays)
    times: dict[str, list] = {name: [] for name in contestants}
    for round in range(rounds + 1):  # the first warms up
        for name, (*calls, _) in contestants.items():
            taken = []
            for call in calls:
                start = time.perf_counter()
                call()
                taken.append(time.perf_counter() - start)
            if round:
                times[name].append(taken)

    base = np.array(times.get(RATIO_OF) or times["jax.nn (xla)"])
    table = Table(title=f"T = {length:,}")
    for column in "", "forward ms", "ratio", "both ms", "ratio", "temporaries MiB":
        table.add_column(column, justify="right" if column else "left")
    for name, (*_, memory) in contestants.items():
        own = np.array(times[name])
        milliseconds, ratio = np.median(own, axis=0) * 1e3, np.median(own / base, axis=0)
        cells = [
            f"{x:.{d}f}" for pair in zip(milliseconds, ratio, strict=True) for x, d in zip(pair, (0, 2), strict=True)
        ]
        table.add_row(name, *cells, "" if memory is None else " / ".join(map(str, memory)))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    console = Console()
    console.print(f"jax {importlib.metadata.version('jax')} on {jax.devices()[0].device_kind}")
    for length in arguments.lengths:
        console.print(measure(length, arguments.rounds))


if __name__ == "__main__":
    main()
