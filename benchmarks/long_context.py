"""One attention layer at long contexts on this machine: time and memory by length.

    python -m benchmarks.long_context [--lengths 8192 16384 32768] [--rounds 3] [--out benchmarks/results]

NoPE, ALiBi and a window of 4,096, forward and backward, with the implementation that is chosen by default; beside torch
SDPA where it is installed. Ratios are to `nope`. On a TPU or GPU lengths go to 131,072 by default. Sizes, FLOPs and
peers are those of `benchmarks.attention`; `benchmarks/measure.py` says how time is taken.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.attention import inputs, pair, settings, torch_peers
from benchmarks.measure import Contestant, group, parser, save
from nope_jax.attention import alibi_attention, nope_attention

WINDOW = 4096


def contestants(length: int) -> Iterator[Contestant]:
    arrays = [jnp.asarray(x, settings()[2]) for x in inputs(length)]
    functions = {
        "nope": nope_attention,
        "alibi": alibi_attention,
        "nope + entropy": partial(nope_attention, return_stats=True),
        f"nope, window {WINDOW:,}": partial(nope_attention, window=WINDOW),
    }
    for name, function in functions.items():
        yield from pair(name, function, arrays, None if "window" in name else length)
    yield from torch_peers(length)


def main() -> None:
    options = parser(__doc__, rounds=3)
    on_cpu = jax.default_backend() == "cpu"
    options.add_argument(
        "--lengths", type=int, nargs="+", default=[2**n for n in ((13, 14, 15) if on_cpu else (15, 16, 17))]
    )
    arguments = options.parse_args()
    heads, dim, dtype = settings()

    def measured() -> Iterator[dict[str, Any]]:
        for length in arguments.lengths:
            title = f"T = {length:,}, {heads} heads of {dim}, {dtype}"
            yield group(title, contestants(length), "nope", arguments.rounds, dtype)

    save("long_context", measured(), arguments.out)


if __name__ == "__main__":
    main()
