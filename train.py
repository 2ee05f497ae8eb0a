"""Train a decoder. Started again on the same workdir, it goes on from the newest checkpoint there.

    python train.py --config configs/tiny.py --workdir runs/nope --model.encoding nope --train.steps 500

Every field of the config is an option by its dotted name; --help lists them. The workdir receives config.json,
data.json (digests of what is trained on), metrics.jsonl (its fields: nope_jax/training/metrics.py), checkpoints/ and,
in code/, the file of an encoding of your own, and holds the file lock for as long as it is written to. Exit status: 0
finished, 1 an error that nobody foresaw, or one of your own code, with its traceback, 2 bad input (also a run on other
data, and a workdir in use), 3 another process of the run died, 4 diverged, 129 (the terminal was closed), 130 (Ctrl-C)
or 143 (SIGTERM) stopped and saved.

The same command on every host trains on all of them: on Cloud TPU slices, under SLURM and Open MPI, and in Kubernetes
jobs (`pip install kubernetes`) each finds out which process it is; elsewhere say

    python train.py ... --coordinator HOST:PORT --num_processes N --process_id I

    python train.py --config configs/nope_1b.py --compile_for v5e:16x16

trains nothing: it compiles the run for a slice of TPUs, on any machine, and says what it would take there in memory and
time (`pip install '.[tpu]'`). Exit status 2 where it does not fit.
"""

import sys

from nope_jax.cli import parse_train, run
from nope_jax.distributed import joined, leave


def main() -> None:
    config, workdir, compile_for, place = parse_train(sys.argv[1:])
    # Seconds of imports, which bad arguments need not wait for.
    if compile_for is not None:
        from nope_jax.compile.report import report

        print(report(config, compile_for))
        return
    from nope_jax.training import train

    with joined(place, workdir):
        train(config, workdir)


if __name__ == "__main__":
    leave(run(main))
