#!/usr/bin/env bash
# A TPU slice on Google Cloud from its creation to its deletion, by gcloud alone.
#
#   launch/tpu_vm.sh create                     asks for the slice (a queued resource) and waits for it
#   launch/tpu_vm.sh setup                      copies this checkout to all workers and installs it
#   launch/tpu_vm.sh run --config FILE --workdir DIR ...     starts `lmtrain run` on all workers, in the background
#   launch/tpu_vm.sh logs                       follows worker 0
#   launch/tpu_vm.sh stop                       SIGTERM to all: they save the same step
#   launch/tpu_vm.sh resume --config FILE --workdir DIR ...  until it is done: makes a slice that was preempted anew,
#                                               sets it up, and runs the same command, which goes on where it stopped
#   launch/tpu_vm.sh delete                     gives everything back
#   launch/tpu_vm.sh --dry-run COMMAND ...      prints the commands
#
# NAME=lmtrain ZONE=us-central1-a TYPE=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite; SPOT=1 for the cheap kind that may be
# taken away. DIR is gs://BUCKET/RUN, or a folder that the workers share and that outlives them (Filestore).
set -euo pipefail
name=${NAME:-lmtrain} zone=${ZONE:-us-central1-a} type=${TYPE:-v5litepod-16} runtime=${RUNTIME:-v2-alpha-tpuv5-lite}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry=
[[ ${1:-} == --dry-run ]] && { dry=1; shift; }

# Run, or shown.
do_() { if [[ $dry ]]; then printf '%q ' "$@"; echo; else "$@"; fi; }
workers() { do_ gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }
state() { # NONE where there is no such slice; another failure, as of the network, is asked again
    local said
    until said=$(gcloud compute tpus queued-resources describe "$name" --zone="$zone" --format='value(state.state)' 2>&1); do
        [[ $said == *NOT_FOUND* ]] && { echo NONE; return; }
        echo "$said" >&2
        sleep 30
    done
    echo "$said"
}

create() {
    do_ gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$zone" \
        --accelerator-type="$type" --runtime-version="$runtime" ${SPOT:+--spot} || return
    [[ $dry ]] && return
    until [[ $(state) == ACTIVE ]]; do
        case $(state) in FAILED | SUSPENDED) echo "the slice is $(state)" >&2; return 1 ;; esac
        sleep 20
    done
}
delete() { do_ gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force --quiet; }
setup() {
    do_ tar --exclude=.git --exclude=.venv --exclude=runs -czf /tmp/lmtrain.tar.gz -C "$root" . &&
        do_ gcloud compute tpus tpu-vm scp /tmp/lmtrain.tar.gz "$name": --zone="$zone" --worker=all &&
        workers "mkdir -p lmtrain && tar -xzf lmtrain.tar.gz -C lmtrain && cd lmtrain && python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e '.[tpu,cloud,tensorboard]'"
}
run() { # its exit status is left in status; none there, and nothing that runs, means that it was lost
    local it
    it=".venv/bin/lmtrain run $(printf '%q ' "$@") >> lmtrain.log 2>&1; echo \$? > status"
    workers "cd lmtrain && rm -f status && (setsid nohup bash -c $(printf %q "$it") > /dev/null 2>&1 &)"
}
logs() { do_ gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=0 --command="tail -n 100 -F lmtrain/lmtrain.log"; }
# The interpreter alone is told, not the shell around it, which has to leave the status behind.
stop() { workers "pkill -TERM -f '^[^ ]*python[^ ]* [^ ]*[l]mtrain run ' || true"; }
status() { gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=0 --command="cat lmtrain/status 2>/dev/null" 2>/dev/null || true; }
running() { gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=0 --command="pgrep -f '[l]mtrain run '" >/dev/null 2>&1; }
resume() {
    local pause=30 restart code lost
    for ((restart = 0; restart <= ${RESTARTS:-20}; restart++)); do
        if [[ $dry || $(state) != ACTIVE ]]; then
            delete || true
            if ! { create && setup; }; then # none to be had now, perhaps
                echo "no slice; again in $pause s" >&2
                sleep $pause
                pause=$((pause < 900 ? 2 * pause : 1800))
                continue
            fi
        fi
        [[ ! $dry ]] && running || run "$@" || continue
        [[ $dry ]] && return
        pause=30
        code= lost=0
        while [[ $(state) == ACTIVE && ! $code ]] && ((lost < 3)); do
            sleep 30
            if running; then lost=0; else lost=$((lost + 1)); fi
            code=$(status)
        done
        case $code in 0) return 0 ;; 2) echo "refused; see the log" >&2; return 2 ;; esac
    done
    echo "not done after ${RESTARTS:-20} restarts" >&2
    return 1
}

case ${1:-} in
    create | setup | run | logs | stop | resume | delete) "$@" ;;
    *) sed -n '2,15s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
esac
