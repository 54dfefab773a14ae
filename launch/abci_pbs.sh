#!/usr/bin/env bash
# 2 nodes of ABCI 3.0 (PBS), ranks started by mpirun. Submit with
#     qsub launch/abci_pbs.sh
# from the folder of train.py, after editing the places marked (1), (2) and (3).
# Made by: python tools/render_job.py --cluster abci-pbs

# (1) Resources: queue (the resource type), group, nodes, time. PBS sets OMP_NUM_THREADS to ompthreads, the cores of one rank.
#PBS -N ds_recipes
#PBS -q rt_HF
#PBS -P GROUP
#PBS -l select=2:ncpus=192:ngpus=8:mpiprocs=8:ompthreads=24
#PBS -l walltime=12:00:00
#PBS -j oe
#PBS -k oed
#PBS -m n
#PBS -v RTYPE=rt_HF,USE_SSH=1
RANKS_PER_HOST=8 # one for each GPU
WALLTIME=12:00:00 # as in the directive above
LEAD_SECONDS=300 # train.py has saved and is gone this long before it

# (2) Environment: modules, Python, and the names of further variables that ranks on other hosts get. The usual ones go by
# themselves if they are set here: PATH, LD_LIBRARY_PATH, NCCL_*, GLOO_*, HF_*, WANDB_* ... (ds_recipes/cluster/exports.py)
MODULES=(python/3.12/3.12.9 cuda/12.6/12.6.1 cudnn/9.5/9.5.1 nccl/2.23/2.23.4-1 hpcx/2.20)
ACTIVATE=.venv/bin/activate
EXPORT=()
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# (3) Run file, run folder (shared by all hosts), and further flags of train.py.
CONFIG=run.yaml
RUN=runs/my_run
ARGUMENTS=()

# PBS starts a job in the home folder. What the job was really given, options of the qsub line included, qstat knows.
cd "$PBS_O_WORKDIR" || exit 2
given() {
    qstat -f "$PBS_JOBID" 2>/dev/null | awk -v name="$1" '
        /^\t/ { if (found) value = value substr($0, 2); next } # qstat folds long lines
        found { exit }
        $1 == name && $2 == "=" { found = 1; sub(/^[^=]*= /, ""); value = $0 }
        END { print value }'
}
WALLTIME_GIVEN="$(given Resource_List.walltime)"
WALLTIME="${WALLTIME_GIVEN:-$WALLTIME}"

# $0 is PBS's copy of the script as it was submitted: edits made since then are for jobs submitted since then.
resubmit() {
    local words=(-N "$PBS_JOBNAME" -q "$PBS_O_QUEUE") project select output job
    project="$(given project)" select="$(given Resource_List.select)" output="$(given Output_Path)"
    [ -z "$project" ] || words+=(-P "$project")
    [ -z "$select" ] || words+=(-l "select=$select" -l "walltime=$WALLTIME")
    output="${output#*:}" # HOST:FILE, by default a new file for each job
    [ "${output##*/}" = "${output:+$PBS_JOBNAME.o${PBS_JOBID%%.*}}" ] || words+=(-o "$output")
    if job="$(qsub "${words[@]}" "$0")"; then
        echo "Queued again as $job." >&2
    else
        echo "qsub refused the script (see above). The run can go on: qsub it again from $PWD." >&2
    fi
}

# mpirun takes a node's slots from this file rather than from a hostfile, and a job without mpiprocs has one a node in it. The
# name is the one that an Open MPI built for PBS looks for.
NODES="$TMPDIR/$PBS_JOBID"
if awk -v r="$RANKS_PER_HOST" '{ n[$1]++ } END { for (host in n) if (n[host] < r) few = 1; exit !few }' "$PBS_NODEFILE"; then
    awk -v r="$RANKS_PER_HOST" '!n[$1]++ { for (i = 0; i < r; i++) print $1 }' "$PBS_NODEFILE" >"$NODES" || exit 2
    export PBS_NODEFILE="$NODES"
fi

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

# Open MPI 4 and 5 name and place the files of --output-filename differently, and 5 shows nothing else: each rank redirects itself.
launch() {
    local name exports=()
    for name in "${EXPORTED[@]}"; do
        exports+=(-x "$name")
    done
    # shellcheck disable=SC2016 # expanded by the rank's shell
    exec mpirun -np "$NUM_RANKS" --hostfile "$HOSTFILE" --map-by slot --bind-to none "${exports[@]}" \
        bash -c 'exec "${@:2}" >"$1/rank-$OMPI_COMM_WORLD_RANK.log" 2>&1' rank "$LOG_FOLDER" "$PYTHON" "${TRAIN[@]}"
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
        --run_folder "$RUN" --config "$CONFIG" --launcher mpirun --ranks_per_host "$RANKS_PER_HOST" \
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
        --run_folder "$RUN" --launch "$DS_RECIPES_LAUNCH" --launcher_status "$status" --signal "$SIGNAL" --hosts "${HOSTS[@]}")" || VERDICT=$?
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
