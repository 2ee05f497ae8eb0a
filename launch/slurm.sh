#!/usr/bin/env bash
# Trains on the GPUs of SLURM nodes, and resumes by itself after the time limit, a preemption or the loss of a node.
#
#   sbatch --nodes=2 launch/slurm.sh --config configs/nope_1b.py --workdir /shared/runs/nope
#
# The options are train.py's. The workdir and data.dir must be on a disk shared by all nodes, or the workdir in a bucket.
# Every GPU gets its own process: under SLURM, JAX gives process i of a node its GPU i. Set --ntasks-per-node to the
# number of GPUs of a node; every process must see all of them (do not use --gpus-per-task).
# Requires .venv with pip install --editable '.[train]' 'jax[cuda13]', created on a node of the same kind.

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
# The first process to save and exit must not terminate the others.
srun --kill-on-bad-exit=0 "${PYTHON:-.venv/bin/python}" train.py "$@" || status=$?
case $status in
    0 | 1 | 2 | 4 | 130) exit "$status" ;;  # finished, program error, bad input, diverged, interrupted
esac
echo "stopped with status $status; back into the queue" >&2
scontrol requeue "$SLURM_JOB_ID"
