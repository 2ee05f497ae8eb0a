#!/usr/bin/env bash
# Trains on the GPUs of SLURM nodes, and goes on by itself after the time limit, a preemption or the loss of a node.
#
#   sbatch --nodes=2 launch/slurm.sh --config configs/nope_1b.py --workdir /shared/runs/nope
#
# The options are train.py's; workdir and data.dir must be on a disk that all nodes see, or the workdir in a bucket.
# Every GPU gets a process of its own: under SLURM, JAX gives process i of a node its GPU i. So --ntasks-per-node is the
# number of GPUs of a node, all of which every process must see (not --gpus-per-task).
# Needs .venv with pip install --editable '.[train]' 'jax[cuda13]', made on a node like these.

#SBATCH --job-name=nope
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail
status=0
# The first process that has saved and ended must not take the others down.
srun --kill-on-bad-exit=0 "${PYTHON:-.venv/bin/python}" train.py "$@" || status=$?
case $status in
    0 | 1 | 2 | 4 | 130) exit "$status" ;;  # finished, an error to look at, bad input, diverged, interrupted
esac
echo "stopped with status $status; back into the queue" >&2
scontrol requeue "$SLURM_JOB_ID"
