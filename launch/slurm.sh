#!/usr/bin/env bash
# A run on several machines under Slurm: one task per machine, one process per GPU.
#
#   sbatch --nodes 4 launch/slurm.sh CONFIG.yaml [section.field=value ...]
#
# Submit it from the checkout's directory. The lines `#SBATCH` below are defaults: sbatch's options
# win over them. launch/README.md tells how it stops, goes on and ends.
#
# To see the command of every machine and start nothing:
#   DRY_RUN=1 SLURM_JOB_NODELIST='node[01-04]' launch/slurm.sh CONFIG.yaml
#
# Settings, all optional, from the environment:
#   PYTHON=.venv/bin/python   the Python that has the package installed
#   GPUS_PER_NODE=8           by default what Slurm gave the first machine, or 8
#   MASTER_PORT=29500         by default one made from the job's number
#   MAX_REQUEUES=100          how often a run that was stopped may go on

#SBATCH --job-name=idpo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
# Five minutes before the time is up, the tasks (not this script) are told to save:
#SBATCH --signal=USR1@300
#SBATCH --requeue

set -euo pipefail

readonly EXIT_USER_ERROR=2 EXIT_PREEMPTED=75 # those of megatron_idpo/errors.py

say() { printf 'slurm.sh: %s\n' "$*" >&2; }
die() {
    say "$@"
    exit "$EXIT_USER_ERROR"
}

(($# > 0)) || die "usage: sbatch launch/slurm.sh CONFIG.yaml [section.field=value ...]"
[[ -n "${SLURM_JOB_NODELIST:-}" ]] || die "no SLURM_JOB_NODELIST: start this with sbatch"

# Slurm runs a copy of this file from a directory of its own.
cd "${SLURM_SUBMIT_DIR:-.}"
[[ -f launch/node.py ]] || die "there is no launch/node.py in $PWD: submit from the checkout"
[[ -f "$1" ]] || die "there is no file $1 in $PWD"
python="${PYTHON:-.venv/bin/python}"
command -v "$python" >/dev/null || die "there is no $python in $PWD: run make setup, or set PYTHON"

listed="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
mapfile -t hosts <<<"$listed"

# Below 30000: above, systems take ports for connections. Jobs that share a machine differ.
port="${MASTER_PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 10000))}"

run=(
    --nnodes "${#hosts[@]}"
    --nproc-per-node "${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}"
    --master-addr "${hosts[0]}"
    --master-port "$port"
    -m megatron_idpo train "$@"
)

if [[ "${DRY_RUN:-0}" != 0 ]]; then
    for place in "${!hosts[@]}"; do
        printf -v words ' %q' "$python" launch/node.py --node-rank "$place" "${run[@]}"
        printf '%s:%s\n' "${hosts[place]}" "$words"
    done
    exit 0
fi

# A task that has ended, for whatever reason, ends the others two minutes later. Not at once
# (--kill-on-bad-exit): srun would report the kill (143) instead of what the first one ended with.
# exec, because Slurm signals the first process of a task only.
code=0
# shellcheck disable=SC2016 # each task's own shell knows its SLURM_NODEID
srun --ntasks "${#hosts[@]}" --ntasks-per-node 1 --cpu-bind none --kill-on-bad-exit=0 --wait 120 \
    bash -c 'exec "$0" launch/node.py --node-rank "$SLURM_NODEID" "$@"' "$python" "${run[@]}" ||
    code=$?

if ((code == EXIT_PREEMPTED)); then
    if ((${SLURM_RESTART_COUNT:-0} >= ${MAX_REQUEUES:-100})); then
        say "stopped with everything saved; not queued again after $SLURM_RESTART_COUNT times"
    elif scontrol requeue "$SLURM_JOB_ID"; then
        say "stopped with everything saved; job $SLURM_JOB_ID is queued again"
    else
        say "stopped with everything saved, but not queued again; to go on, submit it once more"
    fi
fi
exit "$code"
