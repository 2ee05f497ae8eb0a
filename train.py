"""Train a decoder. Run again on the same workdir, it resumes from the newest checkpoint.

    python train.py --config configs/tiny.py --workdir runs/nope --model.encoding nope --train.steps 500

Every field of the config is an option by its dotted name; --help lists them. The workdir receives config.json,
data.json (digests of the training data), metrics.jsonl (nope_jax/training/metrics.py describes its fields),
checkpoints/ and, in code/, the file of a custom encoding. While the run writes to the workdir, the file lock in it is
locked. Exit status: 0 finished; 1 an unexpected error or an error in your own code, with its traceback; 2 bad input
(including a run on different data, or a workdir in use); 3 another process of the run died; 4 diverged; 129 (the
terminal was closed), 130 (Ctrl-C) or 143 (SIGTERM) stopped and saved.

Run the same command on every host to train on all of them. On Cloud TPU slices, under SLURM and Open MPI, and in
Kubernetes jobs (`pip install kubernetes`) each process finds its own number; elsewhere pass it:

    python train.py ... --coordinator HOST:PORT --num_processes N --process_id I

To estimate the memory and time of a run on a TPU slice or on GPUs, on any machine and without training (docs/pods.md
says what to install):

    python train.py --config configs/nope_1b.py --compile_for v5e:16x16
    python train.py --config configs/nope_1b.py --compile_for h100:8

This compiles the run for that machine; the exit status is 2 if it does not fit.
"""

import sys

from nope_jax.cli import parse_train, run
from nope_jax.compiler_flags import set_flags
from nope_jax.distributed import joined, leave


def main() -> None:
    config, workdir, compile_for, place = parse_train(sys.argv[1:])
    # Import late, because it takes seconds and bad arguments should fail at once.
    if compile_for is not None:
        from nope_jax.compile.report import report

        print(report(config, compile_for))
        return
    from nope_jax.training import train

    set_flags()
    with joined(place, workdir):
        train(config, workdir)


if __name__ == "__main__":
    leave(run(main))
