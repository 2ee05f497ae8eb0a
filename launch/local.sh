#!/usr/bin/env bash
# Runs train.py as several processes on this machine, connected over the loopback interface, to test multi-host runs.
#
#   launch/local.sh 2 --config configs/tiny.py --workdir runs/two --train.steps 20
#
# The first argument is the number of processes, the rest are train.py's options. Each process has one CPU device, or as
# many as XLA_FLAGS=--xla_force_host_platform_device_count=4 sets. Ctrl-C and SIGTERM are passed to all. The exit status
# is 0 if all processes return 0, otherwise that of a process that did not end because of another one.

set -uo pipefail
processes=${1:?how many processes}
shift
port=${PORT:-$((20000 + RANDOM % 20000))}
pids=()
for ((i = 0; i < processes; i++)); do
    JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} "${PYTHON:-python}" train.py "$@" \
        --coordinator "127.0.0.1:$port" --num_processes "$processes" --process_id "$i" \
        > >(sed --unbuffered "s/^/[$i] /") 2>&1 &
    pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' INT TERM

status=0
for pid in "${pids[@]}"; do
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done # a trapped signal ends a wait early
    ended=0
    wait "$pid" || ended=$?
    if ((ended != 0 && (status == 0 || status == 3))); then status=$ended; fi
done
exit "$status"
