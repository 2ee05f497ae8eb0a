"""What a positional encoding costs: the time of a training step with each, beside that of NoPE.

    python -m benchmarks.encodings [--encodings alibi t5 ...] [--lengths 1024] [--rounds 7] [--out benchmarks/results]

The decoder is that of `benchmarks.train_step --size small` in float32, on an accelerator `gpt2` in bfloat16, with as
many tokens in a batch at every length. By default every encoding in ENCODINGS that a name alone makes; ratios are to
`nope`. FLOPs are those of the model without the encoding. `benchmarks/measure.py` says how time is taken.
"""

from collections.abc import Iterator
from typing import Any

import jax

from benchmarks.measure import group, parser, save
from benchmarks.train_step import SIZES, ours
from nope_jax.config import override
from nope_jax.encodings import ENCODINGS


def main() -> None:
    options = parser(__doc__, rounds=7)
    options.add_argument("--encodings", nargs="+", default=[name for name in ENCODINGS if name != "nope"])
    options.add_argument("--lengths", type=int, nargs="+", default=[1024])
    arguments = options.parse_args()
    on_cpu = jax.default_backend() == "cpu"
    config = SIZES["small" if on_cpu else "gpt2"]
    dtype = "float32" if on_cpu else "bfloat16"

    def measured() -> Iterator[dict[str, Any]]:
        for length in arguments.lengths:
            rows = config.data.batch_size * config.data.context_length // length
            changes = {"model.dtype": dtype, "data.context_length": length, "data.batch_size": max(1, rows)}
            of_length = override(config, changes | {"model.train_length": length})
            contestants = [ours(e, override(of_length, {"model.encoding": e})) for e in ["nope", *arguments.encodings]]
            title = f"T = {length:,}, {max(1, rows)} rows, {dtype}"
            yield group(title, contestants, "nope", arguments.rounds, dtype)

    save("encodings", measured(), arguments.out)


if __name__ == "__main__":
    main()
