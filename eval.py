"""How far past its training length does a trained model hold? Perplexity and attention entropy by position.

    python eval.py --workdirs runs/nope runs/rope --lengths 128 256 512 1024 2048 --out runs/report

Each run is loaded from its own config.json; any data.* or eval.* field is overridden for all by its dotted name, and
--help lists them. The out directory receives curves.csv, heads.npz, perplexity.png, entropy.png and report.html.
Exit status: 0 finished, 2 bad input, 130 interrupted (Ctrl-C); what has been measured is kept.
"""

import shlex
import sys

from nope_jax.cli import parse_eval, run


def main() -> None:
    options = parse_eval(sys.argv[1:])
    from nope_jax.evaluation import compare  # seconds of imports, which bad arguments need not wait for

    compare(*options, command=shlex.join(["python", "eval.py", *sys.argv[1:]]))


if __name__ == "__main__":
    sys.exit(run(main))
