#!/usr/bin/env bash
# 2 nodes of SLURM, ranks started by srun. Submit with
#     sbatch launch/slurm.sh
# from the folder of train.py, after editing the places marked (1), (2) and (3).
# Made by: python tools/render_job.py --cluster slurm

# (1) Resources: nodes, GPUs and cores, time; remove a # where the cluster asks for account or partition.
#SBATCH --job-name=ds_recipes
##SBATCH --account=ACCOUNT
##SBATCH --partition=PARTITION
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
RANKS_PER_HOST=8 # one for each GPU
WALLTIME=12:00:00 # as in the directive above
LEAD_SECONDS=300 # train.py has saved and is gone this long before it
RANKS_PER_HOST="${SLURM_NTASKS_PER_NODE:-$RANKS_PER_HOST}" # flags given to sbatch count more than the directives

# (2) Environment: modules, Python, and the names of further variables that ranks on other hosts get. The usual ones go by
# themselves if they are set here: PATH, LD_LIBRARY_PATH, NCCL_*, GLOO_*, HF_*, WANDB_* ... (ds_recipes/cluster/exports.py)
MODULES=()
ACTIVATE=.venv/bin/activate
EXPORT=()
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# (3) Run file, run folder (shared by all hosts), and further flags of train.py.
CONFIG=run.yaml
RUN=runs/my_run
ARGUMENTS=()

if [ -z "${SLURM_JOB_ID:-}" ]; then # srun would ask for a job of its own, and one host would be taken for all
    echo "This is no job of SLURM: submit it with sbatch, or run it within salloc." >&2
    exit 2
fi

resubmit() {
    trap "" TERM # SLURM ends this script as it takes the job back into its queue
    if scontrol requeue "$SLURM_JOB_ID"; then
        echo "$(date '+%F %T') job $SLURM_JOB_ID is queued again, and goes on from its checkpoint in some minutes" >&2
    else
        echo "SLURM refuses to queue job $SLURM_JOB_ID again (--no-requeue, JobRequeue=0, or no batch job)." >&2
        echo "Submit this script again: it goes on from the checkpoint in $RUN." >&2
    fi
}

# Nothing below needs an edit.
set -uo pipefail
if ! [ -f train.py ] || ! [ -f tools/prepare_launch.py ]; then
    echo "train.py and tools/ are not in $PWD: submit this script from their folder." >&2
    exit 2
fi

load_environment() {
    set +u # module files and activation scripts read variables that nobody has set
    if ! type module >/dev/null 2>&1 && [ -r /etc/profile.d/modules.sh ]; then
        # shellcheck source=/dev/null
        source /etc/profile.d/modules.sh
    fi
    local name
    for name in "${MODULES[@]}"; do
        if ! type module >/dev/null 2>&1; then
            echo "There is no module command on $(uname -n), so $name is not loaded." >&2
        elif ! module load "$name"; then
            echo "module load $name failed. Look for its name with: module avail" >&2
            exit 2
        fi
    done
    if [ -n "$ACTIVATE" ]; then
        # shellcheck source=/dev/null
        source "$ACTIVATE" || exit 2
    fi
    set -u
    PYTHON="$(command -v python)" || { echo "There is no python on the PATH; see place (2)." >&2; exit 2; }
}

# An srun that is killed leaves its ranks running, on all nodes: SLURM ends them, after some time to save in. The step has the
# launch's id for a name; others of the job are somebody's at work.
end_step() {
    local signal deadline step
    for signal in TERM KILL; do
        deadline=$((SECONDS + 6))
        while [ "$SECONDS" -lt "$deadline" ]; do
            step="$(squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format="%i %j" |
                awk -v launch="$DS_RECIPES_LAUNCH" '$2 == launch { print $1 }')"
            [ -n "$step" ] || return 0
            if [ -n "$signal" ]; then
                echo "ranks go on without their launcher (step $step): SIG$signal" >&2
                scancel --signal="$signal" "$step"
                signal=""
            fi
            sleep 0.5
        done
    done
}

# --mpi=none: ranks meet at MASTER_ADDR, so that a broken PMIx plugin does no harm. srun does not take --cpus-per-task over from
# sbatch (since 22.05), and no variables at all if the job was submitted with --export=NONE.
launch() {
    trap : TERM # SLURM sends it to this shell too; srun hears it as well, and is waited for
    srun --nodes="$NUM_HOSTS" --ntasks="$NUM_RANKS" --ntasks-per-node="$RANKS_PER_HOST" --kill-on-bad-exit=1 --mpi=none \
        --job-name="$DS_RECIPES_LAUNCH" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --export=ALL \
        --output="$LOG_FOLDER/rank-%t.log" "$PYTHON" -u "${TRAIN[@]}"
    local status=$?
    end_step
    return "$status"
}

# Signals never go to a launcher, which would lose the newest steps (docs/stopping.md): the ranks are asked by a file. Ranks that
# start after it was written would take it for an old one, so it is written until they are gone.
LAUNCHER="" ASKING="" SIGNAL="" INTERRUPTED=0
# shellcheck disable=SC2329 # traps call it
heard() {
    echo "$(date '+%F %T') SIG$1: the ranks are asked to save and to stop, by $RUN/STOP" >&2
    mkdir -p "$RUN" && touch "$RUN/STOP"
    if [ -n "$LAUNCHER" ] && [ -z "$SIGNAL" ]; then
        {
            trap '' USR1 USR2
            while env -u DS_RECIPES_LAUNCH sleep 5 && kill -0 "$LAUNCHER"; do touch "$RUN/STOP"; done
        } >/dev/null 2>&1 &
        ASKING=$!
    fi
    SIGNAL="${SIGNAL:-$1}" INTERRUPTED=1 # at a time limit TERM comes after USR1: the first one is the reason
}
trap 'heard USR1' USR1
trap 'heard USR2' USR2
trap 'heard TERM' TERM
trap 'heard INT' INT

# A signal ends bash's wait early: wait again, so that the status is the process's own.
wait_for() {
    local status
    while :; do
        INTERRUPTED=0
        wait "$1"
        status=$?
        [ "$INTERRUPTED" = 1 ] || return "$status"
    done
}

# The log of rank 0, which its launcher keeps in a file, is shown in this script's output too.
follow_rank_0() {
    local log=""
    while [ -z "$log" ] && kill -0 "$1" 2>/dev/null; do
        sleep 0.5
        log="$(find "$LOG_FOLDER" -name "$RANK_0_LOG" -print -quit)"
    done
    [ -z "$log" ] || exec tail --pid="$1" --sleep-interval=0.5 -n +1 -f "$log"
}

# One launch: VERDICT is the status that it deserves, AGAIN says whether it is to be queued again.
# Grid Engine signals every process of a job, whatever its group: what would die of that is told not to hear it.
run_once() {
    local assignments follower="" status
    assignments="$(trap '' USR1 USR2; "$PYTHON" tools/prepare_launch.py \
        --run_folder "$RUN" --config "$CONFIG" --launcher srun --ranks_per_host "$RANKS_PER_HOST" \
        --walltime "$WALLTIME" --lead_seconds "$LEAD_SECONDS" --elapsed_seconds "$SECONDS" \
        --export "${EXPORT[@]}" -- "${ARGUMENTS[@]}")" || exit $?
    # Sets NUM_HOSTS NUM_RANKS HOSTS HOSTFILE LOG_FOLDER RANK_0_LOG ENVIRONMENT EXPORTED TRAIN, and variables for the ranks.
    eval "$assignments"
    if [ -n "$SIGNAL" ]; then
        echo "SIG$SIGNAL came before the start, so nothing was started." >&2
        exit 75
    fi
    { trap '' USR1 USR2; launch; } &
    LAUNCHER=$!
    if [ -n "$RANK_0_LOG" ]; then
        { trap '' USR1 USR2; follow_rank_0 "$LAUNCHER"; } &
        follower=$!
    fi
    wait_for "$LAUNCHER"
    status=$?
    [ -z "$follower" ] || wait_for "$follower"
    VERDICT=0
    # Without the mark by which it finds what is left of the launch.
    AGAIN="$(trap '' USR1 USR2; env -u DS_RECIPES_LAUNCH "$PYTHON" tools/judge_launch.py \
        --run_folder "$RUN" --launch "$DS_RECIPES_LAUNCH" --launcher_status "$status" --signal "$SIGNAL")" || VERDICT=$?
    if [ -n "$ASKING" ]; then
        kill "$ASKING" 2>/dev/null
        rm -f "$RUN/STOP"
    fi
    LAUNCHER="" ASKING=""
}

load_environment
run_once
if [ "$AGAIN" = again ] && [ "${RESUBMIT:-1}" = 1 ]; then
    resubmit
fi
exit "$VERDICT"
