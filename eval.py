"""Evaluates trained models within and past their training length, and extends their context.

    python eval.py --workdirs runs/nope runs/rope --lengths 128 256 512 1024 2048 --out runs/report
    python eval.py tune --workdirs runs/nope --method head --lengths 512 1024 --out runs/nope-head
    python eval.py passkey --workdirs runs/nope runs/nope-head --lengths 256 512 --out runs/report
    python eval.py tasks --workdirs runs/copy-nope runs/copy-rope --out runs/copy-report
    python eval.py ruler --workdirs hf:HuggingFaceTB/SmolLM2-135M --lengths 4096 8192 --out runs/report
    python eval.py longbench --workdirs runs/nope --lengths 4096 --longbench.path LongBench/data --out runs/report
    python eval.py longppl --workdirs runs/nope --lengths 512 --longppl.short 128 --out runs/report
    python eval.py similarity --workdirs runs/nope runs/t5 --out runs/report
    python eval.py probe --workdirs runs/nope runs/rope --lengths 128 256 --out runs/report

Without a name, it measures perplexity and attention entropy by position. Each run is loaded from its own config.json
and its newest checkpoint, or that of --step N or --step best (the lowest validation loss). The data.* fields, and the
eval.* fields that an evaluation uses, can be overridden for all runs by their dotted names; --help lists them. The
--out directory gets tables, figures and report.html, which collects all results in it.
Exit status: 0 finished, 1 unexpected error, or one in an encoding's own code, with its traceback, 2 bad input, 3
another process of several died, 4 a loss that is not finite, 130 interrupted (Ctrl-C); the results so far are kept.

All devices share the work, and the parameters; --mesh.data, fsdp, tensor and sequence say how, as in training. Run the
same command on every host to evaluate on all of them; processes find each other as those of train.py do.
"""

import shlex
import sys

from nope_jax.cli import parse_eval, run
from nope_jax.distributed import joined, leave
from nope_jax.evaluation.registry import EVALUATIONS


def main() -> None:
    arguments = sys.argv[1:]
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else next(iter(EVALUATIONS))
    options = parse_eval(arguments, name)._replace(command=shlex.join(["python", "eval.py", *sys.argv[1:]]))
    # Import late, because it takes seconds and bad arguments should fail at once.
    from nope_jax.evaluation.common.evaluation import evaluate

    with joined(options.process, None):
        evaluate(name, options)


if __name__ == "__main__":
    leave(run(main))
