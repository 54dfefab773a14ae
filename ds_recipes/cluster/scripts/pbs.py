"""The script for PBS Professional as ABCI 3.0 runs it.

Sources: https://docs.abci.ai/v3/en/job-execution/ (queues, limits, -P, USE_SSH), qsub(1B) of PBS Professional.
"""

from ds_recipes.cluster.job import MPIRUN, Job, walltime_text
from ds_recipes.cluster.scripts import parts

CORES_PER_NODE = 192
"""Cores of a full node of ABCI 3.0 (rt_HF), which has no other number of them."""


def script(job: Job, command: str) -> str:
    """The whole script."""
    assert job.walltime_seconds is not None
    ranks = job.gpus_per_node
    chunk = f"ncpus={CORES_PER_NODE}:ngpus={ranks}:mpiprocs={ranks}:ompthreads={max(CORES_PER_NODE // ranks, 1)}"
    directives = f"""
# (1) Resources: queue (the resource type), group, nodes, time. PBS sets OMP_NUM_THREADS to ompthreads, the cores of one rank.
#PBS -N {job.name}
#PBS -q {job.queue}
#PBS -P {job.group}
#PBS -l select={job.nodes}:{chunk}
#PBS -l walltime={walltime_text(job.walltime_seconds)}
#PBS -j oe
#PBS -k oed
#PBS -m n
#PBS -v RTYPE=rt_HF,USE_SSH=1
"""
    return "".join(
        [
            parts.head(
                f"{job.nodes} nodes of ABCI 3.0 (PBS), ranks started by {job.launcher}. Submit with",
                "qsub launch/abci_pbs.sh",
                command,
            ),
            directives,
            parts.limits(job),
            parts.environment(job),
            parts.run(job),
            IN_THE_JOB,
            NODES_ONCE if job.launcher == MPIRUN else "",
            parts.machinery(job),
            parts.ENDING,
        ]
    )


IN_THE_JOB = r"""
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
"""


NODES_ONCE = r"""
# mpirun takes a node's slots from this file rather than from a hostfile, and a job without mpiprocs has one a node in it. The
# name is the one that an Open MPI built for PBS looks for.
NODES="$TMPDIR/$PBS_JOBID"
if awk -v r="$RANKS_PER_HOST" '{ n[$1]++ } END { for (host in n) if (n[host] < r) few = 1; exit !few }' "$PBS_NODEFILE"; then
    awk -v r="$RANKS_PER_HOST" '!n[$1]++ { for (i = 0; i < r; i++) print $1 }' "$PBS_NODEFILE" >"$NODES" || exit 2
    export PBS_NODEFILE="$NODES"
fi
"""
