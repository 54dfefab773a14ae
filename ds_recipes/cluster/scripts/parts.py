"""What all job scripts have in common, as shell: the head, the places to edit, and how one launch is made and judged.

A script of a scheduler is `head`, its directives, `limits`, `environment`, `run`, `machinery` and `ending` in this order.
Between them it may put shell of its own. `ending` calls the function `resubmit` that the script has defined.
"""

import shlex
from collections.abc import Sequence

from ds_recipes.cluster.job import CLUSTERS, SRUN, Job, walltime_text
from ds_recipes.cluster.scripts.launchers import launch_function


def head(what: str, submit: str, command: str) -> str:
    """The first lines: what the script is, how it is submitted, how it was made."""
    return f"""\
#!/usr/bin/env bash
# {what}
#     {submit}
# from the folder of train.py, after editing the places marked (1), (2) and (3).
# Made by: {command}
"""


def limits(job: Job) -> str:
    """The part of place (1) that the script itself reads; under a scheduler it stands below the directives."""
    said = "as in the directive above" if CLUSTERS[job.cluster].has_scheduler else "the time that there is"
    lines = [f"RANKS_PER_HOST={job.gpus_per_node} # one for each GPU"]
    if job.walltime_seconds is not None:
        lines += [
            f"WALLTIME={walltime_text(job.walltime_seconds)} # {said}",
            f"LEAD_SECONDS={job.lead_seconds} # train.py has saved and is gone this long before it",
        ]
    return "\n".join(lines) + "\n"


def environment(job: Job) -> str:
    """Place (2): modules, the Python environment, and variables for the ranks."""
    return f"""
# (2) Environment: modules, Python, and the names of further variables that ranks on other hosts get. The usual ones go by
# themselves if they are set here: PATH, LD_LIBRARY_PATH, NCCL_*, GLOO_*, HF_*, WANDB_* ... (ds_recipes/cluster/exports.py)
MODULES=({quoted(job.modules)})
ACTIVATE={shlex.quote(job.activate)}
EXPORT=({quoted(job.exports)})
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-1}}"
"""


def run(job: Job) -> str:
    """Place (3): the run file, the run folder and further flags of train.py."""
    return f"""
# (3) Run file, run folder (shared by all hosts), and further flags of train.py.
CONFIG={shlex.quote(job.config)}
RUN={shlex.quote(job.run_folder)}
ARGUMENTS=({quoted(job.arguments)})
"""


def machinery(job: Job, host_options: Sequence[str] = (), launch: str | None = None) -> str:
    """The functions that make a launch and judge it. `host_options` are flags of prepare_launch.py, as shell words.

    `launch` is a shell function in place of the launcher's usual one.
    """
    options = [
        f'--run_folder "$RUN" --config "$CONFIG" --launcher {job.launcher} --ranks_per_host "$RANKS_PER_HOST"',
        '--walltime "$WALLTIME" --lead_seconds "$LEAD_SECONDS" --elapsed_seconds "$SECONDS"',
        *host_options,
        '--export "${EXPORT[@]}" -- "${ARGUMENTS[@]}"',
    ]
    if job.walltime_seconds is None:
        del options[1]
    hosts = ' --hosts "${HOSTS[@]}"' if job.launcher != SRUN else ""  # SLURM's script ends what srun leaves behind
    once = RUN_ONCE.replace("@OPTIONS@", " \\\n        ".join(options)).replace("@HOSTS@", hosts)
    return "\n".join(
        [START.rstrip("\n"), (launch or launch_function(job.launcher)).rstrip("\n"), LISTENING.rstrip("\n"), once]
    )


START = r"""
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
"""

LISTENING = r"""
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
"""

RUN_ONCE = r"""
# One launch: VERDICT is the status that it deserves, AGAIN says whether it is to be queued again.
# Grid Engine signals every process of a job, whatever its group: what would die of that is told not to hear it.
run_once() {
    local assignments follower="" status
    assignments="$(trap '' USR1 USR2; "$PYTHON" tools/prepare_launch.py \
        @OPTIONS@)" || exit $?
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
        --run_folder "$RUN" --launch "$DS_RECIPES_LAUNCH" --launcher_status "$status" --signal "$SIGNAL"@HOSTS@)" || VERDICT=$?
    if [ -n "$ASKING" ]; then
        kill "$ASKING" 2>/dev/null
        rm -f "$RUN/STOP"
    fi
    LAUNCHER="" ASKING=""
}
"""

ENDING = r"""
load_environment
run_once
if [ "$AGAIN" = again ] && [ "${RESUBMIT:-1}" = 1 ]; then
    resubmit
fi
exit "$VERDICT"
"""
"""The end of a scheduler's script. RESUBMIT=0 in the job's environment leaves queuing again to the user."""

LOOP = r"""
load_environment
while run_once && [ "$AGAIN" = again ] && [ "${RESUBMIT:-0}" = 1 ]; do
    echo "Stopped early and has advanced: started again (RESUBMIT=1)." >&2
    SIGNAL=""
done
exit "$VERDICT"
"""
"""The end of a script without a scheduler, which starts the next launch itself where it is asked to by RESUBMIT=1."""


def quoted(words: Sequence[str]) -> str:
    """Words of a shell array, none of them read by the shell as anything else."""
    return shlex.join(words)
