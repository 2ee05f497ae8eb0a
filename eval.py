"""How far past its training length does a trained model hold, why, and how can it hold further?

    python eval.py --workdirs runs/nope runs/rope --lengths 128 256 512 1024 2048 --out runs/report
    python eval.py tune --workdirs runs/nope --method head --lengths 512 1024 --out runs/nope-head
    python eval.py passkey --workdirs runs/nope runs/nope-head --lengths 256 512 --out runs/report
    python eval.py similarity --workdirs runs/nope runs/t5 --out runs/report
    python eval.py probe --workdirs runs/nope runs/rope --lengths 128 256 --out runs/report

Bare, it measures perplexity and attention entropy by position. Each run is loaded from its own config.json; any data.*
field, and those eval.* fields that matter, are overridden for all by their dotted names, and --help lists them. The out
directory receives tables, pictures and report.html, which gathers whatever has been computed into it.
Exit status: 0 finished, 1 an error that nobody foresaw, or one of an encoding's own code, with its traceback, 2 bad
input, 4 a loss that is not finite, 130 interrupted (Ctrl-C); what has been measured is kept.
"""

import shlex
import sys

from nope_jax.cli import parse_eval, run
from nope_jax.evaluation.registry import EVALUATIONS


def main() -> None:
    arguments = sys.argv[1:]
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else next(iter(EVALUATIONS))
    options = parse_eval(arguments, name)._replace(command=shlex.join(["python", "eval.py", *sys.argv[1:]]))
    from nope_jax.evaluation.common.evaluation import (
        evaluate,  # seconds of imports, which bad arguments need not wait for
    )

    evaluate(name, options)


if __name__ == "__main__":
    sys.exit(run(main))
