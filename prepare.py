"""Tokenize a corpus once, on all cores, if it is too large to be tokenized at the start of a run.

    python prepare.py --config my_config.py --data.dir /data

Reads the data.* fields of a run's config, each of which is an option by its dotted name, and writes the tokens of both
splits into the folder `tokens` of data.dir, for train.py and eval.py. Run again after an interruption, it continues.
Exit status: 0 done, 2 bad input or a file system error, 130 interrupted (Ctrl-C).
"""

import os
import sys

from nope_jax.cli import parse_prepare, run


def main() -> None:
    config = parse_prepare(sys.argv[1:])
    from nope_jax.data.prepare import prepare  # late, because it takes seconds and bad arguments should fail at once

    prepare(config, workers=os.cpu_count() or 1)


if __name__ == "__main__":
    sys.exit(run(main))
