#!/usr/bin/env bash
# A run on several machines under Slurm: one task per machine, one process per GPU.
#
#   sbatch --nodes 4 launch/slurm.sh CONFIG.yaml [section.field=value ...]
#
# Submit it from the checkout's directory. The `#SBATCH` lines are defaults; options of sbatch have
# priority. launch/README.md describes how a run stops, resumes and ends.
#
# To print the command of every machine without starting anything:
#   DRY_RUN=1 SLURM_JOB_NODELIST='node[01-04]' launch/slurm.sh CONFIG.yaml
#
# Settings, all optional, from the environment:
#   PYTHON=.venv/bin/python   the Python that has the package installed; in a container: python
#   GPUS_PER_NODE=8           default: the GPUs that Slurm allocated on the first machine, or 8
#   MASTER_PORT=29500         default: derived from the job id
#   MAX_REQUEUES=100          how often a stopped run is queued again
#   MAX_RESTARTS=3            how often in a day a run that lost a process or a machine is requeued
# In containers, which have the package installed and see this checkout under the same path:
#   PYXIS_IMAGE=IMAGE         srun --container-image, with NVIDIA's pyxis and enroot
#   APPTAINER_IMAGE=FILE.sif  apptainer exec --nv
#   CONTAINER_MOUNTS=/data    more directories, comma-separated

#SBATCH --job-name=idpo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
# Five minutes before the time limit, the tasks (not this script) get the signal to save:
#SBATCH --signal=USR1@300
#SBATCH --requeue

set -euo pipefail

readonly EXIT_USER_ERROR=2 EXIT_PEER_LOST=3 EXIT_PREEMPTED=75 # as in megatron_idpo/errors.py
readonly EXIT_INTERRUPTED=130                                  # Ctrl-C

say() { printf 'slurm.sh: %s\n' "$*" >&2; }
die() {
    say "$@"
    exit "$EXIT_USER_ERROR"
}

(($# > 0)) || die "usage: sbatch launch/slurm.sh CONFIG.yaml [section.field=value ...]"
[[ -n "${SLURM_JOB_NODELIST:-}" ]] || die "no SLURM_JOB_NODELIST: start this with sbatch"

# Slurm runs a copy of this file from its spool directory.
cd "${SLURM_SUBMIT_DIR:-.}"
[[ -f launch/node.py ]] || die "launch/node.py does not exist in $PWD: submit from the checkout"
[[ -f "$1" ]] || die "$1 does not exist in $PWD"
mounts="$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
srun_options=() wrapper=()
if [[ -n "${PYXIS_IMAGE:-}" ]]; then
    pairs=()
    for path in ${mounts//,/ }; do pairs+=("$path:$path"); done
    joined="$(IFS=, && printf '%s' "${pairs[*]}")"
    srun_options=(--container-image "$PYXIS_IMAGE" --container-mounts "$joined"
        --container-workdir "$PWD")
elif [[ -n "${APPTAINER_IMAGE:-}" ]]; then
    [[ -e "$APPTAINER_IMAGE" ]] || die "APPTAINER_IMAGE: $APPTAINER_IMAGE does not exist in $PWD"
    wrapper=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$APPTAINER_IMAGE")
fi
if [[ -n "${PYXIS_IMAGE:-}${APPTAINER_IMAGE:-}" ]]; then
    python="${PYTHON:-python}"
else
    python="${PYTHON:-.venv/bin/python}"
    command -v "$python" >/dev/null ||
        die "$python does not exist in $PWD: run make setup, or set PYTHON"
fi

program=("${wrapper[@]}" "$python")

listed="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
mapfile -t hosts <<<"$listed"

# Below 30000, where the range of ephemeral ports starts. Jobs on one machine get different ports.
port="${MASTER_PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 10000))}"

run=(
    --nnodes "${#hosts[@]}"
    --nproc-per-node "${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}"
    --master-addr "${hosts[0]}"
    --master-port "$port"
    -m megatron_idpo train "$@"
)

if [[ "${DRY_RUN:-0}" != 0 ]]; then
    for rank in "${!hosts[@]}"; do
        printf -v words ' %q' "${program[@]}" launch/node.py --node-rank "$rank" "${run[@]}"
        printf '%s:%s\n' "${hosts[rank]}" "$words"
    done
    exit 0
fi

# When a task ends, srun ends the others two minutes later. Not at once (--kill-on-bad-exit): srun
# would report the kill (143) instead of the exit code of the first task.
# exec, because Slurm signals only the first process of a task.
code=0
codes="slurm-${SLURM_JOB_ID:-}.codes"
rm -rf "$codes"
# shellcheck disable=SC2016 # expanded by the shell of each task
srun --ntasks "${#hosts[@]}" --ntasks-per-node 1 --cpu-bind none --kill-on-bad-exit=0 --wait 120 \
    "${srun_options[@]}" bash -c \
    'EXIT_CODE_FILE="$0/$SLURM_NODEID" exec "${@:2:$1}" launch/node.py --node-rank "$SLURM_NODEID" "${@:$1+2}"' \
    "$codes" "${#program[@]}" "${program[@]}" "${run[@]}" || code=$?

# srun reports the largest code. The machine that failed by itself, with an error of the user or a
# crash, has a smaller one than those that lost it.
if ((code != EXIT_PREEMPTED)); then
    for failure in "$EXIT_USER_ERROR" 1; do
        if grep -qsx "$failure" "$codes"/*; then
            code="$failure"
            break
        fi
    done
fi
rm -rf "$codes"

if ((code == EXIT_PREEMPTED)); then
    if ((${SLURM_RESTART_COUNT:-0} >= ${MAX_REQUEUES:-100})); then
        say "stopped and saved; not queued again: already requeued $SLURM_RESTART_COUNT times"
    elif scontrol requeue "$SLURM_JOB_ID"; then
        say "stopped and saved; job $SLURM_JOB_ID is queued again"
    else
        say "stopped and saved, but requeueing failed; submit it again to resume"
    fi
elif ((code == EXIT_PEER_LOST || (code > 128 && code != EXIT_INTERRUPTED))); then
    # srun reports the largest code: that of a killed process hides the others' EXIT_PEER_LOST.
    # Counted apart from preemptions, which are no reason to give up.
    restarts="slurm-${SLURM_JOB_ID}.restarts"
    count=0
    # Of a day: one that runs for months may lose a machine every week.
    since="$(date -u -d '1 day ago' +%FT%TZ)"
    [[ ! -f "$restarts" ]] || count="$(awk -v since="$since" '$1 >= since' "$restarts" | wc -l)"
    if ((count >= ${MAX_RESTARTS:-3})); then
        say "lost a process or a machine ($code); restarted $count times within a day, see $restarts"
    elif printf '%s code %s\n' "$(date -u +%FT%TZ)" "$code" >>"$restarts" &&
        scontrol requeue "$SLURM_JOB_ID"; then
        say "lost a process or a machine ($code); job $SLURM_JOB_ID is queued again"
    else
        say "lost a process or a machine ($code); requeueing failed, submit it again to resume"
    fi
fi
exit "$code"
