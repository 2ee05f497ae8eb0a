#!/usr/bin/env bash
# Trains on a Cloud TPU VM or a multi-host slice: requests the chips, installs this commit on every host, starts the same
# command on all of them, and repeats this after a preemption until the run is done.
#
#   TPU=nope ZONE=us-west4-a TYPE=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite \
#       launch/tpu.sh --config configs/nope_1b.py --workdir gs://my-bucket/runs/nope
#
# The options are train.py's. The workdir must be in a bucket, which all hosts see and which outlives them. Also:
#   SPOT=1                  cheaper chips, which may be preempted at any time
#   DATA=gs://my-bucket/data   copied to ~/data on every host: --data.dir '~/data' (docs/data.md)
#   DRY_RUN=1               prints the commands instead of running them
# Run it where it is not interrupted, for instance in tmux on a small VM. You pay for the chips until you delete them:
#   gcloud compute tpus queued-resources delete $TPU --zone=$ZONE --force

set -euo pipefail
: "${TPU:?a name for the slice}" "${ZONE:?where}" "${TYPE:?such as v5litepod-16}" "${RUNTIME:?software version}"
wait=${WAIT:-60}

run() {
    if [[ ${DRY_RUN:-} ]]; then printf '%q ' "$@" && echo; else "$@"; fi
}

on_all_hosts() {
    run gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --batch-size=all --command="$1"
}

state() {
    if [[ ${DRY_RUN:-} ]]; then echo "${1:-ACTIVE}"; else
        gcloud compute tpus queued-resources describe "$TPU" --zone="$ZONE" --format='value(state.state)' 2>/dev/null ||
            echo ABSENT
    fi
}

obtain() {
    local now
    now=$(state ABSENT)
    while [[ $now != ACTIVE ]]; do
        case $now in
            ABSENT)
                run gcloud compute tpus queued-resources create "$TPU" --node-id="$TPU" --zone="$ZONE" \
                    --accelerator-type="$TYPE" --runtime-version="$RUNTIME" ${SPOT:+--spot} ;;
            FAILED | SUSPENDED)  # the remains of a preempted slice
                run gcloud compute tpus queued-resources delete "$TPU" --zone="$ZONE" --force --quiet ;;
            *)
                echo "$TPU is $now; waiting" >&2
                sleep "$wait" ;;
        esac
        now=$(state)
    done
}

install() {
    run gcloud compute tpus tpu-vm scp "$archive" "$TPU:nope_jax.tar.gz" --zone="$ZONE" --worker=all
    on_all_hosts "mkdir -p nope_jax && tar -xzf nope_jax.tar.gz -C nope_jax && cd nope_jax &&
        python3 -m pip install --quiet --user uv &&
        { test -d .venv || ~/.local/bin/uv venv --quiet --python 3.12 .venv; } &&
        ~/.local/bin/uv pip install --quiet --python .venv --constraint constraints/3.12.txt --editable '.[tpu,gcs]'"
    if [[ ${DATA:-} ]]; then
        on_all_hosts "mkdir -p data && gcloud storage rsync --recursive --exclude='.*array_record.*' $DATA data"
    fi
}

archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git archive --output="$archive" HEAD
printf -v options '%q ' "$@"
while true; do
    obtain
    status=0
    install || status=255
    if ((status == 0)); then
        # A process left by an earlier connection holds the chips: let it save and exit first.
        on_all_hosts "pkill --full '^[^ ]*python train.py '; while pgrep --full '^[^ ]*python train.py '; do sleep 5; done
            cd nope_jax && .venv/bin/python train.py $options" || status=$?
    fi
    case $status in
        0) exit 0 ;;
        2 | 4 | 130) exit "$status" ;;  # bad input, divergence, or Ctrl-C on a host
        1) if [[ $(state) == ACTIVE ]]; then exit 1; fi ;;  # a program error, if the slice still exists
    esac
    echo "stopped with status $status; starting again" >&2
    sleep "$wait"
done
